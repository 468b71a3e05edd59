"""G heads of one architecture, computed at once: weights [G, ...], activations [G, rows, D].

What each head computes is what `msq.head.packed` says, with the standard cross-attention. A matrix
product of all heads is one grouped product. Heads with fewer classes than the largest are padded:
padded classes are never looked at as keys, and what they come to is left out of the loss, so they
have no part in any gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from msq.errors import UsageError
from msq.head.layers import LAYER_NORM_EPS
from msq.head.masks import Part, Site
from msq.head.model import MSQNet
from msq.head.position_code import position_code
from msq.head.stack_masks import StackedMasks, row_shape
from msq.head.stack_parameters import StackedParameters


class StackedHead:
    """What the heads of `parameters` compute.

    Args:
        parameters: of the heads.
        precision: `fp32` (the dtype of the parameters) or `bf16`, as in `PackedHead`.

    Attributes:
        valid: bool [G, K], the classes that a head has among the K of the largest.
    """

    def __init__(self, parameters: StackedParameters, precision: str = "fp32") -> None:
        self.parameters, models = parameters, parameters.models
        model = self.model = models[0]
        wide = parameters.data.dtype
        self.dtype = torch.bfloat16 if precision == "bf16" else wide
        self.heads, self.width = model.config.heads, model.width
        self.classes = [one.classes for one in models]
        device = parameters.data.device
        count = torch.tensor(self.classes, device=device)
        self.valid = torch.arange(max(self.classes), device=device) < count[:, None]
        self._bias: Tensor | None = None  # added to scores: keys that are no classes
        if len(set(self.classes)) > 1:
            self._bias = torch.zeros(self.valid.shape, dtype=self.dtype, device=device)
            self._bias.masked_fill_(~self.valid, -math.inf)
        vanilla = model.config.queries == "vanilla"
        self._text = None if model.text is None else _padded([_text(one) for one in models])
        start = _padded([one.start for one in models]) if vanilla else self._text
        assert start is not None  # the constructor of MSQNet saw to it
        self._start = start

    def __call__(
        self, tokens: Tensor, image: Tensor | None = None, masks: StackedMasks | None = None
    ) -> Tensor:
        """Score every class for every clip.

        Args:
            tokens: [G, B, S, D'], or [1, B, S, D'] where all heads see the same clips.
            image: [G, B, D''] or [1, B, D''].
            masks: of dropout; None for none.

        Returns:
            [G, B, K]; what stands beyond a head's own classes means nothing.

        Raises:
            UsageError: `image` is needed and missing.
        """
        model, clips = self.model, tokens.shape[1]
        weights = self.parameters.leaf
        label = self._start + weights("offset", False)
        if model.fuse_label is not None:
            label = label @ weights("fuse_label.weight", False).transpose(1, 2)  # A[k]
        fused = None
        if model.fuse_image is not None:
            if image is None:
                raise UsageError("queries='multimodal' needs `image` [B, D''], found None")
            fused = self._shared(image, "fuse_image.weight").to(self.dtype)  # c[b]
        position = None
        if model.query_position is not None:
            position = weights("query_position", False).to(self.dtype)
        memory = self._keys_and_values(tokens, masks)
        x, packed = self._first_queries(label.to(self.dtype), fused, position, clips)
        for i in range(model.config.layers):
            name = f"layers.{i}"
            if i:
                packed = self._qkv(x, name, position, clips)
            x = self._self_block(x, packed, clips, name, (Part.decoder, i), masks)
            x = self._cross_block(x, memory[i], clips, name, position, (Part.decoder, i), masks)
            x = self._ffn_block(x, clips, name, (Part.decoder, i), masks)
        return self._classify(x, clips)

    def _first_queries(
        self, label: Tensor, fused: Tensor | None, position: Tensor | None, clips: int
    ) -> tuple[Tensor, Tensor]:
        """Q_0 [G, B K, D], and its q, k and v [G, B K, 3 D], projected in its parts.

        What c[b] adds to the keys shifts every score of a row alike, and is not computed.
        """
        width = self.width
        own = self._linear(label, "layers.0.self_attention.qkv")
        if position is not None:
            own = own + self._placed(position, "layers.0")
        if fused is None:
            rows = label[:, None].expand(-1, clips, -1, -1)
            return rows.flatten(1, 2), own[:, None].expand(-1, clips, -1, -1).flatten(1, 2)
        weight = self.parameters.leaf("layers.0.self_attention.qkv.weight")
        query = fused @ weight[:, :width].transpose(1, 2)
        value = fused @ weight[:, 2 * width :].transpose(1, 2)
        clip = torch.cat([query, torch.zeros_like(query), value], dim=2)
        rows = label[:, None] + fused[:, :, None]
        return rows.flatten(1, 2), (own[:, None] + clip[:, :, None]).flatten(1, 2)

    def _qkv(self, x: Tensor, name: str, position: Tensor | None, clips: int) -> Tensor:
        packed = self._linear(x, f"{name}.self_attention.qkv")
        if position is None:
            return packed
        own = _by_clip(packed, clips) + self._placed(position, name)[:, None]
        return own.flatten(1, 2)

    def _placed(self, position: Tensor, name: str) -> Tensor:
        """What positions [G, K, D] add to q, k and v [G, K, 3 D]: nothing to v."""
        weight = self.parameters.leaf(f"{name}.self_attention.qkv.weight")[:, : 2 * self.width]
        return F.pad(position @ weight.transpose(1, 2), (0, self.width))

    def _self_block(
        self, x: Tensor, packed: Tensor, clips: int, name: str, place: tuple[Part, int],
        masks: StackedMasks | None,
    ) -> Tensor:  # fmt: skip
        """Self-attention with residual and norm on rows [G, B K, D]."""
        q, k, v = self._split(packed, clips, 3)
        bias = None if place[0] is Part.encoder else self._bias
        mixed = self._attend(q, k, v, place, Site.self_probability, masks, bias)
        y = self._linear(mixed, f"{name}.self_attention.out")
        return self._add_norm(x, y, clips, f"{name}.norm_self", place, Site.self_residual, masks)

    def _cross_block(
        self, x: Tensor, memory: tuple[Tensor, Tensor], clips: int, name: str,
        position: Tensor | None, place: tuple[Part, int], masks: StackedMasks | None,
    ) -> Tensor:  # fmt: skip
        """Cross-attention with residual and norm on rows [G, B K, D]."""
        q = self._linear(x, f"{name}.cross_attention.q")
        if position is not None:
            weight = self.parameters.leaf(f"{name}.cross_attention.q.weight")
            added = position @ weight.transpose(1, 2)
            q = (_by_clip(q, clips) + added[:, None]).flatten(1, 2)
        mixed = self._attend(self._split(q, clips, 1)[0], *memory, place, Site.cross_probability,
                             masks)  # fmt: skip
        y = self._linear(mixed, f"{name}.cross_attention.out")
        return self._add_norm(x, y, clips, f"{name}.norm_cross", place, Site.cross_residual, masks)

    def _ffn_block(
        self, x: Tensor, clips: int, name: str, place: tuple[Part, int], masks: StackedMasks | None
    ) -> Tensor:
        hidden = self._linear(x, f"{name}.expand").relu()
        if masks is not None:
            shape = row_shape(place[0], clips, x.shape[1], hidden.shape[2])
            hidden = masks.drop(*place, Site.hidden, hidden, shape)
        y = self._linear(hidden, f"{name}.contract")
        return self._add_norm(x, y, clips, f"{name}.norm_ffn", place, Site.ffn_residual, masks)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, place: tuple[Part, int], site: Site,
        masks: StackedMasks | None, bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """softmax(q k^T / sqrt(d) + bias) v: [G, B K, D] from [G, B, H, K, d] and [..., S, d].

        `bias` [G, K] is added for each key.
        """
        scores = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1]))
        if bias is not None:
            scores = scores + bias[:, None, None, None]
        p = scores.softmax(-1)
        if masks is not None:
            _, clips, heads, rows, keys = p.shape
            own_keys = site is Site.self_probability and place[0] is Part.decoder
            p = masks.drop(*place, site, p, lambda count: (
                clips, heads, rows if place[0] is Part.encoder else count,
                count if own_keys else keys,
            ))  # fmt: skip
        mixed = p @ v
        return mixed.transpose(2, 3).flatten(3).flatten(1, 2)

    def _add_norm(
        self, x: Tensor, y: Tensor, clips: int, norm: str, place: tuple[Part, int], site: Site,
        masks: StackedMasks | None,
    ) -> Tensor:  # fmt: skip
        """LayerNorm(x + dropout(y))."""
        if masks is not None:
            shape = row_shape(place[0], clips, y.shape[1], y.shape[2])
            y = masks.drop(*place, site, y, shape)
        return self._norm(x + y, norm).to(self.dtype)

    def _keys_and_values(
        self, tokens: Tensor, masks: StackedMasks | None
    ) -> list[tuple[Tensor, Tensor]]:
        """For every decoder layer its k and v, each [G, B, H, S, d]."""
        model, (_, clips, length, _) = self.model, tokens.shape
        model.require_coded(length)
        kind, layers, width = model.config.memory_position, model.config.layers, self.width
        memory = self._shared(tokens.flatten(1, 2), "memory.weight")
        code = None
        if kind != "none":
            code = position_code(length, width, memory.device, memory.dtype)
        if kind == "sincos-input" and code is not None:
            memory = memory + code.repeat(clips, 1)
            if masks is not None:
                shape = row_shape(Part.input, clips, clips * length, width)
                memory = masks.drop(Part.input, 0, Site.self_residual, memory, shape)
        rows = memory.to(self.dtype)
        for i in range(model.config.encoder_layers):
            name, place = f"encoder.{i}", (Part.encoder, i)
            packed = self._linear(rows, f"{name}.self_attention.qkv")
            rows = self._self_block(rows, packed, clips, name, place, masks)
            rows = self._ffn_block(rows, clips, name, place, masks)
        if model.encoder_norm is not None:
            rows = self._norm(rows, "encoder_norm").to(self.dtype)
        made = self._linear(rows, "layers.cross_attention.kv")
        if kind == "sincos" and code is not None:
            weight = self.parameters.leaf("layers.cross_attention.kv.weight")
            added = code.to(self.dtype) @ weight.mT
            added = added.view(len(weight), length, layers, 2, width)
            keys = torch.stack([added[..., 0, :], torch.zeros_like(added[..., 0, :])], dim=3)
            made = (_by_clip(made, clips) + keys.flatten(2)[:, None]).flatten(1, 2)
        parts = self._split(made, clips, 2 * layers)
        return list(zip(parts[0::2], parts[1::2], strict=True))

    def _classify(self, x: Tensor, clips: int) -> Tensor:
        """Eq. 7 on rows [G, B K, D]."""
        weights, normed = self.parameters.leaf, _by_clip(self._norm(x, "norm"), clips)
        bias = weights("classifier.bias", False)[:, None]
        if self.model.config.classifier != "text":
            own = weights("classifier.weight", False)
            return torch.add((normed * own[:, None]).sum(-1), bias)
        assert self._text is not None  # the constructor of MSQNet saw to it
        weight = weights("classifier.generate.weight", False)
        offset = weights("classifier.generate.bias", False)[:, None]
        generated = torch.baddbmm(offset, self._text, weight.mT)
        return torch.add((normed * generated[:, None]).sum(-1), bias)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        """The layer of every head on its rows: [G, M, N] from [G, M, D]."""
        weight = self.parameters.leaf(f"{name}.weight")
        return torch.baddbmm(self.parameters.leaf(f"{name}.bias")[:, None], x, weight.mT)

    def _shared(self, x: Tensor, name: str) -> Tensor:
        """A product without bias: [G, M, D] from [G, M, D'] or, for all heads, [1, M, D']."""
        weight = self.parameters.leaf(name, False)
        return torch.bmm(x.expand(len(weight), -1, -1), weight.mT)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """LayerNorm of every head, in the precision of the parameters."""
        weight, bias = (self.parameters.leaf(f"{name}.{x}", False)[:, None]
                        for x in ("weight", "bias"))  # fmt: skip
        normed = F.layer_norm(x.to(weight.dtype), (self.width,), eps=LAYER_NORM_EPS)
        return torch.addcmul(bias, normed, weight)

    def _split(self, packed: Tensor, clips: int, parts: int) -> tuple[Tensor, ...]:
        """[G, B K, parts D] -> so many [G, B, H, K, d]."""
        split = packed.view(len(packed), clips, -1, parts, self.heads, self.width // self.heads)
        return split.permute(3, 0, 1, 4, 2, 5).contiguous().unbind(0)


def _by_clip(x: Tensor, clips: int) -> Tensor:
    """[G, B K, N] -> [G, B, K, N]."""
    return x.view(len(x), clips, -1, x.shape[2])


def _text(model: MSQNet) -> Tensor:
    assert model.text is not None
    return model.text


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """[G, K, ...] with zeros where a head has fewer than K classes."""
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
