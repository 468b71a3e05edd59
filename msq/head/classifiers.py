"""What turns the last queries [B, K, D] into logits: a weight vector and a bias for each class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msq.errors import UsageError


class PerClass(nn.Module):
    """Eq. 7: a weight vector and a bias for each trained class."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, width))
        self.bias = nn.Parameter(torch.empty(classes))

    def forward(self, text: Tensor | None, trained: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weight [K, D] and bias [K]; `trained` [K'] picks rows, and must not hold -1."""
        if trained is None:
            return self.weight, self.bias
        if bool((trained < 0).any()):
            raise UsageError(
                f"{int((trained < 0).sum())} of the {len(trained)} classes were never trained, and "
                "classifier 'per-class' has no weights for them; train with --classifier shared "
                "or --classifier text"
            )
        return self.weight[trained], self.bias[trained]


class Shared(nn.Module):
    """One weight vector and one bias for all classes: only the query tells them apart."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, width))
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self, text: Tensor | None, trained: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weight [1, D] and bias [1], whatever the classes are."""
        return self.weight, self.bias


class FromText(nn.Module):
    """The weight vector of a class is an affine function of its text embedding; one bias."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.generate = nn.Linear(text_width, width)
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self, text: Tensor | None, trained: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weight [K, D] from `text` [K, D_text], and bias [1]."""
        assert text is not None  # the constructor of MSQNet and its forward saw to it
        return self.generate(text), self.bias


def make_classifier(kind: str, classes: int, width: int, text: Tensor | None) -> nn.Module:
    """The classifier that `head.classifier` names, for K classes and width D."""
    if kind == "per-class":
        return PerClass(classes, width)
    if kind == "shared":
        return Shared(width)
    assert text is not None
    return FromText(text.shape[1], width)
