"""Decoding no more than the wanted frames need: "plan" decode.

From the packet table, find for every wanted packet the keyframe its decoding starts at, decode
only these runs, and let the decoder skip what nothing else refers to. The result is the same, bit
for bit, as that of decoding the whole file; where that cannot be told from the packets, the answer
is None and the caller decodes everything. So it is where anything that is decoded on the way is
damaged or does not come out: wanted frames may be predicted from it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain
from typing import Any, cast

import av
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType

from msq.extract.h264 import References
from msq.extract.hidden import is_hidden, revealed
from msq.extract.packets import VideoPacket
from msq.extract.pixels import Pictures, to_rgb


@dataclass(frozen=True, slots=True)
class Run:
    """Packets `first..last` (inclusive, decode order), to be decoded in one go."""

    first: int
    last: int


class NotAsPlanned(Exception):
    """A run of packets did not give the frames that the packets promise."""


def key_places(packets: Sequence[VideoPacket]) -> list[int]:
    """Where the keyframes are, ascending."""
    return [i for i, packet in enumerate(packets) if packet.is_keyframe]


def plan_runs(
    packets: Sequence[VideoPacket],
    wanted: Collection[int],
    *,
    keys: Sequence[int] | None = None,
    join: bool = True,
) -> list[Run]:
    """Runs of packets that decode every wanted packet, ascending and disjoint.

    Args:
        packets: all packets in decode order; the first keyframe comes before every wanted one.
        wanted: positions of the wanted packets.
        keys: see `key_places`, where they are known already.
        join: make one run of two that meet; of those that overlap one is made in any case.
    """
    keys = key_places(packets) if keys is None else keys
    runs: list[Run] = []
    for target in sorted(wanted):
        first = run_start(packets, keys, target)
        # A leading picture may reach back over several runs, that of its own keyframe among them.
        while runs and first <= runs[-1].last + join:
            first = min(first, runs.pop().first)
        runs.append(Run(first, target))
    return runs


def run_start(packets: Sequence[VideoPacket], keys: Sequence[int], target: int) -> int:
    """The keyframe at which decoding has to begin for one wanted packet."""
    at = bisect_right(keys, target) - 1
    if _time(packets[target]) < _time(packets[keys[at]]):
        at = max(at - 1, 0)  # a leading picture of an open GOP refers to the GOP before
    return keys[at]


def decode_planned(
    context: VideoCodecContext,
    packets: Sequence[VideoPacket],
    wanted: Collection[int],
) -> dict[int, Pictures] | None:
    """RGB pictures by packet position, None where the runs do not give what the packets promise.

    Args:
        context: the stream's decoder, not used before.
        packets: all packets in decode order, distinct pts.
        wanted: positions of the wanted packets.
    """
    places = places_by_time(packets)
    pictures: dict[int, Pictures] = {}
    try:
        for run in plan_runs(packets, wanted):
            part = packets[run.first : run.last + 1]
            for at, frame in planned_frames(context, part, run, wanted, places):
                if at in wanted:
                    pictures[at] = to_rgb(frame)
    except (NotAsPlanned, av.FFmpegError):
        return None
    return pictures if len(pictures) == len(wanted) else None


def places_by_time(packets: Sequence[VideoPacket]) -> dict[int, int]:
    """Presentation time -> position, of the packets that are shown."""
    return {_time(p): i for i, p in enumerate(packets) if not p.is_discard}


def planned_frames(
    context: VideoCodecContext,
    packets: Iterable[VideoPacket],
    run: Run,
    wanted: Collection[int],
    places: Mapping[int, int],
) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames of one run, as they are shown, each with the position of its packet.

    Args:
        context: the stream's decoder, new or as the run before has left it.
        packets: those of the run.
        run: which they are.
        wanted: positions of packets that must not be skipped.
        places: see `places_by_time`.

    Raises:
        NotAsPlanned: any damage of what is decoded, hidden frames included; a packet that gives no
            frame; a reference that was skipped since it was destroyed; and a run whose keyframe is
            none: an H.264 stream that is refreshed bit by bit marks where a refresh begins, and
            what is decoded from there on is wrong at first. The decoder is of no use any more then.
    """
    start, previous, begun = 0, None, False
    due: list[int] = []  # times of decoded packets whose frames have not come out
    # Only H.264 marks with certainty what nothing refers to (nal_ref_idc = 0). HEVC's sub-layer
    # non-reference pictures may be referred to by higher temporal layers.
    references = References(context.extradata) if context.name == "h264" else None
    for i, packet in enumerate(chain(packets, (None,)), run.first):
        if packet is not None:
            skipped = False
            if references is not None:
                data = bytes(cast("Any", packet))
                skipped = i not in wanted and i != run.first and references.skips(data)
                if not skipped and references.lost(data):
                    raise NotAsPlanned
            context.skip_frame = "NONREF" if skipped else "DEFAULT"
            if i == run.first:
                start = _time(packet)
                begun = packet.is_discard  # not shown, so it need not be what it says
            if not skipped and packet.pts is not None and packet.pts >= start:
                heappush(due, packet.pts)
        try:
            shown = context.decode(revealed(context, packet))
        except av.FFmpegError as error:
            raise NotAsPlanned from error
        for frame in shown:
            if frame.pts is None or (previous is not None and frame.pts <= previous):
                raise NotAsPlanned
            previous = frame.pts
            if frame.pts < start:
                continue  # leads the run's keyframe: undecodable here, and not asked for
            if frame.is_corrupt or not due or heappop(due) != frame.pts:
                raise NotAsPlanned
            if is_hidden(frame):
                continue
            begun = begun or frame.pict_type == PictureType.I
            at = places.get(frame.pts)
            if at is None or not begun:
                raise NotAsPlanned
            yield at, frame
    if due:
        raise NotAsPlanned
    context.flush_buffers()


def _time(packet: VideoPacket) -> int:
    """A packet's pts, which the packet table has checked where it matters.

    Packets cut off by an edit list may lack one; they count as earlier than everything shown.
    """
    return packet.pts if packet.pts is not None else -(2**63)
