"""The blocks of the packed head's layers, each with its residual and LayerNorm, on rows [B K, D].

Cross-attention has three forms: with projections on both sides, absorbed (`msq.head.absorbed`),
and absorbed in one operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from msq.errors import UsageError
from msq.head.absorbed import absorbed_attention, absorbing_pays
from msq.head.masks import LayerMasks, Site
from msq.head.packed_blocks import CrossAttend, DropAddNorm, FeedForward, SelfAttend, split_heads
from msq.head.packed_kernels import KernelBlocks
from msq.head.packed_parameters import PackedParameters


class PackedLayers:
    """The blocks of encoder and decoder layers, by the name of the layer.

    Args:
        parameters: of the head.
        blocks: those that run a kernel.
        absorb: use the absorbed cross-attention; None asks the table.
    """

    def __init__(
        self, parameters: PackedParameters, blocks: KernelBlocks, absorb: bool | None
    ) -> None:
        self.blocks, self.heads, self.absorb = blocks, blocks.heads, absorb
        self.width, self.precision, self.dtype = (
            parameters.width, parameters.precision, parameters.dtype
        )  # fmt: skip
        self._linear, self._norm = parameters.linear, parameters.norm

    def first_self_block(
        self,
        label: Tensor,
        fused: Tensor | None,
        position: Tensor | None,
        clips: int,
        masks: LayerMasks | None,
    ) -> Tensor:
        """Self-attention of the first layer on A[k] + c[b], its projections in their parts."""
        name, width = "layers.0", self.width
        label = label.to(self.dtype)
        own = F.linear(label, *self._linear(f"{name}.self_attention.qkv"))
        if position is not None:
            own = own + self._placed(position, name)
        if fused is None:
            # Without dropout all clips still have the same queries here: one stands for all.
            different = clips if masks is not None else 1
            rows = label.expand(different, -1, -1).reshape(-1, width)
            packed = own.expand(different, -1, -1).reshape(-1, 3 * width)
            x = self._attend_block(rows, packed, different, name, masks)
            return x if different == clips else x.expand(clips, -1, -1).reshape(-1, width)
        fused = fused.to(self.dtype)
        weight = self._linear(f"{name}.self_attention.qkv")[0]
        query, value = F.linear(fused, weight[:width]), F.linear(fused, weight[2 * width :])
        clip = torch.cat([query, torch.zeros_like(query), value], dim=1)
        rows = (label + fused[:, None]).view(-1, width)
        if "self_attention" in self.blocks:
            mixed = self.blocks.self_attention(own, clips, masks, clip)
            return self._after_attention(rows, mixed, name, masks)
        packed = (own + clip[:, None]).view(-1, 3 * width)
        return self._attend_block(rows, packed, clips, name, masks)

    def self_block(
        self,
        x: Tensor,
        clips: int,
        name: str,
        position: Tensor | None,
        masks: LayerMasks | None,
    ) -> Tensor:
        """Self-attention with residual and norm on rows [B K, D]."""
        packed = F.linear(x, *self._linear(f"{name}.self_attention.qkv"))
        if position is not None:
            packed = packed.view(clips, len(position), -1) + self._placed(position, name)
            packed = packed.view(x.shape[0], -1)
        return self._attend_block(x, packed, clips, name, masks)

    def _attend_block(
        self, x: Tensor, packed: Tensor, clips: int, name: str, masks: LayerMasks | None
    ) -> Tensor:
        if "self_attention" in self.blocks:
            mixed = self.blocks.self_attention(packed, clips, masks)
        else:
            mixed = _apply(SelfAttend, split_heads(packed, clips, 3, self.heads), masks)
        return self._after_attention(x, mixed, name, masks)

    def _after_attention(
        self, x: Tensor, mixed: Tensor, name: str, masks: LayerMasks | None
    ) -> Tensor:
        y = F.linear(mixed, *self._linear(f"{name}.self_attention.out"))
        return self._add_norm(x, y, f"{name}.norm_self", masks, Site.self_residual)

    def _placed(self, position: Tensor, name: str) -> Tensor:
        """What positions [K, D] add to q, k and v [K, 3 D]: nothing to v."""
        width = self.width
        weight = self._linear(f"{name}.self_attention.qkv")[0]
        added = F.linear(position.to(self.dtype), weight[: 2 * width])
        return F.pad(added, (0, width))

    def cross_form(self, queries: int, tokens: Tensor) -> Callable[..., Tensor]:
        """How K queries attend to the tokens [B, S, D']: `_fused`, `_absorbed` or `_standard`."""
        if "absorbed_cross" in self.blocks:
            return self._fused
        absorb = self.absorb
        if "cross_attention" in self.blocks:
            absorb = False
        if absorb is None:
            device = tokens.device.type
            absorb = absorbing_pays(queries, tokens.shape[1], device, self.precision)
        return self._absorbed if absorb else self._standard

    def _standard(
        self, x: Tensor, memory: tuple[Tensor, ...], name: str, position: Tensor | None,
        masks: LayerMasks | None,
    ) -> Tensor:  # fmt: skip
        """Cross-attention of rows [B K, D] with residual and norm, projections on both sides."""
        clips = len(memory[0])
        weight, bias = self._linear(f"{name}.cross_attention.q")
        q = F.linear(x, weight, bias)
        if position is not None:
            added = F.linear(position.to(self.dtype), weight)
            q = (q.view(clips, *added.shape) + added).view(x.shape)
        if "cross_attention" in self.blocks:
            mixed = self.blocks.cross_attention(q, memory[0].flatten(0, 1), clips, masks)
        else:
            q = split_heads(q, clips, 1, self.heads)[0]
            k, v = (part.transpose(1, 2) for part in memory)
            mixed = _apply(CrossAttend, q, k, v, masks)
        y = F.linear(mixed, *self._linear(f"{name}.cross_attention.out"))
        return self._add_norm(x, y, f"{name}.norm_cross", masks, Site.cross_residual)

    def _absorbed(
        self, x: Tensor, memory: tuple[Tensor, ...], name: str, position: Tensor | None,
        masks: LayerMasks | None,
    ) -> Tensor:  # fmt: skip
        """The same by `absorbed_attention`."""
        k, v = memory
        rows = x.view(len(k), -1, x.shape[1])
        if position is not None:
            rows = rows + position.to(self.dtype)
        query, out = (self._linear(f"{name}.cross_attention.{part}") for part in ("q", "out"))
        y = absorbed_attention(rows, k, v, query, out, masks).view(x.shape)
        return self._add_norm(x, y, f"{name}.norm_cross", masks, Site.cross_residual)

    def _fused(
        self, x: Tensor, memory: tuple[Tensor, ...], name: str, position: Tensor | None,
        masks: LayerMasks | None,
    ) -> Tensor:  # fmt: skip
        """The same with everything up to the norm in one operation."""
        if position is not None:
            raise UsageError("kernels: absorbed_cross cannot add positions to the queries alone")
        query, out = (self._linear(f"{name}.cross_attention.{part}") for part in ("q", "out"))
        (k, v), norm = memory, self._norm(f"{name}.norm_cross")
        return self.blocks.absorbed_cross(x, k, v, query, out, norm, masks)

    def ffn_block(self, x: Tensor, name: str, masks: LayerMasks | None) -> Tensor:
        """The feed-forward part with residual and norm on rows [M, D]."""
        expand, contract = self._linear(f"{name}.expand"), self._linear(f"{name}.contract")
        if "relu_drop" in self.blocks:
            y = self.blocks.feed_forward(x, expand, contract, masks)
        else:
            y = _apply(FeedForward, x, *expand, *contract, masks)
        return self._add_norm(x, y, f"{name}.norm_ffn", masks, Site.ffn_residual)

    def _add_norm(
        self, x: Tensor, y: Tensor, norm: str, masks: LayerMasks | None, site: Site
    ) -> Tensor:
        weights = self._norm(norm)
        if "drop_add_norm" in self.blocks:
            return self.blocks.add_norm(x, y, weights, masks, site)
        return _apply(DropAddNorm, x, y, *weights, masks, site)


def _apply(function: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    apply = cast("Callable[..., Tensor]", function.apply)
    return apply(*inputs)
