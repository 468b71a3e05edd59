"""Every op of `msq.kernels` with inputs of a chosen size, and what it computes in plain PyTorch.

The plain form runs in any precision: in float64 it is what is right, in bfloat16 it is how wrong
PyTorch is itself, and so the measure for the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from msq.kernels.bits import mask_bits
from msq.kernels.cross_attention import absorbed_cross_attention
from msq.kernels.cross_attention_short import cross_attention
from msq.kernels.ffn import relu_drop
from msq.kernels.ffn_product import feed_forward
from msq.kernels.norm import drop_add_norm, kept
from msq.kernels.self_attention import self_attention

RATE = 410
SCALE = 4096 / (4096 - RATE)


@dataclass(frozen=True, slots=True)
class KernelCase:
    """One op on inputs of one size.

    Attributes:
        name: for people.
        op: as the table of tiles names it.
        ops: names in `torch.ops.msq` that it calls, backward included.
        tensors: what it is differentiated in.
        call: the op; True runs the kernel, False the reference.
        plain: the same from torch's own functions.
        grad: of the result.
        bytes: that forward has to read and write at least.
    """

    name: str
    op: str
    ops: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    call: Callable[[Any, bool], Tensor]
    plain: Callable[[Any], Tensor]
    grad: Tensor
    bytes: int = 0


def kernel_cases(
    clips: int,
    queries: int,
    tokens: int,
    width: int,
    heads: int,
    dtype: torch.dtype,
    device: str,
    dropout: bool = True,
) -> Iterator[KernelCase]:
    """The differentiable ops as one decoder layer uses them.

    Args:
        clips: B.
        queries: K.
        tokens: S.
        width: D.
        heads: H.
        dtype: of the rows.
        device: of everything.
        dropout: with mask bits.
    """
    layer = _Layer(clips, queries, tokens, width, heads, dtype, device, dropout)
    yield layer.norm()
    yield from layer.self_attention()
    yield from layer.cross_attention()
    yield from layer.feed_forward()


class _Layer:
    """A decoder layer of one size, whose inputs are drawn as its cases are asked for, in order."""

    def __init__(
        self,
        clips: int,
        queries: int,
        tokens: int,
        width: int,
        heads: int,
        dtype: torch.dtype,
        device: str,
        dropout: bool,
    ) -> None:
        self.clips, self.queries, self.tokens = clips, queries, tokens
        self.width, self.heads, self.dtype, self.device = width, heads, dtype, device
        self.dropout, self.scale = dropout, SCALE if dropout else 1.0
        self.generator = torch.Generator().manual_seed(clips * 1000 + queries)
        self.rows = clips * queries
        self.vectors = (self.draw(width, of=torch.float32), self.draw(width, of=torch.float32))
        self.residual = self.bits(1, self.rows, width)
        self.two = (self.draw(self.rows, width), self.draw(self.rows, width), *self.vectors)
        self.grad = self.draw(self.rows, width)
        self.bytes = self.rows * width * self.grad.element_size()  # of rows [B K, D]
        self.where = f"B={clips} K={queries}{'' if dropout else ', no dropout'}"

    def draw(self, *shape: int, size: float = 1.0, of: torch.dtype | None = None) -> Tensor:
        drawn = size * torch.randn(*shape, generator=self.generator)
        return drawn.to(self.device, of or self.dtype)

    def bits(self, site: int, rows: int, columns: int) -> Tensor | None:
        key = torch.tensor([5, 6], device=self.device)
        return mask_bits(key, site, rows, columns, RATE) if self.dropout else None

    def dropped(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return x
        return x * (kept(mask, x.shape[-1]).view(x.shape).to(x.dtype) * self.scale)

    def plain_norm(self, given: Sequence[Tensor]) -> Tensor:
        x, y, weight, bias = given
        h = x + self.dropped(y, self.residual)
        return F.layer_norm(h, (self.width,), weight.to(h.dtype), bias.to(h.dtype), 1e-5)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[B K, D] of q [B, H, K, d], k and v [B, H, S, d]."""
        p = (q @ k.transpose(-1, -2) / (self.width // self.heads) ** 0.5).softmax(-1)
        p = self.dropped(p.reshape(-1, k.shape[-2]), mask).view(p.shape)
        return (p @ v).transpose(1, 2).reshape(self.rows, self.width)

    def norm(self) -> KernelCase:
        return KernelCase(
            f"drop_add_norm {self.where}", "drop_add_norm",
            ("drop_add_norm", "drop_add_norm_backward"), self.two,
            lambda given, triton: drop_add_norm(
                given[0], given[1], given[2], given[3], self.residual, self.scale, triton=triton
            ),
            self.plain_norm, self.grad, 4 * self.bytes,
        )  # fmt: skip

    def self_attention(self) -> Iterator[KernelCase]:
        """q, k and v of all rows, or in the parts of classes and of clips."""
        clips, queries, width, heads, scale = (
            self.clips, self.queries, self.width, self.heads, self.scale
        )  # fmt: skip
        mask = self.bits(2, clips * heads * queries, queries)

        def plain(given: Sequence[Tensor], factorised: bool) -> Tensor:
            qkv = given[0].view(-1, queries, 3 * width)
            if factorised:
                added = given[1].view(clips, 1, 3, width)
                zero = torch.zeros_like(added[:, :, :1])
                added = torch.cat([added[:, :, :1], zero, added[:, :, 2:]], dim=2)
                qkv = qkv + added.reshape(clips, 1, 3 * width)
            split = qkv.view(clips, queries, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            q, k, v = split.unbind(0)
            return self.attended(q, k, v, mask)

        both = ("self_attention", "self_attention_backward")
        yield KernelCase(
            f"self_attention {self.where}", "self_attention", both,
            (self.draw(self.rows, 3 * width),),
            lambda given, triton: self_attention(
                given[0], clips, heads, mask, scale, triton=triton
            ),
            lambda given: plain(given, False), self.grad, 4 * self.bytes,
        )  # fmt: skip
        yield KernelCase(
            f"self_attention, factorised {self.where}", "self_attention", both,
            (self.draw(queries, 3 * width), self.draw(clips, 3 * width)),
            lambda given, triton: self_attention(
                given[0], clips, heads, mask, scale, clip=given[1], triton=triton
            ),
            lambda given: plain(given, True), self.grad, self.bytes,
        )  # fmt: skip

    def cross_attention(self) -> Iterator[KernelCase]:
        """Absorbed, with the residual and norm after it; and on projected queries."""
        mask = self.bits(3, self.clips * self.heads * self.queries, self.tokens)
        yield self._absorbed_cross(mask)
        yield self._short_cross(mask)

    def _absorbed_cross(self, mask: Tensor | None) -> KernelCase:
        clips, queries, tokens, width, heads = (
            self.clips, self.queries, self.tokens, self.width, self.heads
        )  # fmt: skip
        stack = (clips, heads, tokens, width)
        seven = (
            self.draw(self.rows, width), self.draw(*stack, size=width**-0.5),
            self.draw(*stack[:3]), self.draw(*stack), self.draw(width), *self.vectors,
        )  # fmt: skip

        def plain(given: Sequence[Tensor]) -> Tensor:
            x, keys, beta, values, out_bias, weight, bias = given
            scores = x.view(clips, queries, width) @ keys.flatten(1, 2).transpose(1, 2)
            p = (scores.view(clips, queries, heads, tokens) + beta[:, None]).softmax(-1)
            if mask is not None:
                keep = kept(mask, tokens).view(clips, heads, queries, tokens).transpose(1, 2)
                p = p * (keep.to(p.dtype) * self.scale)
            y = (p.flatten(2) @ values.flatten(1, 2) + out_bias).flatten(0, 1)
            return self.plain_norm((x, y, weight, bias))

        return KernelCase(
            f"absorbed_cross {self.where}", "absorbed_cross",
            ("absorbed_cross", "absorbed_cross_backward", "drop_add_norm_backward"), seven,
            lambda given, triton: absorbed_cross_attention(
                given[0], given[1], given[2], given[3], given[4], given[5], given[6], mask,
                self.residual, self.scale, triton=triton,
            ),
            plain, self.grad, 3 * self.bytes + 2 * seven[1].nbytes,
        )  # fmt: skip

    def _short_cross(self, mask: Tensor | None) -> KernelCase:
        clips, queries, tokens, width, heads = (
            self.clips, self.queries, self.tokens, self.width, self.heads
        )  # fmt: skip
        short = (self.draw(self.rows, width), self.draw(clips * tokens, 2 * width))

        def plain(given: Sequence[Tensor]) -> Tensor:
            q, kv = given
            split = q.view(clips, queries, heads, width // heads).transpose(1, 2)
            both = kv.view(clips, tokens, 2, heads, width // heads).permute(2, 0, 3, 1, 4)
            k, v = both.unbind(0)
            return self.attended(split, k, v, mask)

        return KernelCase(
            f"cross_attention {self.where}", "cross_attention",
            ("cross_attention", "cross_attention_backward"), short,
            lambda given, triton: cross_attention(
                given[0], given[1], clips, heads, mask, self.scale, triton=triton
            ),
            plain, self.grad, 2 * self.bytes + short[1].nbytes,
        )  # fmt: skip

    def feed_forward(self) -> Iterator[KernelCase]:
        """The part between the two products, and all of it."""
        rows, width = self.rows, self.width
        hidden = (self.draw(rows, 4 * width), self.draw(4 * width))
        mask = self.bits(4, rows, 4 * width)
        yield KernelCase(
            f"relu_drop {self.where}", "relu_drop", ("relu_drop", "relu_drop_backward"), hidden,
            lambda given, triton: relu_drop(given[0], given[1], mask, self.scale, triton=triton),
            lambda given: self.dropped((given[0] + given[1]).relu(), mask),
            self.draw(rows, 4 * width), 8 * self.bytes,
        )  # fmt: skip
        five = (
            self.draw(rows, width), self.draw(4 * width, width, size=width**-0.5),
            self.draw(4 * width), self.draw(width, 4 * width, size=width**-0.5), self.draw(width),
        )  # fmt: skip

        def plain(given: Sequence[Tensor]) -> Tensor:
            x, w1, b1, w2, b2 = given
            return F.linear(self.dropped(F.linear(x, w1, b1).relu(), mask), w2, b2)

        yield KernelCase(
            f"ffn_product {self.where}", "ffn_product", ("ffn_product", "ffn_product_backward"),
            five,
            lambda given, triton: feed_forward(
                given[0], given[1], given[2], given[3], given[4], mask, self.scale, triton=triton
            ),
            plain, self.draw(rows, width), 10 * self.bytes + 8 * five[0].element_size() * width**2,
        )  # fmt: skip
