"""The packed head: what `msq.head.model` says, in fewer and larger operations.

* q, k and v of a self-attention are one matrix product; the keys and values of all decoder layers
  are one, since all read the same tokens.
* Q_0[b, k] = A[k] + c[b] is projected in its parts: K + B rows in place of B K. What c adds to the
  keys shifts every score of a row alike, so softmax cancels it and it is not computed.
* Learned positions and the position code of the tokens are projected apart and added.
* Cross-attention takes the absorbed form where a recorded table says that it is faster
  (`msq.head.absorbed`).
* The blocks have backward passes of their own (`msq.head.packed_blocks`).

It has no parameters: it reads those of an `MSQNet`, and gives them their gradients. `pack` and
`unpack` say which of them lie side by side.

In bf16 the rows between the blocks and both sides of every large matrix product are bf16. In
float32 stay: the parameters and their gradients as the optimiser sees them, the optimiser, the
fusion of the queries and the projection of the tokens, LayerNorm and softmax inside, the
classifier, and the loss. Sums in matrix products are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from msq.errors import UsageError
from msq.head.absorbed import absorbed_attention, absorbing_pays
from msq.head.flat import FlatParameters
from msq.head.masks import LayerMasks, Masks, Part, Site
from msq.head.model import MSQNet, position_code
from msq.head.packed_blocks import CrossAttend, DropAddNorm, FeedForward, SelfAttend, split_heads
from msq.head.packed_kernels import KernelBlocks


def packed_groups(layers: int, encoder_layers: int) -> dict[str, tuple[str, ...]]:
    """Packed name -> the plain names it joins, along the first dimension."""
    groups = {}
    for leaf in ("weight", "bias"):
        for stack, count in (("encoder", encoder_layers), ("layers", layers)):
            for i in range(count):
                owner = f"{stack}.{i}.self_attention"
                groups[f"{owner}.qkv.{leaf}"] = tuple(f"{owner}.{x}.{leaf}" for x in "qkv")
        groups[f"layers.cross_attention.kv.{leaf}"] = tuple(
            f"layers.{i}.cross_attention.{x}.{leaf}" for i in range(layers) for x in "kv"
        )
    return groups


def pack(plain: Mapping[str, Tensor], layers: int, encoder_layers: int = 0) -> dict[str, Tensor]:
    """A state dict by plain names with the packed tensors in place of those that they join."""
    groups = packed_groups(layers, encoder_layers)
    joined = {name for names in groups.values() for name in names}
    packed = {name: tensor for name, tensor in plain.items() if name not in joined}
    return packed | {p: torch.cat([plain[n] for n in names]) for p, names in groups.items()}


def unpack(packed: Mapping[str, Tensor], layers: int, encoder_layers: int = 0) -> dict[str, Tensor]:
    """The inverse of `pack`, bit for bit."""
    groups = packed_groups(layers, encoder_layers)
    plain = {name: tensor for name, tensor in packed.items() if name not in groups}
    for name, names in groups.items():
        parts = packed[name].chunk(len(names))
        plain |= {part: tensor.clone() for part, tensor in zip(names, parts, strict=True)}
    return plain


class PackedHead:
    """A head that computes what `model` does, from the parameters of `model`.

    Args:
        model: the plain head.
        precision: `fp32` (the dtype of the parameters) or `bf16`.
        flat: the parameters in one buffer, made with `flat_parameters`; gradients then go there.
            Without it the parameters are joined at each call, and have their own gradients.
        frozen: join them once, for inference only.
        absorb: use the absorbed cross-attention; None asks the table.
        kernels: names of the operations that run a Triton kernel (`msq.head.kernel_choice`);
            `absorbed_cross` means the absorbed form, `cross_attention` the other one.
        triton: False runs the references of those operations in place of their kernels, for tests.
    """

    def __init__(
        self,
        model: MSQNet,
        *,
        precision: str = "fp32",
        flat: FlatParameters | None = None,
        frozen: bool = False,
        absorb: bool | None = None,
        kernels: Collection[str] = (),
        triton: bool = True,
    ) -> None:
        self.blocks = KernelBlocks(kernels, model.config.heads, triton=triton)
        self.model, self.precision, self.flat, self.absorb = model, precision, flat, absorb
        config = model.config
        self.heads = config.heads
        self.dtype = torch.bfloat16 if precision == "bf16" else model.memory.weight.dtype
        self._groups = packed_groups(config.layers, config.encoder_layers)
        self._named = dict(model.named_parameters())
        self._frozen, self._joined = frozen, dict[str, Tensor]()
        self._classes: tuple[Any, ...] = ()  # those asked for last, and their parts

    def __call__(
        self,
        tokens: Tensor,
        image: Tensor | None = None,
        *,
        text: Tensor | None = None,
        trained: Tensor | None = None,
        masks: Masks | None = None,
    ) -> dict[str, Tensor]:
        """Score every class for every clip: arguments, result and errors of `MSQNet.forward`.

        There are no `intermediates`, and `masks` None means no dropout, whatever the mode.

        Args:
            tokens: [B, S, D'].
            image: [B, D''].
            text: [K', D_text].
            trained: [K'].
            masks: of dropout.

        Returns:
            "logits": [B, K], or [B, K'].
        """
        if not self._frozen:
            self._joined.clear()
        model, clips = self.model, len(tokens)
        label, position, weight, bias = self._class_parts(text, trained)
        if model.fuse_label is not None:
            label = model.fuse_label(label)  # A[k]
        fused = None
        if model.fuse_image is not None:
            if image is None:
                raise UsageError("queries='multimodal' needs `image` [B, D''], found None")
            fused = model.fuse_image(image)  # c[b]
        memory = self._keys_and_values(tokens, masks)
        cross = self._cross_form(len(label), tokens)
        x: Tensor | None = None
        for i in range(model.config.layers):
            name, drop = f"layers.{i}", None if masks is None else masks.at(Part.decoder, i)
            if x is None:
                x = self._first_self_block(label, fused, position, clips, drop)
            else:
                x = self._self_block(x, clips, name, position, drop)
            x = cross(x, memory[i], name, position, drop)
            x = self._ffn_block(x, name, drop)
        assert x is not None  # there is at least one layer
        return {"logits": self._classify(x, clips, weight, bias)}

    def _class_parts(
        self, text: Tensor | None, trained: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """`MSQNet.class_parts`; a frozen head makes them once for all batches."""
        if not self._frozen:
            return self.model.class_parts(text, trained)
        if not self._classes or self._classes[0] is not text or self._classes[1] is not trained:
            self._classes = text, trained, self.model.class_parts(text, trained)
        found: tuple[Tensor, Tensor | None, Tensor, Tensor] = self._classes[2]
        return found

    def _first_self_block(
        self,
        label: Tensor,
        fused: Tensor | None,
        position: Tensor | None,
        clips: int,
        masks: LayerMasks | None,
    ) -> Tensor:
        """Self-attention of the first layer on A[k] + c[b], its projections in their parts."""
        name, width = "layers.0", self.model.width
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

    def _self_block(
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
        width = self.model.width
        weight = self._linear(f"{name}.self_attention.qkv")[0]
        added = F.linear(position.to(self.dtype), weight[: 2 * width])
        return F.pad(added, (0, width))

    def _cross_form(self, queries: int, tokens: Tensor) -> Callable[..., Tensor]:
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

    def _ffn_block(self, x: Tensor, name: str, masks: LayerMasks | None) -> Tensor:
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

    def _keys_and_values(self, tokens: Tensor, masks: Masks | None) -> list[tuple[Tensor, ...]]:
        """For every decoder layer its k and v, each [B, S, H, d].

        For the operation that takes them side by side they are one tensor [B, S, 2 D].
        """
        model, (clips, length, _) = self.model, tokens.shape
        model.require_coded(length)
        kind, layers, width = model.config.memory_position, model.config.layers, model.width
        memory = model.memory(tokens)
        code = None
        if kind != "none":
            code = position_code(length, width, memory.device, memory.dtype)
        if kind == "sincos-input":
            memory = memory + code
            if masks is not None:
                memory = masks.at(Part.input).drop(Site.self_residual, memory)
        rows = memory.reshape(clips * length, width).to(self.dtype)
        for i in range(model.config.encoder_layers):
            name, drop = f"encoder.{i}", None if masks is None else masks.at(Part.encoder, i)
            rows = self._ffn_block(self._self_block(rows, clips, name, None, drop), name, drop)
        if model.encoder_norm is not None:
            rows = model.encoder_norm(rows.to(memory.dtype)).to(self.dtype)
        weight, bias = self._linear("layers.cross_attention.kv")
        made = F.linear(rows, weight, bias).view(clips, length, 2 * layers, width)
        if kind == "sincos" and code is not None:
            added = F.linear(code.to(self.dtype), weight).view(length, layers, 2, width)
            only_keys = torch.stack([added[:, :, 0], torch.zeros_like(added[:, :, 0])], dim=2)
            made = made + only_keys.view(length, 2 * layers, width)
        if "cross_attention" in self.blocks and "absorbed_cross" not in self.blocks:
            return [(kv,) for kv in made.view(clips, length, layers, 2 * width).unbind(2)]
        parts = made.view(clips, length, 2 * layers, self.heads, -1).unbind(2)
        return list(zip(parts[0::2], parts[1::2], strict=True))

    def _classify(self, x: Tensor, clips: int, weight: Tensor, bias: Tensor) -> Tensor:
        """Eq. 7 on rows [B K, D]."""
        normed: Tensor = self.model.norm(x.to(self.model.norm.weight.dtype))
        if len(weight) == 1:
            scores = (normed @ weight[0]).view(clips, -1)
        else:
            by_class = normed.view(clips, len(weight), -1).transpose(0, 1)  # [K, B, D]
            scores = torch.bmm(by_class, weight[:, :, None])[:, :, 0].t()
        return scores + bias

    def _linear(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of a layer by its plain or packed name, as matrix products take them."""
        return self._weight(f"{name}.weight"), self._weight(f"{name}.bias")

    def _norm(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of a LayerNorm, as wide as the parameters are."""
        return self._weight(f"{name}.weight", False), self._weight(f"{name}.bias", False)

    def _weight(self, name: str, low: bool = True) -> Tensor:
        names = self._groups.get(name, (name,))
        if self.flat is not None:
            return self.flat.leaf(names, low)
        if name not in self._joined:
            parts: list[Tensor] = [self._named[part] for part in names]
            made = parts[0] if len(parts) == 1 else torch.cat(parts)
            made = made.to(self.dtype) if low else made
            self._joined[name] = made.detach() if self._frozen else made
        return self._joined[name]


def flat_parameters(model: MSQNet, precision: str = "fp32") -> FlatParameters:
    """The parameters of a head in one buffer, laid out as the packed head reads them."""
    groups = packed_groups(model.config.layers, model.config.encoder_layers)
    low = torch.bfloat16 if precision == "bf16" else None
    return FlatParameters(model, groups.values(), low)


def _apply(function: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    apply = cast("Callable[..., Tensor]", function.apply)
    return apply(*inputs)
