"""Opening a video file, and its packets in one demux pass: what is there before anything decodes.

PyAV's own log callback stays off (it deadlocks with codec threads, see `open_stream`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

import av
import av.error
import av.logging
from av.container import InputContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from msq.errors import VideoError

# Codecs whose every packet is one shown frame, so that packets can be counted instead of frames.
# MPEG-4 part 2 is not among them (packed B frames, placeholders for frames not coded), nor is VP8
# (hidden reference frames are packets of their own).
_ONE_FRAME_PER_PACKET = frozenset({"h264", "hevc", "vp9", "libdav1d"})

VideoPacket: TypeAlias = "av.Packet[VideoStream]"  # generic in PyAV's stubs only

_SLACK_SECONDS = 0.5  # a last frame's duration is often unknown; this is no truncation

_AV_TIME_BASE = 1_000_000  # container times are in microseconds


class UndecodableVideo(VideoError):
    """A video without a single frame to show.

    Attributes:
        path: the file or folder.
        reason: what was expected and what was found, without the path: fit for a store.
        message: the decoding library's own words, a part of the reason; empty where it had none.
    """

    def __init__(self, path: Path, reason: str, message: str = "") -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type[UndecodableVideo], tuple[Path, str, str]]:
        # Survives the way out of a worker process.
        return type(self), (self.path, self.reason, self.message)


@dataclass(slots=True)
class Damage:
    """What went wrong while reading a video that still gave frames."""

    corrupt: int = 0
    partial: int = 0
    silent: int = 0
    errors: list[str] = field(default_factory=list)
    packets: int = 0
    declared: int = 0
    seconds: float = 0.0
    declared_seconds: float = 0.0
    sizes: set[tuple[int, int]] = field(default_factory=set)

    def describe(self) -> str | None:
        """One line for the record, None for a clean video."""
        parts = []
        if self.corrupt:
            parts.append(f"frames decoded with corrupt data: {self.corrupt}")
        if self.partial:
            parts.append(f"packets that are not whole: {self.partial}")
        if self.errors:
            parts.append(f"errors while decoding: {len(self.errors)} (first: {self.errors[0]})")
        if self.silent:
            parts.append(f"packets that gave neither a frame nor an error: {self.silent}")
        if self.packets < self.declared:
            parts.append(
                f"truncated: the container declares {self.declared} frames, "
                f"the file holds {self.packets}"
            )
        if self.declared_seconds - self.seconds > _SLACK_SECONDS:
            parts.append(
                f"truncated: the container declares {self.declared_seconds:.2f} s, "
                f"the file holds {self.seconds:.2f} s"
            )
        if len(self.sizes) > 1:
            sizes = ", ".join(f"{width}x{height}" for height, width in sorted(self.sizes))
            parts.append(f"frames change size ({sizes}) and were brought to one")
        return "; ".join(parts) or None


@dataclass(frozen=True, slots=True)
class PacketTable:
    """The non-empty packets of a video stream in decode order."""

    packets: tuple[VideoPacket, ...]

    def display_order(self) -> list[int] | None:
        """Positions of the shown packets sorted by pts, None where packets cannot tell the order.

        They cannot where a pts is missing or repeated, or where shown packets come before the
        first keyframe or lead it: whether a decoder shows those is its own affair.
        """
        first_key = next((i for i, p in enumerate(self.packets) if p.is_keyframe), None)
        shown = [i for i, packet in enumerate(self.packets) if not packet.is_discard]
        if first_key is None or not shown:
            return None
        times = {i: self.packets[i].pts for i in shown}
        key_time = self.packets[first_key].pts
        known = [pts for pts in times.values() if pts is not None]
        if key_time is None or len(known) < len(shown) or len(set(known)) < len(shown):
            return None
        if any(i < first_key or known[n] < key_time for n, i in enumerate(shown)):
            return None
        return sorted(shown, key=lambda i: times[i] or 0)


def message_of(error: BaseException) -> str:
    """The library's own words, without the path that PyAV appends to them."""
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def open_stream(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its video stream, single-threaded, quiet.

    Raises:
        UndecodableVideo: missing, not readable, not a video, no video stream, unknown codec; also
            in the place of any error of libav that leaves the body of the `with`.
    """
    # `av.logging.set_level` would switch on PyAV's Python callback, which can deadlock against
    # codec threads; this only lowers libav's own level.
    av.logging.set_libav_level(av.logging.FATAL)
    try:
        if os.stat(path).st_size == 0:
            raise UndecodableVideo(path, "expected a video file, found an empty file (0 bytes)")
        # "file:" keeps libav from reading a colon in the name as a protocol, the white list from
        # following a play list or concat script to other places.
        container = av.open(
            f"file:{path}",
            metadata_errors="replace",
            options={"protocol_whitelist": "file"},
        )
    except FileNotFoundError:
        raise UndecodableVideo(path, "expected a video file, found nothing at this path") from None
    except (OSError, ValueError, av.FFmpegError) as error:
        found = message_of(error)
        raise UndecodableVideo(
            path, f"expected a video file that can be opened, found: {found}", found
        ) from error
    with container:
        try:
            yield container, _video_stream(path, container)
        except av.FFmpegError as error:  # what the reader of the stream did not expect
            found = message_of(error)
            raise UndecodableVideo(
                path, f"expected decodable frames, found: {found}", found
            ) from error


def read_packets(
    container: InputContainer, stream: VideoStream, damage: Damage
) -> Iterator[VideoPacket]:
    """Non-empty packets in decode order; a demuxer error ends the stream and is noted.

    Empty packets stand for repeated frames (AVI) or the end; libav takes one for a flush.
    """
    count, last = 0, 0
    try:
        for packet in container.demux(stream):
            if packet.size:
                count += 1
                damage.partial += packet.is_corrupt
                last = max(last, (packet.pts or 0) + (packet.duration or 0))
                yield packet
            elif packet.dts is not None:
                count += 1
    except av.FFmpegError as error:
        damage.errors.append(f"demuxer: {message_of(error)}")
    damage.packets, damage.declared = count, declared_frames(stream)
    damage.seconds = float(last * (stream.time_base or 0))
    damage.declared_seconds = declared_seconds(stream)


def packet_table(container: InputContainer, stream: VideoStream, damage: Damage) -> PacketTable:
    """All packets of the stream, still compressed: about the size of the file."""
    return PacketTable(tuple(read_packets(container, stream, damage)))


def frames_are_packets(container: InputContainer, stream: VideoStream) -> bool:
    """True where packets may be counted in the place of frames."""
    return stream.codec_context.name in _ONE_FRAME_PER_PACKET and not guesses_times(container)


def guesses_times(container: InputContainer) -> bool:
    """True for AVI, which stores no times: libav numbers its chunks, not its frames."""
    return container.format.name == "avi"


def declared_frames(stream: VideoStream) -> int:
    """Packets that the container says it holds, 0 where it does not say.

    An edit list makes libav drop the packets that no shown frame needs, while `stream.frames`
    still counts them: the index tells what is to come.
    """
    if stream.container.format.name.startswith("mov,"):
        return min(stream.frames, len(stream.index_entries))
    return stream.frames


def declared_seconds(stream: VideoStream) -> float:
    """End of the video stream by Matroska's own tag, which has no frame count; else 0."""
    if not stream.container.format.name.startswith("matroska"):
        return 0.0
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    return 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3]) if tag else 0.0


def time_origin(container: InputContainer, stream: VideoStream) -> Fraction:
    """Second of the file's own clock at which playing starts (1.4 in many transport streams)."""
    if not container.start_time:  # 0, or None where nothing has a time
        return Fraction(0)
    origin = Fraction(container.start_time, _AV_TIME_BASE)
    if stream.start_time is not None and stream.time_base is not None:
        exact = stream.start_time * stream.time_base
        # The container's start is rounded to microseconds: take the stream's where it is the same.
        if abs(exact - origin) <= Fraction(2, _AV_TIME_BASE):
            return exact
    return origin


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    """The main video stream; a cover picture in a music file is none."""
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        found = ", ".join(sorted({s.type for s in container.streams})) or "no streams at all"
        raise UndecodableVideo(path, f"expected a video stream, found: {found}")
    context: VideoCodecContext | None = stream.codec_context  # the stubs leave out the None
    if context is None:
        raise UndecodableVideo(
            path, "expected a video stream of a known codec, found an unknown one"
        )
    context.thread_count = 1
    return stream
