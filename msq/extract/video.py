"""A clip -> its sampled frames, exactly those that a full sequential decode would give.

Two ways lead there. The plan (`msq.extract.plan`) decodes only what the wanted frames need and is
taken wherever the packets alone tell the display order. Everything else (every AVI, raw streams
without times, codecs that hide frames, a plan that does not come out clean) is decoded in full,
and what really came out is counted. Several samplings of one clip are taken from one decoding.
Times are seconds on the player's clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.stream import VideoStream

from msq.extract.frame_folder import frame_files, read_frame
from msq.extract.packets import (
    Damage,
    PacketTable,
    open_stream,
    packet_table,
)
from msq.extract.pixels import Pictures, stack_pictures, to_rgb
from msq.extract.plan import decode_planned
from msq.extract.sampling import FrameChoice
from msq.extract.shown import decode_all, frame_times, nothing_shown, packet_times, shown_frames
from msq.extract.timeline import Clock, Cut, Seconds, folder_times

__all__ = [
    "HELD_BYTES",
    "DecodedClip",
    "Request",
    "decode_all",
    "decode_clip",
    "decode_samples",
    "frame_times",
    "stacked_clips",
]

Request: TypeAlias = tuple[int, str] | FrameChoice  # (frames, sampling) is the whole clip
_Choice = npt.NDArray[np.int64]

# Decoded (not yet converted) frames that a full decode may hold while it cannot yet know how many
# there will be. A longer video is decoded a second time instead.
HELD_BYTES = 256 * 2**20


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
class _Wish:
    """What is wanted of one video: several samplings of one cut."""

    path: Path
    requests: tuple[FrameChoice, ...]
    cut: Cut

    def choose(self, times: Seconds) -> list[_Choice]:
        """Per request the frames it takes, as indices into `times` (display order)."""
        inside = self.cut.inside(times, self.path)
        return [inside[request.indices(len(inside))] for request in self.requests]


def decode_clip(
    path: Path,
    frames: int,
    *,
    start: float | None = None,
    end: float | None = None,
    sampling: str = "uniform",
    fps: float | None = None,
    keep: Sequence[tuple[float, float]] = (),
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
        keep: open intervals in seconds: frames outside all of them are taken away before any are
            chosen. Empty keeps all.

    Returns:
        Frames [T, H, W, 3], bitwise those of a full decode; their times; damage found on the way.

    Raises:
        VideoError: nothing can be decoded, or no frame lies in the cut. Its `reason` says what was
            expected and found, without the path.
        UsageError: an unknown `sampling`.
    """
    wanted = [(frames, sampling)]
    return decode_samples(path, wanted, start=start, end=end, fps=fps, keep=keep)[0]


def decode_samples(
    path: Path,
    requests: Sequence[Request],
    *,
    start: float | None = None,
    end: float | None = None,
    fps: float | None = None,
    keep: Sequence[tuple[float, float]] = (),
) -> list[DecodedClip]:
    """Several samplings of one clip from one opening and one decoding of the file.

    What is decoded is the union of the wanted frames. Each result is what `decode_clip` returns
    for its request alone, `degraded` included: damage that no plan can miss (missing or partial
    packets, all that a full decode meets) stands in every result, a change of size only in those
    that hold frames of both sizes. Where the plan of the union meets damage, some requests may
    need none of the damaged frames, so each is then decoded by itself; this and a full decode of
    more than 256 MiB of frames are the only cases in which a file is opened again.

    Args:
        path: video file, or folder of numbered pictures.
        requests: (frames wanted, sampling) of each result, see `decode_clip`, or a `FrameChoice`.
        start: first second of the cut.
        end: end of the cut in seconds, exclusive.
        fps: frames per second of a frame folder.
        keep: open intervals in seconds whose frames may be chosen, see `decode_clip`.

    Returns:
        One clip per request, in their order.

    Raises:
        VideoError: `decode_clip` would raise it for at least one of the requests.
        UsageError: an unknown sampling.
    """
    choices = tuple(FrameChoice(*request) for request in requests)
    for choice in choices:
        choice.indices(1)  # refuse bad arguments before any reading
    if not requests:
        return []
    wish = _Wish(Path(path), choices, Cut(start, end, tuple(keep)))
    if wish.path.is_dir():
        return _decode_folder(wish, fps)
    with open_stream(wish.path) as (container, stream):
        clips = _decode_file(wish, container, stream)
    if clips is not None:
        return clips
    # The plan met damage and has used the decoder up.
    if len(requests) > 1:
        return [decode_samples(path, [c], start=start, end=end, keep=keep)[0] for c in choices]
    with open_stream(wish.path) as (container, stream):
        damage = Damage()
        table = packet_table(container, stream, damage)
        return _decode_in_full(wish, container, stream, table, damage, promised=True)


