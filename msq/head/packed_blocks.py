"""The blocks of the packed head, each with its own backward pass.

They compute what `msq.head.layers` says, with rows [M, D] in place of [B, K, D] (M = B K), one
matrix product for q, k and v, attention per (clip, head) without copies for `nn.Module` layouts,
and dropout from packed bits (`msq.head.masks`), read again in the backward pass and never stored
as numbers.

LayerNorm and softmax compute in float32 (float64 for float64 inputs) whatever the precision of the
rows; matrix products accumulate in float32 and the factor of the dropout is applied there, before
rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from msq.head.layers import LAYER_NORM_EPS
from msq.head.masks import LayerMasks, Site

_softmax_backward = torch.ops.aten._softmax_backward_data.default
_relu_backward = torch.ops.aten.threshold_backward.grad_input


def attend(
    q: Tensor, k: Tensor, v: Tensor, masks: LayerMasks | None, site: Site
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v.

    Args:
        q: [B, H, K, d].
        k: [B, H, S, d].
        v: [B, H, S, d].
        masks: of the probabilities.
        site: likewise.

    Returns:
        [B K, H d], and the probabilities before dropout [B H, K, S] for `attend_backward`.
    """
    b, h, rows, d = q.shape
    scores = _bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), 1 / math.sqrt(d))
    p = scores.softmax(-1)
    dropped, scale = p, 1.0
    if masks is not None:
        kept = masks.kept(site, (b, h, rows, k.shape[2]), p.dtype)
        dropped, scale = torch.mul(p.view(kept.shape), kept).flatten(0, 1), masks.scale
    mixed = _bmm(dropped, v.flatten(0, 1), scale)
    return mixed.view(b, h, rows, d).transpose(1, 2).reshape(b * rows, h * d), p


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    masks: LayerMasks | None,
    site: Site,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients of q, k and v into `out`, three tensors of their shapes."""
    b, h, rows, d = q.shape
    grad = grad.view(b, rows, h, d).transpose(1, 2).reshape(b * h, rows, d)
    dropped, scale, kept = p, 1.0, None
    if masks is not None:
        kept, scale = masks.kept(site, (b, h, rows, k.shape[2]), p.dtype), masks.scale
        dropped = torch.mul(p.view(kept.shape), kept).flatten(0, 1)
    _bmm(dropped.transpose(1, 2), grad, scale, out[2].flatten(0, 1))
    dp = _bmm(grad, v.flatten(0, 1).transpose(1, 2), scale)
    if kept is not None:
        dp.view(kept.shape).mul_(kept)
    ds = _softmax_backward(dp, p, -1, p.dtype)
    _bmm(ds, k.flatten(0, 1), 1 / math.sqrt(d), out[0].flatten(0, 1))
    _bmm(ds.transpose(1, 2), q.flatten(0, 1), 1 / math.sqrt(d), out[1].flatten(0, 1))


class SelfAttend(Function):
    """`attend` for q, k and v in one tensor [3, B, H, K, d]."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, masks: LayerMasks | None) -> Tensor:
        """The mixed values [B K, H d]."""
        mixed, p = attend(heads[0], heads[1], heads[2], masks, Site.self_probability)
        ctx.save_for_backward(heads, p)
        ctx.masks = masks
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient of `heads`."""
        heads, p = ctx.saved_tensors
        out = torch.empty_like(heads)
        attend_backward(grad.contiguous(), heads[0], heads[1], heads[2], p, ctx.masks,
                        Site.self_probability, (out[0], out[1], out[2]))  # fmt: skip
        return out, None


class CrossAttend(Function):
    """`attend` from queries to the tokens."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, masks: LayerMasks | None) -> Tensor:
        """The mixed values [B K, H d]."""
        mixed, p = attend(q, k, v, masks, Site.cross_probability)
        ctx.save_for_backward(q, k, v, p)
        ctx.masks = masks
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """The gradients of q, k and v."""
        q, k, v, p = ctx.saved_tensors
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        attend_backward(grad.contiguous(), q, k, v, p, ctx.masks, Site.cross_probability,
                        (dq, dk, dv))  # fmt: skip
        return dq, dk, dv, None


