"""Which frames the samplings of the cuts of a video take, and the pictures that they share."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from msq.extract.packets import UndecodableVideo
from msq.extract.pixels import Pictures
from msq.extract.sampling import FrameChoice
from msq.extract.timeline import Cut, Moments
from msq.extract.video import DecodedClip
from msq.extract.video_survey import Survey

HELD_PICTURES = 256 * 2**20  # bytes of pictures that wait for the rest of their cuts


@dataclass(frozen=True)
class Look:
    """What is wanted of every cut: which frames, and what is kept of each.

    Attributes:
        choice: which frames.
        of: uint8 [H, W, 3] to what is kept of it, uint8 [...]; of each picture by itself.
        bytes: of what is kept of one picture.
    """

    choice: FrameChoice
    of: Callable[[Pictures], npt.NDArray[np.uint8]]
    bytes: int


class Taken(NamedTuple):
    """One sampling of one cut: its frames, or why there are none.

    What a `Look` keeps of each picture stands in the place of `frames`, uint8 [T, ...].
    """

    cut: int
    request: int
    clip: DecodedClip | UndecodableVideo


@dataclass(frozen=True, eq=False)
class Job:
    """The frames of one sampling of one cut, as ascending indices into the survey's times."""

    cut: int
    request: int
    choice: npt.NDArray[np.int64]

    @property
    def frames(self) -> list[int]:
        """Each index once, ascending."""
        return list(dict.fromkeys(self.choice.tolist()))


def jobs_of(
    video: Survey,
    cuts: Sequence[Cut],
    looks: Sequence[Look],
    only: set[tuple[int, int]] | None = None,
) -> Generator[Taken, None, list[Job]]:
    """The frames of every sampling of every cut; of a cut without any it is said at once."""
    jobs = []
    moments = Moments(video.times, video.path)
    for k, cut in enumerate(cuts):
        wanted = [r for r in range(len(looks)) if only is None or (k, r) in only]
        if not wanted:
            continue
        try:
            inside = moments.inside(cut)
        except UndecodableVideo as error:
            for r in wanted:
                yield Taken(k, r, error)
            continue
        jobs += [Job(k, r, inside[looks[r].choice.indices(len(inside))]) for r in wanted]
    return jobs


def passes(jobs: Sequence[Job], looks: Sequence[Look]) -> Iterator[list[Job]]:
    """Jobs that one pass over the video can take without holding too many pictures.

    One pass is enough unless very many cuts overlap: a cut that finds no room waits for the next
    pass, which takes every so many of them. A cut that is too large by itself is alone in its time.
    """
    by_cut = [list(group) for _, group in groupby(jobs, lambda job: job.cut)]
    left = sorted(by_cut, key=lambda group: min(int(job.choice[0]) for job in group))
    while left:
        taken, later, room = [], [], _Room(looks)
        for group in left:
            if room.admits(group):
                taken += group
            else:
                later.append(group)
        yield taken
        left = later


class _Room:
    """What the cuts of a pass hold while their first frames come by."""

    def __init__(self, looks: Sequence[Look]) -> None:
        self._looks, self._bytes = looks, 0
        self._wanted: Counter[tuple[int, int]] = Counter()
        self._open: list[tuple[int, int, list[tuple[int, int]]]] = []  # by their last frame

    def admits(self, group: Sequence[Job]) -> bool:
        """Make room for a cut that begins no earlier than those before it, if there is any."""
        first = min(int(job.choice[0]) for job in group)
        while self._open and self._open[0][0] < first:
            for pair in heapq.heappop(self._open)[2]:
                self._wanted[pair] -= 1
                if not self._wanted[pair]:
                    del self._wanted[pair]
                    self._bytes -= self._looks[pair[0]].bytes
        pairs = [(job.request, i) for job in group for i in job.frames]
        more = sum(self._looks[r].bytes for r, i in pairs if (r, i) not in self._wanted)
        if self._open and self._bytes + more > HELD_PICTURES:
            return False
        self._bytes += more
        self._wanted.update(pairs)
        last = max(int(job.choice[-1]) for job in group)
        heapq.heappush(self._open, (last, group[0].cut, pairs))
        return True
