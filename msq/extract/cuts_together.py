"""The cuts of a file decoded together, once from front to back, by one plan for all of them.

What `decode_samples` gives of a cut alone is the measure. A cut is taken from here only where its
own plan would have come out clean, too: all that it would have decoded was shown before the cut is
handed out. Damage makes cuts wait for another pass, or for a plan of their own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import av
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType

from msq.extract.cut_jobs import Job, Look, Taken
from msq.extract.forward import Forward, new_decoder
from msq.extract.packets import VideoPacket, open_stream
from msq.extract.pixels import to_rgb
from msq.extract.plan import (
    NotAsPlanned,
    Run,
    key_places,
    places_by_time,
    plan_runs,
    planned_frames,
    run_start,
)
from msq.extract.shared_pictures import SharedPictures
from msq.extract.video_survey import Survey, in_place_of_packets

Watch = Callable[[], None]


@dataclass
class Left:
    """Jobs that a pass could not take.

    Attributes:
        again: damage was met before their own frames, and frames of others among it: they may come
            out of another pass without these.
        alone: a frame of theirs may be damaged, or their pictures differ in size.
        full: their own plan meets damage, whatever else is decoded.
    """

    again: list[Job] = field(default_factory=list)
    alone: list[Job] = field(default_factory=list)
    full: list[Job] = field(default_factory=list)


class _Part(NamedTuple):
    """The frames of a job in one run.

    Attributes:
        places: of their packets, ascending.
        start: keyframe at which a plan of these alone begins; the run may begin before it, for the
            frames of others.
        job: whose frames.
        last_run: no later run has any of the job.
    """

    places: list[int]
    start: int
    job: Job
    last_run: bool


def decode_together(
    video: Survey, order: Sequence[int], jobs: Sequence[Job], looks: Sequence[Look], watch: Watch
) -> Generator[Taken, None, Left]:
    """Decode once what all of the jobs need; returns those that were left.

    Args:
        video: its survey.
        order: places of the packets in display order.
        jobs: those of one pass, see `cut_jobs.passes`.
        looks: of the requests.
        watch: called at every packet; may raise to end it all.

    Raises:
        UndecodableVideo: the file cannot be read any more.
    """
    decoding = _Together(video, order, jobs, looks, watch)
    yield from decoding.taken()
    return decoding.left


class _Together:
    """See `decode_together`."""

    def __init__(
        self,
        video: Survey,
        order: Sequence[int],
        jobs: Sequence[Job],
        looks: Sequence[Look],
        watch: Watch,
    ) -> None:
        self.left = Left()
        self._video, self._order, self._watch = video, order, watch
        self._marks = in_place_of_packets(video.marks)
        self._keys = key_places(self._marks)
        self._by_time = places_by_time(self._marks)
        self._frame_of = {order[i]: i for job in jobs for i in job.frames}
        self._runs = plan_runs(self._marks, self._frame_of, keys=self._keys, join=False)
        self._parts = self._parts_of_runs(jobs)
        self._pictures = SharedPictures(jobs, looks)
        self._failed: set[Job] = set()

    def _parts_of_runs(self, jobs: Sequence[Job]) -> list[list[_Part]]:
        """For each run the parts of jobs that lie in it, by their last packets."""
        firsts = [run.first for run in self._runs]
        parts: list[list[_Part]] = [[] for _ in firsts]
        for job in jobs:
            inside: dict[int, list[int]] = {}
            for place in sorted(self._order[i] for i in job.frames):
                inside.setdefault(bisect_right(firsts, place) - 1, []).append(place)
            last = max(inside)
            for k, places in inside.items():
                start = min(run_start(self._marks, self._keys, place) for place in places)
                parts[k].append(_Part(places, start, job, k == last))
        for some in parts:
            some.sort(key=lambda part: part.places[-1])
        return parts

    def taken(self) -> Iterator[Taken]:
        """Each job that comes out clean, as soon as that is certain."""
        path = self._video.path
        with ExitStack() as reading, ExitStack() as decoding:
            source = Forward(path, *reading.enter_context(open_stream(path)))
            decoder = new_decoder(path, decoding)
            for run, parts in zip(self._runs, self._parts, strict=True):
                waiting = deque(part for part in parts if part.job not in self._failed)
                if not waiting:
                    continue
                needed = Run(run.first, waiting[-1].places[-1])
                feed = _Feed(source.along(needed), needed, waiting, self._watch)
                try:
                    for part in self._shown(decoder, feed, waiting):
                        yield from self._finished(part, feed)
                except (NotAsPlanned, av.FFmpegError):
                    self._sort_out(waiting, feed)
                    decoder = new_decoder(path, decoding)

    def _shown(
        self, decoder: VideoCodecContext, feed: _Feed, waiting: deque[_Part]
    ) -> Iterator[_Part]:
        """The parts of a run in order, each when all that its own plan decodes was shown.

        Raises:
            NotAsPlanned: the run is damaged; the parts that are still waiting have not been shown.
        """
        for at, frame in planned_frames(decoder, feed, feed.run, feed.wanted, self._by_time):
            if at in feed.starts and frame.pict_type != PictureType.I:
                feed.false_starts.add(at)
            if at in feed.wanted:
                feed.came.add(at)
                if self._pictures.wants(self._frame_of[at]):
                    self._pictures.add(self._frame_of[at], to_rgb(frame))
            while waiting and feed.is_shown(waiting[0].places[-1], frame):
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()

    def _finished(self, part: _Part, feed: _Feed) -> Iterator[Taken]:
        """The clip of a job whose last part was shown."""
        job, clip = part.job, None
        if feed.came.issuperset(part.places) and part.start not in feed.false_starts:
            if not part.last_run:
                return
            clip = self._pictures.clip(job, self._video.times, self._video.damage)
        self._pictures.forget(job)
        if clip is not None:
            yield Taken(job.cut, job.request, clip)
            return
        self._failed.add(job)
        self.left.alone.append(job)

    def _sort_out(self, waiting: Sequence[_Part] | deque[_Part], feed: _Feed) -> None:
        """What becomes of the jobs that a damaged run leaves without their frames."""
        # If no frame that anybody wants was reached, only what every plan from this keyframe on
        # decodes was decoded, and none fares better.
        hopeless = not any(place <= feed.fed for place in feed.wanted)
        for part in waiting:
            self._failed.add(part.job)
            self._pictures.forget(part.job)
            if part.places[0] <= feed.fed:
                self.left.alone.append(part.job)
            elif not hopeless:
                self.left.again.append(part.job)
            elif feed.run.first in self._own_starts(part.job):
                self.left.full.append(part.job)
            else:
                self.left.alone.append(part.job)

    def _own_starts(self, job: Job) -> set[int]:
        """Where the runs of a job's own plan begin."""
        wanted = [self._order[i] for i in job.frames]
        return {run.first for run in plan_runs(self._marks, wanted, keys=self._keys)}