def _decode_file(
    wish: _Wish, container: InputContainer, stream: VideoStream
) -> list[DecodedClip] | None:
    """By plan where packets tell the order, else in full; None where a plan met damage."""
    damage = Damage()
    table = packet_table(container, stream, damage)
    shown = packet_times(container, stream, table, damage)
    if shown is not None:
        return _decode_by_plan(wish, stream, table, *shown, damage)
    return _decode_in_full(wish, container, stream, table, damage)


def _decode_by_plan(
    wish: _Wish,
    stream: VideoStream,
    table: PacketTable,
    order: Sequence[int],
    times: Seconds,
    damage: Damage,
) -> list[DecodedClip] | None:
    """The clips from a fraction of the packets, None where that cannot be known to be exact."""
    choices = wish.choose(times)
    position = {i: order[i] for i in _union(choices)}
    wanted = frozenset(position.values())
    pictures = decode_planned(stream.codec_context, table.packets, wanted)
    if pictures is None:
        return None
    return stacked_clips(choices, {i: pictures[at] for i, at in position.items()}, times, damage)


def _decode_in_full(
    wish: _Wish,
    container: InputContainer,
    stream: VideoStream,
    table: PacketTable,
    damage: Damage,
    *,
    promised: bool = False,
) -> list[DecodedClip]:
    """Decode everything, count what came out, index that; `promised`: see `shown_frames`."""
    stamps: list[int | None] = []
    held: list[av.VideoFrame] | None = []
    size = 0
    for frame in shown_frames(stream, table.packets, damage, promised=promised):
        stamps.append(frame.pts)
        if held is not None:
            held.append(frame)
            size += sum(plane.buffer_size for plane in frame.planes)
            if size > HELD_BYTES:
                held = None
    if not stamps:
        raise nothing_shown(wish.path, damage)
    times = Clock(container, stream).seconds(stamps)
    choices = wish.choose(times)
    wanted = _union(choices)
    if held is not None:
        pictures = {i: to_rgb(held[i]) for i in wanted}
    else:
        pictures = _decode_again(wish.path, wanted)
    return stacked_clips(choices, pictures, times, damage)


def _decode_again(path: Path, wanted: set[int]) -> dict[int, Pictures]:
    """The wanted frames of a video that is too long to be held, by their output index."""
    pictures: dict[int, Pictures] = {}
    with open_stream(path) as (container, stream):
        table = packet_table(container, stream, Damage())
        for i, frame in enumerate(shown_frames(stream, table.packets, Damage())):
            if i in wanted:
                pictures[i] = to_rgb(frame)
                if len(pictures) == len(wanted):
                    break
    return pictures


def _decode_folder(wish: _Wish, fps: float | None) -> list[DecodedClip]:
    files = frame_files(wish.path)
    times = folder_times(len(files), fps)
    choices = wish.choose(times)
    pictures = {i: read_frame(wish.path, files[i]) for i in sorted(_union(choices))}
    return stacked_clips(choices, pictures, times, Damage())


def _union(choices: Sequence[_Choice]) -> set[int]:
    return {int(i) for choice in choices for i in choice}


def stacked_clips(
    choices: Sequence[_Choice], pictures: Mapping[int, Pictures], times: Seconds, damage: Damage
) -> list[DecodedClip]:
    """One clip per choice, from pictures by their index into `times`."""
    clips = []
    for choice in choices:
        stacked, sizes = stack_pictures([pictures[int(i)] for i in choice])
        degraded = replace(damage, sizes=sizes).describe()
        clips.append(DecodedClip(stacked, times[choice].astype(np.float32), degraded))
    return clips
