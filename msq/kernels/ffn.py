"""What lies between the two products of a feed-forward network, in one pass each way.

    out = keep relu(x + bias) / (1 - drop)

A number of `out` is positive exactly where ReLU and dropout let it through, so the backward pass
reads neither the mask nor x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msq.kernels.norm import kept


def relu_drop(
    x: Tensor,
    bias: Tensor,
    bits: Tensor | None = None,
    scale: float = 1.0,
    *,
    triton: bool = False,
) -> Tensor:
    """Bias, ReLU and dropout.

    Args:
        x: [M, F], the first product without its bias.
        bias: [F].
        bits: int32 [M, ceil(F / 32)], 1 is dropped (`msq.kernels.bits`); None drops nothing.
        scale: 1 / (probability of keeping); 1 where the second product applies it.
        triton: run the kernel rather than the reference.

    Returns:
        [M, F] in the dtype of `x`. Differentiable in `x` and `bias`.

    Raises:
        ValueError: shapes that do not fit, or a scale that is not positive.
    """
    rows, width = x.shape
    words = (rows, -(-width // 32))
    fits = bias.shape == (width,)
    fits = fits and (bits is None or (bits.shape == words and bits.dtype == torch.int32))
    if not fits:
        mask = "" if bits is None else f", bits {bits.dtype} {list(bits.shape)}"
        raise ValueError(
            f"relu_drop: x {list(x.shape)}, bias {list(bias.shape)}{mask} do not fit "
            f"(bits: int32 {list(words)})"
        )
    if not scale > 0:
        raise ValueError(f"relu_drop: scale: expected a positive number, found {scale}")
    out: Tensor = torch.ops.msq.relu_drop(x, bias, bits, scale, triton)
    return out


@torch.library.custom_op("msq::relu_drop", mutates_args=())
def _forward(x: Tensor, bias: Tensor, bits: Tensor | None, scale: float, triton: bool) -> Tensor:
    """[M, F]."""
    x = x.contiguous()
    if triton:
        from msq.kernels.gpu.ffn import launch_forward

        return launch_forward(x, bias, bits, scale)
    wide = torch.promote_types(x.dtype, torch.float32)
    hidden = (x.to(wide) + bias.to(wide)).relu()
    if bits is not None:
        hidden = hidden * kept(bits, x.shape[1])
    return (hidden * scale).to(x.dtype)


@_forward.register_fake
def _(x: Tensor, bias: Tensor, bits: Tensor | None, scale: float, triton: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("msq::relu_drop_backward", mutates_args=())
def _backward(
    grad: Tensor, out: Tensor, bias: Tensor, scale: float, triton: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x [M, F] and of bias [F]."""
    grad = grad.contiguous()
    if triton:
        from msq.kernels.gpu.ffn import launch_backward

        return launch_backward(grad, out, bias, scale)
    wide = torch.promote_types(out.dtype, torch.float32)
    dx = (grad.to(wide) * scale).masked_fill(out <= 0, 0)
    return dx.to(out.dtype), dx.sum(0).to(bias.dtype)


@_backward.register_fake
def _(grad: Tensor, out: Tensor, bias: Tensor, scale: float, triton: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out), torch.empty_like(bias, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, _, ctx.scale, ctx.triton = inputs
    ctx.save_for_backward(output, bias)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    out, bias = ctx.saved_tensors
    dx, dbias = torch.ops.msq.relu_drop_backward(grad, out, bias, ctx.scale, ctx.triton)
    return dx, dbias, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
