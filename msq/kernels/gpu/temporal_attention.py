"""The Triton kernels of `msq.kernels.temporal_attention`.

A problem (the T frames of one place, one head) is far smaller than a tile of the usual attention
kernels. Here a block of 16 or 32 rows holds as many whole problems as fit, told apart by a
block-diagonal mask, and a program takes several blocks as one batched product, so that every warp
has rows of its own and a wasted product is at most one block wide. The rows of a problem are
neighbours in memory and so are the problems: a block is a run of rows, and nothing is copied. No
problem is cut, so the backward pass is one kernel without atomics that computes the probabilities
again and needs nothing but q, k and v.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from msq.kernels.gpu.launch import capability, on_its_device
from msq.kernels.tiles import Tile, find_tile

_LOG2E = 1.4426950408889634


@triton.jit
def flipped(x, BLOCKS: tl.constexpr):
    """The last two axes exchanged."""
    return tl.trans(x) if BLOCKS == 1 else tl.permute(x, (0, 2, 1))


@triton.jit
def rows_of(
    left, stride: tl.constexpr, d: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Offsets [BLOCKS, BLOCK, d] from a program's first row, and which rows [.., BLOCK, 1] exist.

    `left` is how many rows there are from the first one on. One block has no axis of its own.
    """
    row = tl.arange(0, BLOCK)
    lane = tl.arange(0, d)
    used: tl.constexpr = BLOCK // T * T
    if BLOCKS == 1:
        at = row[:, None] * stride + lane[None, :]
        inside = ((row < used) & (row < left))[:, None]
    else:
        whole = tl.arange(0, BLOCKS)[:, None] * used + row[None, :]
        at = whole[:, :, None] * stride + lane[None, None, :]
        inside = ((row < used)[None, :] & (whole < left))[:, :, None]
    return at, inside


@triton.jit
def probabilities(
    q, k, scale2, T: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """softmax(q k^T) [.., BLOCK, BLOCK] within each problem, 0 between problems.

    Rows beyond the last problem see at least themselves, so nothing divides by zero.
    """
    s = tl.dot(q, flipped(k, BLOCKS), input_precision=PRECISION) * scale2
    if T < BLOCK:
        row = tl.arange(0, BLOCK) // T
        same = row[:, None] == row[None, :]
        s = tl.where(same if BLOCKS == 1 else same[None, :, :], s, float("-inf"))
    p = tl.exp2(s - tl.max(s, axis=-1, keep_dims=True))
    return p * (1.0 / tl.sum(p, axis=-1, keep_dims=True))


@triton.jit
def forward(
    qkv, out, rows, scale2, H: tl.constexpr, d: tl.constexpr, T: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of problems of one head; heads of the same rows run side by side."""
    D: tl.constexpr = H * d
    h = tl.program_id(0) % H
    first = (tl.program_id(0) // H).to(tl.int64) * (BLOCKS * (BLOCK // T * T))
    left = (rows - first).to(tl.int32)
    at, inside = rows_of(left, 3 * D, d, T, BLOCK, BLOCKS)
    here = qkv + first * (3 * D) + h * d
    q = tl.load(here + at, mask=inside, other=0.0)
    k = tl.load(here + at + D, mask=inside, other=0.0)
    v = tl.load(here + at + 2 * D, mask=inside, other=0.0)
    p = probabilities(q, k, scale2, T, BLOCK, BLOCKS, PRECISION)
    mixed = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    to, _ = rows_of(left, D, d, T, BLOCK, BLOCKS)
    tl.store(out + first * D + h * d + to, mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    grad, qkv, dqkv, rows, scale, scale2, H: tl.constexpr, d: tl.constexpr, T: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """All gradients of BLOCKS blocks of problems of one head."""
    D: tl.constexpr = H * d
    h = tl.program_id(0) % H
    first = (tl.program_id(0) // H).to(tl.int64) * (BLOCKS * (BLOCK // T * T))
    left = (rows - first).to(tl.int32)
    at, inside = rows_of(left, 3 * D, d, T, BLOCK, BLOCKS)
    of_grad, _ = rows_of(left, D, d, T, BLOCK, BLOCKS)
    here = qkv + first * (3 * D) + h * d
    q = tl.load(here + at, mask=inside, other=0.0)
    k = tl.load(here + at + D, mask=inside, other=0.0)
    p = probabilities(q, k, scale2, T, BLOCK, BLOCKS, PRECISION)
    g = tl.load(grad + first * D + h * d + of_grad, mask=inside, other=0.0)
    there = dqkv + first * (3 * D) + h * d + at
    # Rows that do not exist have the gradient 0 and add nothing to dk and dv.
    dv = tl.dot(flipped(p.to(g.dtype), BLOCKS), g, input_precision=PRECISION)
    tl.store(there + 2 * D, dv.to(dqkv.dtype.element_ty), mask=inside)
    v = tl.load(here + at + 2 * D, mask=inside, other=0.0)
    dp = tl.dot(g, flipped(v, BLOCKS), input_precision=PRECISION)
    ds = (p * (dp - tl.sum(p * dp, axis=-1, keep_dims=True)) * scale).to(k.dtype)
    dq = tl.dot(ds, k, input_precision=PRECISION)
    tl.store(there, dq.to(dqkv.dtype.element_ty), mask=inside)
    dk = tl.dot(flipped(ds, BLOCKS), q, input_precision=PRECISION)
    tl.store(there + D, dk.to(dqkv.dtype.element_ty), mask=inside)


@on_its_device
def launch_forward(qkv: Tensor, heads: int) -> Tensor:
    """Mixed values [P, T, D]."""
    problems, frames, three = qkv.shape
    out = torch.empty(problems, frames, three // 3, dtype=qkv.dtype, device=qkv.device)
    tile = find_tile("temporal_attention", capability(qkv), frames)
    scale = _LOG2E / math.sqrt(three // (3 * heads))
    forward[_grid(qkv, heads, tile)](
        qkv, out, problems * frames, scale, **_constants(qkv, heads), **tile.launch()
    )
    return out


@on_its_device
def launch_backward(grad: Tensor, qkv: Tensor, heads: int) -> Tensor:
    """Gradients of q, k and v, packed as they are [P, T, 3 D]."""
    problems, frames, three = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    tile = find_tile("temporal_attention_backward", capability(qkv), frames)
    root = math.sqrt(three // (3 * heads))
    backward[_grid(qkv, heads, tile)](
        grad, qkv, dqkv, problems * frames, 1 / root, _LOG2E / root, **_constants(qkv, heads),
        **tile.launch(),
    )  # fmt: skip
    return dqkv


def _grid(qkv: Tensor, heads: int, tile: Tile) -> tuple[int]:
    """One axis: the others end at 65535, and there are more problems than that."""
    problems, frames, _ = qkv.shape
    of_program = tile.sizes["BLOCKS"] * (tile.sizes["BLOCK"] // frames)
    return (triton.cdiv(problems, of_program) * heads,)


def _constants(qkv: Tensor, heads: int) -> dict[str, int | str]:
    return {
        "H": heads, "d": qkv.shape[2] // (3 * heads), "T": qkv.shape[1],
        "PRECISION": "ieee" if qkv.dtype == torch.float32 else "tf32",
    }  # fmt: skip
