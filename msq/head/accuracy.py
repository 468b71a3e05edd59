"""Shares of what a scorer got right: clips by their best classes, and (clip, class) pairs.

Shapes, labels and `known` are as in `msq.head.metrics`, which has every number that msq reports.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msq.errors import UsageError
from msq.head.ranking import checked_labels


def topk_accuracy(scores: Tensor, labels: Tensor, k: int = 1, known: Tensor | None = None) -> float:
    """Share of clips with a right class among their k highest scores; -inf is no score.

    Args:
        scores: [N, K].
        labels: [N] class indices, or [N, K], where any of a clip's labels is right; clips without
            any label are left out.
        k: at most K; of tied scores the lower class index comes first.
        known: [N, K]; a class that is not known for a clip is not among its scores.
    """
    if labels.ndim == 1:
        labels = torch.nn.functional.one_hot(labels.long(), scores.shape[1])
    scores, positive = checked_labels(scores, labels, known)
    keep = positive.any(1).nonzero().flatten()
    part = None if known is None else known[keep]
    return float(topk_tensor(scores[keep], positive[keep], (k,), part))


def topk_tensor(
    scores: Tensor, positive: Tensor, most: Sequence[int], known: Tensor | None
) -> Tensor:
    """`topk_accuracy` for several k of clips that all have a label; NaN where there is none."""
    scores = scores if known is None else scores.masked_fill(known == 0, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    right = (positive & (scores != -torch.inf)).gather(1, order)
    return torch.stack([right[:, :k].any(1).double().mean() for k in most])


def multilabel_accuracy(
    scores: Tensor,
    labels: Tensor,
    threshold: float = 0.5,
    *,
    logits: bool = False,
    known: Tensor | None = None,
) -> float:
    """Share of (clip, class) pairs judged right: 1 - Hamming loss.

    Sparse labels make it high for a scorer that says no to everything: print it beside
    `all_negative_accuracy`.

    Args:
        scores: [N, K] probabilities, or logits where `logits` is set.
        labels: [N, K].
        threshold: a probability above it is a yes.
        logits: apply a sigmoid first.
        known: [N, K].

    Raises:
        UsageError: values outside 0 to 1 that were not called logits.
    """
    scores, positive = checked_labels(scores, labels, known)
    if logits:
        return float(accuracy_tensor(scores.sigmoid(), positive, threshold, known))
    if scores.numel() and not bool(((scores >= 0) & (scores <= 1)).all()):
        raise UsageError(
            f"multilabel_accuracy: expected probabilities, found values from {float(scores.min())} "
            f"to {float(scores.max())}; pass logits=True for logits"
        )
    return float(accuracy_tensor(scores, positive, threshold, known))


def accuracy_tensor(
    scores: Tensor, positive: Tensor, threshold: float, known: Tensor | None
) -> Tensor:
    """`multilabel_accuracy` of probabilities, 0-dimensional."""
    return known_share((scores > threshold) == positive, known)


def all_negative_accuracy(labels: Tensor, known: Tensor | None = None) -> float:
    """`multilabel_accuracy` of a scorer that says no to everything."""
    return float(known_share(labels == 0, known))


def known_share(right: Tensor, known: Tensor | None) -> Tensor:
    """The share of pairs that are right, of those that are known; NaN where there is none."""
    if known is None:
        return right.double().mean()
    counted = known != 0
    return (right & counted).double().sum() / counted.double().sum()