class _Feed:
    """The packets of a run on their way to the decoder, and what came of them.

    Attributes:
        run: which packets.
        wanted: places of those that must not be skipped.
        starts: keyframes inside the run at which plans of some jobs would begin.
        fed: place of the last packet that the decoder got.
        came: wanted places whose frames were shown.
        false_starts: those of `starts` that are no keyframes when they are looked at.
    """

    def __init__(
        self,
        packets: Iterator[VideoPacket],
        run: Run,
        parts: Sequence[_Part] | deque[_Part],
        watch: Watch,
    ) -> None:
        self._packets, self.run, self._watch = packets, run, watch
        self.wanted = {place for part in parts for place in part.places}
        self.starts = {part.start for part in parts} - {run.first}
        self.fed = run.first - 1
        self.came: set[int] = set()
        self.false_starts: set[int] = set()
        self._latest: dict[int, int] = {}  # wanted place -> latest time of a packet up to it

    def __iter__(self) -> Iterator[VideoPacket]:
        """Each packet once."""
        latest = -(2**63)
        for place, packet in enumerate(self._packets, self.run.first):
            self._watch()
            self.fed = place
            if packet.pts is not None:  # hidden ones, too: shown frames refer to them
                latest = max(latest, packet.pts)
            if place in self.wanted:
                self._latest[place] = latest
            yield packet

    def is_shown(self, place: int, frame: av.VideoFrame) -> bool:
        """Whether all that was decoded up to a wanted packet was shown, now that `frame` is."""
        latest = self._latest.get(place)
        return latest is not None and frame.pts is not None and frame.pts >= latest
