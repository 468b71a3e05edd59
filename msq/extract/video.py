"""A clip -> its sampled frames, exactly those that a full sequential decode would give.

Two ways lead there. The plan (`msq.extract.plan`) decodes only what the wanted frames need and is
taken wherever the packets alone tell the display order. Everything else (every AVI, raw streams
without times, codecs that hide frames, a plan that does not come out) is decoded in full, and what
really came out is counted. Times are seconds on the player's clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.stream import VideoStream

from msq.extract.frame_folder import frame_files, read_frame
from msq.extract.packets import (
    Damage,
    UndecodableVideo,
    frames_are_packets,
    guesses_times,
    message_of,
    open_stream,
    packet_table,
    read_packets,
    time_origin,
)
from msq.extract.pixels import Pictures, stack_pictures, to_rgb
from msq.extract.plan import decode_planned
from msq.extract.sampling import sample_indices

Seconds = npt.NDArray[np.float64]

# Decoded (not yet converted) frames that a full decode may hold while it cannot yet know how many
# there will be. A longer video is decoded a second time instead.
_HELD_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class DecodedClip:
    """The sampled frames of one clip.

    Attributes:
        frames: uint8 RGB [T, H, W, 3].
        times: float32 [T], seconds at which the frames are shown; NaN where unknown.
        degraded: what was wrong with the file, None for a clean one.
    """

    frames: npt.NDArray[np.uint8]
    times: npt.NDArray[np.float32]
    degraded: str | None


@dataclass(frozen=True, slots=True)
class _Cut:
    """The part `start <= time < end` of a video; None is open."""

    start: float | None
    end: float | None

    @property
    def whole(self) -> bool:
        return self.start is None and self.end is None

    def inside(self, times: Seconds, path: Path) -> npt.NDArray[np.int64]:
        """Indices of the frames in the cut, at least one."""
        if self.whole:
            return np.arange(len(times))
        if np.isnan(times).any():
            raise UndecodableVideo(
                path,
                f"expected frames with times, to cut {self}; found a video without time stamps "
                "(remux it into a container, or give frame folders their frame rate)",
            )
        low = -math.inf if self.start is None else self.start
        high = math.inf if self.end is None else self.end
        chosen = np.flatnonzero((times >= low) & (times < high))
        if not len(chosen):
            raise UndecodableVideo(
                path,
                f"expected at least one frame in the cut {self}; found none "
                f"(frames are shown from {times.min():.3f} to {times.max():.3f} s)",
            )
        return chosen

    def __str__(self) -> str:
        start = "the beginning" if self.start is None else f"{self.start:g} s"
        return f"{start} to {'the end' if self.end is None else f'{self.end:g} s'}"


def decode_clip(
    path: Path,
    frames: int,
    *,
    start: float | None = None,
    end: float | None = None,
    sampling: str = "uniform",
    fps: float | None = None,
) -> DecodedClip:
    """Sample `frames` frames of a video file or frame folder, whole or cut.

    A cut holds the frames with `start <= time < end`. A clip shorter than `frames` repeats frames.

    Args:
        path: video file, or folder of numbered pictures.
        frames: frames wanted (T), at least 1.
        start: first second of the cut.
        end: end of the cut in seconds, exclusive.
        sampling: `uniform` or `official`, see `sample_indices`.
        fps: frames per second of a frame folder, which has no times otherwise; files ignore it.

    Returns:
        Frames [T, H, W, 3], bitwise those of a full decode; their times; damage found on the way.

    Raises:
        VideoError: nothing can be decoded, or no frame lies in the cut. Its `reason` says what was
            expected and found, without the path.
        UsageError: an unknown `sampling`.
    """
    path = Path(path)
    sample_indices(1, frames, sampling)  # refuse bad arguments before any reading
    cut = _Cut(start, end)
    if path.is_dir():
        return _decode_folder(path, frames, cut, sampling, fps)
    with open_stream(path) as (container, stream):
        if frames_are_packets(container, stream):
            clip = _decode_by_plan(path, container, stream, frames, cut, sampling)
            if clip is not None:
                return clip
    return _decode_in_full(path, frames, cut, sampling)


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
        return pictures, _folder_times(len(files), fps)
    damage = Damage()
    with open_stream(path) as (container, stream):
        shown = [(to_rgb(f), f.pts) for f in _every_frame(container, stream, damage)]
        times = _Clock(container, stream).seconds([pts for _, pts in shown])
    if not shown:
        raise _nothing_shown(path, damage)
    pictures, _ = stack_pictures([picture for picture, _ in shown])
    return pictures, times


class _Clock:
    """Presentation times -> seconds on the player's clock."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._base = stream.time_base or Fraction(0)
        self._origin = time_origin(container, stream)
        self._guessed = guesses_times(container)

    def seconds(self, stamps: list[int | None]) -> Seconds:
        """float64 [n]; NaN where a frame has no time."""
        known = [pts for pts in stamps if pts is not None]
        if self._guessed and known and len(known) == len(stamps):
            # AVI numbers its chunks: with packed B frames the numbers are right as a set and
            # attached to the wrong frames, shifted by the decoder's delay.
            known.sort()
            return np.array([float((pts - known[0]) * self._base) for pts in known])
        return np.array(
            [math.nan if pts is None else float(pts * self._base - self._origin) for pts in stamps],
            dtype=np.float64,
        )


