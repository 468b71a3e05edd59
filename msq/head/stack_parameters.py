"""The parameters of G heads in one buffer [G, P], each head's own modules being views of its row.

Heads of other numbers of classes differ in the first dimension of few parameters (offset, position,
weight and bias of the classifier). There a row has room for the largest, a head has the beginning,
and what lies behind it is zero and stays zero: its gradients are, and decay keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from msq.head.flat import ALIGNED
from msq.head.model import MSQNet
from msq.head.packed_parameters import packed_groups


class StackedParameters:
    """The parameters of some heads of one architecture, moved into one buffer.

    Matrices come first and vectors after them, as in `msq.head.flat`.

    Args:
        models: G heads on one device, in one dtype; their parameters become views.
        low: dtype of a copy for matrix products, kept up to date by `begin`.

    Attributes:
        data: [G, P].
        grad: [G, P], filled by `gather`.
        split: where the vectors begin, which have no weight decay.

    Raises:
        ValueError: heads of different architectures.
    """

    def __init__(self, models: Sequence[MSQNet], low: torch.dtype | None = None) -> None:
        self.models = list(models)
        named = [dict(model.named_parameters()) for model in self.models]
        config = self.models[0].config
        self._groups = packed_groups(config.layers, config.encoder_layers)
        self._shapes = _common_shapes(named)
        taken = {name for group in self._groups.values() for name in group}
        ordered = [*self._groups.values(), *((n,) for n in named[0] if n not in taken)]
        ordered.sort(key=lambda group: len(self._shapes[group[0]]) < 2)  # stable: matrices first
        self._places: dict[str, int] = {}
        end, self.split = 0, 0
        for group in ordered:
            end = _aligned(end)
            for name in group:
                self._places[name] = end
                end += self._shapes[name].numel()
            if len(self._shapes[group[0]]) >= 2:
                self.split = _aligned(end)
        first = next(iter(named[0].values()))
        self.data = torch.zeros(len(named), _aligned(max(end, self.split)), dtype=first.dtype,
                                device=first.device)  # fmt: skip
        self.grad = torch.zeros_like(self.data)
        self.low = None if low is None else torch.empty_like(self.data, dtype=low)
        self._leaves: dict[tuple[str, bool], Tensor] = {}
        for model, row in zip(self.models, self.data, strict=True):
            self._move(model, row)

    def leaf(self, name: str, low: bool = True) -> Tensor:
        """A parameter of all heads, [G, ...], by its plain or packed name.

        Args:
            name: of a parameter, or of a group in `msq.head.packed_parameters.packed_groups`.
            low: in the lower precision, where there is one.
        """
        low = low and self.low is not None
        if (name, low) not in self._leaves:
            source = self.data if not low or self.low is None else self.low
            self._leaves[name, low] = self._view(source, name).detach().requires_grad_()
        return self._leaves[name, low]

    def begin(self) -> None:
        """Forget the gradients of the last step, and bring the low copy up to date."""
        for leaf in self._leaves.values():
            leaf.grad = None
        if self.low is not None:
            self.low.copy_(self.data)

    def gather(self) -> None:
        """Copy the gradients that the backward pass left into `grad`.

        What it never reaches has zeros there from the beginning; a parameter is read either in the
        lower precision or in the full one, never in both.
        """
        reached = [(n, leaf) for (n, _), leaf in self._leaves.items() if leaf.grad is not None]
        views = [self._view(self.grad, name) for name, _ in reached]
        torch._foreach_copy_(views, [leaf.grad for _, leaf in reached if leaf.grad is not None])
        for _, leaf in reached:
            leaf.grad = None

    @torch.no_grad()
    def keep(self, heads: Sequence[int]) -> None:
        """Go on with some of the heads; the others take their parameters with them."""
        for g, model in enumerate(self.models):
            if g not in heads:
                self._move(model, self.data[g].clone())
        index = torch.tensor(list(heads), dtype=torch.long, device=self.data.device)
        self.models = [self.models[g] for g in heads]
        self.data, self.grad = self.data[index], self.grad[index]
        self.low = None if self.low is None else self.low[index]
        self._leaves.clear()
        for model, row in zip(self.models, self.data, strict=True):
            for name, parameter in model.named_parameters():
                parameter.data = self._part(row, name, parameter.shape)

    @torch.no_grad()
    def _move(self, model: MSQNet, row: Tensor) -> None:
        """Let the parameters of a model be views of a row, with the values they have."""
        for name, parameter in model.named_parameters():
            part = self._part(row, name, parameter.shape)
            part.copy_(parameter)
            parameter.data = part

    def _part(self, row: Tensor, name: str, shape: torch.Size) -> Tensor:
        """The beginning of a parameter's room in a row [P]."""
        place = self._places[name]
        return row[place : place + shape.numel()].view(shape)

    def _view(self, buffer: Tensor, name: str) -> Tensor:
        """[G, ...] of a buffer [G, P]; parts of a group are joined along their first dimension."""
        names = self._groups.get(name, (name,))
        shapes, place = [self._shapes[part] for part in names], self._places[names[0]]
        rows = sum(shape[0] for shape in shapes)
        end = place + sum(shape.numel() for shape in shapes)
        return buffer[:, place:end].view(len(buffer), rows, *shapes[0][1:])


def _common_shapes(named: Sequence[dict[str, nn.Parameter]]) -> dict[str, torch.Size]:
    """The shape with room for every head, by name."""
    shapes = {}
    for name, first in named[0].items():
        found = [parameters[name].shape for parameters in named if name in parameters]
        if len(found) < len(named) or any(shape[1:] != first.shape[1:] for shape in found):
            raise ValueError(
                f"heads of one architecture have {name} in one width: found "
                f"{[tuple(shape) for shape in found]} in {len(named)} heads"
            )
        shapes[name] = torch.Size((max(shape[0] for shape in found), *first.shape[1:]))
    return shapes


def _aligned(end: int) -> int:
    return -(-end // ALIGNED) * ALIGNED
