"""What a video shows from its beginning to its end: its frames, and when, without any choice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import av
from av.container import InputContainer
from av.video.frame import PictureType
from av.video.stream import VideoStream

from msq.extract.frame_folder import frame_files, read_frame
from msq.extract.hidden import is_hidden, revealed
from msq.extract.packets import (
    Damage,
    PacketTable,
    UndecodableVideo,
    VideoPacket,
    frames_are_packets,
    message_of,
    open_stream,
    packet_table,
)
from msq.extract.pixels import Pictures, stack_pictures, to_rgb
from msq.extract.timeline import Clock, Seconds, folder_times


def shown_frames(
    stream: VideoStream,
    packets: Iterable[VideoPacket],
    damage: Damage,
    *,
    promised: bool = False,
) -> Iterator[av.VideoFrame]:
    """All frames that the decoder shows, in its order; errors are noted and passed over.

    Args:
        stream: whose decoder is new.
        packets: of the stream.
        damage: where it is noted, that of frames which an edit list hides included.
        promised: each packet is one frame, see `packet_times`: those that give none are noted.
    """
    context, failed = stream.codec_context, 0
    sent, came, fields, begun = set[int](), set[int](), False, False
    for packet in chain(packets, (None,)):
        if promised and packet is not None and packet.pts is not None:
            sent.add(packet.pts)
        try:
            shown = context.decode(revealed(context, packet))
        except av.FFmpegError as error:
            failed += 1
            damage.errors.append(message_of(error))
            continue
        for frame in shown:
            hidden = is_hidden(frame)
            # Hidden frames that lead the first keyframe lack what they refer to: nobody misses it.
            begun = begun or not hidden or frame.pict_type == PictureType.I
            damage.corrupt += frame.is_corrupt and begun
            if promised and frame.pts is not None:
                came.add(frame.pts)
            fields = fields or frame.interlaced_frame  # a packet may be one of a frame's two fields
            if not hidden:
                yield frame
    if came and not fields:
        # An H.264 stream that begins amid a refresh shows nothing before that is through.
        first = min(came) if context.name == "h264" else min(sent)
        damage.silent = max(0, sum(pts >= first for pts in sent - came) - failed)


def decode_all(path: Path, *, fps: float | None = None) -> tuple[Pictures, Seconds]:
    """Every frame in the decoder's output order: the reference that `decode_clip` is held to.

    All frames are held in memory, full size: for short videos and tests.

    Args:
        path: video file, or folder of numbered pictures.
        fps: frames per second of a frame folder.

    Returns:
        uint8 RGB [n, H, W, 3]; float64 seconds [n], NaN where unknown.

    Raises:
        VideoError: nothing can be decoded.
    """
    path = Path(path)
    if path.is_dir():
        files = frame_files(path)
        pictures, _ = stack_pictures([read_frame(path, f) for f in files])
        return pictures, folder_times(len(files), fps)
    damage = Damage()
    with open_stream(path) as (container, stream):
        frames = shown_frames(stream, packet_table(container, stream, damage).packets, damage)
        shown = [(to_rgb(frame), frame.pts) for frame in frames]
        times = Clock(container, stream).seconds([pts for _, pts in shown])
    if not shown:
        raise nothing_shown(path, damage)
    pictures, _ = stack_pictures([picture for picture, _ in shown])
    return pictures, times


def frame_times(path: Path, *, fps: float | None = None) -> Seconds:
    """When each frame is shown, in display order, without decoding where packets tell it.

    These are the times that `decode_samples` chooses from, as long as the file is whole: of a
    damaged one that is found out only by decoding, frames count that will not come out.

    Args:
        path: video file, or folder of numbered pictures.
        fps: frames per second of a frame folder.

    Returns:
        float64 [n], seconds; NaN where unknown.

    Raises:
        VideoError: the file cannot be opened, or shows nothing.
    """
    path = Path(path)
    if path.is_dir():
        return folder_times(len(frame_files(path)), fps)
    damage = Damage()
    with open_stream(path) as (container, stream):
        table = packet_table(container, stream, damage)
        times = packet_times(container, stream, table, damage)
        if times is not None:
            return times[1]
        stamps = [frame.pts for frame in shown_frames(stream, table.packets, damage)]
        if not stamps:
            raise nothing_shown(path, damage)
        return Clock(container, stream).seconds(stamps)


def packet_times(
    container: InputContainer, stream: VideoStream, table: PacketTable, damage: Damage
) -> tuple[Sequence[int], Seconds] | None:
    """(packets in display order, their seconds), None where only decoding can tell."""
    if frames_are_packets(container, stream):
        order = table.display_order()
        if order is not None and not damage.partial:  # a partial packet may show nothing
            return order, Clock(container, stream).seconds([table.packets[i].pts for i in order])
    return None


def nothing_shown(path: Path, damage: Damage) -> UndecodableVideo:
    """The error of a file that opens and gives no frame."""
    found = damage.describe() or f"{damage.packets} packets and no frame"
    return UndecodableVideo(path, f"expected at least one decodable frame, found: {found}", found)
