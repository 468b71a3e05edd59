"""LayerNorm(x + dropout(y)), the end of every residual branch, in one pass each way.

    h = x + keep y / (1 - p)         out = (h - mean h) / sqrt(var h + eps) * weight + bias

The sum and LayerNorm are float32 whatever the rows are (float64 for float64); h is rounded to the
rows' precision before it is normalised, since that is what the backward pass finds again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WIDEST = 2048  # D that fits one program


def drop_add_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    bits: Tensor | None = None,
    scale: float = 1.0,
    eps: float = 1e-5,
    *,
    triton: bool = False,
) -> Tensor:
    """Dropout, residual and post-norm.

    Args:
        x: [M, D], the residual stream.
        y: [M, D], the branch, in the same dtype.
        weight: [D] float32 (float64 with float64 rows).
        bias: likewise.
        bits: int32 [M, ceil(D / 32)], 1 is dropped (`msq.kernels.bits`); None drops nothing.
        scale: 1 / (probability of keeping).
        eps: of LayerNorm.
        triton: run the kernel rather than the reference.

    Returns:
        [M, D] in the dtype of `x`. Differentiable in x, y, weight and bias.

    Raises:
        ValueError: shapes that do not fit.
    """
    rows, width = x.shape
    words = None if bits is None else [rows, -(-width // 32)]
    if y.shape != x.shape or weight.shape != (width,) or bias.shape != (width,):
        raise ValueError(
            f"drop_add_norm: x {list(x.shape)}, y {list(y.shape)}, weight {list(weight.shape)}, "
            f"bias {list(bias.shape)} do not fit"
        )
    if bits is not None and (list(bits.shape) != words or bits.dtype != torch.int32):
        raise ValueError(
            f"drop_add_norm: bits: expected int32 {words}, found {bits.dtype} {list(bits.shape)}"
        )
    out: Tensor = torch.ops.msq.drop_add_norm(x, y, weight, bias, bits, scale, eps, triton)[0]
    return out


@torch.library.custom_op("msq::drop_add_norm", mutates_args=())
def _forward(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    bits: Tensor | None,
    scale: float,
    eps: float,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result and h [M, D]; mean and inverse deviation of h [M]."""
    x, y, weight, bias = (v.contiguous() for v in (x, y, weight, bias))
    if triton:
        from msq.kernels.gpu.norm import launch_forward

        return launch_forward(x, y, weight, bias, bits, scale, eps)
    wide = weight.dtype
    branch = y.to(wide)
    if bits is not None:
        branch = branch * kept(bits, x.shape[1]) * scale
    h = (x.to(wide) + branch).to(x.dtype)
    seen = h.to(wide)
    mean = seen.mean(1)
    rstd = (seen.var(1, correction=0) + eps).rsqrt()
    out = (seen - mean[:, None]) * rstd[:, None] * weight + bias
    return out.to(x.dtype), h, mean, rstd


@_forward.register_fake
def _(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    bits: Tensor | None,
    scale: float,
    eps: float,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = torch.empty(x.shape[0], dtype=weight.dtype, device=x.device)
    rows = torch.empty_like(x, memory_format=torch.contiguous_format)
    return rows, torch.empty_like(rows), row, torch.empty_like(row)


@torch.library.custom_op("msq::drop_add_norm_backward", mutates_args=())
def _backward(
    grad: Tensor,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bits: Tensor | None,
    scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and y [M, D], of weight and bias [D]."""
    grad, weight = grad.contiguous(), weight.contiguous()
    if triton:
        from msq.kernels.gpu.norm import launch_backward

        return launch_backward(grad, h, mean, rstd, weight, bits, scale)
    wide = weight.dtype
    g = grad.to(wide)
    normed = (h.to(wide) - mean[:, None]) * rstd[:, None]
    inner = g * weight
    dh = inner - inner.mean(1, keepdim=True) - normed * (inner * normed).mean(1, keepdim=True)
    dh = dh * rstd[:, None]
    dy = dh if bits is None else dh * kept(bits, h.shape[1]) * scale
    # Two outputs of an op may not be one tensor.
    dy = dy.to(h.dtype) if bits is not None else dy.to(h.dtype, copy=True)
    return dh.to(h.dtype), dy, (g * normed).sum(0), g.sum(0)


@_backward.register_fake
def _(
    grad: Tensor,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bits: Tensor | None,
    scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(h),
        torch.empty_like(h),
        torch.empty_like(weight),
        torch.empty_like(weight),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _, bits, scale, _, triton = inputs
    _, h, mean, rstd = output
    ctx.save_for_backward(h, mean, rstd, weight, bits)
    ctx.scale, ctx.triton = scale, triton
    ctx.mark_non_differentiable(h, mean, rstd)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    h, mean, rstd, weight, bits = ctx.saved_tensors
    dx, dy, dweight, dbias = torch.ops.msq.drop_add_norm_backward(
        grad, h, mean, rstd, weight, bits, ctx.scale, ctx.triton
    )
    return dx, dy, dweight, dbias, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def kept(bits: Tensor, columns: int) -> Tensor:
    """Booleans [rows, columns] from packed decisions: True where a number is kept."""
    places = torch.arange(32, dtype=torch.int32, device=bits.device)
    single = bits[:, :, None] >> places & 1
    return single.flatten(1)[:, :columns] == 0
