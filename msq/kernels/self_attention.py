"""Self-attention of K class queries, a whole row of keys at a time, from packed q, k and v.

    s = q k^T / sqrt(d)     p = softmax(s)     out = (keep p / (1 - drop)) v         (Eq. 4)

In the first layer the queries are label rows plus a row of their clip, Q0[b, k] = A[k] + c[b]. Then
q[b, k] = Aq[k] + cq[b] and v[b, l] = Av[l] + cv[b]; what the clip adds to the keys is the same for
all of a query's keys and falls out of the softmax, so it is never looked at and its gradient is
exactly zero. `clip` asks for that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from msq.kernels.norm import kept

MOST_KEYS = 256
MOST_HEADS = 65_535  # B H: programs along the second axis of a launch


def self_attention(
    qkv: Tensor,
    clips: int,
    heads: int,
    bits: Tensor | None = None,
    keep_scale: float = 1.0,
    *,
    clip: Tensor | None = None,
    valid: Tensor | None = None,
    triton: bool = False,
) -> Tensor:
    """Attention among the queries of each clip.

    Args:
        qkv: [B K, 3 D], or [K, 3 D] with `clip`: q, k and v side by side, heads side by side in
            each.
        clips: B.
        heads: H.
        bits: int32 [B H K, ceil(K / 32)], 1 is dropped (`msq.kernels.bits`); None drops nothing.
        keep_scale: 1 / (probability of keeping).
        clip: [B, 3 D], added to the rows of each clip; see above.
        valid: uint8 [R, K], 0 for classes that are none (padding of stacked heads); clip b has
            row b // (B / R), and at least one class of a row is valid. None: all are.
        triton: run the kernel rather than the reference.

    Returns:
        [B K, D] in the dtype of `qkv`. Differentiable in `qkv` and `clip`.

    Raises:
        ValueError: shapes that do not fit, or too many clips for the kernel.
    """
    rows, three = qkv.shape
    keys = rows if clip is not None else rows // max(clips, 1)
    fits = three % (3 * heads) == 0 and (clip is not None or rows == keys * clips)
    fits = fits and (clip is None or clip.shape == (clips, three))
    words = (clips * heads * keys, -(-keys // 32))
    fits = fits and (bits is None or (bits.shape == words and bits.dtype == torch.int32))
    if valid is not None:
        fits = fits and valid.shape[1] == keys and clips % len(valid) == 0
    if not fits:
        shapes = {"qkv": qkv, "clip": clip, "bits": bits, "valid": valid}
        found = ", ".join(f"{k} {list(v.shape)}" for k, v in shapes.items() if v is not None)
        raise ValueError(f"self_attention, B = {clips}, H = {heads}: {found} do not fit")
    if triton:
        require_launchable("self_attention", clips, heads)
    out: Tensor = torch.ops.msq.self_attention(
        qkv, clip, bits, valid, clips, heads, keep_scale, triton
    )[0]
    return out


def unsupported(keys: int, head_width: int) -> str:
    """Why the kernel cannot take these sizes; empty where it can."""
    if keys > MOST_KEYS:
        return f"a row of {keys} keys does not fit on the chip (at most {MOST_KEYS})"
    if head_width not in (16, 32, 64, 128):
        return f"heads of width {head_width} (expected 16, 32, 64 or 128)"
    return ""


def require_launchable(op: str, clips: int, heads: int) -> None:
    """Refuse more heads of clips than one launch takes.

    Raises:
        ValueError: with how many clips it takes.
    """
    if clips * heads > MOST_HEADS:
        raise ValueError(
            f"{op}: expected at most {MOST_HEADS // heads} clips of {heads} heads in one launch of "
            f"its kernel, found {clips}; use a smaller batch, or kernels = reference"
        )


@torch.library.custom_op("msq::self_attention", mutates_args=())
def _forward(
    qkv: Tensor,
    clip: Tensor | None,
    bits: Tensor | None,
    valid: Tensor | None,
    clips: int,
    heads: int,
    keep_scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """Mixed values [B K, D] and, per head and query, log2 of the softmax's denominator [B H K]."""
    qkv = qkv.contiguous()
    if triton:
        from msq.kernels.gpu.self_attention import launch_forward

        return launch_forward(qkv, clip, bits, valid, clips, heads, keep_scale)
    q, k, v = _split(qkv, clip, clips, heads)
    scores = _scores(q, k, valid)
    p = scores.softmax(-1)
    if bits is not None:
        p = p * kept(bits, k.shape[2]).view(p.shape).to(p.dtype) * keep_scale
    log_sum = scores.logsumexp(-1).flatten() / math.log(2)
    return _joined(p @ v).to(qkv.dtype), log_sum


