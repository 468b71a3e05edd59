"""What a trained head and its encoders look at in a video, class by class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msq.errors import UsageError
from msq.head.evaluate import probabilities
from msq.head.predict_videos import FAR_APART
from msq.head.rollout import query_rollout

if TYPE_CHECKING:
    from msq.extract.encode_watched import Shown
    from msq.head.predict import Head
    from msq.head.predict_labels import Asked

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class EncoderLook:
    """What one encoder looks at, with the frames it saw.

    Attributes:
        frames: uint8 RGB [T, H, W, 3], as decoded.
        times: [T], seconds; NaN where unknown.
        box: top, left, height and width of the part of a frame it saw, in pixels of `frames`.
        heat: [T, h, w], shares over the h x w patches of that part; None where it was not watched.
        elsewhere: share on the global token's own start, which is nowhere in the picture.
            `heat.sum() + elsewhere` is 1.
    """

    frames: NDArray[np.uint8]
    times: Floats
    box: tuple[float, float, float, float]
    heat: Floats | None
    elsewhere: float


@dataclass(frozen=True)
class AttentionMaps:
    """What is looked at in one clip: by the encoders, and by each class's query.

    Attributes:
        clip: the file's name without suffix.
        labels: K of them, highest score first.
        scores: [K] probabilities, those of `Head.predict` for the same labels.
        tokens: [K, S], what share of its look at the stored tokens each query gives each of them;
            with frame pooling the global token, then one per step in time. Rows sum to one.
        heat: [K, T, h, w], the same on the patches of the T frames of `video`: in time where the
            tokens lie, in space by rollout (`msq.extract.encode_watched.WatchedTokens.heat`).
        elsewhere: [K], what of it ends on the global token's own start. `heat[k].sum() +
            elsewhere[k]` is 1.
        video: the video encoder by itself: what its global token comes from.
        image: the image encoder, where the queries are fused with its feature and its attention
            can be followed; else None.
        remarks: what could not be shown, or was wrong with the file, in words.
        unknown_words: words of the labels that mean nothing to the text encoder.
    """

    clip: str
    labels: tuple[str, ...]
    scores: Floats
    tokens: Floats
    heat: Floats
    elsewhere: Floats
    video: EncoderLook
    image: EncoderLook | None
    remarks: tuple[str, ...]
    unknown_words: tuple[str, ...]


def attention_maps(
    head: Head,
    video: Path,
    asked: Asked,
    start: float | None,
    end: float | None,
    *,
    top: int | None,
    through_encoder: bool,
    fps: float | None,
) -> AttentionMaps:
    """See `Head.attention`."""
    from msq.extract.encode_watched import WatchedTokens, show
    from msq.extract.timeline import require_rate

    require_rate(fps)
    _require_cut(start, end)
    if top is not None and top < 1:
        raise UsageError(f"top: expected 1 or more labels, found {top}")
    encoder = head.encoders["video"]
    others = [] if head.model.fuse_image is None else [head.encoders["image"]]
    shown, *rest = show(video, [encoder, *others], start, end, fps)
    watched = WatchedTokens(encoder, shown.inputs, through_encoder)
    remarks = _remarks(shown)
    feature, image = None, None
    for other, seen in zip(others, rest, strict=True):
        feature, image = _image(other, seen, through_encoder, remarks)
    scores, tokens = _asked_of_head(head, watched.tokens, feature, asked)
    order = scores.argsort(descending=True, stable=True)[:top]
    heat, elsewhere = watched.heat(tokens[order])
    look = _look(shown, *(watched.global_heat() if through_encoder else (None, None)))
    return AttentionMaps(
        clip=video.stem,
        labels=tuple(asked.names[k] for k in order.tolist()),
        scores=_array(scores[order]),
        tokens=_array(tokens[order]),
        heat=_array(heat),
        elsewhere=_array(elsewhere),
        video=look,
        image=image,
        remarks=tuple(remarks),
        unknown_words=tuple(asked.unknown),
    )


def _require_cut(start: float | None, end: float | None) -> None:
    """Refuse a part that cannot hold a frame."""
    known = [x for x in (start, end) if x is not None]
    if not all(map(math.isfinite, known)) or (len(known) == 2 and known[0] >= known[1]):
        raise UsageError(f"part of the video: expected a start before its end, in seconds, found "
                         f"{start} to {end}")  # fmt: skip


def _remarks(shown: Shown) -> list[str]:
    remarks = [] if shown.degraded is None else [shown.degraded]
    gap = float(np.diff(shown.times).max()) if len(shown.times) > 1 else 0.0
    if gap > FAR_APART:
        remarks.append(
            f"up to {gap:.0f} s lie between the frames that were looked at, and what is shorter "
            "may be missed; cut the video with a start and an end"
        )
    return remarks


@torch.no_grad()
def _asked_of_head(
    head: Head, tokens: Tensor, feature: Tensor | None, asked: Asked
) -> tuple[Tensor, Tensor]:
    """Scores [K] and looks [K, S] of the plain head."""
    like = head.model.memory.weight
    found = head.model(
        tokens[None].to(like),
        None if feature is None else feature[None].to(like),
        text=asked.text,
        trained=asked.trained,
        intermediates=True,
    )
    scores = probabilities(found["logits"], head.meta["task"])[0]
    return scores, query_rollout(found)[0].float()


def _image(
    encoder: Any, shown: Shown, through_encoder: bool, remarks: list[str]
) -> tuple[Tensor, EncoderLook | None]:
    """The image feature [D''], and what the tower looks at where that can be followed."""
    from msq.extract.encode_watched import image_heat
    from msq.extract.shard_builder import encode

    if through_encoder:
        try:
            feature, heat, elsewhere = image_heat(encoder, shown.inputs)
        except UsageError as error:  # the classes' maps do without it
            remarks.append(f"the image encoder is not shown: {error}")
        else:
            return feature, _look(shown, heat, elsewhere)
    return encode(encoder, [shown.inputs])[0], None


def _look(shown: Shown, heat: Tensor | None, elsewhere: Tensor | None) -> EncoderLook:
    return EncoderLook(
        frames=shown.frames,
        times=shown.times,
        box=shown.box,
        heat=None if heat is None else _array(heat),
        elsewhere=0.0 if elsewhere is None else float(elsewhere),
    )


def _array(values: Tensor) -> Floats:
    return values.detach().float().cpu().numpy()
