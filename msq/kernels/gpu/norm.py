"""The Triton kernels of `msq.kernels.norm`: one program per few rows, no atomics.

The backward pass sums the gradients of weight and bias over the rows of each program; the partial
sums are added up by one reduction, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msq.kernels.gpu.launch import capability, given, on_its_device
from msq.kernels.tiles import find_tile

_PROGRAMS = 1056  # of the backward pass: eight for each of 132 multiprocessors


@triton.jit
def load_kept(bits, row, inside_row, words: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] of 1 for kept and 0 for dropped, from whole words."""
    word = tl.arange(0, WIDTH // 32)
    at = row[:, None] * words + word[None, :]
    packed = tl.load(bits + at, mask=inside_row[:, None] & (word < words)[None, :], other=0)
    single = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return (1 - tl.reshape(single, (ROWS, WIDTH))).to(tl.float32)


@triton.jit
def forward(
    x,
    y,
    weight,
    bias,
    bits,
    out,
    h,
    mean,
    rstd,
    M,
    scale,
    eps,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each program takes ROWS rows, D numbers each."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, WIDTH)
    inside = (row < M)[:, None] & (col < D)[None, :]
    at = row[:, None] * D + col[None, :]
    total = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BITS:
        total = total * load_kept(bits, row, row < M, (D + 31) // 32, ROWS, WIDTH) * scale
    total += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(h.dtype.element_ty)
    tl.store(h + at, rounded, mask=inside)
    seen = rounded.to(tl.float32)
    mu = tl.sum(seen, axis=1) / D
    centred = tl.where(inside, seen - mu[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
    w = tl.load(weight + col, mask=col < D, other=0.0)
    b = tl.load(bias + col, mask=col < D, other=0.0)
    normed = centred * inverse[:, None] * w[None, :] + b[None, :]
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=inside)
    tl.store(mean + row, mu, mask=row < M)
    tl.store(rstd + row, inverse, mask=row < M)


@triton.jit
def backward(
    grad,
    h,
    mean,
    rstd,
    weight,
    bits,
    dx,
    dy,
    dweight,
    dbias,
    M,
    steps,
    scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each program takes `steps` groups of ROWS rows and writes one line of partial sums."""
    program = tl.program_id(0)
    col = tl.arange(0, WIDTH)
    w = tl.load(weight + col, mask=col < D, other=0.0)
    weight_sum = tl.zeros((WIDTH,), dtype=tl.float32)
    bias_sum = tl.zeros((WIDTH,), dtype=tl.float32)
    for step in range(steps):
        row = (program.to(tl.int64) * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (col < D)[None, :]
        at = row[:, None] * D + col[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        seen = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        mu = tl.load(mean + row, mask=row < M, other=0.0)
        inverse = tl.load(rstd + row, mask=row < M, other=0.0)
        normed = tl.where(inside, (seen - mu[:, None]) * inverse[:, None], 0.0)
        inner = g * w[None, :]
        first = tl.sum(inner, axis=1) / D
        second = tl.sum(inner * normed, axis=1) / D
        dh = (inner - first[:, None] - normed * second[:, None]) * inverse[:, None]
        tl.store(dx + at, dh.to(dx.dtype.element_ty), mask=inside)
        if HAS_BITS:
            dh = dh * load_kept(bits, row, row < M, (D + 31) // 32, ROWS, WIDTH) * scale
        tl.store(dy + at, dh.to(dy.dtype.element_ty), mask=inside)
        weight_sum += tl.sum(g * normed, axis=0)
        bias_sum += tl.sum(g, axis=0)
    tl.store(dweight + program * D + col, weight_sum, mask=col < D)
    tl.store(dbias + program * D + col, bias_sum, mask=col < D)


@on_its_device
def launch_forward(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    bits: Tensor | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result and h [M, D]; mean and inverse deviation [M] float32."""
    rows, width = x.shape
    tile = find_tile("drop_add_norm", capability(x), width)
    out, h = torch.empty_like(x), torch.empty_like(x)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    grid = (triton.cdiv(rows, tile.sizes["ROWS"]),)
    forward[grid](
        x, y, weight, bias, given(bits, x), out, h, mean, rstd, rows, scale, eps,
        D=width, WIDTH=triton.next_power_of_2(max(width, 32)), HAS_BITS=bits is not None,
        **tile.launch(),
    )  # fmt: skip
    return out, h, mean, rstd


@on_its_device
def launch_backward(
    grad: Tensor,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bits: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and y [M, D] and of weight and bias [D]."""
    rows, width = h.shape
    tile = find_tile("drop_add_norm_backward", capability(h), width)
    groups = triton.cdiv(rows, tile.sizes["ROWS"])
    programs = min(groups, _PROGRAMS)
    dx, dy = torch.empty_like(h), torch.empty_like(h)
    parts = torch.empty(2, programs, width, dtype=torch.float32, device=h.device)
    backward[(programs,)](
        grad, h, mean, rstd, weight, given(bits, h), dx, dy, parts[0], parts[1], rows,
        triton.cdiv(groups, programs), scale,
        D=width, WIDTH=triton.next_power_of_2(max(width, 32)), HAS_BITS=bits is not None,
        **tile.launch(),
    )  # fmt: skip
    sums = parts.sum(1)
    return dx, dy, sums[0], sums[1].clone()
