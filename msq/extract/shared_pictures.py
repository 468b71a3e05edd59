"""Pictures of a video that several cuts share, each held once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from msq.extract.cut_jobs import Job, Look
from msq.extract.packets import Damage
from msq.extract.pixels import Pictures
from msq.extract.timeline import Seconds
from msq.extract.video import DecodedClip, stacked_clips


class SharedPictures:
    """The pictures that some jobs wait for, each held once and for as long as one of them waits.

    Args:
        jobs: all that will ask.
        looks: of the requests.
        whole: keep pictures as they are, for jobs whose pictures differ in size.
    """

    def __init__(self, jobs: Sequence[Job], looks: Sequence[Look], *, whole: bool = False) -> None:
        self._looks, self._whole = looks, whole
        self._waiting: list[Counter[int]] = [Counter() for _ in looks]  # per request and frame
        for job in jobs:
            self._waiting[job.request].update(job.frames)
        self._held: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}

    def wants(self, index: int) -> bool:
        """Whether any job waits for a frame that is not there."""
        return any(
            index in waiting and (r, index) not in self._held
            for r, waiting in enumerate(self._waiting)
        )

    def add(self, index: int, picture: Pictures) -> None:
        """A frame, uint8 RGB [H, W, 3]."""
        for r, waiting in enumerate(self._waiting):
            if index in waiting:
                self._held[r, index] = picture if self._whole else self._looks[r].of(picture)
                self._sizes[r, index] = (picture.shape[0], picture.shape[1])

    def clip(self, job: Job, times: Seconds, damage: Damage) -> DecodedClip | None:
        """The clip of a job whose frames are all there.

        None where its pictures differ in size: they are brought to one before anything else is made
        of them, so they must be held whole.
        """
        pictures = {i: self._held[job.request, i] for i in job.frames}
        if self._whole:
            return whole_clip(job, pictures, times, damage, self._looks)
        sizes = {self._sizes[job.request, i] for i in pictures}
        if len(sizes) > 1:
            return None
        frames = np.stack([pictures[i] for i in job.choice.tolist()])
        degraded = replace(damage, sizes=sizes).describe()
        return DecodedClip(frames, times[job.choice].astype(np.float32), degraded)

    def forget(self, job: Job) -> None:
        """A job waits no more."""
        waiting = self._waiting[job.request]
        for i in job.frames:
            waiting[i] -= 1
            if not waiting[i]:
                del waiting[i]
                self._held.pop((job.request, i), None)
                self._sizes.pop((job.request, i), None)


def whole_clip(
    job: Job,
    pictures: Mapping[int, Pictures],
    times: Seconds,
    damage: Damage,
    looks: Sequence[Look],
) -> DecodedClip:
    """The clip of a job from whole pictures by their index into the times."""
    (clip,) = stacked_clips([job.choice], pictures, times, damage)
    look = looks[job.request]
    return replace(clip, frames=np.stack([look.of(picture) for picture in clip.frames]))
