"""Cuts of a video decoded, resized and gathered in batches for encoders."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msq.errors import VideoError
from msq.extract.cuts import Look, decode_cuts
from msq.extract.decode_task import Picture
from msq.extract.packets import UndecodableVideo
from msq.extract.timeline import Cut
from msq.extract.video_survey import Survey


@dataclass
class PreparedCut:
    """The resized frames of one cut, uint8 [T, 3, h, w] for each picture, and their times [T].

    `damage` is what was wrong with those of each picture, in the order of the encoders.
    """

    place: int
    frames: dict[Picture, NDArray[np.uint8]]
    times: dict[Picture, NDArray[np.float32]]
    damage: dict[Picture, str | None]

    @property
    def degraded(self) -> str | None:
        """What was wrong with the first picture that was not clean; None where all were."""
        return next((words for words in self.damage.values() if words), None)


def prepared_cuts(
    video: Survey,
    cuts: Sequence[Cut],
    pictures: Sequence[Picture],
    batch: int,
    watch: Callable[[], None],
) -> Generator[list[PreparedCut] | tuple[int, VideoError], None, None]:
    """Cuts as encoders want them, without the encoders.

    Args:
        video: its survey.
        cuts: in any order.
        pictures: what each encoder wants, all of the clean view.
        batch: cuts that are handed out together.
        watch: called over and over while this works; may raise to end it.

    Yields:
        Lists of cuts that are decoded and resized; one by one those that cannot be, by their place,
        with the reason.

    Raises:
        VideoError: the file cannot be read any more.
    """
    wanted = list(dict.fromkeys(pictures))
    looks = [_look(picture) for picture in wanted]
    unfinished: dict[int, PreparedCut] = {}
    left = dict.fromkeys(range(len(cuts)))
    ready: list[PreparedCut] = []
    try:
        for place, request, clip in decode_cuts(video, cuts, looks, watch):
            if isinstance(clip, UndecodableVideo):
                unfinished.pop(place, None)
                if place in left:
                    del left[place]
                    yield place, clip
                continue
            if place not in left:
                continue
            cut = unfinished.setdefault(place, PreparedCut(place, {}, {}, dict.fromkeys(wanted)))
            picture = wanted[request]
            cut.frames[picture], cut.times[picture] = clip.frames, clip.times
            cut.damage[picture] = clip.degraded
            if len(cut.frames) == len(wanted):
                del left[place]
                ready.append(unfinished.pop(place))
            if len(ready) == batch:
                yield ready
                ready = []
    except VideoError:
        if ready:
            yield ready
        raise
    except Exception as error:
        if left:
            error.add_note(f"{video.path}: {cuts[next(iter(left))]} was not done yet")
        raise
    if ready:
        yield ready


def _look(picture: Picture) -> Look:
    """A picture as what is kept of each frame: uint8 [H, W, 3] to [3, size, size]."""

    def resized(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = picture.pixels(frame[None], "")[0]
        return pixels

    return Look(picture.choice(""), resized, picture.bytes // picture.frames)
