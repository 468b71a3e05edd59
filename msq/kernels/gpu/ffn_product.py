"""The Triton kernels of `msq.kernels.ffn_product`: a product and what follows it in one program.

A program makes ROWS x COLS numbers of the product in registers and finishes them there. No atomics:
each tile of rows writes its own sums over the rows, which one reduction adds up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msq.kernels.gpu.launch import capability, on_its_device
from msq.kernels.tiles import Tile, find_tile


@triton.jit
def forward(
    x, weight, bias, bits, out, M, scale, F: tl.constexpr, D: tl.constexpr, HAS_BITS: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Hidden layer: keep relu(x weight^T + bias) scale; weight is [F, D]."""
    across: tl.constexpr = (F + COLS - 1) // COLS
    first = (tl.program_id(0) // across).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLS
    col = column + tl.arange(0, COLS)
    lane = tl.arange(0, DEPTH)
    # Rows and columns past the end take the last one's numbers, which are not stored.
    near = (tl.minimum(first + row, M - 1) - first).to(tl.int32)
    x_at = x + first * D + near[:, None] * D + lane[None, :]
    w_at = weight + tl.minimum(col, F - 1)[None, :] * D + lane[:, None]
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(0, D, DEPTH):
        if D % DEPTH == 0:
            a = tl.load(x_at + start)
            b = tl.load(w_at + start)
        else:
            a = tl.load(x_at + start, mask=(start + lane < D)[None, :], other=0.0)
            b = tl.load(w_at + start, mask=(start + lane < D)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    # By halves of the columns: finished as a whole, the tile takes all registers.
    left, right = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLS // 2)), (0, 2, 1)))
    rows = tl.minimum(M - first, ROWS).to(tl.int32)
    of_rows = bits + first * ((F + 31) // 32)
    finish(left, bias, of_rows, out + first * F, rows, column, scale, F, HAS_BITS, ROWS, COLS // 2)
    finish(right, bias, of_rows, out + first * F, rows, column + COLS // 2, scale, F, HAS_BITS,
           ROWS, COLS // 2)  # fmt: skip


@triton.jit
def finish(
    total, bias, bits, out, rows, column, scale, F: tl.constexpr, HAS_BITS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Bias, ReLU and dropout of some columns; `rows` of the tile are real."""
    row = tl.arange(0, ROWS)
    col = column + tl.arange(0, COLS)
    here = row < rows
    total += tl.load(bias + col, mask=col < F, other=0.0).to(tl.float32)[None, :]
    total = tl.where(total < 0, 0.0, total) * scale  # what is no number stays none
    if HAS_BITS:
        words: tl.constexpr = (F + 31) // 32
        word = column // 32 + tl.arange(0, COLS // 32)
        packed = tl.load(
            bits + row[:, None] * words + word[None, :],
            mask=here[:, None] & (word < words)[None, :], other=0,
        )  # fmt: skip
        single = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        keep = tl.reshape(1 - single, (ROWS, COLS)).to(tl.int8)
        total = total * keep.to(tl.float32)
    at = out + row[:, None] * F + col[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=here[:, None] & (col < F)[None, :])


@triton.jit
def backward(
    grad, weight, hidden, dx, parts, M, scale, F: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradient (hidden > 0) (grad weight) scale, and its sums over these rows; weight is [D, F]."""
    across: tl.constexpr = (F + COLS - 1) // COLS
    group = tl.program_id(0) // across
    first = group.to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLS
    col = column + tl.arange(0, COLS)
    lane = tl.arange(0, DEPTH)
    near = (tl.minimum(first + row, M - 1) - first).to(tl.int32)
    grad_at = grad + first * D + near[:, None] * D + lane[None, :]
    w_at = weight + lane[:, None] * F + col[None, :]
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(0, D, DEPTH):
        if D % DEPTH == 0:
            a = tl.load(grad_at + start)
        else:
            a = tl.load(grad_at + start, mask=(start + lane < D)[None, :], other=0.0)
        if D % DEPTH == 0 and F % COLS == 0:
            b = tl.load(w_at + start * F)
        else:
            real = (start + lane < D)[:, None] & (col < F)[None, :]
            b = tl.load(w_at + start * F, mask=real, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    # By halves: gated as a whole, 128 x 256 numbers spill.
    left, right = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLS // 2)), (0, 2, 1)))
    rows = tl.minimum(M - first, ROWS).to(tl.int32)
    gate(left, hidden + first * F, dx + first * F, parts + group.to(tl.int64) * F, rows, column,
         scale, F, ROWS, COLS // 2)  # fmt: skip
    gate(right, hidden + first * F, dx + first * F, parts + group.to(tl.int64) * F, rows,
         column + COLS // 2, scale, F, ROWS, COLS // 2)  # fmt: skip


@triton.jit
def gate(
    total, hidden, dx, parts, rows, column, scale, F: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Lets through what the hidden layer let through; `rows` of the tile are real."""
    row = tl.arange(0, ROWS)
    col = column + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < F)[None, :]
    at = row[:, None] * F + col[None, :]
    seen = tl.load(hidden + at, mask=inside, other=0.0)
    total = tl.where(seen <= 0, 0.0, total * scale)
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=inside)
    tl.store(parts + col, tl.sum(total, axis=0), mask=col < F)


@on_its_device
def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor, bits: Tensor | None, scale: float
) -> Tensor:
    """[M, F]."""
    rows, width = x.shape[0], weight.shape[0]
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    tile = find_tile("ffn_product", capability(x), width)
    forward[(_programs(tile, rows, width),)](
        x.contiguous(), weight.contiguous(), bias.contiguous(),
        x if bits is None else bits.contiguous(), out, rows, scale, F=width, D=x.shape[1],
        HAS_BITS=bits is not None, PRECISION=_precision(x), **tile.launch(),
    )  # fmt: skip
    return out


@on_its_device
def launch_backward(
    grad: Tensor, weight: Tensor, hidden: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the first product [M, F] and of its bias [F]."""
    rows, width = hidden.shape
    dx = torch.empty(rows, width, dtype=hidden.dtype, device=hidden.device)
    tile = find_tile("ffn_product_backward", capability(hidden), width)
    groups = triton.cdiv(rows, tile.sizes["ROWS"])
    parts = torch.empty(groups, width, dtype=torch.float32, device=hidden.device)
    backward[(_programs(tile, rows, width),)](
        grad.contiguous(), weight.contiguous(), hidden.contiguous(), dx, parts, rows, scale,
        F=width, D=grad.shape[1], PRECISION=_precision(hidden), **tile.launch(),
    )  # fmt: skip
    return dx, parts.sum(0).to(bias.dtype)


def _programs(tile: Tile, rows: int, width: int) -> int:
    """Tiles of a product [rows, width]."""
    down, across = triton.cdiv(rows, tile.sizes["ROWS"]), triton.cdiv(width, tile.sizes["COLS"])
    return int(down * across)


def _precision(x: Tensor) -> str:
    """Of a product: whole where the numbers are float32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
