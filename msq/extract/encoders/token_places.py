"""Where tokens lie: from pooled tokens to a model's own, and from these to frames and patches."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from msq.errors import UsageError
from msq.extract.encoders.encoder import VideoEncoder
from msq.extract.encoders.pooling import TokenOrder, pool
from msq.extract.encoders.spec import Pooling


def unpool(rows: Tensor, length: int, encoder: VideoEncoder) -> Tensor:
    """Weights over pooled tokens as weights over all tokens of the model: `rows · P`.

    P [S, L] is what the spec's pooling multiplies the tokens with. It is not written down a second
    time here: pooling is linear, so `rows · P` is the gradient of `rows · pool(x)` by x.

    Args:
        rows: [R, S].
        length: L, tokens of the model's own sequence.
        encoder: its spec says how they are pooled.

    Returns:
        [R, L]; sums stay as they are.
    """
    spec = encoder.spec
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(len(rows), length, 1, device=rows.device, requires_grad=True)
        pooled = pool(x, spec.frames, cast(Pooling, spec.pooling), encoder.order)
        (found,) = torch.autograd.grad(pooled, x, rows.clone()[..., None])
    return found[..., 0]


def global_row(length: int, encoder: VideoEncoder) -> Tensor:
    """The global token [1, L] as weights over the model's tokens: itself, or the mean of all."""
    if _order(encoder).global_token:
        row = torch.zeros(1, length)
        row[0, 0] = 1
        return row
    return torch.full((1, length), 1 / length)


def own_steps(length: int, encoder: VideoEncoder) -> Tensor:
    """Which of the model's tokens belong to which step in time: bool [t, L]; the global to none."""
    order = _order(encoder)
    places = torch.arange(length - int(order.global_token))
    step = places // (len(places) // order.steps) if order.time_major else places % order.steps
    if order.global_token:
        step = torch.cat([torch.tensor([-1]), step])
    return step == torch.arange(order.steps)[:, None]


def laid_out(rows: Tensor, encoder: VideoEncoder) -> tuple[Tensor, Tensor]:
    """Weights over a model's own tokens, laid on frames.

    A step of several frames (a tubelet, the stride of a 3-D network) shares its weight out evenly
    among them.

    Args:
        rows: [R, L].
        encoder: says the order of the tokens.

    Returns:
        [R, T, h, w] over the patches of each frame, and [R] what lies on the global token, which is
        nowhere in the picture. Together they sum to what the rows do.

    Raises:
        UsageError: patches that make no square.
    """
    order, frames = _order(encoder), encoder.spec.frames
    elsewhere = rows[:, 0] if order.global_token else torch.zeros(len(rows), device=rows.device)
    places = rows[:, int(order.global_token) :]
    if order.time_major:
        places = places.reshape(len(rows), order.steps, -1)
    else:
        places = places.reshape(len(rows), -1, order.steps).transpose(1, 2)
    side = math.isqrt(places.shape[2])
    if side**2 != places.shape[2]:
        raise UsageError(
            f"{encoder.spec.slug}: expected a square of patches in each frame, found "
            f"{places.shape[2]}, which cannot be laid on a picture"
        )
    step = torch.arange(frames, device=rows.device) * order.steps // frames
    shared = torch.bincount(step, minlength=order.steps)[step]
    on_frames = places[:, step] / shared[None, :, None]
    return on_frames.reshape(len(rows), frames, side, side), elsewhere


def _order(encoder: VideoEncoder) -> TokenOrder:
    return encoder.order or TokenOrder(encoder.spec.frames)
