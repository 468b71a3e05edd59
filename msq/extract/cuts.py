"""Many cuts of one video from one pass over it, each with the frames that it would have alone.

`decode_samples` opens a file for each clip and holds its packets. A long video that is cut into
hundreds of windows is read here packet by packet instead: what is held is the packets of the part
that is being decoded and the sampled frames of a few cuts, however long the video is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.stream import VideoStream

from msq.extract.frame_folder import read_frame
from msq.extract.packets import Damage, UndecodableVideo, VideoPacket, open_stream, read_packets
from msq.extract.pixels import Pictures, to_rgb
from msq.extract.plan import Run, decode_planned, plan_runs
from msq.extract.sampling import FrameChoice
from msq.extract.timeline import Cut
from msq.extract.video import HELD_BYTES, DecodedClip, Request, shown_frames, stacked_clips
from msq.extract.video_survey import Survey, decoded_survey, in_place_of_packets

_GROUP_BYTES = 256 * 2**20  # of the pictures of cuts that are decoded together
_GROUP_CUTS = 64


class Taken(NamedTuple):
    """One sampling of one cut: its frames, or why there are none."""

    cut: int
    request: int
    clip: DecodedClip | UndecodableVideo


@dataclass(frozen=True)
class _Job:
    """The frames of one sampling of one cut, as ascending indices into the survey's times."""

    cut: int
    request: int
    choice: npt.NDArray[np.int64]

    @property
    def frames(self) -> set[int]:
        return set(self.choice.tolist())


def decode_cuts(video: Survey, cuts: Sequence[Cut], requests: Sequence[Request]) -> Iterator[Taken]:
    """Every sampling of every cut, each equal to that of `decode_samples` for it alone.

    Damage included: what a plan meets in some cuts does not touch the others, and those cuts are
    then taken from a decoding of the whole file, last and all together. There the frames of all
    cuts that overlap are held at a time, and all decoded frames where they fit into 256 MiB.

    Args:
        video: see `survey`.
        cuts: in the order of their starts, or more packets are held than need be.
        requests: (frames wanted, sampling), or a `FrameChoice`, for every cut.

    Yields:
        Each pair of a cut and a request once, as soon as its last frame is there.

    Raises:
        VideoError: the file cannot be read any more.
        UsageError: an unknown sampling.
    """
    choices = [FrameChoice(*request) for request in requests]
    jobs = yield from _jobs(video, cuts, choices, None)
    if video.files:
        yield from _from_folder(video, jobs)
        return
    if video.order is not None:
        jobs = yield from _by_plan(video, video.order, _groups(jobs, video.picture_bytes))
        jobs = yield from _by_plan(video, video.order, [[job] for job in jobs])
        if not jobs:
            return
        video = decoded_survey(video.path)
        jobs = yield from _jobs(video, cuts, choices, {(job.cut, job.request) for job in jobs})
    yield from _in_full(video, jobs)


def _jobs(
    video: Survey,
    cuts: Sequence[Cut],
    choices: Sequence[FrameChoice],
    only: set[tuple[int, int]] | None,
) -> Generator[Taken, None, list[_Job]]:
    """The frames of every sampling of every cut; of a cut without any it is said at once."""
    jobs = []
    for k, cut in enumerate(cuts):
        wanted = [r for r in range(len(choices)) if only is None or (k, r) in only]
        if not wanted:
            continue
        try:
            inside = cut.inside(video.times, video.path)
        except UndecodableVideo as error:
            for r in wanted:
                yield Taken(k, r, error)
            continue
        jobs += [_Job(k, r, inside[choices[r].indices(len(inside))]) for r in wanted]
    return jobs


def _groups(jobs: Sequence[_Job], picture_bytes: int) -> list[list[_Job]]:
    """Jobs that are decoded together: all of a cut, and no more pictures than may be held."""
    most = _GROUP_BYTES // max(picture_bytes, 1)
    groups: list[list[_Job]] = []
    pictures: set[int] = set()
    for job in jobs:
        if groups:
            first, last = groups[-1][0].cut, groups[-1][-1].cut
            room = len(pictures | job.frames) <= most and job.cut - first < _GROUP_CUTS
            if room or job.cut == last:
                groups[-1].append(job)
                pictures |= job.frames
                continue
        groups.append([job])
        pictures = job.frames
    return groups


