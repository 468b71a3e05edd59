"""Attention rollout through a video encoder: from its tokens back to the patches they came from.

Source: Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (arXiv 2005.00928),
section 3. A layer with a residual mixes its tokens by A' = ½ A + ½ I, with A the attention
probabilities averaged over heads; their rows sum to one, and so do those of A'. Over all layers

    R = A'_L · A'_{L-1} · … · A'_1,

and row i of R says what share of output token i came from each input token. Only some rows are
wanted (the global token's, or what a class looks at), so a row r [1, tokens] is rolled back,
((r A'_L) A'_{L-1}) …, and R itself is never made. What each kind of encoder's A is:

* *Joint* attention (VideoMAE): one A over all tokens, as above.
* *Divided* attention (TimeSformer): a layer is two steps, R_l = A'_space · A'_time.
  - Time: patch (n, t) mixes the patches (n, t') of its own place by A_n [T, T]. The global token
    takes no part and passes whole: its row of A'_time is that of I.
  - Space: patch (n, t) mixes the global token and the patches (n', t) of its own frame by
    A_t [1 + N, 1 + N]. The global token is changed by the mean of what the T frames propose, so
    that its row of A_space has mean_t A_t[0, 0] at itself and A_t[0, n'] / T at patch (n', t).
* *Per frame* (an image model on every frame): one A_t over the tokens of each frame; the global
  token is the mean of the frames' class tokens, or of all patches where there are none.

Values, projections and MLPs play no part in rollout. It says where information may have come from,
not what it was used for.

Shapes: R rows, T frames, t steps, N patches per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from msq.errors import UsageError
from msq.extract.encoders.attention_maps import is_readable, watching
from msq.extract.encoders.encoder import VideoEncoder
from msq.extract.encoders.per_frame import PerFrame
from msq.extract.encoders.timesformer import TimeSformer
from msq.extract.encoders.videomae import VideoMAE

RollBack = Callable[[Tensor], Tensor]


class ImageLayers(NamedTuple):
    """Of a plain ViT: its attention layers, tokens before its patches, the first a class token."""

    layers: list[nn.Module]
    prefix: int
    has_class: bool


@dataclass(frozen=True)
class _Plan:
    """Which layers to watch, and what their maps do to a row."""

    layers: list[nn.Module]
    roll: Callable[[Tensor, Sequence[Tensor]], Tensor]


@contextmanager
def rollout(encoder: VideoEncoder) -> Iterator[RollBack]:
    """Watch an encoder in the block; of its last forward pass there, of one clip, rows roll back.

    Yields:
        A function from rows [R, L] of weights over the model's L output tokens, before pooling, to
        [R, L] of weights over its input tokens: the global token's start and the patches. Sums stay
        as they are.

    Raises:
        UsageError: an encoder without attention, or with another kind than those above.
    """
    plan = _plan(encoder)
    with watching(plan.layers) as maps, torch.no_grad():
        yield lambda rows: plan.roll(rows.to(maps[0]), maps)


def joint_back(rows: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """Rows [R, S] rolled back through maps [S, S], the first layer's first."""
    for a in reversed(maps):
        rows = 0.5 * (rows @ a + rows)
    return rows


def divided_back(rows: Tensor, time: Sequence[Tensor], space: Sequence[Tensor]) -> Tensor:
    """Rows [R, 1 + N·T] in TimeSformer's order rolled back through divided layers.

    Args:
        rows: weights of the global token, then of patch n in frame t at 1 + n·T + t.
        time: per layer A_n, [N, T, T].
        space: per layer A_t, [T, 1 + N, 1 + N].
    """
    frames = space[0].shape[0]
    first, patches = rows[:, 0], rows[:, 1:].reshape(len(rows), -1, frames)  # [R], [R, N, T]
    for over_time, over_space in zip(reversed(time), reversed(space), strict=True):
        shared = (first / frames)[None, :, None].expand(frames, -1, -1)
        mixed = torch.cat([shared, patches.permute(2, 0, 1)], dim=2) @ over_space  # [T, R, 1 + N]
        first = 0.5 * (mixed[:, :, 0].sum(dim=0) + first)
        patches = 0.5 * (mixed[:, :, 1:].permute(1, 2, 0) + patches)
        mixed = patches.transpose(0, 1) @ over_time  # [N, R, T]
        patches = 0.5 * (mixed.transpose(0, 1) + patches)
    return torch.cat([first[:, None], patches.flatten(1)], dim=1)


