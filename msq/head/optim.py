"""The optimiser, and the average of the weights that it leaves behind."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from msq.config import OptimConfig
from msq.head.flat import FlatParameters


def build_optimiser(
    model: nn.Module | FlatParameters, config: OptimConfig
) -> torch.optim.Optimizer:
    """Adam or AdamW, fused; weight decay on matrices only.

    The offsets of the labels are matrices too: decay draws them towards the text they started
    from.
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
    return kind(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)


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

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after step `step` (0 for the first)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

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
