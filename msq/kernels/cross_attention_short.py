"""Cross-attention to a short memory, projections apart, with a clip's whole memory on the chip.

    s = q k^T / sqrt(d)     p = softmax(s)     out = (keep p / (1 - drop)) v

It is for few queries; for many, the absorbed form (`msq.kernels.cross_attention`) is less work.
Keys and values may be columns of one wide product for all layers: rows have any stride.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from msq.kernels.norm import kept
from msq.kernels.self_attention import require_launchable

MOST_TOKENS = 32  # the decisions of a row of probabilities are one word


def cross_attention(
    q: Tensor,
    kv: Tensor,
    clips: int,
    heads: int,
    bits: Tensor | None = None,
    keep_scale: float = 1.0,
    *,
    triton: bool = False,
) -> Tensor:
    """Attention from the queries of each clip to its tokens.

    Args:
        q: [B K, D], heads side by side; rows of any stride.
        kv: [B T, 2 D], k and v side by side, in the same dtype; rows of any stride.
        clips: B.
        heads: H.
        bits: int32 [B H K, ceil(T / 32)], 1 is dropped (`msq.kernels.bits`); None drops nothing.
        keep_scale: 1 / (probability of keeping).
        triton: run the kernel rather than the reference.

    Returns:
        [B K, D] in the dtype of `q`. Differentiable in `q` and `kv`.

    Raises:
        ValueError: shapes that do not fit, or too many clips for the kernel.
    """
    per_clip, tokens = q.shape[0] // max(clips, 1), kv.shape[0] // max(clips, 1)
    fits = q.shape[1] % heads == 0 and kv.shape[1] == 2 * q.shape[1] and q.dtype == kv.dtype
    fits = fits and q.shape[0] == clips * per_clip and kv.shape[0] == clips * tokens
    words = (clips * heads * per_clip, -(-tokens // 32))
    fits = fits and (bits is None or (bits.shape == words and bits.dtype == torch.int32))
    if not fits:
        shapes = {"q": q, "kv": kv, "bits": bits}
        found = ", ".join(
            f"{k} {v.dtype} {list(v.shape)}" for k, v in shapes.items() if v is not None
        )
        raise ValueError(f"cross_attention, B = {clips}, H = {heads}: {found} do not fit")
    if triton:
        require_launchable("cross_attention", clips, heads)
    out: Tensor = torch.ops.msq.cross_attention(q, kv, bits, clips, heads, keep_scale, triton)
    return out


def unsupported(tokens: int, head_width: int) -> str:
    """Why the kernel cannot take these sizes; empty where it can."""
    if tokens > MOST_TOKENS:
        return f"{tokens} tokens (at most {MOST_TOKENS})"
    if head_width not in (16, 32, 64, 128):
        return f"heads of width {head_width} (expected 16, 32, 64 or 128)"
    return ""


@torch.library.custom_op("msq::cross_attention", mutates_args=())
def _forward(
    q: Tensor,
    kv: Tensor,
    bits: Tensor | None,
    clips: int,
    heads: int,
    keep_scale: float,
    triton: bool,
) -> Tensor:
    """Mixed values [B K, D]."""
    if triton:
        from msq.kernels.gpu.cross_attention_short import launch_forward

        return launch_forward(q, kv, bits, clips, heads, keep_scale)
    queries, (k, v) = _split(q, clips, heads, 1)[0], _split(kv, clips, heads, 2)
    p, keep = _probabilities(queries, k, bits, keep_scale)
    return _joined((p * keep) @ v).to(q.dtype)


@_forward.register_fake
def _(
    q: Tensor,
    kv: Tensor,
    bits: Tensor | None,
    clips: int,
    heads: int,
    keep_scale: float,
    triton: bool,
) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("msq::cross_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    bits: Tensor | None,
    clips: int,
    heads: int,
    keep_scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of q [B K, D] and kv [B T, 2 D]."""
    if triton:
        from msq.kernels.gpu.cross_attention_short import launch_backward

        return launch_backward(grad.contiguous(), q, kv, bits, clips, heads, keep_scale)
    queries, (k, v) = _split(q, clips, heads, 1)[0], _split(kv, clips, heads, 2)
    p, keep = _probabilities(queries, k, bits, keep_scale)
    g = _split(grad.to(q.dtype), clips, heads, 1)[0]
    dp = g @ v.transpose(-1, -2) * keep
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / math.sqrt(q.shape[1] // heads)
    dk, dv = ds.transpose(-1, -2) @ queries, (p * keep).transpose(-1, -2) @ g
    return _joined(ds @ k).to(q.dtype), torch.cat([_joined(dk), _joined(dv)], 1).to(q.dtype)


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    bits: Tensor | None,
    clips: int,
    heads: int,
    keep_scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, kv, bits, *ctx.rest = inputs
    ctx.save_for_backward(q, kv, bits)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dq, dkv = torch.ops.msq.cross_attention_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return dq, dkv, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _split(rows: Tensor, clips: int, heads: int, parts: int) -> tuple[Tensor, ...]:
    """[B n, parts D] -> parts of [B, H, n, d] in float32 or wider."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    split = wide.reshape(clips, -1, parts, heads, rows.shape[1] // (parts * heads))
    return split.permute(2, 0, 3, 1, 4).unbind(0)


def _probabilities(
    q: Tensor, k: Tensor, bits: Tensor | None, keep_scale: float
) -> tuple[Tensor, Tensor | float]:
    """Before dropout [B, H, K, T], and what dropout multiplies them with."""
    p = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    if bits is None:
        return p, 1.0
    return p, kept(bits, k.shape[2]).view(p.shape).to(p.dtype) * keep_scale


def _joined(x: Tensor) -> Tensor:
    """[B, H, n, d] -> [B n, H d]."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)
