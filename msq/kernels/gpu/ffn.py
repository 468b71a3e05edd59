"""The Triton kernels of `msq.kernels.ffn`: a program takes some rows of some columns, no atomics.

The backward pass sums the gradient of the bias over the rows of each program; the partial sums are
added up by one reduction, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msq.kernels.gpu.launch import capability, on_its_device
from msq.kernels.tiles import find_tile

_PROGRAMS = 1056  # of the backward pass: eight for each of 132 multiprocessors


@triton.jit
def forward(
    x, bias, bits, out, M, scale, F: tl.constexpr, HAS_BITS: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of COLS columns."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    here = first + row < M
    inside = here[:, None] & (col < F)[None, :]
    at = row[:, None] * F + col[None, :]
    total = tl.load(x + first * F + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(bias + col, mask=col < F, other=0.0).to(tl.float32)[None, :]
    total = tl.where(total < 0, 0.0, total) * scale  # what is no number stays none
    if HAS_BITS:
        words: tl.constexpr = (F + 31) // 32
        word = tl.program_id(1) * (COLS // 32) + tl.arange(0, COLS // 32)
        where = row[:, None] * words + word[None, :]
        packed = tl.load(
            bits + first * words + where, mask=here[:, None] & (word < words)[None, :], other=0
        )
        single = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        total = total * (1 - tl.reshape(single, (ROWS, COLS))).to(tl.float32)
    tl.store(out + first * F + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    grad, out, dx, parts, M, steps, scale, F: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Each program takes `steps` groups of ROWS rows and writes one line of partial sums."""
    program = tl.program_id(0)
    row = tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros((COLS,), dtype=tl.float32)
    for step in range(steps):
        first = (program.to(tl.int64) * steps + step) * ROWS
        inside = (first + row < M)[:, None] & (col < F)[None, :]
        at = row[:, None] * F + col[None, :]
        g = tl.load(grad + first * F + at, mask=inside, other=0.0).to(tl.float32)
        seen = tl.load(out + first * F + at, mask=inside, other=0.0)
        passed = tl.where(seen <= 0, 0.0, g * scale)
        tl.store(dx + first * F + at, passed.to(dx.dtype.element_ty), mask=inside)
        total += tl.sum(passed, axis=0)
    tl.store(parts + program.to(tl.int64) * F + col, total, mask=col < F)


@on_its_device
def launch_forward(x: Tensor, bias: Tensor, bits: Tensor | None, scale: float) -> Tensor:
    """[M, F]."""
    rows, width = x.shape
    tile = find_tile("relu_drop", capability(x), width)
    out = torch.empty_like(x)
    grid = (triton.cdiv(rows, tile.sizes["ROWS"]), triton.cdiv(width, tile.sizes["COLS"]))
    forward[grid](
        x, bias.contiguous(), x if bits is None else bits.contiguous(), out, rows, scale,
        F=width, HAS_BITS=bits is not None, **tile.launch(),
    )  # fmt: skip
    return out


@on_its_device
def launch_backward(grad: Tensor, out: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of x [M, F] and of bias [F]."""
    rows, width = out.shape
    tile = find_tile("relu_drop_backward", capability(out), width)
    across = triton.cdiv(width, tile.sizes["COLS"])
    groups = triton.cdiv(rows, tile.sizes["ROWS"])
    programs = min(groups, max(1, _PROGRAMS // across))
    dx = torch.empty_like(out)
    parts = torch.empty(programs, width, dtype=torch.float32, device=out.device)
    backward[(programs, across)](
        grad, out, dx, parts, rows, triton.cdiv(groups, programs), scale, F=width, **tile.launch()
    )
    return dx, parts.sum(0).to(bias.dtype)
