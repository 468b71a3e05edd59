"""Absorbed cross-attention to a short memory with everything up to the next LayerNorm, in one op.

With keys and values that already hold the projections (`msq.head.absorbed`):

    s = x K'^T + beta              p = softmax(s) over the tokens of each head
    o = (keep p / (1 - drop)) V' + bo
    h = x + keep o / (1 - drop)    out = LayerNorm(h)

The backward pass makes the gradients of the rows in one kernel, which leaves p and the gradient of
s behind, [B K, H T] each; the products of those over the queries of a clip are plain matrix
products. LayerNorm's part is that of `msq.kernels.norm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msq.kernels.norm import kept

MOST_TOKENS = 32  # the decisions of a row of probabilities are one word
MOST_COLUMNS = 256  # H T
CHUNK = 64  # columns of x at a time


def absorbed_cross_attention(
    x: Tensor,
    keys: Tensor,
    beta: Tensor,
    values: Tensor,
    out_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    bits: Tensor | None = None,
    residual_bits: Tensor | None = None,
    scale: float = 1.0,
    eps: float = 1e-5,
    *,
    triton: bool = False,
) -> Tensor:
    """Cross-attention, output projection, dropout, residual and post-norm.

    Args:
        x: [B K, D], the residual stream, which is the queries too.
        keys: K' [B, H, T, D], in the same dtype, scaled by 1 / sqrt(d).
        beta: [B, H, T].
        values: V' [B, H, T, D], in the same dtype.
        out_bias: bo [D].
        weight: of LayerNorm, [D] float32 (float64 with float64 rows).
        bias: likewise.
        bits: int32 [B H K, ceil(T / 32)] for the probabilities, 1 is dropped
            (`msq.kernels.bits`); None drops nothing.
        residual_bits: int32 [B K, ceil(D / 32)] for the branch, likewise.
        scale: 1 / (probability of keeping), of both.
        eps: of LayerNorm.
        triton: run the kernels rather than the reference.

    Returns:
        [B K, D] in the dtype of `x`. Differentiable in all floating-point tensors.

    Raises:
        ValueError: shapes that do not fit.
    """
    rows, width = x.shape
    clips, heads, tokens, _ = keys.shape
    per_clip = rows // max(clips, 1)
    fits = keys.shape == values.shape == (clips, heads, tokens, width)
    fits = fits and beta.shape == (clips, heads, tokens) and rows == clips * per_clip
    fits = fits and all(vector.shape == (width,) for vector in (out_bias, weight, bias))
    for given, lines, columns in (
        (bits, clips * heads * per_clip, tokens),
        (residual_bits, rows, width),
    ):
        words = (lines, -(-columns // 32))
        fits = fits and (given is None or (given.shape == words and given.dtype == torch.int32))
    if not fits:
        shapes = {
            "x": x, "keys": keys, "beta": beta, "values": values, "out_bias": out_bias,
            "weight": weight, "bias": bias, "bits": bits, "residual_bits": residual_bits,
        }  # fmt: skip
        found = ", ".join(f"{k} {list(v.shape)}" for k, v in shapes.items() if v is not None)
        raise ValueError(f"absorbed_cross_attention: {found} do not fit (bits are int32)")
    out: Tensor = torch.ops.msq.absorbed_cross(
        x, keys, beta, values, out_bias, weight, bias, bits, residual_bits, scale, eps, triton
    )[0]
    return out


def token_pieces(tokens: int, heads: int) -> tuple[int, int]:
    """Two powers of two, the second may be 0, that cover the tokens of a head with little waste.

    Of all heads together each is a matrix product with at least 16 columns: 17 tokens of 8 heads
    are 16 + 2, 144 columns and not 256.
    """
    least = -(-16 // heads)
    first = max(least, 1 << (tokens.bit_length() - 1))
    rest = max(0, tokens - first)
    second = max(least, 1 << (rest - 1).bit_length()) if rest else 0
    return (first, second) if second < first else (2 * first, 0)


def columns(tokens: int, heads: int) -> int:
    """Columns of scores with those that are masked: what the table of tiles calls keys."""
    return heads * sum(token_pieces(tokens, heads))


def unsupported(tokens: int, heads: int, width: int) -> str:
    """Why the kernels cannot take these sizes; empty where they can."""
    if tokens > MOST_TOKENS:
        return f"{tokens} tokens (at most {MOST_TOKENS})"
    if heads & (heads - 1):
        return f"{heads} heads (expected a power of two)"
    if tokens * heads > MOST_COLUMNS:
        return f"{tokens} tokens of {heads} heads do not fit on the chip (at most {MOST_COLUMNS})"
    if width % CHUNK or width > 2048:
        return f"rows of width {width} (expected a multiple of {CHUNK} up to 2048)"
    return ""


@torch.library.custom_op("msq::absorbed_cross", mutates_args=())
def _forward(
    x: Tensor,
    keys: Tensor,
    beta: Tensor,
    values: Tensor,
    out_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    bits: Tensor | None,
    residual_bits: Tensor | None,
    scale: float,
    eps: float,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result and h [B K, D]; mean and inverse deviation of h [B K]."""
    x = x.contiguous()
    if triton:
        from msq.kernels.gpu.cross_attention import launch_forward

        return launch_forward(
            x, keys, beta, values, out_bias, weight, bias, bits, residual_bits, scale, eps
        )
    p, keep = _probabilities(x, keys, beta, bits, scale)
    mixed = torch.matmul((p * keep).flatten(2), values.to(p.dtype).flatten(1, 2))
    branch = (mixed + out_bias).flatten(0, 1)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.msq.drop_add_norm(
        x, branch, weight, bias, residual_bits, scale, eps, False
    )
    return result