class DropAddNorm(Function):
    """LayerNorm(x + dropout(y)) over rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        masks: LayerMasks | None,
        site: Site,
    ) -> Tensor:
        """[M, D] from x and y [M, D]; weight and bias [D] in float32 or wider."""
        if masks is None:
            h = x + y
        else:
            kept = masks.kept(site, tuple(y.shape), y.dtype)
            h = torch.addcmul(x, y, kept, value=masks.scale)
        normed, mean, rstd = _layer_norm(h, weight, bias)
        ctx.save_for_backward(h, mean, rstd, weight, bias)
        ctx.masks, ctx.site = masks, site
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, y, weight and bias."""
        h, mean, rstd, weight, bias = ctx.saved_tensors
        dh, dweight, dbias = _layer_norm_backward(grad, h, mean, rstd, weight, bias)
        dy = dh
        if ctx.masks is not None:
            kept = ctx.masks.kept(ctx.site, tuple(dh.shape), dh.dtype)
            dy = torch.mul(dh, kept).mul_(ctx.masks.scale)
        return dh, dy, dweight, dbias, None, None


class FeedForward(Function):
    """contract(dropout(relu(expand(x)))) over rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
        masks: LayerMasks | None,
    ) -> Tensor:  # fmt: skip
        """[M, D] from x [M, D]; w1 [F, D], w2 [D, F]."""
        hidden = torch.addmm(b1, x, w1.t()).relu_()
        scale = 1.0
        if masks is not None:
            kept = masks.kept(Site.hidden, tuple(hidden.shape), hidden.dtype)
            hidden.mul_(kept)
            scale = masks.scale
        ctx.save_for_backward(x, hidden, w1, w2)
        ctx.scale = scale
        return torch.addmm(b2, hidden, w2.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and the four parameters.

        What the mask dropped is zero in `hidden`, as is what ReLU cut off: no mask is needed.
        """
        x, hidden, w1, w2 = ctx.saved_tensors
        dw2 = torch.mm(grad.t(), hidden).mul_(ctx.scale)
        dhidden = scaled_mm(grad, w2, ctx.scale)
        _relu_backward(dhidden, hidden, 0, grad_input=dhidden)
        dw1 = torch.mm(dhidden.t(), x)
        return torch.mm(dhidden, w1), dw1, dhidden.sum(0), dw2, grad.sum(0), None


def split_heads(packed: Tensor, clips: int, parts: int, heads: int) -> Tensor:
    """[B K, parts D] -> [parts, B, H, K, d] in one copy."""
    rows = packed.shape[0] // clips
    split = packed.view(clips, rows, parts, heads, packed.shape[1] // (parts * heads))
    return split.permute(2, 0, 3, 1, 4).contiguous()


def _bmm(a: Tensor, b: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    """The product alpha a b for stacks of matrices; the factor is applied before rounding."""
    if out is None:
        out = torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=a.dtype, device=a.device)
    if alpha == 1:
        return torch.bmm(a, b, out=out)
    return torch.baddbmm(out, a, b, beta=0, alpha=alpha, out=out)


def scaled_mm(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """The product alpha a b; the factor is applied before rounding."""
    if alpha == 1:
        return torch.mm(a, b)
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    return torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)


def _layer_norm(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last dimension, its means and inverse deviations."""
    mixed = h.dtype != weight.dtype
    # torch's kernel for the CPU takes bf16 rows with float32 parameters, the one for GPUs does not.
    rows = h.to(weight.dtype) if mixed and h.is_cuda else h
    out, mean, rstd = torch.native_layer_norm(rows, weight.shape, weight, bias, LAYER_NORM_EPS)
    return out.to(h.dtype), mean, rstd


def _layer_norm_backward(
    grad: Tensor, h: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, weight and bias."""
    rows = h
    if h.dtype != weight.dtype and h.is_cuda:
        rows, grad = h.to(weight.dtype), grad.to(weight.dtype)
    dh, dweight, dbias = torch.ops.aten.native_layer_norm_backward.default(
        grad.contiguous(), rows, weight.shape, mean, rstd, weight, bias, [True, True, True]
    )
    return dh.to(h.dtype), dweight, dbias
