"""Every number that msq reports, defined once.

Shapes: scores and labels are [N, K] (N clips, K classes); labels count as positive where they are
not zero. Everything runs on the device of its inputs, in float64; only the order of the scores
matters to the ranking metrics, so logits and probabilities give the same.

`mAP` without a further word means macro over the whole set: the AP of each class over all labelled
clips, averaged over the classes that have a positive.

Where `known` [N, K] is given, a (clip, class) pair that is not known is left out: the clip is not
in that class's ranking, whatever its score and label, and no share counts the pair. A clip is
labelled when a known label of it is positive.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msq.errors import UsageError
from msq.head.ranking import (
    MeanAP,
    average_precision,
    charades_map,
    checked_labels,
    labelled,
    mean_average_precision,
    micro_average_precision,
    official_micro_average_precision,
)

__all__ = [
    "MeanAP",
    "all_metrics",
    "all_negative_accuracy",
    "average_precision",
    "chance_map",
    "charades_map",
    "harmonic_mean",
    "labelled",
    "mean_average_precision",
    "micro_average_precision",
    "multilabel_accuracy",
    "official_micro_average_precision",
    "ranking_metrics",
    "ranking_scores",
    "topk_accuracy",
]


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
    scores = scores if known is None else scores.masked_fill(known == 0, -torch.inf)
    keep = positive.any(1)
    if not bool(keep.any()):
        return float("nan")
    top = scores[keep].argsort(dim=1, descending=True, stable=True)[:, :k]
    right = (positive & (scores != -torch.inf))[keep]
    return float(right.gather(1, top).any(1).double().mean())


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
        scores = scores.sigmoid()
    elif scores.numel() and not bool(((scores >= 0) & (scores <= 1)).all()):
        raise UsageError(
            f"multilabel_accuracy: expected probabilities, found values from {float(scores.min())} "
            f"to {float(scores.max())}; pass logits=True for logits"
        )
    right = ((scores > threshold) == positive).double()
    return float(right.mean() if known is None else right[known != 0].mean())


def all_negative_accuracy(labels: Tensor, known: Tensor | None = None) -> float:
    """`multilabel_accuracy` of a scorer that says no to everything."""
    right = (labels == 0).double()
    return float(right.mean() if known is None else right[known != 0].mean())


def chance_map(labels: Tensor, known: Tensor | None = None) -> float:
    """Expected `mean_average_precision` of a random order without ties.

    For R positives among N rows the expected AP is ((R - 1) / (N - 1) (N - H_N) + H_N) / N with
    H_N the N-th harmonic number: a little above the share R / N. Of each class only the known rows
    count.
    """
    keep = labelled(labels, known)
    counted = torch.ones_like(labels) if known is None else (known != 0)
    positive = ((labels != 0) & (counted != 0))[keep].double()
    rows, found = counted[keep].double().sum(0).cpu(), positive.sum(0).cpu()
    rows, found = rows[found > 0], found[found > 0]
    if not len(found):
        return float("nan")
    steps = 1.0 / torch.arange(1, int(rows.max()) + 1, dtype=torch.float64)
    harmonic = steps.cumsum(0)[rows.long() - 1]
    spread = (found - 1) / (rows - 1).clamp(min=1) * (rows - harmonic)
    return float(((spread + harmonic) / rows).mean())


def harmonic_mean(a: float, b: float) -> float:
    """2ab / (a + b), and 0 where both are 0."""
    return 2 * a * b / (a + b) if a + b else a + b


def all_metrics(
    logits: Tensor,
    labels: Tensor,
    task: str,
    *,
    known: Tensor | None = None,
    log_probabilities: bool = False,
) -> dict[str, Any]:
    """Every metric of both protocols, by their JSON names; fractions of one.

    Args:
        logits: [N, K] as the head gives them.
        labels: [N, K], N not filtered: clips without any label are left out of the ranking
            metrics (counted in `rows_unlabelled`), not of `accuracy`.
        task: `multilabel`, or `singlelabel`, where scores are compared after a softmax.
        known: [N, K], zero where nobody knows; None where all is known.
        log_probabilities: for `singlelabel`: they are taken as they are, without a softmax.

    Returns:
        `map, map_micro, map_official, map_charades, top1, top5, classes_scored,
        classes_without_positives, rows, rows_unlabelled, map_chance`, and for multilabel
        `accuracy, accuracy_all_negative`; `pairs_unknown` where `known` is given.
    """
    multilabel = task == "multilabel"
    result = ranking_metrics(ranking_scores(logits, task, log_probabilities), labels, known)
    if multilabel:
        result["accuracy"] = multilabel_accuracy(logits, labels, logits=True, known=known)
        result["accuracy_all_negative"] = all_negative_accuracy(labels, known)
    return result


def ranking_scores(logits: Tensor, task: str, log_probabilities: bool = False) -> Tensor:
    """What clips are ranked by: the logits, or, for `singlelabel`, their log-softmax.

    With `log_probabilities` those of `singlelabel` are that already; a second softmax would break
    ties between clips by its rounding, and give another order where they do not sum to one.
    """
    if task == "multilabel" or log_probabilities:
        return logits
    return logits.double().log_softmax(1)


def ranking_metrics(scores: Tensor, labels: Tensor, known: Tensor | None = None) -> dict[str, Any]:
    """Those of `all_metrics` that need an order of the scores and no threshold.

    Args:
        scores: [N, K] of any scale; -inf for a clip without a prediction.
        labels: [N, K].
        known: [N, K].
    """
    macro = mean_average_precision(scores, labels, known)
    keep = labelled(labels, known).nonzero().flatten()
    part = None if known is None else known[keep]
    result: dict[str, Any] = {
        "map": float(macro),
        "map_micro": micro_average_precision(scores[keep], labels[keep], part),
        "map_official": official_micro_average_precision(scores[keep], labels[keep], known=part),
        "map_charades": float(charades_map(scores, labels, known)),
        "map_chance": chance_map(labels, known),
        "top1": topk_accuracy(scores, labels, 1, known),
        "top5": topk_accuracy(scores, labels, 5, known),
        "classes_scored": macro.classes_scored,
        "classes_without_positives": macro.classes_left_out,
        "rows": len(labels),
        "rows_unlabelled": macro.rows_left_out,
    }
    if known is not None:
        result["pairs_unknown"] = int((known == 0).sum())
    return result