def per_frame_back(rows: Tensor, maps: Sequence[Tensor], prefix: int, has_class: bool) -> Tensor:
    """Rows [R, 1 + N·T] of a per-frame model rolled back through its layers.

    Args:
        rows: in TimeSformer's order, as `PerFrame` gives its tokens.
        maps: per layer [T, prefix + N, prefix + N].
        prefix: tokens before the patches: a class token, register tokens.
        has_class: the first of them is a class token. Without one the global token is the mean of
            all patches.

    Returns:
        [R, 1 + N·T]; what came from the tokens before the patches stands at the global one.
    """
    frames, length = maps[0].shape[:2]
    patches = rows[:, 1:].reshape(len(rows), -1, frames).permute(2, 0, 1)  # [T, R, N]
    weights = torch.zeros(frames, len(rows), length, device=rows.device)
    weights[:, :, prefix:] = patches
    if has_class:
        weights[:, :, 0] = rows[:, 0] / frames
    else:
        weights[:, :, prefix:] += rows[:, :1] / (frames * (length - prefix))
    weights = joint_back(weights, maps)
    elsewhere = weights[:, :, :prefix].sum(dim=(0, 2))
    patches = weights[:, :, prefix:].permute(1, 2, 0).flatten(1)
    return torch.cat([elsewhere[:, None], patches], dim=1)


def image_layers(tower: Any) -> ImageLayers | None:
    """Of a plain ViT of open_clip or timm; None of any other model or kind of layer."""
    kind = f"{type(tower).__module__}.{type(tower).__qualname__}"
    if kind == "open_clip.transformer.VisionTransformer":
        blocks, plain = tower.transformer.resblocks, "ResidualAttentionBlock"
        prefix, has_class = 1, True
    elif kind == "timm.models.vision_transformer.VisionTransformer":
        blocks, plain = tower.blocks, "Block"
        prefix, has_class = int(tower.num_prefix_tokens), tower.cls_token is not None
    else:
        return None
    layers: list[nn.Module] = [getattr(block, "attn", nn.Identity()) for block in blocks]
    if any(type(block).__name__ != plain for block in blocks):
        return None
    return ImageLayers(layers, prefix, has_class) if all(map(is_readable, layers)) else None


def _plan(encoder: VideoEncoder) -> _Plan:
    model: Any = encoder.model
    blocks: Any = getattr(model, "blocks", ())
    if isinstance(model, TimeSformer):
        pairs = [(b.temporal_attention, b.spatial_attention) for b in blocks]
        return _Plan(
            [layer for pair in pairs for layer in pair],
            lambda rows, maps: divided_back(rows, maps[::2], maps[1::2]),
        )
    if isinstance(model, VideoMAE):
        return _Plan(
            [block.attention for block in blocks],
            lambda rows, maps: joint_back(rows, [a[0] for a in maps]),
        )
    if isinstance(model, PerFrame) and (found := image_layers(model.tower)) is not None:
        return _Plan(
            found.layers,
            lambda rows, maps: per_frame_back(rows, maps, found.prefix, found.has_class),
        )
    raise UsageError(
        f"{encoder.spec.slug} ({encoder.spec.architecture}): expected an encoder whose attention "
        "can be rolled out, a TimeSformer, a VideoMAE or a plain ViT on every frame; found one "
        "without such attention. What can be shown is what the head's queries attend to among its "
        "tokens: --head-only (in Python through_encoder=False)"
    )
