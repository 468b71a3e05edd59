"""Video file in, features out: what `msq extract` would store of a video, without a store."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msq.errors import UsageError, VideoError, is_out_of_memory
from msq.extract.ahead import made_ahead
from msq.extract.decode_task import DecodeTask, Picture, decode, without_paths
from msq.extract.device_batches import free_memory
from msq.extract.prepared_cuts import PreparedCut, prepared_cuts
from msq.extract.shard_builder import FrameEncoder
from msq.extract.shard_builder import encode as encode_frames
from msq.extract.timeline import Cut, require_rate
from msq.extract.video_survey import Survey
from msq.extract.views import CLEAN, View, parse_view

BATCH = 8  # clips of one forward pass, as `msq extract` has it by default
_AHEAD = 2  # batches of cuts that are decoded while one is encoded


@dataclass(frozen=True)
class Encoded:
    """What encoders make of one clip.

    Attributes:
        features: per encoder, on its device, float32: tokens [S, D'] of a video encoder, the mean
            over frames [D''] of an image encoder.
        times: per encoder, seconds of the frames it saw, float32 [T]; NaN where unknown.
        degraded: what was wrong with a video that still gave frames; None for a clean one.
    """

    features: list[Tensor]
    times: list[NDArray[np.float32]]
    degraded: str | None


def encode(
    video: str | Path,
    encoder: FrameEncoder,
    start: float | None = None,
    end: float | None = None,
    view: View | str = CLEAN,
    *,
    fps: float | None = None,
    clip: str = "",
) -> Tensor:
    """Features of a video, or of a part of it, as `msq extract` stores them.

    Frames are sampled, resized, cropped and normalised as the encoder's spec says. In float32 and
    with a batch of one the result has the bits of the stored row; another batch, device or number
    of threads may move the last of them. A damaged video that still gives frames is encoded, with a
    warning that says what is wrong.

    Args:
        video: video file, or folder of numbered pictures.
        encoder: of `msq.load_video_encoder`, or the image encoder of `msq.load_clip`.
        start: first second of the part; None is the beginning.
        end: its end in seconds, exclusive; None is the end of the video.
        view: which look at it: `clean`, `test clip 1/10 crop 2/3` or `augmented 1`, or a `View`.
        fps: frames per second of a folder of pictures, which `start` and `end` need.
        clip: id of the clip in a store, from which augmented views are drawn; others need none.

    Returns:
        Tokens [S, D'] of a video encoder, or the mean of an image encoder's vectors over frames
        [D''], float32 on the encoder's device.

    Raises:
        VideoError: nothing can be decoded, or no frame lies in the part.
        UsageError: no such view or frame rate, an augmented view without a `clip`, or an encoder of
            text.
    """
    found = encode_clip(video, [encoder], start, end, view, fps=fps, clip=clip)
    if found.degraded is not None:
        warnings.warn(f"{video}: {found.degraded}", stacklevel=2)
    return found.features[0]


def encode_clip(
    video: str | Path,
    encoders: Sequence[FrameEncoder],
    start: float | None = None,
    end: float | None = None,
    view: View | str = CLEAN,
    *,
    fps: float | None = None,
    clip: str = "",
) -> Encoded:
    """Features of one clip by several encoders, from one decoding; see `encode`.

    Raises:
        VideoError: nothing can be decoded, or no frame lies in the part.
        UsageError: no such view or frame rate, an augmented view without a `clip`, or an encoder of
            text.
    """
    require_rate(fps)
    look = parse_view(view) if isinstance(view, str) else view
    if look.kind in ("augmented", "official") and not clip:
        raise UsageError(
            f"view {str(look)!r}: it is drawn from the clip's id, too; expected clip=ID, as in "
            "store.clips"
        )
    pictures = _pictures(encoders, look)
    wanted = tuple(dict.fromkeys(pictures))
    done = decode(DecodeTask(0, Path(video), start, end, wanted, fps, clip))
    if done.reason is not None:
        raise VideoError(f"{video}: {done.reason}")
    places = [wanted.index(picture) for picture in pictures]
    features = [
        encode_frames(encoder, [done.frames[place]])[0]
        for encoder, place in zip(encoders, places, strict=True)
    ]
    degraded = next((words for words in done.degraded if words), None)
    return Encoded(features, [done.times[place] for place in places], degraded)


def encode_cuts(
    video: Survey, cuts: Sequence[Cut], encoders: Sequence[FrameEncoder], batch: int = BATCH
) -> Generator[tuple[int, Encoded | VideoError], None, None]:
    """Features of many cuts of one video, decoded in order and encoded in batches.

    Decoding and resizing run in a thread beside the encoders, two batches ahead. Memory: what
    `decode_cuts` holds, and the resized frames of three batches. Where it is too short for a batch,
    that batch is halved until it fits. An error that is no video's says at which cut it was met.

    Args:
        video: see `msq.extract.video_survey.survey`.
        cuts: in any order.
        encoders: video or image encoders; all see the same cuts.
        batch: cuts of one forward pass.

    Yields:
        Each cut once, by its place, in no order that may be relied on: its features, or why there
        are none.

    Raises:
        VideoError: the file cannot be read any more.
        UsageError: an encoder of text.
    """
    pictures = _pictures(encoders, CLEAN)
    prepared = made_ahead(lambda watch: prepared_cuts(video, cuts, pictures, batch, watch), _AHEAD)
    with closing(prepared):
        for ready in prepared:
            if isinstance(ready, list):
                yield from _encoded(video.path, ready, cuts, encoders, pictures)
            else:
                yield ready


def _encoded(
    path: Path,
    ready: Sequence[PreparedCut],
    cuts: Sequence[Cut],
    encoders: Sequence[FrameEncoder],
    pictures: Sequence[Picture],
) -> Iterator[tuple[int, Encoded]]:
    try:
        made = [
            _in_batches(encoder, [cut.frames[picture] for cut in ready])
            for encoder, picture in zip(encoders, pictures, strict=True)
        ]
    except Exception as error:
        places = ", ".join(str(cuts[cut.place]) for cut in ready)
        error.add_note(f"{path}: while encoding {places}")
        raise
    for k, cut in enumerate(ready):
        degraded = cut.degraded and without_paths(cut.degraded, path)
        times = [cut.times[picture] for picture in pictures]
        yield cut.place, Encoded([features[k] for features in made], times, degraded)


def _in_batches(encoder: FrameEncoder, frames: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Features of clips [T, 3, h, w], in half batches where memory is too short for a whole one."""
    try:
        return encode_frames(encoder, frames)
    except (RuntimeError, MemoryError) as error:
        if len(frames) == 1 or not is_out_of_memory(error):
            raise
    free_memory()
    half = len(frames) // 2
    return torch.cat([_in_batches(encoder, part) for part in (frames[:half], frames[half:])])


def _pictures(encoders: Sequence[FrameEncoder], view: View) -> list[Picture]:
    """What each encoder wants of a clip."""
    for encoder in encoders:
        if encoder.spec.kind not in ("video", "image"):
            raise UsageError(
                f"{encoder.spec.slug}: expected a video or an image encoder, found one of "
                f"{encoder.spec.kind}"
            )
    return [Picture.of(encoder.spec, view) for encoder in encoders]
