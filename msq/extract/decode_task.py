"""One clip to decode for all encoders of a run, and what comes of it.

It is opened and decoded once, whatever frames each encoder wants of it (damaged files excepted,
see `decode_samples`), and resized to each distinct size.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from msq.errors import VideoError
from msq.extract.augment import augment, draw, draw_official, draw_places
from msq.extract.sampling import FrameChoice
from msq.extract.transforms import resize_crop
from msq.extract.video import decode_samples
from msq.extract.views import CLEAN, View

if TYPE_CHECKING:  # the encoders' libraries take seconds to import, and workers need none of them
    from msq.extract.encoders.spec import EncoderSpec


@dataclass(frozen=True)
class Picture:
    """What one encoder wants of a clip: T frames, chosen by `sampling`, square of `size`.

    `short_side` is that of the frames before the crop, 0 for `size`; `view` is which look at the
    clip it is. What an augmented view shows depends on the clip's id, too.
    """

    frames: int
    sampling: str
    size: int
    resize: str
    short_side: int = 0
    view: View = CLEAN

    @classmethod
    def of(cls, spec: EncoderSpec, view: View = CLEAN) -> Picture:
        """The wish of one encoder for one view."""
        return cls(spec.frames, spec.sampling, spec.size, spec.resize, spec.short_side, view)

    def choice(self, clip: str) -> FrameChoice:
        """Which frames it takes of the clip with this id."""
        view = self.view
        places = draw_places(view.seed, clip, self.frames) if view.kind == "augmented" else ()
        return FrameChoice(self.frames, self.sampling, view.clip, view.clips, places)

    def pixels(self, frames: NDArray[np.uint8], clip: str) -> NDArray[np.uint8]:
        """Uint8 `[T, 3, size, size]` of the chosen frames `[T, H, W, 3]`."""
        seed = self.view.seed
        if self.view.kind == "augmented":
            return augment(frames, draw(seed, clip), self.size, self.resize).numpy()
        if self.view.kind == "official":
            drawn = draw_official(seed, clip, self.frames)
            return augment(frames, drawn, self.size, self.resize).numpy()
        return resize_crop(
            frames,
            self.size,
            self.resize,
            short_side=self.short_side,
            crop=self.view.crop,
            crops=self.view.crops,
        ).numpy()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the uint8 frames, `[T, 3, size, size]`."""
        return self.frames, 3, self.size, self.size

    @property
    def bytes(self) -> int:
        """Bytes of the uint8 frames `[T, 3, size, size]`."""
        return self.frames * 3 * self.size**2


@dataclass(frozen=True)
class DecodeTask:
    """One clip to decode: its row and what is wanted of it; `fps` is that of a frame folder.

    `id` is the clip's, which augmented views are drawn from; `keep` are open intervals in seconds:
    where there are any, only their frames may be shown.
    """

    row: int
    path: Path
    start: float | None
    end: float | None
    pictures: tuple[Picture, ...]
    fps: float | None = None
    id: str = ""
    keep: tuple[tuple[float, float], ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes of all pictures."""
        return sum(picture.bytes for picture in self.pictures)


@dataclass
class Decoded:
    """What came of a task.

    Attributes:
        row: the task's row.
        frames: per picture uint8 `[T, 3, size, size]`; empty where decoding failed.
        times: per picture float32 `[T]`, seconds.
        degraded: per picture what was wrong with a video that still gave frames, None for a clean
            one. It is the same whatever other pictures the task asks for, so that a store does
            not depend on which encoders ran together.
        reason: why there are no frames; None where there are.
        message: the decoder's own words.
        decoded: frames that were sampled; encoders that agree share them.
        seconds: time spent decoding and resizing.
        cpu: seconds of processor time of it, in a decode worker.
        shared: the frames lie in memory that is shared with the worker, see `release`.
        free: gives that memory back.
        counted: its time is part of the figures of the run already.
    """

    row: int
    frames: list[NDArray[np.uint8]] = field(default_factory=list)
    times: list[NDArray[np.float32]] = field(default_factory=list)
    degraded: list[str | None] = field(default_factory=list)
    reason: str | None = None
    message: str = ""
    decoded: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    shared: bool = False
    free: Callable[[], None] | None = field(default=None, repr=False, compare=False)
    counted: bool = False

    def release(self) -> None:
        """The frames are not needed any more: their memory goes to another clip.

        Whoever keeps them does not call this; later clips then find other ways.
        """
        if self.free is not None:
            self.frames, free, self.free = [], self.free, None
            free()


def decode(task: DecodeTask) -> Decoded:
    """Decode and resize one clip; a video that cannot be decoded is a result, not an error."""
    started = time.perf_counter()
    result = Decoded(task.row)
    choices = [picture.choice(task.id) for picture in task.pictures]
    wanted = tuple(dict.fromkeys(choices))
    try:
        samples = decode_samples(
            task.path, wanted, start=task.start, end=task.end, fps=task.fps, keep=task.keep
        )
        clips = dict(zip(wanted, samples, strict=True))
        for picture, choice in zip(task.pictures, choices, strict=True):
            clip = clips[choice]
            result.frames.append(picture.pixels(clip.frames, task.id))
            result.times.append(clip.times)
            degraded = clip.degraded
            result.degraded.append(degraded and without_paths(degraded, task.path))
        result.decoded = sum(choice.frames for choice in wanted)
    except (VideoError, OSError, MemoryError) as error:
        result.frames, result.times, result.degraded = [], [], []
        result.reason = without_paths(str(getattr(error, "reason", "") or error), task.path)
        result.message = without_paths(_own_words(error), task.path)
    result.seconds = time.perf_counter() - started
    return result


def without_paths(text: str, path: Path) -> str:
    """`text` without where the clip lies on this machine, which is no part of a store."""
    text = text.removeprefix(f"{path}: ")
    places = sorted({str(path), str(path.absolute()), os.path.realpath(path)}, key=len)
    for place in reversed(places):
        folder = os.path.dirname(place)
        for spelled in (place, repr(place)[1:-1]):
            text = text.replace(spelled, path.name)
        if len(folder) > 1:
            text = text.replace(folder + os.sep, "")
    return text


def _own_words(error: BaseException) -> str:
    words = getattr(error, "message", None)
    if isinstance(words, str):
        return words
    return str(error.__cause__) if error.__cause__ is not None else ""
