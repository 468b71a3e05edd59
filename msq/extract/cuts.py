"""Many cuts of one video from one pass over it, each with the frames that it would have alone.

`decode_samples` opens a file for each clip and holds its packets. A long video that is cut into
tens of thousands of windows is surveyed once and decoded once from front to back instead: each
packet is read and each frame decoded and resized once, however many windows share it, and what is
held is the pictures of the windows that are open at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import av

from msq.extract.cut_jobs import Job, Look, Taken, jobs_of, passes
from msq.extract.cuts_alone import decode_alone
from msq.extract.cuts_together import decode_together
from msq.extract.forward import changed
from msq.extract.frame_folder import read_frame
from msq.extract.packets import Damage, UndecodableVideo, VideoPacket, open_stream, read_packets
from msq.extract.pixels import to_rgb
from msq.extract.sampling import FrameChoice
from msq.extract.shared_pictures import SharedPictures, whole_clip
from msq.extract.shown import shown_frames
from msq.extract.timeline import Cut
from msq.extract.video import HELD_BYTES, Request
from msq.extract.video_survey import Survey, decoded_survey

__all__ = ["Look", "Taken", "decode_cuts"]

Watch = Callable[[], None]


def decode_cuts(
    video: Survey,
    cuts: Sequence[Cut],
    requests: Sequence[Request | Look],
    watch: Watch = lambda: None,
) -> Iterator[Taken]:
    """Every sampling of every cut, each equal to that of `decode_samples` for it alone.

    Damage included: what a plan meets in some cuts does not touch the others. Those cuts are then
    tried one by one, and at last all together from a decoding of the whole file. In every case the
    pictures of the cuts that overlap are held at a time, each once, up to 256 MiB; where more than
    that overlap, the file is read again for the rest. A decoding of the whole file holds all frames
    where they fit into 256 MiB.

    Args:
        video: see `survey`.
        cuts: in any order.
        requests: (frames wanted, sampling), a `FrameChoice`, or a `Look`, for every cut.
        watch: called over and over while this works; may raise to end it.

    Yields:
        Each pair of a cut and a request once, as soon as its last frame is there.

    Raises:
        VideoError: the file cannot be read any more.
        UsageError: an unknown sampling.
    """
    looks = [_look(video, request) for request in requests]
    jobs = yield from jobs_of(video, cuts, looks)
    if video.files:
        yield from _from_folder(video, jobs, looks, watch)
        return
    if video.order is not None:
        jobs = yield from _by_plans(video, video.order, jobs, looks, watch)
        if not jobs:
            return
        video = decoded_survey(video.path, watch, promised=True)
        jobs = yield from jobs_of(video, cuts, looks, {(job.cut, job.request) for job in jobs})
    mixed: list[Job] = []  # pictures of several sizes
    for some in passes(jobs, looks):
        mixed += yield from _in_full(video, some, looks, watch, whole=False)
    for some in passes(mixed, [_look(video, look.choice) for look in looks]):
        yield from _in_full(video, some, looks, watch, whole=True)


def _look(video: Survey, request: Request | Look) -> Look:
    """A request for whole pictures as a look."""
    if isinstance(request, Look):
        return request
    decoded = 2 * video.decoded_bytes // max(1, len(video.times))  # RGB for 4:2:0
    return Look(FrameChoice(*request), lambda picture: picture, video.picture_bytes or decoded)


def _by_plans(
    video: Survey, order: Sequence[int], jobs: Sequence[Job], looks: Sequence[Look], watch: Watch
) -> Generator[Taken, None, list[Job]]:
    """Decode no more than the cuts need; returns the jobs whose own plans met damage."""
    alone: list[Job] = []
    full: list[Job] = []
    while jobs:
        again: list[Job] = []  # fewer each time, since others among the damage are set aside
        for some in passes(jobs, looks):
            left = yield from decode_together(video, order, some, looks, watch)
            again += left.again
            alone += left.alone
            full += left.full
        jobs = again
    full += yield from decode_alone(video, order, alone, looks, watch)
    return full


def _in_full(
    video: Survey, jobs: Iterable[Job], looks: Sequence[Look], watch: Watch, *, whole: bool
) -> Generator[Taken, None, list[Job]]:
    """Decode everything; returns the jobs whose pictures differ in size and are not held whole."""
    ending: dict[int, list[Job]] = {}
    jobs = list(jobs)
    for job in jobs:
        ending.setdefault(int(job.choice[-1]), []).append(job)
    pictures, mixed = SharedPictures(jobs, looks, whole=whole), []
    # As `decode_samples` does: what a decoder cannot know of a damaged frame it leaves as it was in
    # the buffer, which is a new one only as long as all others are held.
    held: list[av.VideoFrame] = []
    hold = video.decoded_bytes <= HELD_BYTES
    with open_stream(video.path) as (container, stream):
        packets = _watched(read_packets(container, stream, Damage()), watch)
        for at, frame in enumerate(shown_frames(stream, packets, Damage())):
            if not ending:
                break
            if hold:
                held.append(frame)
            if pictures.wants(at):
                pictures.add(at, to_rgb(frame))
            for job in ending.pop(at, ()):
                clip = pictures.clip(job, video.times, video.damage)
                pictures.forget(job)
                if clip is None:
                    mixed.append(job)
                else:
                    yield Taken(job.cut, job.request, clip)
    if ending:
        raise changed(video.path)
    return mixed


def _watched(packets: Iterator[VideoPacket], watch: Watch) -> Iterator[VideoPacket]:
    for packet in packets:
        watch()
        yield packet


def _from_folder(
    video: Survey, jobs: Sequence[Job], looks: Sequence[Look], watch: Watch
) -> Iterator[Taken]:
    """Each picture is read once for all cuts that share it; a broken one is those cuts' own."""
    for some in passes(jobs, looks):
        pictures = SharedPictures(some, looks)
        broken: dict[int, UndecodableVideo] = {}
        for job in some:
            watch()
            for i in job.frames:
                if i not in broken and pictures.wants(i):
                    try:
                        pictures.add(i, read_frame(video.path, video.files[i]))
                    except UndecodableVideo as error:
                        broken[i] = error
            first = next((broken[i] for i in job.frames if i in broken), None)
            clip = None if first else pictures.clip(job, video.times, video.damage)
            pictures.forget(job)
            if first is None and clip is None:
                every = {i: read_frame(video.path, video.files[i]) for i in job.frames}
                clip = whole_clip(job, every, video.times, video.damage, looks)
            found = first or clip
            assert found is not None
            yield Taken(job.cut, job.request, found)
