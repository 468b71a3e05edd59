"""Attention over time of a video encoder: T frames of one place, for thousands of places.

    s = q k^T / sqrt(d)     p = softmax(s)     out = p v

A clip of 8 or 16 frames and 196 places has 196 problems of 8 or 16 rows in every head. Attention
kernels made for long rows give each a tile of 64 or 128 rows and copy their gradients together;
here whole problems share a tile, and q, k and v stay as the encoder's linear layer leaves them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from msq.errors import UsageError
from msq.kernels.dispatch import interpreted

MOST_FRAMES = 128
HEAD_WIDTHS = (16, 32, 64)


def temporal_attention(qkv: Tensor, heads: int, *, triton: bool = False) -> Tensor:
    """Attention within each problem.

    Args:
        qkv: [P, T, 3 D], P = clips x places: q, k and v side by side, heads side by side in each.
        heads: H.
        triton: run the kernel rather than the reference.

    Returns:
        [P, T, D] in the dtype of `qkv`, ready for the output projection. Differentiable in `qkv`.

    Raises:
        ValueError: shapes that do not fit.
        UsageError: the kernel is asked for off a GPU.
    """
    if qkv.ndim != 3 or qkv.shape[2] % (3 * heads):
        raise ValueError(
            f"temporal_attention, H = {heads}: expected [P, T, 3 D] with D a multiple of H, found "
            f"{list(qkv.shape)}"
        )
    if triton and not qkv.is_cuda and not interpreted():
        raise UsageError(
            f"temporal_attention: its kernel needs a CUDA device, found {qkv.device.type}; load "
            "the encoder for this device, or with kernels='reference'"
        )
    out: Tensor = torch.ops.msq.temporal_attention(qkv, heads, triton)
    return out


def unsupported(frames: int, head_width: int) -> str:
    """Why the kernel cannot take these sizes; empty where it can."""
    if frames > MOST_FRAMES:
        return f"{frames} frames do not fit in a tile (at most {MOST_FRAMES})"
    if head_width not in HEAD_WIDTHS:
        return f"heads of width {head_width} (expected 16, 32 or 64)"
    return ""


@torch.library.custom_op("msq::temporal_attention", mutates_args=())
def _forward(qkv: Tensor, heads: int, triton: bool) -> Tensor:
    """Mixed values [P, T, D]."""
    if triton:
        from msq.kernels.gpu.temporal_attention import launch_forward

        return launch_forward(qkv.contiguous(), heads)
    q, k, v = _split(qkv, heads)
    return _joined(_probabilities(q, k) @ v).to(qkv.dtype)


@_forward.register_fake
def _(qkv: Tensor, heads: int, triton: bool) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


@torch.library.custom_op("msq::temporal_attention_backward", mutates_args=())
def _backward(grad: Tensor, qkv: Tensor, heads: int, triton: bool) -> Tensor:
    """Gradients of q, k and v [P, T, 3 D], packed as they are."""
    if triton:
        from msq.kernels.gpu.temporal_attention import launch_backward

        return launch_backward(grad.contiguous(), qkv.contiguous(), heads)
    q, k, v = _split(qkv, heads)
    p = _probabilities(q, k)
    g = grad.to(q.dtype).reshape(*grad.shape[:2], heads, q.shape[-1]).transpose(1, 2)
    dp = g @ v.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
    parts = (ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ g)
    return torch.cat([_joined(x) for x in parts], 2).to(qkv.dtype)


@_backward.register_fake
def _(grad: Tensor, qkv: Tensor, heads: int, triton: bool) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, *ctx.rest = inputs
    ctx.save_for_backward(qkv)  # and nothing else: the probabilities are computed again


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dqkv = torch.ops.msq.temporal_attention_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return dqkv, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """q, k and v [P, H, T, d] in float32 or wider."""
    wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    split = wide.reshape(*qkv.shape[:2], 3, heads, qkv.shape[2] // (3 * heads))
    q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)


def _joined(x: Tensor) -> Tensor:
    """[P, H, T, d] -> [P, T, H d]."""
    return x.transpose(1, 2).flatten(2)
