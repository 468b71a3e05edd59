"""The parameters of an `MSQNet` as the packed head reads them: some of them side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from msq.head.flat import FlatParameters
from msq.head.model import MSQNet


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


def flat_parameters(model: MSQNet, precision: str = "fp32") -> FlatParameters:
    """The parameters of a head in one buffer, laid out as the packed head reads them."""
    groups = packed_groups(model.config.layers, model.config.encoder_layers)
    low = torch.bfloat16 if precision == "bf16" else None
    return FlatParameters(model, groups.values(), low)


class PackedParameters:
    """Weights and biases by their plain or packed names.

    Args:
        model: whose they are.
        precision: `fp32` (the dtype of the parameters) or `bf16`.
        flat: all of them in one buffer, made with `flat_parameters`. Without it they are joined
            at each call of the head, and have their own gradients.
        frozen: join them once, for inference only.

    Attributes:
        precision: as given.
        dtype: of what matrix products take.
        width: D.
    """

    def __init__(
        self, model: MSQNet, precision: str, flat: FlatParameters | None, frozen: bool
    ) -> None:
        self._model, self._flat, self._frozen = model, flat, frozen
        self.precision, self.width = precision, model.width
        self.dtype = torch.bfloat16 if precision == "bf16" else model.memory.weight.dtype
        self._groups = packed_groups(model.config.layers, model.config.encoder_layers)
        self._named = dict(model.named_parameters())
        self._joined = dict[str, Tensor]()
        self._classes: tuple[Any, ...] = ()  # those asked for last, and their parts

    def begin(self) -> None:
        """A call of the head begins: the parameters may have other values now."""
        if not self._frozen:
            self._joined.clear()

    def of_classes(
        self, text: Tensor | None, trained: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """`MSQNet.class_parts`; a frozen head makes them once for all batches."""
        if not self._frozen:
            return self._model.class_parts(text, trained)
        if not self._classes or self._classes[0] is not text or self._classes[1] is not trained:
            self._classes = text, trained, self._model.class_parts(text, trained)
        found: tuple[Tensor, Tensor | None, Tensor, Tensor] = self._classes[2]
        return found

    def linear(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of a layer by its plain or packed name, as matrix products take them."""
        return self._weight(f"{name}.weight"), self._weight(f"{name}.bias")

    def norm(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of a LayerNorm, as wide as the parameters are."""
        return self._weight(f"{name}.weight", False), self._weight(f"{name}.bias", False)

    def _weight(self, name: str, low: bool = True) -> Tensor:
        names = self._groups.get(name, (name,))
        if self._flat is not None:
            return self._flat.leaf(names, low)
        if name not in self._joined:
            parts: list[Tensor] = [self._named[part] for part in names]
            made = parts[0] if len(parts) == 1 else torch.cat(parts)
            made = made.to(self.dtype) if low else made
            self._joined[name] = made.detach() if self._frozen else made
        return self._joined[name]
