"""The optimiser, and the average of the weights that it leaves behind."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from msq.config import OptimConfig
from msq.head.flat import FlatParameters


def build_optimiser(
    model: nn.Module | FlatParameters,
    config: OptimConfig,
    rate: Tensor | None = None,
    *,
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """Adam or AdamW, fused; weight decay on matrices only.

    The offsets of the labels are matrices too: decay draws them towards the text they started
    from.

    Args:
        model: whose parameters.
        config: of the optimiser.
        rate: a tensor that holds the learning rate, to be changed in place; None takes the number.
        capturable: its steps can stand in a CUDA graph.
    """
    if isinstance(model, FlatParameters):
        matrices, vectors = [model.matrices], [model.vectors]
    else:
        parameters = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.ndim >= 2]
        vectors = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    lr = config.lr if rate is None else rate
    return kind(groups, lr=lr, betas=(0.9, config.beta2), fused=True, capturable=capturable)


class WeightAverage:
    """Exponential moving average of the parameters.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that the start is forgotten quickly.

    Args:
        parameters: those of the model, in order.
        decay: of the average.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.average = [p.detach().clone() for p in self.parameters]
        self._weight = self.average[0].new_zeros(())  # of what is taken in

    def update(self, step: int) -> None:
        """Take in the parameters after step `step` (0 for the first)."""
        self.plan(step)
        self.take()

    def plan(self, step: int) -> None:
        """Say after which step the next `take` comes."""
        self._weight.fill_(1 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def take(self) -> None:
        """Take in the parameters as they are; nothing here depends on the processor's numbers."""
        for average, parameter in zip(self.average, self.parameters, strict=True):
            average.lerp_(parameter, self._weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters with their average; a second call undoes the first."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def load(self, average: list[Tensor]) -> None:
        """Go on from a stored average."""
        for mine, stored in zip(self.average, average, strict=True):
            mine.copy_(stored)
