"""The training loss (Eq. 8)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def loss_kind(kind: str, task: str) -> str:
    """`bce` or `ce`: as configured, or by the task where that says `auto`."""
    if kind != "auto":
        return kind
    return "bce" if task == "multilabel" else "ce"


def head_loss(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """Binary cross-entropy, averaged over clips and classes, or cross-entropy over classes.

    Args:
        logits: [B, K].
        labels: [B, K] zeros and ones; for `ce` each row is divided by its sum.
        kind: `bce` or `ce`.
    """
    target = labels.to(logits.dtype)
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, target)
    return F.cross_entropy(logits, target / target.sum(1, keepdim=True).clamp(min=1))
