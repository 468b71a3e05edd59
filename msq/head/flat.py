"""All parameters of a head in one buffer, with their gradients, and a bf16 copy where it is asked.

The modules keep their parameters, by their plain names; these become views of the buffer. So what
is packed together is a view too, a checkpoint never sees the packing, and the optimiser, the norm
of the gradients and the average of the weights are each one operation on one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

ALIGNED = 16  # elements: every group of parameters starts at a multiple of a cache line


class FlatParameters:
    """The parameters of a module, moved into one buffer.

    Matrices come first and vectors after them, since weight decay acts on matrices only. The
    parameters of a group lie side by side, in its order; all of them matrices, or all vectors.

    Args:
        model: whose parameters become views; they have one dtype and device.
        groups: names of parameters to lie side by side.
        low: dtype of a copy for matrix products, kept up to date by `begin`.

    Attributes:
        data: [P] all parameters (and zeros between them).
        grad: [P] their gradients, filled by `gather`.
        matrices: the part of `data` with weight decay, a Parameter whose gradient is in `grad`.
        vectors: the rest of `data`, likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Iterable[Sequence[str]] = (),
        low: torch.dtype | None = None,
    ) -> None:
        named = dict(model.named_parameters())
        joined = [tuple(group) for group in groups]
        taken = {name for group in joined for name in group}
        ordered = joined + [(name,) for name in named if name not in taken]
        ordered.sort(key=lambda group: named[group[0]].ndim < 2)  # stable: matrices first
        self._places: dict[str, int] = {}
        end, split = 0, 0
        for group in ordered:
            end = -(-end // ALIGNED) * ALIGNED
            for name in group:
                self._places[name] = end
                end += named[name].numel()
            if named[group[0]].ndim >= 2:
                split = -(-end // ALIGNED) * ALIGNED
        first = next(iter(named.values()))
        self.data = torch.zeros(max(end, split), dtype=first.dtype, device=first.device)
        self.grad = torch.zeros_like(self.data)
        self.low = None if low is None else torch.empty_like(self.data, dtype=low)
        self._named, self._leaves = named, dict[tuple[str, ...], Tensor]()
        with torch.no_grad():
            for name, parameter in named.items():
                view = self._view(self.data, (name,))
                view.copy_(parameter)
                parameter.data = view
        self.matrices, self.vectors = self._slice(0, split), self._slice(split, None)

    def leaf(self, names: tuple[str, ...], low: bool = False) -> Tensor:
        """Parameters that lie side by side as one, joined along their first dimension.

        Args:
            names: one parameter or (a part of) a group.
            low: in the lower precision, where there is one.
        """
        if names not in self._leaves:
            source = self.low if low and self.low is not None else self.data
            self._leaves[names] = self._view(source, names).detach().requires_grad_()
        return self._leaves[names]

    def begin(self) -> None:
        """Forget the gradients of the last step, and bring the low copy up to date."""
        for tensor in (*self._named.values(), *self._leaves.values()):
            tensor.grad = None
        if self.low is not None:
            self.low.copy_(self.data)

    def gather(self, add: bool = False) -> None:
        """Copy the gradients that the backward pass left into `grad`; zero where it left none.

        Args:
            add: to what earlier backward passes of the step left there, in its own precision.
        """
        have: dict[tuple[str, ...], Tensor] = {
            (name,): p for name, p in self._named.items() if p.grad is not None
        }
        have |= {names: leaf for names, leaf in self._leaves.items() if leaf.grad is not None}
        reached = {name for names in have for name in names}
        views = [self._view(self.grad, names) for names in have]
        found = [t.grad for t in have.values() if t.grad is not None]
        if add:
            for view, gradient in zip(views, found, strict=True):
                view.add_(gradient)
        else:
            torch._foreach_copy_(views, found)
        for name in self._named:
            if name not in reached and not add:
                self._view(self.grad, (name,)).zero_()
        for tensor in have.values():
            tensor.grad = None

    def _view(self, buffer: Tensor, names: tuple[str, ...]) -> Tensor:
        """The joined parameters in `data`, `grad` or `low`."""
        shapes = [self._named[name].shape for name in names]
        place = self._places[names[0]]
        for name in names:
            if self._places[name] != place:
                raise ValueError(f"{names} do not lie side by side: make them a group")
            place += self._named[name].numel()
        rows = sum(shape[0] for shape in shapes)
        return buffer[self._places[names[0]] : place].view(rows, *shapes[0][1:])

    def _slice(self, begin: int, end: int | None) -> nn.Parameter:
        part = nn.Parameter(self.data[begin:end])
        part.grad = self.grad[begin:end]
        return part
