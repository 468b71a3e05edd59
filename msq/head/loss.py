"""The training loss: Eq. 8, and two that weigh rare labels otherwise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from msq.config import TrainConfig

# Fields of `TrainConfig` that a loss reads.
NUMBERS: dict[str, tuple[str, ...]] = {
    "asymmetric": ("gamma_neg", "gamma_pos", "clip_margin"),
    "focal": ("focal_gamma", "focal_alpha"),
}
_PLAIN = TrainConfig()


def loss_kind(kind: str, task: str) -> str:
    """The loss as configured, or by the task where that says `auto`: `bce` or `ce`."""
    if kind != "auto":
        return kind
    return "bce" if task == "multilabel" else "ce"


def head_loss(
    logits: Tensor,
    labels: Tensor,
    kind: str,
    known: Tensor | None = None,
    numbers: TrainConfig = _PLAIN,
) -> Tensor:
    """A loss of each class by itself, averaged over clips and classes, or cross-entropy over them.

    Args:
        logits: [B, K]; those of 16 bits are widened to float32 first.
        labels: [B, K] zeros and ones; for `ce` each row is divided by its sum.
        kind: `bce`, `asymmetric`, `focal`, or `ce`.
        known: [B, K], zero where nobody knows whether the clip has the class: such a pair adds
            nothing to the loss, and the mean is over the others. With `ce` such a class is no
            alternative for its clip. None where all is known.
        numbers: where `NUMBERS` are read from.

    Returns:
        0-dimensional, float32 or wider.
    """
    logits = _wide(logits)
    target = labels.to(logits.dtype)
    if known is not None:
        counts = (known != 0).to(logits.dtype)
        target = target * counts
        if kind != "ce":
            each = class_losses(logits, target, kind, numbers)
            return (each * counts).sum() / counts.sum().clamp(min=1)
        logits = logits.masked_fill(known == 0, torch.finfo(logits.dtype).min)
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, target)
    if kind != "ce":
        return class_losses(logits, target, kind, numbers).mean()
    return F.cross_entropy(logits, target / target.sum(1, keepdim=True).clamp(min=1))


def class_losses(
    logits: Tensor, target: Tensor, kind: str, numbers: TrainConfig = _PLAIN
) -> Tensor:
    """The loss of every pair of clip and class, none of which looks at another.

    With p = sigmoid(x), of a class that a clip has, and of one that it has not:

    * `bce`: -log p, and -log(1 - p);
    * `asymmetric`: -(1 - p)^gamma_pos log p, and -q^gamma_neg log(1 - q), where q is p less
      `clip_margin`, at least 0 (Ridnik et al. 2021, arXiv 2009.14119, eq. 7);
    * `focal`: -alpha (1 - p)^gamma log p, and -(1 - alpha) p^gamma log(1 - p), of `focal_alpha` and
      `focal_gamma` (Lin et al. 2017, arXiv 1708.02002, eq. 5).

    Gradients go through the weights too, and are finite for every finite logit.

    Args:
        logits: x, of any shape.
        target: of the same shape and dtype, zeros and ones.
        kind: `bce`, `asymmetric` or `focal`.
        numbers: where `NUMBERS` are read from.
    """
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if kind == "focal":
        gamma, alpha = numbers.focal_gamma, numbers.focal_alpha
        has = alpha * _weighted(logits, gamma)
        lacks = (1 - alpha) * _weighted(-logits, gamma)
    else:
        has = _weighted(logits, numbers.gamma_pos)
        lacks = _shifted(logits, numbers.gamma_neg, numbers.clip_margin)
    return target * has + (1 - target) * lacks


def _weighted(x: Tensor, gamma: float) -> Tensor:
    """-(1 - p)^gamma log p; the power by its logarithm, whose gradient has no division by 1 - p."""
    return -(gamma * F.logsigmoid(-x)).exp() * F.logsigmoid(x)


def _shifted(x: Tensor, gamma: float, margin: float) -> Tensor:
    """-q^gamma log(1 - q) with q = max(p - margin, 0)."""
    if not margin:
        return _weighted(-x, gamma)
    p = x.sigmoid()
    counts = p > margin
    q = torch.where(counts, p - margin, 0.5)  # 0.5 is for nobody: at 0 the power has no slope
    rest = ((-x).sigmoid() + margin).clamp(max=1)  # 1 - q, above 0 where p is 1 to the last bit
    return torch.where(counts, -q.pow(gamma) * rest.log(), 0.0)


def _wide(logits: Tensor) -> Tensor:
    """In float32 where they have 16 bits."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
