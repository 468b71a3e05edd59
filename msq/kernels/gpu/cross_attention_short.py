"""The Triton kernels of `msq.kernels.cross_attention_short`.

The tokens of a clip are padded to one tile of 16 or 32. The backward pass has one program for each
clip and head, which goes over its queries in order: no atomics.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from msq.kernels.gpu.launch import capability, given, on_its_device
from msq.kernels.tiles import find_tile

_LOG2E = 1.4426950408889634


@triton.jit
def load_memory(
    kv, b, h, T, stride, part: tl.constexpr, D: tl.constexpr, d: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """[TOKENS, d] of k (0) or v (1) of one clip and head; zeros beyond T."""
    token = tl.arange(0, TOKENS)
    row = (b.to(tl.int64) * T + token) * stride
    at = row[:, None] + (part * D + h * d + tl.arange(0, d))[None, :]
    return tl.load(kv + at, mask=(token < T)[:, None], other=0.0)


@triton.jit
def load_keep(bits, row, inside, TOKENS: tl.constexpr):
    """[ROWS, TOKENS] of 1 for kept and 0 for dropped; a row is one word."""
    packed = tl.load(bits + row, mask=inside, other=0)
    return (1 - ((packed[:, None] >> tl.arange(0, TOKENS)[None, :]) & 1)).to(tl.float32)


@triton.jit
def softmax(q, k, T, scale2, TOKENS: tl.constexpr, PRECISION: tl.constexpr):
    """Probabilities [ROWS, TOKENS] before dropout."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
    s = tl.where((tl.arange(0, TOKENS) < T)[None, :], s, float("-inf"))
    p = tl.exp2(s - tl.max(s, axis=1)[:, None])
    return p / tl.sum(p, axis=1)[:, None]


@triton.jit
def forward(
    q, kv, bits, out, K, T, H, q_stride, kv_stride, scale2, keep_scale, D: tl.constexpr,
    d: tl.constexpr, TOKENS: tl.constexpr, HAS_BITS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one clip and head."""
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    idx = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = idx < K
    row = b.to(tl.int64) * K + idx
    lane = h * d + tl.arange(0, d)
    tile = tl.load(q + row[:, None] * q_stride + lane[None, :], mask=inside[:, None], other=0.0)
    k = load_memory(kv, b, h, T, kv_stride, 0, D, d, TOKENS)
    p = softmax(tile, k, T, scale2, TOKENS, PRECISION)
    if HAS_BITS:
        p = p * load_keep(bits, bh.to(tl.int64) * K + idx, inside, TOKENS) * keep_scale
    v = load_memory(kv, b, h, T, kv_stride, 1, D, d, TOKENS)
    mixed = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    at = row[:, None] * D + lane[None, :]
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def backward(
    grad, q, kv, bits, dq, dkv, K, T, H, q_stride, kv_stride, scale, scale2, keep_scale,
    D: tl.constexpr, d: tl.constexpr, TOKENS: tl.constexpr, HAS_BITS: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """All gradients of one clip and head."""
    bh = tl.program_id(0)
    b, h = bh // H, bh % H
    lane = h * d + tl.arange(0, d)
    k = load_memory(kv, b, h, T, kv_stride, 0, D, d, TOKENS)
    v = load_memory(kv, b, h, T, kv_stride, 1, D, d, TOKENS)
    dk = tl.zeros((TOKENS, d), dtype=tl.float32)
    dv = tl.zeros((TOKENS, d), dtype=tl.float32)
    for start in range(0, K, ROWS):
        idx = start + tl.arange(0, ROWS)
        inside = idx < K
        row = b.to(tl.int64) * K + idx
        at = row[:, None] * D + lane[None, :]
        tile = tl.load(q + row[:, None] * q_stride + lane[None, :], mask=inside[:, None], other=0.0)
        g = tl.load(grad + at, mask=inside[:, None], other=0.0)
        p = softmax(tile, k, T, scale2, TOKENS, PRECISION)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        dropped = p
        if HAS_BITS:
            keep = load_keep(bits, bh.to(tl.int64) * K + idx, inside, TOKENS) * keep_scale
            dropped = p * keep
            dp = dp * keep
        # Rows beyond K have the gradient 0, so they add nothing to dk and dv.
        ds = (p * (dp - tl.sum(p * dp, axis=1)[:, None]) * scale).to(k.dtype)
        of_q = tl.dot(ds, k, input_precision=PRECISION)
        tl.store(dq + at, of_q.to(dq.dtype.element_ty), mask=inside[:, None])
        dk = tl.dot(tl.trans(ds), tile, dk, input_precision=PRECISION)
        dv = tl.dot(tl.trans(dropped.to(g.dtype)), g, dv, input_precision=PRECISION)
    token = tl.arange(0, TOKENS)
    to = (b.to(tl.int64) * T + token)[:, None] * (2 * D) + lane[None, :]
    tl.store(dkv + to, dk.to(dkv.dtype.element_ty), mask=(token < T)[:, None])
    tl.store(dkv + to + D, dv.to(dkv.dtype.element_ty), mask=(token < T)[:, None])


@on_its_device
def launch_forward(
    q: Tensor, kv: Tensor, bits: Tensor | None, clips: int, heads: int, keep_scale: float
) -> Tensor:
    """Mixed values [B K, D]."""
    q, kv = _rows(q), _rows(kv)
    sizes, constants = _shared(q, kv, bits, clips, heads)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tile = find_tile("cross_attention", capability(q), sizes[0])
    forward[(triton.cdiv(sizes[0], tile.sizes["ROWS"]), clips * heads)](
        q, kv, given(bits, q), out, *sizes, _LOG2E / math.sqrt(q.shape[1] // heads), keep_scale,
        **constants, **tile.launch(),
    )  # fmt: skip
    return out


@on_its_device
def launch_backward(
    grad: Tensor, q: Tensor, kv: Tensor, bits: Tensor | None, clips: int, heads: int,
    keep_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of q [B K, D] and kv [B T, 2 D]."""
    q, kv = _rows(q), _rows(kv)
    sizes, constants = _shared(q, kv, bits, clips, heads)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dkv = torch.empty(kv.shape, dtype=q.dtype, device=q.device)
    root = math.sqrt(q.shape[1] // heads)
    tile = find_tile("cross_attention_backward", capability(q), sizes[0])
    backward[(clips * heads,)](
        grad, q, kv, given(bits, q), dq, dkv, *sizes, 1 / root, _LOG2E / root, keep_scale,
        **constants, **tile.launch(),
    )  # fmt: skip
    return dq, dkv


def _shared(
    q: Tensor, kv: Tensor, bits: Tensor | None, clips: int, heads: int
) -> tuple[tuple[int, int, int, int, int], dict[str, int | str]]:
    """K, T, H and the strides of rows; the constants that both kernels have."""
    tokens = kv.shape[0] // clips
    sizes = (q.shape[0] // clips, tokens, heads, q.stride(0), kv.stride(0))
    constants: dict[str, int | str] = {
        "D": q.shape[1], "d": q.shape[1] // heads, "HAS_BITS": bits is not None,
        "TOKENS": 16 if tokens <= 16 else 32,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return sizes, constants


def _rows(x: Tensor) -> Tensor:
    """Rows of any stride stay where they are; their numbers lie side by side."""
    return x if x.stride(1) == 1 else x.contiguous()
