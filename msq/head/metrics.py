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

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from msq.head.accuracy import (
    accuracy_tensor,
    all_negative_accuracy,
    known_share,
    multilabel_accuracy,
    topk_accuracy,
    topk_tensor,
)
from msq.head.chance import chance_map, chance_of_counts, class_counts
from msq.head.f1 import f1_tensor
from msq.head.ranking import (
    MeanAP,
    average_precision,
    charades_map,
    charades_tensor,
    checked_labels,
    class_tensor,
    fitting_labels,
    labelled,
    mean_average_precision,
    micro_average_precision,
    official_micro_average_precision,
    official_tensor,
)
from msq.head.sending import brought

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
    "metrics_and_classes",
    "micro_average_precision",
    "multilabel_accuracy",
    "official_micro_average_precision",
    "ranking_metrics",
    "ranking_scores",
    "topk_accuracy",
]


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
            metrics (counted in `rows_unlabelled`), not of `accuracy` and F1.
        task: `multilabel`, or `singlelabel`, where scores are compared after a softmax.
        known: [N, K], zero where nobody knows; None where all is known.
        log_probabilities: for `singlelabel`: they are taken as they are, without a softmax.

    Returns:
        `map, map_micro, map_official, map_charades, top1, top5, classes_scored,
        classes_without_positives, rows, rows_unlabelled, map_chance`, and for multilabel
        `accuracy, accuracy_all_negative, f1_macro, f1_micro`, all four at 0.5; `pairs_unknown`
        where `known` is given.
    """
    return metrics_and_classes(
        logits, labels, task, known=known, log_probabilities=log_probabilities
    )[0]


def metrics_and_classes(
    logits: Tensor,
    labels: Tensor,
    task: str,
    *,
    known: Tensor | None = None,
    log_probabilities: bool = False,
) -> tuple[dict[str, Any], Tensor]:
    """`all_metrics`, and the AP of each class [K], float64 in this machine's memory.

    A device is waited for twice: for how many clips have a label, and for all numbers.
    """
    scores = ranking_scores(logits, task, log_probabilities)
    numbers = _numbers(scores, labels, known)
    if task == "multilabel":
        positive = fitting_labels(scores, labels, known)
        likely = logits.sigmoid()
        numbers["accuracy"] = accuracy_tensor(likely, positive, 0.5, known)
        numbers["f1"] = f1_tensor(likely > 0.5, positive, known)
        numbers["accuracy_all_negative"] = known_share(labels == 0, known)
    found = brought(numbers)
    result = _result(found, scores, labels, known)
    names = ("accuracy", "accuracy_all_negative")
    result |= {n: float(found[n]) for n in names if n in found}
    if "f1" in found:
        result |= dict(zip(("f1_macro", "f1_micro"), found["f1"].tolist(), strict=True))
    return result, found["classes"]


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
    return _result(brought(_numbers(scores, labels, known)), scores, labels, known)


def _numbers(scores: Tensor, labels: Tensor, known: Tensor | None) -> dict[str, Tensor]:
    """What `ranking_metrics` is made of, on the device; how many clips have a label is read."""
    positive = fitting_labels(scores, labels, known)
    keep = positive.any(1).nonzero().flatten()
    ranked, right = scores[keep], positive[keep]
    part = None if known is None else known[keep]
    column = None if part is None else part.reshape(-1, 1)
    numbers = {
        "classes": class_tensor(ranked, right, part),
        "micro": class_tensor(ranked.reshape(-1, 1), right.reshape(-1, 1), column),
        "official": official_tensor(ranked, right, known=part),
        "charades": charades_tensor(scores, positive, known),
        "top": topk_tensor(ranked, right, (1, 5), part),
        "counts": class_counts(right, part),
        "kept": scores.new_full((), len(keep), dtype=torch.float64),
        "nan": scores.isnan().sum(),
    }
    if known is not None:
        numbers["unknown"] = (known == 0).sum()
    return numbers


def _result(
    found: Mapping[str, Tensor], scores: Tensor, labels: Tensor, known: Tensor | None
) -> dict[str, Any]:
    """`ranking_metrics` of numbers that were brought here.

    Raises:
        MsqError: NaN among the scores.
    """
    if found["nan"]:
        checked_labels(scores, labels, known)  # says which
    rows, positives = found["counts"]
    kept = int(found["kept"])
    macro = MeanAP(found["classes"], kept, len(labels) - kept)
    result: dict[str, Any] = {
        "map": float(macro),
        "map_micro": float(found["micro"][0]),
        "map_official": float(found["official"]),
        "map_charades": float(MeanAP(found["charades"], kept, len(labels) - kept)),
        "map_chance": chance_of_counts(rows, positives),
        "top1": float(found["top"][0]),
        "top5": float(found["top"][1]),
        "classes_scored": macro.classes_scored,
        "classes_without_positives": macro.classes_left_out,
        "rows": len(labels),
        "rows_unlabelled": macro.rows_left_out,
    }
    if known is not None:
        result["pairs_unknown"] = int(found["unknown"])
    return result