def _every_frame(
    container: InputContainer, stream: VideoStream, damage: Damage
) -> Iterator[av.VideoFrame]:
    """All frames that the decoder shows, in its order; errors are noted and passed over."""
    context = stream.codec_context
    for packet in (*read_packets(container, stream, damage), None):
        try:
            shown = context.decode(packet)
        except av.FFmpegError as error:
            damage.errors.append(message_of(error))
            continue
        for frame in shown:
            damage.corrupt += frame.is_corrupt
            yield frame


def _decode_by_plan(
    path: Path,
    container: InputContainer,
    stream: VideoStream,
    frames: int,
    cut: _Cut,
    sampling: str,
) -> DecodedClip | None:
    """The clip from a fraction of the packets, None where that cannot be known to be exact."""
    damage = Damage()
    table = packet_table(container, stream, damage)
    order = table.display_order()
    if order is None or damage.partial:  # a packet that is not whole may show nothing
        return None
    times = _Clock(container, stream).seconds([table.packets[i].pts for i in order])
    chosen = cut.inside(times, path)
    chosen = chosen[sample_indices(len(chosen), frames, sampling)]
    positions = [order[i] for i in chosen]
    context, wanted = stream.codec_context, frozenset(positions)
    pictures = decode_planned(context, table.packets, wanted, damage)
    if pictures is None:
        return None
    return _clip([pictures[i] for i in positions], times[chosen], damage)


def _decode_in_full(path: Path, frames: int, cut: _Cut, sampling: str) -> DecodedClip:
    """Decode everything, count what came out, index that."""
    damage = Damage()
    stamps: list[int | None] = []
    held: list[av.VideoFrame] | None = []
    size = 0
    with open_stream(path) as (container, stream):
        for frame in _every_frame(container, stream, damage):
            stamps.append(frame.pts)
            if held is not None:
                held.append(frame)
                size += sum(plane.buffer_size for plane in frame.planes)
                if size > _HELD_BYTES:
                    held = None
        times = _Clock(container, stream).seconds(stamps)
    if not stamps:
        raise _nothing_shown(path, damage)
    chosen = cut.inside(times, path)
    chosen = chosen[sample_indices(len(chosen), frames, sampling)]
    wanted = {int(i) for i in chosen}
    if held is not None:
        pictures = {i: to_rgb(held[i]) for i in wanted}
    else:
        pictures = _decode_again(path, wanted)
    return _clip([pictures[int(i)] for i in chosen], times[chosen], damage)


def _decode_again(path: Path, wanted: set[int]) -> dict[int, Pictures]:
    """The wanted frames of a video that is too long to be held, by their output index."""
    pictures: dict[int, Pictures] = {}
    with open_stream(path) as (container, stream):
        for i, frame in enumerate(_every_frame(container, stream, Damage())):
            if i in wanted:
                pictures[i] = to_rgb(frame)
                if len(pictures) == len(wanted):
                    break
    return pictures


def _decode_folder(
    path: Path, frames: int, cut: _Cut, sampling: str, fps: float | None
) -> DecodedClip:
    files = frame_files(path)
    times = _folder_times(len(files), fps)
    chosen = cut.inside(times, path)
    chosen = chosen[sample_indices(len(chosen), frames, sampling)]
    pictures = {i: read_frame(path, files[i]) for i in {int(i) for i in chosen}}
    return _clip([pictures[int(i)] for i in chosen], times[chosen], Damage())


def _folder_times(length: int, fps: float | None) -> Seconds:
    return np.full(length, math.nan) if fps is None else np.arange(length) / fps


def _clip(pictures: list[Pictures], times: Seconds, damage: Damage) -> DecodedClip:
    stacked, damage.sizes = stack_pictures(pictures)
    return DecodedClip(stacked, times.astype(np.float32), damage.describe())


def _nothing_shown(path: Path, damage: Damage) -> UndecodableVideo:
    found = damage.describe() or f"{damage.packets} packets and no frame"
    return UndecodableVideo(path, f"expected at least one decodable frame, found: {found}", found)
