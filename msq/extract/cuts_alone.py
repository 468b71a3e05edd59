"""Cuts of a file decoded one by one, each by its own plan, from one reading of the packets."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack

from msq.extract.cut_jobs import Job, Look, Taken
from msq.extract.forward import Forward, new_decoder
from msq.extract.packets import open_stream
from msq.extract.pixels import Pictures
from msq.extract.plan import decode_planned, key_places, plan_runs
from msq.extract.shared_pictures import whole_clip
from msq.extract.video_survey import Survey, in_place_of_packets


def decode_alone(
    video: Survey,
    order: Sequence[int],
    jobs: Sequence[Job],
    looks: Sequence[Look],
    watch: Callable[[], None],
) -> Generator[Taken, None, list[Job]]:
    """Each job by a plan of its own, its pictures whole; returns those whose plan met damage.

    Args:
        video: its survey.
        order: places of the packets in display order.
        jobs: in any order.
        looks: of the requests.
        watch: called at every job; may raise to end it all.
    """
    failed: list[Job] = []
    if not jobs:
        return failed
    marks = in_place_of_packets(video.marks)
    keys = key_places(marks)
    planned = []
    for job in jobs:
        wanted = {order[i] for i in job.frames}
        planned.append((plan_runs(marks, wanted, keys=keys), job, wanted))
    planned.sort(key=lambda one: one[0][0].first)
    with ExitStack() as reading, ExitStack() as decoding:
        source = Forward(video.path, *reading.enter_context(open_stream(video.path)))
        decoder = new_decoder(video.path, decoding)
        for n, (runs, job, wanted) in enumerate(planned):
            watch()
            later = planned[n + 1][0][0].first if n + 1 < len(planned) else len(marks)
            pictures: dict[int, Pictures] = {}
            for run in runs:
                packets = source.packets(run, later)
                inside = {i - run.first for i in wanted if run.first <= i <= run.last}
                found = decode_planned(decoder, packets, inside)
                if found is None:  # and the decoder is used up
                    failed.append(job)
                    decoder = new_decoder(video.path, decoding)
                    break
                pictures.update((run.first + i, picture) for i, picture in found.items())
            else:
                own = {i: pictures[order[i]] for i in job.frames}
                clip = whole_clip(job, own, video.times, video.damage, looks)
                yield Taken(job.cut, job.request, clip)
    return failed
