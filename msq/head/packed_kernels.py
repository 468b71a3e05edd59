"""The blocks of the packed head that go through an operation of `msq.kernels`.

Each takes the head's tensors and masks, and computes what a block of `msq.head.packed_blocks` does;
`msq.head.kernel_choice` says which of them a run takes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from msq.errors import UsageError
from msq.head.absorbed import absorbed_memory
from msq.head.layers import LAYER_NORM_EPS
from msq.head.masks import LayerMasks, Site
from msq.head.packed_blocks import scaled_mm
from msq.kernels.cross_attention import absorbed_cross_attention
from msq.kernels.cross_attention_short import cross_attention
from msq.kernels.ffn import relu_drop
from msq.kernels.norm import drop_add_norm
from msq.kernels.self_attention import self_attention

OPS = ("absorbed_cross", "cross_attention", "drop_add_norm", "relu_drop", "self_attention")
Linear = tuple[Tensor, Tensor]  # weight and bias


class KernelBlocks:
    """Blocks by operation.

    Args:
        ops: names among `OPS` that are to be taken; `name in blocks` asks for them.
        heads: H.
        triton: run their Triton kernels; without it their references, for tests.

    Raises:
        UsageError: a name that is no operation.
    """

    def __init__(self, ops: Collection[str], heads: int, *, triton: bool = True) -> None:
        unknown = sorted(set(ops) - set(OPS))
        if unknown:
            raise UsageError(f"kernels: expected names among {', '.join(OPS)}; found {unknown}")
        self.ops, self.heads, self.triton = frozenset(ops), heads, triton

    def __contains__(self, op: str) -> bool:
        return op in self.ops

    def self_attention(
        self, packed: Tensor, clips: int, masks: LayerMasks | None, clip: Tensor | None = None
    ) -> Tensor:
        """Mixed values [B K, D] of q, k and v side by side.

        Args:
            packed: [B K, 3 D], or [K, 3 D] where `clip` is given.
            clips: B.
            masks: of the probabilities.
            clip: [B, 3 D], what each clip adds to all of its rows.
        """
        keys = len(packed) // (1 if clip is not None else clips)
        bits = _bits(masks, Site.self_probability, clips * self.heads * keys, keys)
        return self_attention(
            packed, clips, self.heads, bits, _scale(masks), clip=clip, triton=self.triton
        )

    def add_norm(
        self, x: Tensor, y: Tensor, norm: Linear, masks: LayerMasks | None, site: Site
    ) -> Tensor:
        """LayerNorm(x + dropout(y)) of rows [M, D]."""
        return drop_add_norm(
            x, y, *norm, _bits(masks, site, *y.shape), _scale(masks), LAYER_NORM_EPS,
            triton=self.triton,
        )  # fmt: skip

    def absorbed_cross(
        self, x: Tensor, k: Tensor, v: Tensor, query: Linear, out: Linear, norm: Linear,
        masks: LayerMasks | None,
    ) -> Tensor:  # fmt: skip
        """Cross-attention of rows x [B K, D], residual and LayerNorm; k and v are [B, S, H, d]."""
        (_, tokens, heads, _), rows = k.shape, len(x)
        keys, beta, values = absorbed_memory(k, v, query, out[0])
        return absorbed_cross_attention(
            x, keys, beta, values, out[1], *norm,
            _bits(masks, Site.cross_probability, rows * heads, tokens),
            _bits(masks, Site.cross_residual, *x.shape), _scale(masks), LAYER_NORM_EPS,
            triton=self.triton,
        )  # fmt: skip

    def cross_attention(
        self, q: Tensor, kv: Tensor, clips: int, masks: LayerMasks | None
    ) -> Tensor:
        """Mixed values [B K, D] of queries [B K, D]; kv is [B S, 2 D], rows of any stride."""
        bits = _bits(masks, Site.cross_probability, len(q) * self.heads, len(kv) // clips)
        return cross_attention(q, kv, clips, self.heads, bits, _scale(masks), triton=self.triton)

    def feed_forward(
        self, x: Tensor, expand: Linear, contract: Linear, masks: LayerMasks | None
    ) -> Tensor:
        """contract(dropout(relu(expand(x)))) of rows [M, D]."""
        apply = cast("Any", FusedFeedForward.apply)
        out: Tensor = apply(x, *expand, *contract, masks, self.triton)
        return out


class FusedFeedForward(Function):
    """`msq.head.packed_blocks.FeedForward` with one pass between its two products."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
        masks: LayerMasks | None, triton: bool,
    ) -> Tensor:  # fmt: skip
        """[M, D] from x [M, D]; w1 [F, D], w2 [D, F]."""
        before = torch.mm(x, w1.t())
        bits = _bits(masks, Site.hidden, *before.shape)
        hidden = relu_drop(before, b1, bits, triton=triton)
        ctx.save_for_backward(x, hidden, w1, b1, w2)
        ctx.scale, ctx.triton = _scale(masks), triton
        return torch.addmm(b2, hidden, w2.t(), alpha=ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and the four parameters."""
        x, hidden, w1, b1, w2 = ctx.saved_tensors
        dw2 = torch.mm(grad.t(), hidden).mul_(ctx.scale)
        dhidden, db1 = torch.ops.msq.relu_drop_backward(
            scaled_mm(grad, w2, ctx.scale), hidden, b1, 1.0, ctx.triton
        )
        dw1 = torch.mm(dhidden.t(), x)
        return torch.mm(dhidden, w1), dw1, db1, dw2, grad.sum(0), None, None


def _bits(masks: LayerMasks | None, site: Site, rows: int, columns: int) -> Tensor | None:
    return None if masks is None else masks.words(site, rows, columns)


def _scale(masks: LayerMasks | None) -> float:
    """1 / (probability of keeping)."""
    return 1.0 if masks is None else masks.scale
