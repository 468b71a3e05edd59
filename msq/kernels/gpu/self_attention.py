"""The Triton kernels of `msq.kernels.self_attention`.

A program holds whole rows of scores, so there is no running softmax. K is no power of two; the keys
are cut into two pieces that are (157 = 128 + 32 with 3 columns masked), each a product of its own.
The backward pass is two kernels without atomics: one by rows of queries for dq, one by rows of keys
for dk and dv, each recomputing the probabilities from the stored denominators.
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


def key_pieces(keys: int) -> tuple[int, int]:
    """Two powers of two, the second may be 0, that cover so many keys with little waste."""
    first = max(16, 1 << (keys.bit_length() - 1))
    rest = max(0, keys - first)
    second = 0 if not rest else max(16, triton.next_power_of_2(rest))
    return (first, second) if second < first else (2 * first, 0)


@triton.jit
def load_part(
    qkv, clip, b, h, K, idx, part: tl.constexpr,
    D: tl.constexpr, d: tl.constexpr, FACTORISED: tl.constexpr,
):  # fmt: skip
    """Rows [n, d] of q (0), k (1) or v (2) of one clip and head; zeros beyond K."""
    lane = tl.arange(0, d)
    column = part * D + h * d + lane
    first = 0 if FACTORISED else b * K
    row = (first + idx).to(tl.int64)
    inside = (idx < K)[:, None]
    tile = tl.load(qkv + row[:, None] * (3 * D) + column[None, :], mask=inside, other=0.0)
    if FACTORISED and part != 1:
        added = tl.load(clip + b.to(tl.int64) * (3 * D) + column)
        total = tile.to(tl.float32) + added[None, :].to(tl.float32)
        tile = tl.where(inside, total, 0.0).to(qkv.dtype.element_ty)
    return tile


@triton.jit
def load_keep(bits, row, first: tl.constexpr, K, words, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] of 1 for kept and 0 for dropped; `first` is a whole word."""
    if COLS % 32 == 0:
        word = first // 32 + tl.arange(0, COLS // 32)
        inside = (row[1] < K)[:, None] & (word < words)[None, :]
        packed = tl.load(bits + row[0][:, None] * words + word[None, :], mask=inside, other=0)
        single = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        keep = 1 - tl.reshape(single, (ROWS, COLS))
    else:
        packed = tl.load(bits + row[0] * words + first // 32, mask=row[1] < K, other=0)
        keep = 1 - ((packed[:, None] >> tl.arange(0, COLS)[None, :]) & 1)
    return keep.to(tl.float32)


@triton.jit
def score(
    q, k, valid, group, first, K, scale2,
    COLS: tl.constexpr, HAS_VALID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores q k^T in units of log2, -inf for keys that are none."""
    col = first + tl.arange(0, COLS)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
    inside = col < K
    if HAS_VALID:
        inside = inside & (tl.load(valid + group * K + col, mask=inside, other=0) != 0)
    return tl.where(inside[None, :], s, float("-inf"))


@triton.jit
def forward(
    qkv, clip, bits, valid, out, log_sum, K, H, per_group, words, scale2, keep_scale,
    D: tl.constexpr, d: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    HAS_BITS: tl.constexpr, HAS_VALID: tl.constexpr, FACTORISED: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one clip and head."""
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    group = b // per_group
    idx = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bit_row = (bh.to(tl.int64) * K + idx, idx)
    q = load_part(qkv, clip, b, h, K, idx, 0, D, d, FACTORISED)
    k1 = load_part(qkv, clip, b, h, K, tl.arange(0, FIRST), 1, D, d, FACTORISED)
    s1 = score(q, k1, valid, group, 0, K, scale2, FIRST, HAS_VALID, PRECISION)
    top = tl.max(s1, axis=1)
    if SECOND > 0:
        k2 = load_part(qkv, clip, b, h, K, FIRST + tl.arange(0, SECOND), 1, D, d, FACTORISED)
        s2 = score(q, k2, valid, group, FIRST, K, scale2, SECOND, HAS_VALID, PRECISION)
        top = tl.maximum(top, tl.max(s2, axis=1))
    p1 = tl.exp2(s1 - top[:, None])
    total = tl.sum(p1, axis=1)
    if HAS_BITS:
        p1 = p1 * load_keep(bits, bit_row, 0, K, words, ROWS, FIRST)
    v1 = load_part(qkv, clip, b, h, K, tl.arange(0, FIRST), 2, D, d, FACTORISED)
    mixed = tl.dot(p1.to(v1.dtype), v1, input_precision=PRECISION)
    if SECOND > 0:
        p2 = tl.exp2(s2 - top[:, None])
        total += tl.sum(p2, axis=1)
        if HAS_BITS:
            p2 = p2 * load_keep(bits, bit_row, FIRST, K, words, ROWS, SECOND)
        v2 = load_part(qkv, clip, b, h, K, FIRST + tl.arange(0, SECOND), 2, D, d, FACTORISED)
        mixed += tl.dot(p2.to(v2.dtype), v2, input_precision=PRECISION)
    mixed = mixed * (keep_scale / total)[:, None]
    at = (b.to(tl.int64) * K + idx)[:, None] * D + h * d + tl.arange(0, d)[None, :]
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=(idx < K)[:, None])
    tl.store(log_sum + bh.to(tl.int64) * K + idx, top + tl.log2(total), mask=idx < K)


@triton.jit
def probability_gradient(
    q, k, v, g, lse, bits, bit_row, valid, group, first: tl.constexpr, K, words, scale2,
    keep_scale, COLS: tl.constexpr, ROWS: tl.constexpr, HAS_BITS: tl.constexpr,
    HAS_VALID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Probabilities before dropout, and their gradient, of one piece of the keys."""
    s = score(q, k, valid, group, first, K, scale2, COLS, HAS_VALID, PRECISION)
    p = tl.exp2(s - lse[:, None])
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    if HAS_BITS:
        dp = dp * load_keep(bits, bit_row, first, K, words, ROWS, COLS) * keep_scale
    return p, dp


@triton.jit
def backward_rows(
    grad, qkv, clip, bits, valid, log_sum, delta, dqkv, K, H, per_group, words, scale, scale2,
    keep_scale, D: tl.constexpr, d: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    HAS_BITS: tl.constexpr, HAS_VALID: tl.constexpr, FACTORISED: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient dq of one tile of queries; sum(p dp) of each, for the other kernel."""
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    group = b // per_group
    idx = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = idx < K
    bit_row = (bh.to(tl.int64) * K + idx, idx)
    q = load_part(qkv, clip, b, h, K, idx, 0, D, d, FACTORISED)
    at = (b.to(tl.int64) * K + idx)[:, None] * D + h * d + tl.arange(0, d)[None, :]
    g = tl.load(grad + at, mask=inside[:, None], other=0.0)
    lse = tl.load(log_sum + bh.to(tl.int64) * K + idx, mask=inside, other=0.0)
    k1 = load_part(qkv, clip, b, h, K, tl.arange(0, FIRST), 1, D, d, FACTORISED)
    v1 = load_part(qkv, clip, b, h, K, tl.arange(0, FIRST), 2, D, d, FACTORISED)
    p1, dp1 = probability_gradient(
        q, k1, v1, g, lse, bits, bit_row, valid, group, 0, K, words, scale2, keep_scale,
        FIRST, ROWS, HAS_BITS, HAS_VALID, PRECISION,
    )  # fmt: skip
    row_sum = tl.sum(p1 * dp1, axis=1)
    if SECOND > 0:
        k2 = load_part(qkv, clip, b, h, K, FIRST + tl.arange(0, SECOND), 1, D, d, FACTORISED)
        v2 = load_part(qkv, clip, b, h, K, FIRST + tl.arange(0, SECOND), 2, D, d, FACTORISED)
        p2, dp2 = probability_gradient(
            q, k2, v2, g, lse, bits, bit_row, valid, group, FIRST, K, words, scale2, keep_scale,
            SECOND, ROWS, HAS_BITS, HAS_VALID, PRECISION,
        )  # fmt: skip
        row_sum += tl.sum(p2 * dp2, axis=1)
    ds1 = p1 * (dp1 - row_sum[:, None]) * scale
    dq = tl.dot(ds1.to(k1.dtype), k1, input_precision=PRECISION)
    if SECOND > 0:
        ds2 = p2 * (dp2 - row_sum[:, None]) * scale
        dq += tl.dot(ds2.to(k2.dtype), k2, input_precision=PRECISION)
    to = (b.to(tl.int64) * K + idx)[:, None] * (3 * D) + h * d + tl.arange(0, d)[None, :]
    tl.store(dqkv + to, dq.to(dqkv.dtype.element_ty), mask=inside[:, None])
    tl.store(delta + bh.to(tl.int64) * K + idx, row_sum, mask=inside)


@triton.jit
def backward_keys(
    grad, qkv, clip, bits, valid, log_sum, delta, dqkv, K, H, per_group, words, scale, scale2,
    keep_scale, D: tl.constexpr, d: tl.constexpr, HAS_BITS: tl.constexpr, HAS_VALID: tl.constexpr,
    FACTORISED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The gradients dk and dv of one tile of keys, over all tiles of queries in order."""
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    first = tl.program_id(0) * COLS
    col = first + tl.arange(0, COLS)
    lane = tl.arange(0, d)
    k = load_part(qkv, clip, b, h, K, col, 1, D, d, FACTORISED)
    v = load_part(qkv, clip, b, h, K, col, 2, D, d, FACTORISED)
    real = col < K
    if HAS_VALID:
        real = real & (tl.load(valid + (b // per_group) * K + col, mask=real, other=0) != 0)
    dk = tl.zeros((COLS, d), dtype=tl.float32)
    dv = tl.zeros((COLS, d), dtype=tl.float32)
    for start in range(0, K, ROWS):
        idx = start + tl.arange(0, ROWS)
        inside = idx < K
        q = load_part(qkv, clip, b, h, K, idx, 0, D, d, FACTORISED)
        at = (b.to(tl.int64) * K + idx)[:, None] * D + h * d + lane[None, :]
        g = tl.load(grad + at, mask=inside[:, None], other=0.0)
        lse = tl.load(log_sum + bh.to(tl.int64) * K + idx, mask=inside, other=0.0)
        row_sum = tl.load(delta + bh.to(tl.int64) * K + idx, mask=inside, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2
        p = tl.where(real[:, None] & inside[None, :], tl.exp2(s - lse[None, :]), 0.0)
        dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        dropped = p
        if HAS_BITS:
            word = first // 32 + tl.arange(0, COLS // 32)
            where = (bh.to(tl.int64) * K + idx)[:, None] * words + word[None, :]
            packed = tl.load(bits + where, mask=inside[:, None] & (word < words)[None, :], other=0)
            single = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
            keep = tl.trans(1 - tl.reshape(single, (ROWS, COLS))).to(tl.float32) * keep_scale
            dropped = p * keep
            dp = dp * keep
        dv += tl.dot(dropped.to(g.dtype), g, input_precision=PRECISION)
        ds = p * (dp - row_sum[None, :]) * scale
        dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    to = (b.to(tl.int64) * K + col)[:, None] * (3 * D) + h * d + lane[None, :]
    tl.store(dqkv + to + D, dk.to(dqkv.dtype.element_ty), mask=(col < K)[:, None])
    tl.store(dqkv + to + 2 * D, dv.to(dqkv.dtype.element_ty), mask=(col < K)[:, None])


@on_its_device
def launch_forward(
    qkv: Tensor, clip: Tensor | None, bits: Tensor | None, valid: Tensor | None,
    clips: int, heads: int, keep_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mixed values [B K, D] and log2 of the denominators [B H K]."""
    keys, width, shared = _shared(qkv, clip, bits, valid, clips, heads)
    out = torch.empty(clips * keys, width, dtype=qkv.dtype, device=qkv.device)
    log_sum = torch.empty(clips * heads * keys, dtype=torch.float32, device=qkv.device)
    tile = find_tile("self_attention", capability(qkv), keys)
    first, second = key_pieces(keys)
    forward[(triton.cdiv(keys, tile.sizes["ROWS"]), clips * heads)](
        qkv, given(clip, qkv), given(bits, qkv), given(valid, qkv), out, log_sum, keys, heads,
        _per_group(valid, clips), -(-keys // 32), _LOG2E / math.sqrt(width // heads), keep_scale,
        FIRST=first, SECOND=second, **shared, **tile.launch(),
    )  # fmt: skip
    return out, log_sum


@on_its_device
def launch_backward(
    grad: Tensor, qkv: Tensor, clip: Tensor | None, bits: Tensor | None, valid: Tensor | None,
    log_sum: Tensor, clips: int, heads: int, keep_scale: float,
) -> Tensor:  # fmt: skip
    """Gradients of q, k and v of every clip [B K, 3 D]."""
    keys, width, shared = _shared(qkv, clip, bits, valid, clips, heads)
    dqkv = torch.empty(clips * keys, 3 * width, dtype=qkv.dtype, device=qkv.device)
    delta = torch.empty_like(log_sum)
    root = math.sqrt(width // heads)
    arguments = (
        grad, qkv, given(clip, qkv), given(bits, qkv), given(valid, qkv), log_sum, delta, dqkv,
        keys, heads, _per_group(valid, clips), -(-keys // 32), 1 / root, _LOG2E / root, keep_scale,
    )  # fmt: skip
    first, second = key_pieces(keys)
    tile = find_tile("self_attention_backward_rows", capability(qkv), keys)
    grid = (triton.cdiv(keys, tile.sizes["ROWS"]), clips * heads)
    backward_rows[grid](*arguments, FIRST=first, SECOND=second, **shared, **tile.launch())
    tile = find_tile("self_attention_backward_keys", capability(qkv), keys)
    grid = (triton.cdiv(keys, tile.sizes["COLS"]), clips * heads)
    backward_keys[grid](*arguments, **shared, **tile.launch())
    return dqkv


def _shared(
    qkv: Tensor, clip: Tensor | None, bits: Tensor | None, valid: Tensor | None,
    clips: int, heads: int,
) -> tuple[int, int, dict[str, int | str]]:  # fmt: skip
    """K, D and the constants that all three kernels have."""
    width = qkv.shape[1] // 3
    keys = qkv.shape[0] if clip is not None else qkv.shape[0] // clips
    constants = {
        "D": width, "d": width // heads, "HAS_BITS": bits is not None,
        "HAS_VALID": valid is not None, "FACTORISED": clip is not None,
        "PRECISION": "ieee" if qkv.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return keys, width, constants


def _per_group(valid: Tensor | None, clips: int) -> int:
    """Clips that share a row of `valid`."""
    return clips if valid is None else clips // len(valid)
