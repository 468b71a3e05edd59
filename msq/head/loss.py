"""The training loss (Eq. 8)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def loss_kind(kind: str, task: str) -> str:
    """`bce` or `ce`: as configured, or by the task where that says `auto`."""
    if kind != "auto":
        return kind
    return "bce" if task == "multilabel" else "ce"


def head_loss(logits: Tensor, labels: Tensor, kind: str, known: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, averaged over clips and classes, or cross-entropy over classes.

    Args:
        logits: [B, K].
        labels: [B, K] zeros and ones; for `ce` each row is divided by its sum.
        kind: `bce` or `ce`.
        known: [B, K], zero where nobody knows whether the clip has the class: such a pair adds
            nothing to the loss, and the mean of `bce` is over the others. With `ce` such a class
            is no alternative for its clip. None where all is known.
    """
    target = labels.to(logits.dtype)
    if known is not None:
        counts = (known != 0).to(logits.dtype)
        target = target * counts
        if kind == "bce":
            each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            return (each * counts).sum() / counts.sum().clamp(min=1)
        logits = logits.masked_fill(known == 0, torch.finfo(logits.dtype).min)
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, target)
    return F.cross_entropy(logits, target / target.sum(1, keepdim=True).clamp(min=1))