@_forward.register_fake
def _(
    qkv: Tensor,
    clip: Tensor | None,
    bits: Tensor | None,
    valid: Tensor | None,
    clips: int,
    heads: int,
    keep_scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    rows = qkv.shape[0] * clips if clip is not None else qkv.shape[0]
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return (
        qkv.new_empty(rows, qkv.shape[1] // 3),
        torch.empty(rows * heads, dtype=wide, device=qkv.device),
    )


@torch.library.custom_op("msq::self_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    qkv: Tensor,
    clip: Tensor | None,
    bits: Tensor | None,
    valid: Tensor | None,
    log_sum: Tensor,
    clips: int,
    heads: int,
    keep_scale: float,
    triton: bool,
) -> Tensor:
    """Gradients of q, k and v of every clip [B K, 3 D], as if they were not factorised."""
    grad = grad.contiguous()
    if triton:
        from msq.kernels.gpu.self_attention import launch_backward

        return launch_backward(grad, qkv, clip, bits, valid, log_sum, clips, heads, keep_scale)
    q, k, v = _split(qkv, clip, clips, heads)
    root = math.sqrt(q.shape[-1])
    p = _scores(q, k, valid).softmax(-1)
    g = grad.to(q.dtype).view(clips, -1, heads, q.shape[-1]).transpose(1, 2)
    keep = 1.0 if bits is None else kept(bits, k.shape[2]).view(p.shape).to(p.dtype) * keep_scale
    dp = g @ v.transpose(-1, -2) * keep
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / root
    parts = (ds @ k, ds.transpose(-1, -2) @ q, (p * keep).transpose(-1, -2) @ g)
    return torch.cat([_joined(x) for x in parts], 1).to(qkv.dtype)


@_backward.register_fake
def _(
    grad: Tensor,
    qkv: Tensor,
    clip: Tensor | None,
    bits: Tensor | None,
    valid: Tensor | None,
    log_sum: Tensor,
    clips: int,
    heads: int,
    keep_scale: float,
    triton: bool,
) -> Tensor:
    return qkv.new_empty(grad.shape[0], qkv.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, clip, bits, valid, *ctx.rest = inputs
    ctx.save_for_backward(qkv, clip, bits, valid, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, clip, bits, valid, log_sum = ctx.saved_tensors
    full = torch.ops.msq.self_attention_backward(
        grad, qkv.contiguous(), clip, bits, valid, log_sum, *ctx.rest
    )
    nothing = (None,) * (2 + len(ctx.rest))
    if clip is None:
        return full, None, *nothing
    by_part = full.view(clip.shape[0], -1, 3, full.shape[1] // 3)
    of_clip = by_part.sum(1, dtype=torch.promote_types(full.dtype, torch.float32))
    of_clip[:, 1] = 0  # what a clip adds to its keys plays no part
    of_label = by_part.sum(0, dtype=of_clip.dtype)
    return of_label.flatten(1).to(qkv.dtype), of_clip.flatten(1).to(clip.dtype), *nothing


_forward.register_autograd(_differentiate, setup_context=_save)


def _split(qkv: Tensor, clip: Tensor | None, clips: int, heads: int) -> tuple[Tensor, ...]:
    """q, k and v [B, H, K, d] in float32 or wider."""
    wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    if clip is not None:
        added = clip.to(wide.dtype).clone().view(clips, 1, 3, -1)
        added[:, :, 1] = 0
        wide = (wide.view(1, -1, *added.shape[2:]) + added).flatten(0, 1).flatten(1)
    split = wide.view(clips, -1, 3, heads, wide.shape[1] // (3 * heads))
    q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _scores(q: Tensor, k: Tensor, valid: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if valid is None:
        return scores
    of_clip = valid.repeat_interleave(q.shape[0] // len(valid), 0)
    return scores.masked_fill(of_clip[:, None, None, :] == 0, -math.inf)


def _joined(x: Tensor) -> Tensor:
    """[B, H, K, d] -> [B K, H d]."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)