def _by_plan(
    video: Survey, order: Sequence[int], groups: Sequence[Sequence[_Job]]
) -> Generator[Taken, None, list[_Job]]:
    """Decode no more than each group needs; returns the jobs of groups that met damage."""
    if not groups:
        return []
    marks = in_place_of_packets(video.marks)
    wanted = [{order[i] for job in group for i in job.frames} for group in groups]
    plans = [plan_runs(marks, positions) for positions in wanted]
    # The first packet that is needed from each group on.
    needed = [len(marks)]
    for runs in reversed(plans):
        needed.insert(0, min(needed[0], runs[0].first))
    failed: list[_Job] = []
    with ExitStack() as reading, ExitStack() as decoding:
        source = _Forward(video.path, *reading.enter_context(open_stream(video.path)))
        decoder = decoding.enter_context(open_stream(video.path))[1].codec_context
        for group, positions, runs, later in zip(groups, wanted, plans, needed[1:], strict=True):
            pictures: dict[int, Pictures] = {}
            for run in runs:
                packets = source.packets(run, later)
                inside = {i - run.first for i in positions if run.first <= i <= run.last}
                found = decode_planned(decoder, packets, inside)
                if found is None:  # and the decoder is used up
                    failed += group
                    decoding.close()
                    decoder = decoding.enter_context(open_stream(video.path))[1].codec_context
                    break
                pictures.update((run.first + i, picture) for i, picture in found.items())
            else:
                for job in group:
                    yield _taken(video, job, {i: pictures[order[i]] for i in job.frames})
    return failed


class _Forward:
    """The packets of a file, read once from its beginning to its end.

    Args:
        path: for messages.
        container: open, of which nothing was read.
        stream: its video stream.
    """

    def __init__(self, path: Path, container: InputContainer, stream: VideoStream) -> None:
        self._path = path
        self._source = read_packets(container, stream, Damage())
        self._held: deque[tuple[int, VideoPacket]] = deque()
        self._read = 0

    def packets(self, run: Run, later: int) -> list[VideoPacket]:
        """The packets of a run; those before it and before `later` are forgotten."""
        keep = min(run.first, later)
        while self._held and self._held[0][0] < keep:
            self._held.popleft()
        while self._read <= run.last:
            packet = next(self._source, None)
            if packet is None:
                raise _changed(self._path)
            if self._read >= keep:
                self._held.append((self._read, packet))
            self._read += 1
        return [packet for at, packet in self._held if run.first <= at <= run.last]


def _in_full(video: Survey, jobs: Iterable[_Job]) -> Iterator[Taken]:
    """Decode everything, and keep frames for as long as a cut that has them waits for others."""
    ending: dict[int, list[_Job]] = {}
    waiting: dict[int, int] = {}  # frame -> jobs that still need it
    for job in jobs:
        ending.setdefault(int(job.choice[-1]), []).append(job)
        for i in job.frames:
            waiting[i] = waiting.get(i, 0) + 1
    pictures: dict[int, Pictures] = {}
    # As `decode_samples` does: what a decoder cannot know of a damaged frame it leaves as it was in
    # the buffer, which is a new one only as long as all others are held.
    held: list[av.VideoFrame] = []
    hold = video.decoded_bytes <= HELD_BYTES
    with open_stream(video.path) as (container, stream):
        packets = read_packets(container, stream, Damage())
        for at, frame in enumerate(shown_frames(stream, packets, Damage())):
            if not ending:
                return
            if hold:
                held.append(frame)
            if at in waiting:
                pictures[at] = to_rgb(frame)
            for job in ending.pop(at, ()):
                yield _taken(video, job, pictures)
                for i in job.frames:
                    waiting[i] -= 1
                    if not waiting[i]:
                        del pictures[i]
    if ending:
        raise _changed(video.path)


def _from_folder(video: Survey, jobs: Iterable[_Job]) -> Iterator[Taken]:
    for job in jobs:
        try:
            pictures = {i: read_frame(video.path, video.files[i]) for i in sorted(job.frames)}
        except UndecodableVideo as error:
            yield Taken(job.cut, job.request, error)
        else:
            yield _taken(video, job, pictures)


def _taken(video: Survey, job: _Job, pictures: Mapping[int, Pictures]) -> Taken:
    """A job done, from pictures by their index into the times."""
    (clip,) = stacked_clips([job.choice], pictures, video.times, video.damage)
    return Taken(job.cut, job.request, clip)


def _changed(path: Path) -> UndecodableVideo:
    return UndecodableVideo(
        path, "expected the frames that were there a moment ago, found fewer: the file was changed"
    )
