"""When the frames of a video are shown: one reading that holds neither packets nor frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

from msq.extract.frame_folder import frame_files
from msq.extract.packets import Damage, PacketTable, VideoPacket, open_stream, read_packets
from msq.extract.shown import nothing_shown, packet_times, shown_frames
from msq.extract.timeline import Clock, Seconds, folder_times, require_rate


class Mark(NamedTuple):
    """What a plan has to know of a packet; the packet itself is read again when it is decoded."""

    pts: int | None
    is_keyframe: bool
    is_discard: bool


@dataclass(frozen=True)
class Survey:
    """When the frames of a video are shown, and how to come to them.

    Attributes:
        path: video file or frame folder.
        times: float64 [n], seconds in display order; NaN where unknown.
        damage: found on the way.
        order: places of the packets in display order; None where only decoding tells the order.
        marks: of the packets in decode order.
        files: pictures of a frame folder; empty for a file.
        picture_bytes: of one picture at full size; 0 where it is not asked for.
        decoded_bytes: of all frames as the decoder gives them; 0 where none were decoded.
    """

    path: Path
    times: Seconds
    damage: Damage
    order: tuple[int, ...] | None = None
    marks: tuple[Mark, ...] = field(default=(), repr=False)
    files: tuple[Path, ...] = field(default=(), repr=False)
    picture_bytes: int = 0
    decoded_bytes: int = 0


def survey(path: Path, *, fps: float | None = None) -> Survey:
    """Read through a video once; it is decoded only where its packets do not tell the frames.

    Args:
        path: video file, or folder of numbered pictures.
        fps: frames per second of a frame folder, which has no times otherwise.

    Raises:
        VideoError: the file cannot be opened, or shows nothing.
        UsageError: `fps` is not a positive number.
    """
    require_rate(fps)
    path = Path(path)
    if path.is_dir():
        files = tuple(frame_files(path))
        return Survey(path, folder_times(len(files), fps), Damage(), files=files)
    damage = Damage()
    with open_stream(path) as (container, stream):
        marks = tuple(
            Mark(packet.pts, packet.is_keyframe, packet.is_discard)
            for packet in read_packets(container, stream, damage)
        )
        size = 3 * stream.width * stream.height
        table = PacketTable(tuple(in_place_of_packets(marks)))
        shown = packet_times(container, stream, table, damage)
    if shown is None:
        return decoded_survey(path)
    order, times = shown
    return Survey(path, times, damage, tuple(order), marks, picture_bytes=size)


def decoded_survey(
    path: Path, watch: Callable[[], None] = lambda: None, *, promised: bool = False
) -> Survey:
    """The survey of a file by decoding all of it, whatever its packets say.

    Args:
        path: the file.
        watch: called at every frame; may raise to end it.
        promised: its packets tell the frames, but no plan came out, see `shown_frames`.

    Raises:
        VideoError: the file cannot be opened, or shows nothing.
    """
    damage = Damage()
    with open_stream(path) as (container, stream):
        stamps, size = [], 0
        packets = read_packets(container, stream, damage)
        for frame in shown_frames(stream, packets, damage, promised=promised):
            watch()
            stamps.append(frame.pts)
            size += sum(plane.buffer_size for plane in frame.planes)
        if not stamps:
            raise nothing_shown(path, damage)
        times = Clock(container, stream).seconds(stamps)
        return Survey(path, times, damage, decoded_bytes=size)


def in_place_of_packets(marks: Sequence[Mark]) -> Sequence[VideoPacket]:
    """Marks as packets, for what looks at times and flags alone."""
    return cast("Sequence[VideoPacket]", marks)
