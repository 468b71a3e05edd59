"""What a step of end-to-end training is fed: frames of its clips, decoded ahead of it.

Decode workers are those of stage one. Parts come in the order asked for, whatever becomes of a
clip on the way, and depend on the seed and their numbers alone: not on workers, look-ahead, cache,
or where a resumed run begins.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msq.errors import UsageError, VideoError
from msq.extract.clip_order import Augment, ClipOrder, Place
from msq.extract.datasets.dataset import Clip
from msq.extract.decode_pool import LOOK_AHEAD_CLIPS, cores, decode, decode_in_order
from msq.extract.decode_task import Decoded, DecodeTask, Picture
from msq.extract.frame_cache import FrameCache

__all__ = ["Augment", "ClipFeed", "FrameCache", "Shown"]

INPUT_BOUND = 0.1  # share of the time that goes by waiting, from which the input is the bottleneck
_NAMED = 3  # files in an error


class Shown(NamedTuple):
    """One part of a step, valid until the next but one is asked for.

    Attributes:
        rows: of the clips that are shown, as many as were asked for.
        frames: per picture uint8 [B, T, 3, h, w], contiguous; `device_batches.Sender` takes
            `list(frames)` to a device.
        failed: places of clips that cannot be decoded, whose frames are zeros; empty where there
            are spare ones to show instead.
    """

    rows: list[int]
    frames: list[NDArray[np.uint8]]
    failed: list[int]


class ClipFeed:
    """Parts of steps, decoded ahead by worker processes.

    Memory: the look-ahead, two parts, and the cache.

    Args:
        clips: rows -> clips.
        pictures: what is shown of each, one for each encoder; clean or test views.
        workers: decode processes; 0 decodes in this one, when asked.
        prefetch_bytes: of decoded frames that may wait for the caller, see `decode_in_order`.
        augment: `none` shows the pictures as they are. `consistent` shows what augmented views of
            stage one do: drawn once for a clip, with a jitter in time. `official` the authors'
            transforms: see `draw_official`. The same crop in all pictures, drawn from (seed,
            number, clip id) alone; `seed_of_draw` says how.
        seed: of the run.
        cache: of these pictures; may be shared with other feeds. Left alone under augmentation.
        spare: rows that may be shown in the place of clips that cannot be decoded.

    Attributes:
        failures: clip id -> why it cannot be decoded; such a clip is not tried again. A resumed run
            may put back what it knew: it saves time, and alters nothing.
        degraded: clip id -> what is wrong with a video that still gives frames.
        replaced: places at which another clip was shown than was asked for.
        waited: seconds that the caller waited for parts.
        busy: seconds that workers spent on clips, all together.

    Raises:
        UsageError: pictures that are augmented already, or a cache of other ones.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        pictures: Sequence[Picture],
        *,
        workers: int,
        prefetch_bytes: int,
        augment: Augment = "none",
        seed: int = 0,
        cache: FrameCache | None = None,
        spare: Sequence[int] = (),
    ) -> None:
        if augment != "none" and any(picture.view.kind != "clean" for picture in pictures):
            raise UsageError(f"clips.augment={augment}: only clean views can be augmented")
        if augment == "none" and cache is not None and cache.pictures != tuple(pictures):
            raise UsageError("cache of decoded clips: it is one of other pictures")
        self._clips, self._pictures = clips, tuple(pictures)
        self._workers, self._prefetch = workers, prefetch_bytes
        self._augment, self._seed = augment, seed
        self._cache = cache if augment == "none" else None
        self._spare = spare
        self._stream: Generator[Decoded, None, None] | None = None
        self._current: ClipOrder | None = None
        self.failures: dict[str, str] = {}
        self.degraded: dict[str, str] = {}
        self.replaced = 0
        self.waited = self.busy = 0.0
        self._shown = self._decoded = self._hits = 0
        # Seconds of waiting, those of the caller, clips: without the first part of each order.
        self._steady = [0.0, 0.0, 0.0]

    def __enter__(self) -> ClipFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def parts(self, order: Iterable[tuple[int, Sequence[int]]]) -> Generator[Shown, None, None]:
        """The parts of an order, decoded ahead; asking for another order ends this one.

        Args:
            order: (number, rows) of each part; may be without end, and is asked ahead. What is
                drawn depends on the number: parts that are to be drawn apart have different ones.

        Raises:
            VideoError: neither a clip nor any drawn in its place can be decoded.
            MsqError: worker processes cannot be started at all.
            ValueError: the feed was closed meanwhile, or asked for another order.
        """
        self.close()
        current = self._current = ClipOrder(
            self._clips,
            self._pictures,
            order,
            augment=self._augment,
            seed=self._seed,
            spare=self._spare,
            failures=self.failures,
            cache=self._cache,
            ahead=max(LOOK_AHEAD_CLIPS, 4 * self._workers),
        )
        buffers: list[list[NDArray[np.uint8]]] = [[], []]
        try:
            given: float | None = None
            asked = time.perf_counter()
            while (part := current.part()) is not None:
                buffers.reverse()
                shown = self._filled(part, current, buffers[0])
                ready = time.perf_counter()
                self._count(part, ready - asked, None if given is None else asked - given)
                given = time.perf_counter()
                yield shown
                asked = time.perf_counter()
                if self._current is not current:
                    raise ValueError("the feed of clips was closed, or asked for another order")
        finally:
            if self._current is current:
                self.close()

    def close(self) -> None:
        """End the worker processes and give back shared memory; what was counted stays."""
        self._current = None
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def summary(self) -> dict[str, Any]:
        """How the input kept up, so far.

        Returns:
            `clips` shown and `decoded`; `clips_per_second` shown, and `decode_clips_per_second`
            that the workers can decode; `waited_seconds` and `waited_share` of the time, beginnings
            of orders excepted, `decode_seconds`; `replaced`, `failed` and `degraded` clips;
            `cache_hits`, `cache` (a line on where clips are kept); `bottleneck`, `input` or
            `encoder`; `line` for people, with what to do.
        """
        waited, own, clips = self._steady
        share = waited / (waited + own) if waited + own else 0.0
        bottleneck = "input" if share >= INPUT_BOUND else "encoder"
        rate = clips / (waited + own) if waited + own else 0.0
        hands = max(self._workers, 1)
        line = (
            f"bottleneck: {bottleneck}; {share:.0%} of the time went by waiting for clips "
            f"({rate:.1f} clips/s, {self._decoded} of {self._shown} decoded by "
            f"{self._workers or 'no'} processes)"
        )
        return {
            "clips": self._shown,
            "decoded": self._decoded,
            "clips_per_second": rate,
            "decode_clips_per_second": self._decoded * hands / self.busy if self.busy else None,
            "waited_seconds": self.waited,
            "waited_share": share,
            "decode_seconds": self.busy,
            "replaced": self.replaced,
            "failed": len(self.failures),
            "degraded": len(self.degraded),
            "cache_hits": self._hits,
            "cache": self._cache_line(),
            "bottleneck": bottleneck,
            "line": line + (f"; {self._remedy()}" if bottleneck == "input" else ""),
        }

    def _cache_line(self) -> str:
        if self._augment != "none":
            return "training clips are not kept: augmented ones are other ones each time"
        return "decoded clips are not kept" if self._cache is None else self._cache.line

    def _remedy(self) -> str:
        ways = []
        if self._workers < cores():
            ways.append(f"more decode processes (--workers, up to {cores()} here)")
        if self._augment != "none":
            ways.append("clips.augment=none, which costs less and can keep decoded clips")
        elif self._cache is None or self._cache.where == "off":
            ways.append("clips.cache=memory or disk")
        return "what helps: " + ", ".join([*ways, "videos of a short side of 256 pixels"])

    def _count(self, part: Sequence[Place], waited: float, own: float | None) -> None:
        self.waited += waited
        self._shown += len(part)
        if own is not None:
            self._steady[0] += waited
            self._steady[1] += own
            self._steady[2] += len(part)

    def _filled(
        self, part: Sequence[Place], current: ClipOrder, buffers: list[NDArray[np.uint8]]
    ) -> Shown:
        """The frames of one part, in buffers that are made larger where they must be."""
        if not buffers or len(buffers[0]) < len(part):
            shapes = [(len(part), *picture.shape) for picture in self._pictures]
            buffers[:] = [np.empty(shape, np.uint8) for shape in shapes]
        frames = [buffer[: len(part)] for buffer in buffers]
        for index, place in enumerate(part):
            self._show(place, current, [array[index] for array in frames])
            self.replaced += place.row != place.asked
        failed = [index for index, place in enumerate(part) if place.failed]
        return Shown([place.row for place in part], frames, failed)

    def _show(self, place: Place, current: ClipOrder, into: list[NDArray[np.uint8]]) -> None:
        """The frames of one place, from wherever they come."""
        result = self._next(current) if place.awaited else None
        if result is not None:
            assert result.row == place.ticket
            current.arrived(place)
        if place.failed:
            if len(self._spare):
                raise self._hopeless(place)
            for array in into:
                array.fill(0)
            return
        clip = self._clips[place.row].id
        if place.cached:
            if self._cache is not None and self._cache.read(clip, into):
                self._hits += 1
                return
            result = decode(current.task(place))  # the disk of the cache has failed
            if result.reason is not None:
                raise VideoError(f"{self._clips[place.row].path}: {result.reason}")
        assert result is not None
        for array, found in zip(into, result.frames, strict=True):
            np.copyto(array, found)
        result.release()
        self._decoded += 1
        self.busy += result.seconds
        for words in filter(None, result.degraded):
            self.degraded.setdefault(clip, words)
        if self._cache is not None:
            self._cache.write(clip, into)

    def _next(self, current: ClipOrder) -> Decoded:
        """The next result; decoding may have ended meanwhile, since all was cached."""

        def instead(result: Decoded) -> DecodeTask | None:
            self.busy += result.seconds
            return current.instead(result)

        while True:
            if self._stream is None:
                self._stream = decode_in_order(current, self._workers, self._prefetch, instead)
            result = next(self._stream, None)
            if result is not None:
                return result
            self._stream = None

    def _hopeless(self, place: Place) -> VideoError:
        clips = [self._clips[row] for row in dict.fromkeys(place.tried)]
        named = "; ".join(f"{clip.path}: {self.failures[clip.id]}" for clip in clips[:_NAMED])
        more = f"; and {len(clips) - _NAMED} more" if len(clips) > _NAMED else ""
        return VideoError(
            f"none of {len(clips)} clips drawn for one place can be decoded; expected videos or "
            f"folders of frames, found {named}{more}; check that the videos are where the dataset "
            "says"
        )
