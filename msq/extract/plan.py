"""Decoding no more than the wanted frames need: "plan" decode.

From the packet table, find for every wanted packet the keyframe its decoding starts at, decode
only these runs, and let the decoder skip what nothing else refers to. The result is the same, bit
for bit, as that of decoding the whole file; where that cannot be told from the packets, the answer
is None and the caller decodes everything.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import av
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType

from msq.extract.packets import VideoPacket
from msq.extract.pixels import Pictures, to_rgb

# Only H.264 marks with certainty what nothing refers to (nal_ref_idc = 0). HEVC's sub-layer
# non-reference pictures may be referred to by higher temporal layers.
_SKIPS_UNREFERENCED = frozenset({"h264"})

Skip = Literal["DEFAULT", "NONREF"]


@dataclass(frozen=True, slots=True)
class Run:
    """Packets `first..last` (inclusive, decode order), to be decoded in one go."""

    first: int
    last: int


def plan_runs(packets: Sequence[VideoPacket], wanted: Collection[int]) -> list[Run]:
    """Runs of packets that decode every wanted packet, ascending and disjoint.

    Args:
        packets: all packets in decode order; the first keyframe comes before every wanted one.
        wanted: positions of the wanted packets.
    """
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    runs: list[Run] = []
    for target in sorted(wanted):
        at = bisect_right(keys, target) - 1
        if _time(packets[target]) < _time(packets[keys[at]]):
            at = max(at - 1, 0)  # a leading picture of an open GOP refers to the GOP before
        first = keys[at]
        # A leading picture may reach back over several runs, that of its own keyframe among them.
        while runs and first <= runs[-1].last + 1:
            first = min(first, runs.pop().first)
        runs.append(Run(first, target))
    return runs


def decode_planned(
    context: VideoCodecContext,
    packets: Sequence[VideoPacket],
    wanted: Collection[int],
) -> dict[int, Pictures] | None:
    """RGB pictures by packet position, None where the runs do not give what the packets promise.

    That is any damage, and a run whose keyframe is none: an H.264 stream that is refreshed bit by
    bit marks where a refresh begins, and what is decoded from there on is wrong at first.

    Args:
        context: the stream's decoder, not used before.
        packets: all packets in decode order, distinct pts.
        wanted: positions of the wanted packets.
    """
    position = {_time(p): i for i, p in enumerate(packets) if not p.is_discard}
    idle: Skip = "NONREF" if context.name in _SKIPS_UNREFERENCED else "DEFAULT"
    pictures: dict[int, Pictures] = {}
    try:
        for run in plan_runs(packets, wanted):
            start, previous = _time(packets[run.first]), None
            begun = packets[run.first].is_discard  # never comes out, so it cannot be looked at
            for frame in _decode_run(context, packets, run, wanted, idle):
                if frame.pts is None or (previous is not None and frame.pts <= previous):
                    return None
                previous = frame.pts
                if frame.pts < start:
                    continue  # leads the run's keyframe: undecodable here, and not asked for
                begun = begun or frame.pict_type == PictureType.I
                at = position.get(frame.pts)
                if at is None or frame.is_corrupt or not begun:
                    return None
                if at in wanted:
                    pictures[at] = to_rgb(frame)
    except av.FFmpegError:
        return None
    return pictures if len(pictures) == len(wanted) else None


def _decode_run(
    context: VideoCodecContext,
    packets: Sequence[VideoPacket],
    run: Run,
    wanted: Collection[int],
    idle: Skip,
) -> Iterator[av.VideoFrame]:
    for i in range(run.first, run.last + 1):
        context.skip_frame = "DEFAULT" if i in wanted or i == run.first else idle
        yield from context.decode(packets[i])
    yield from context.decode(None)
    context.flush_buffers()


def _time(packet: VideoPacket) -> int:
    """A packet's pts, which the packet table has checked where it matters.

    Packets cut off by an edit list may lack one; they count as earlier than everything shown.
    """
    return packet.pts if packet.pts is not None else -(2**63)