@_forward.register_fake
def _(
    x: Tensor,
    keys: Tensor,
    beta: Tensor,
    values: Tensor,
    out_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    bits: Tensor | None,
    residual_bits: Tensor | None,
    scale: float,
    eps: float,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = torch.empty(x.shape[0], dtype=weight.dtype, device=x.device)
    rows = torch.empty_like(x, memory_format=torch.contiguous_format)
    return rows, torch.empty_like(rows), row, torch.empty_like(row)


@torch.library.custom_op("msq::absorbed_cross_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    beta: Tensor,
    values: Tensor,
    out_bias: Tensor,
    weight: Tensor,
    bits: Tensor | None,
    residual_bits: Tensor | None,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, keys, beta, values, out_bias, weight and bias, in their shapes."""
    x, clips = x.contiguous(), keys.shape[0]
    dh, do, dweight, dbias = torch.ops.msq.drop_add_norm_backward(
        grad, h, mean, rstd, weight.contiguous(), residual_bits, scale, triton
    )
    if triton:
        from msq.kernels.gpu.cross_attention import launch_backward

        dx, p, ds = launch_backward(do, dh, x, keys, beta, values, bits, scale)
        of_clip, g = x.view(clips, -1, x.shape[1]), do.view(clips, -1, x.shape[1])
    else:
        whole, keep = _probabilities(x, keys, beta, bits, scale)
        of_clip, g = (v.to(whole.dtype).view(clips, -1, x.shape[1]) for v in (x, do))
        dp = g @ values.to(whole.dtype).flatten(1, 2).transpose(1, 2)
        dp = dp.view(whole.shape) * keep
        ds = (whole * (dp - (whole * dp).sum(-1, keepdim=True))).flatten(2)
        p = (whole * keep).flatten(2)
        through = (ds @ keys.to(whole.dtype).flatten(1, 2)).flatten(0, 1)
        dx = (dh.to(whole.dtype) + through).to(x.dtype)
    dkeys = torch.bmm(ds.transpose(1, 2), of_clip).view(keys.shape).to(keys.dtype)
    dvalues = torch.bmm(p.transpose(1, 2), g).view(values.shape).to(values.dtype)
    dbeta = ds.sum(1, dtype=weight.dtype).view(beta.shape).to(beta.dtype)
    dout_bias = do.sum(0, dtype=weight.dtype).to(out_bias.dtype)
    return dx, dkeys, dbeta, dvalues, dout_bias, dweight, dbias


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    beta: Tensor,
    values: Tensor,
    out_bias: Tensor,
    weight: Tensor,
    bits: Tensor | None,
    residual_bits: Tensor | None,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dkeys, dbeta, dvalues, dout_bias, dweight, dbias = (
        torch.empty_like(v, memory_format=torch.contiguous_format)
        for v in (x, keys, beta, values, out_bias, weight, weight)
    )
    return dx, dkeys, dbeta, dvalues, dout_bias, dweight, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, keys, beta, values, out_bias, weight, _, bits, residual_bits, scale, _, triton = inputs
    ctx.save_for_backward(x, keys, beta, values, out_bias, weight, bits, residual_bits, *output[1:])
    ctx.scale, ctx.triton = scale, triton
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    found = torch.ops.msq.absorbed_cross_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.triton)
    return *found, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _probabilities(
    x: Tensor, keys: Tensor, beta: Tensor, bits: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | float]:
    """Before dropout [B, K, H, T], and what dropout multiplies them with."""
    clips, heads, tokens, width = keys.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide).view(clips, -1, width)
    scores = rows @ keys.to(wide).flatten(1, 2).transpose(1, 2)
    p = (scores.view(clips, -1, heads, tokens) + beta.to(wide)[:, None]).softmax(-1)
    if bits is None:
        return p, 1.0
    keep = kept(bits, tokens).view(clips, heads, -1, tokens).transpose(1, 2)
    return p, keep.to(wide) * scale
