"""The first product of a feed-forward network with what follows it, and the same on the way back.

    hidden = keep relu(x W1^T + b1) / (1 - drop)        y = hidden W2^T + b2
    dx1 = (hidden > 0) (dy W2) / (1 - drop)             db1 = sum of dx1

Forward stores `hidden` alone: a number of it is positive exactly where ReLU and dropout let it
through, so the backward pass reads neither the mask nor the product. Other products are torch's.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

import msq.kernels.ffn  # noqa: F401 - registers relu_drop_backward
from msq.kernels.norm import kept


def product_relu_drop(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    bits: Tensor | None = None,
    scale: float = 1.0,
    *,
    triton: bool = False,
) -> Tensor:
    """`relu_drop` of a product, the product included.

    Args:
        x: [M, D].
        weight: [F, D], in the dtype of `x`.
        bias: [F].
        bits: int32 [M, ceil(F / 32)], 1 is dropped (`msq.kernels.bits`); None drops nothing.
        scale: 1 / (probability of keeping); 1 where the second product applies it.
        triton: run the kernel rather than the reference.

    Returns:
        [M, F] in the dtype of `x`. Differentiable in `x`, `weight` and `bias`; its own backward
        pass is that of `relu_drop` and two products. `feed_forward` has the fused one.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a scale that is not positive.
    """
    rows, width = x.shape[0], weight.shape[0]
    words = (rows, -(-width // 32))
    fits = x.dim() == 2 and weight.shape == (width, x.shape[-1]) and weight.dtype == x.dtype
    fits = fits and rows > 0 and bias.shape == (width,)
    fits = fits and (bits is None or (bits.shape == words and bits.dtype == torch.int32))
    if not fits:
        mask = "" if bits is None else f", bits {bits.dtype} {list(bits.shape)}"
        raise ValueError(
            f"product_relu_drop: x {x.dtype} {list(x.shape)}, weight {weight.dtype} "
            f"{list(weight.shape)}, bias {list(bias.shape)}{mask} do not fit (weight [F, D] for "
            f"x [M, D], at least one row; bits: int32 {list(words)})"
        )
    if not scale > 0:
        raise ValueError(f"product_relu_drop: scale: expected a positive number, found {scale}")
    out: Tensor = torch.ops.msq.ffn_product(x, weight, bias, bits, scale, triton)
    return out


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    bits: Tensor | None = None,
    scale: float = 1.0,
    *,
    triton: bool = False,
) -> Tensor:
    """The whole network; the products next to the ReLU are kernels, the others torch's.

    Args:
        x: [M, D].
        w1: [F, D].
        b1: [F].
        w2: [D, F], in the dtype of `x` like all products' operands.
        b2: [D].
        bits: as `product_relu_drop` takes them.
        scale: 1 / (probability of keeping).
        triton: run the kernels rather than the references.

    Returns:
        [M, D] in the dtype of `x`. Differentiable in the first five.

    Raises:
        ValueError: as `product_relu_drop`, or a second product that does not fit.
    """
    shape = (x.shape[-1], w1.shape[0])
    if w2.shape != shape or b2.shape != shape[:1] or w2.dtype != x.dtype:
        raise ValueError(
            f"feed_forward: w2 {w2.dtype} {list(w2.shape)} and b2 {list(b2.shape)} do not fit "
            f"x {x.dtype} {list(x.shape)} and w1 {list(w1.shape)} (w2 {list(shape)})"
        )
    apply = cast("Any", _FeedForward.apply)
    out: Tensor = apply(x, w1, b1, w2, b2, bits, scale, triton)
    return out


class _FeedForward(Function):
    """Both fused products and the four plain ones."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, bits: Tensor | None,
        scale: float, triton: bool,
    ) -> Tensor:  # fmt: skip
        hidden = product_relu_drop(x, w1, b1, bits, scale, triton=triton)
        ctx.save_for_backward(x, hidden, w1, b1, w2, b2)
        ctx.scale, ctx.triton = scale, triton
        return torch.addmm(b2.to(x.dtype), hidden, w2.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, w1, b1, w2, b2 = ctx.saved_tensors
        before, db1 = torch.ops.msq.ffn_product_backward(
            grad, w2, hidden, b1, ctx.scale, ctx.triton
        )
        dw1, dw2 = torch.mm(before.t(), x), torch.mm(grad.t(), hidden)
        return torch.mm(before, w1), dw1, db1, dw2, grad.sum(0).to(b2.dtype), None, None, None


@torch.library.custom_op("msq::ffn_product", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, bits: Tensor | None, scale: float, triton: bool
) -> Tensor:
    """[M, F]."""
    if triton:
        from msq.kernels.gpu.ffn_product import launch_forward

        return launch_forward(x, weight, bias, bits, scale)
    wide = torch.promote_types(x.dtype, torch.float32)
    hidden = (torch.mm(x.to(wide), weight.to(wide).t()) + bias.to(wide)).relu()
    if bits is not None:
        hidden = hidden * kept(bits, weight.shape[0])
    return (hidden * scale).to(x.dtype)


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, bits: Tensor | None, scale: float, triton: bool
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("msq::ffn_product_backward", mutates_args=())
def _backward(
    grad: Tensor, weight: Tensor, hidden: Tensor, bias: Tensor, scale: float, triton: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x W1^T [M, F] and b1 [F] from that of y [M, D]; weight is W2 [D, F]."""
    if triton:
        from msq.kernels.gpu.ffn_product import launch_backward

        return launch_backward(grad, weight, hidden, bias, scale)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    before = torch.mm(grad.to(wide), weight.to(wide)) * scale
    before = before.masked_fill(hidden <= 0, 0)
    return before.to(hidden.dtype), before.sum(0).to(bias.dtype)


@_backward.register_fake
def _(
    grad: Tensor, weight: Tensor, hidden: Tensor, bias: Tensor, scale: float, triton: bool
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, ctx.scale, ctx.triton = inputs
    ctx.save_for_backward(x, weight, bias, output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, out = ctx.saved_tensors
    before, dbias = torch.ops.msq.relu_drop_backward(grad, out, bias, ctx.scale, ctx.triton)
    return torch.mm(before, weight), torch.mm(before.t(), x), dbias, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
