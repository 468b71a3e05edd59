"""Every number that msq reports, defined once.

Shapes: scores and labels are [N, K] (N clips, K classes); labels count as positive where they are
not zero. Everything runs on the device of its inputs, in float64; only the order of the scores
matters to the ranking metrics, so logits and probabilities give the same.

`mAP` without a further word means macro over the whole set: the AP of each class over all labelled
clips, averaged over the classes that have a positive.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msq.errors import MsqError, UsageError


class MeanAP(float):
    """A macro mAP: a float that also tells what it was averaged over.

    Attributes:
        per_class: [K] AP, NaN for classes without positives.
        classes_scored: classes with at least one positive.
        classes_left_out: classes without, which are not averaged.
        rows_scored: clips ranked.
        rows_left_out: clips without any label, which are not ranked.
    """

    per_class: Tensor
    classes_scored: int
    classes_left_out: int
    rows_scored: int
    rows_left_out: int

    def __new__(cls, per_class: Tensor, rows_scored: int, rows_left_out: int) -> MeanAP:
        """Average `per_class` [K] over the classes that are not NaN."""
        scored = ~per_class.isnan()
        value = float(per_class[scored].mean()) if bool(scored.any()) else float("nan")
        self = super().__new__(cls, value)
        self.per_class = per_class
        self.classes_scored = int(scored.sum())
        self.classes_left_out = per_class.numel() - self.classes_scored
        self.rows_scored = rows_scored
        self.rows_left_out = rows_left_out
        return self


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """AP of each class: the sum of (recall step x precision), not interpolated.

    Tied scores form one step, as in scikit-learn and torchmetrics: the result does not depend on
    the order of the rows.

    Returns:
        [K] float64, NaN for a class without positives.

    Raises:
        UsageError: shapes that do not fit.
        MsqError: NaN among the scores.
    """
    scores, positive = _checked(scores, labels)
    ranked, order = scores.sort(dim=0, descending=True)
    hits = positive.gather(0, order).double()
    n = ranked.shape[0]
    place = torch.arange(n, device=ranked.device)[:, None].expand_as(ranked)
    last = torch.ones_like(ranked, dtype=torch.bool)
    last[:-1] = ranked[:-1] != ranked[1:]
    # For each row the place where its group of ties ends: the nearest `last` at or below it.
    end = torch.where(last, place, n).flip(0).cummin(dim=0).values.flip(0)
    precision = hits.cumsum(0).gather(0, end) / (end + 1)
    return (hits * precision).sum(0) / _positives(hits)


def mean_average_precision(scores: Tensor, labels: Tensor) -> MeanAP:
    """Macro mAP over the whole set; a float with counts.

    Rows without any label are left out and counted, as are classes without positives (as
    SlowFast's and Animal Kingdom's scorers do; torchmetrics counts such a class as 0).
    """
    keep = (labels != 0).any(1)
    per_class = average_precision(scores[keep], labels[keep])
    kept = int(keep.sum())
    return MeanAP(per_class, kept, len(keep) - kept)


def micro_average_precision(scores: Tensor, labels: Tensor) -> float:
    """AP over all (clip, class) pairs taken together, ties grouped; NaN without positives."""
    _checked(scores, labels)
    return float(average_precision(scores.reshape(-1, 1), labels.reshape(-1, 1))[0])


def official_micro_average_precision(scores: Tensor, labels: Tensor, batch_size: int = 32) -> float:
    """What the authors' code calls mAP: micro AP of each batch, averaged.

    Batches are taken in row order and weighted by their size, the last one being shorter. A batch
    without positives counts as 0, as torchmetrics has it. It is not comparable with mAP: a scorer
    that ignores the video gets 13.8 % on Charades here and 5.7 % macro.
    """
    _checked(scores, labels)
    total = 0.0
    for first in range(0, len(scores), batch_size):
        rows = slice(first, first + batch_size)
        value = micro_average_precision(scores[rows], labels[rows])
        total += (0.0 if value != value else value) * len(scores[rows])
    return total / len(scores) if len(scores) else float("nan")


def charades_map(scores: Tensor, labels: Tensor) -> MeanAP:
    """The official Charades scorer: stable ties, unlabelled clips ranked last.

    AP is the mean, over the positives, of the precision at each one's place in a stable descending
    sort: tied rows stay in input order, so the result depends on it. Scores of clips without any
    label become -inf.
    """
    scores, positive = _checked(scores, labels)
    keep = positive.any(1)
    ranked = scores.double().masked_fill(~keep[:, None], -torch.inf)
    order = ranked.argsort(dim=0, descending=True, stable=True)
    hits = positive.gather(0, order).double()
    place = torch.arange(1, len(hits) + 1, device=hits.device, dtype=torch.float64)[:, None]
    per_class = (hits * hits.cumsum(0) / place).sum(0) / _positives(hits)
    kept = int(keep.sum())
    return MeanAP(per_class, kept, len(keep) - kept)


def topk_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of clips with a right class among their k highest scores.

    Args:
        scores: [N, K].
        labels: [N] class indices, or [N, K], where any of a clip's labels is right; clips without
            any label are left out.
        k: at most K; of tied scores the lower class index comes first.
    """
    if labels.ndim == 1:
        labels = torch.nn.functional.one_hot(labels.long(), scores.shape[1])
    scores, positive = _checked(scores, labels)
    keep = positive.any(1)
    if not bool(keep.any()):
        return float("nan")
    top = scores[keep].argsort(dim=1, descending=True, stable=True)[:, :k]
    return float(positive[keep].gather(1, top).any(1).double().mean())


def multilabel_accuracy(
    scores: Tensor, labels: Tensor, threshold: float = 0.5, *, logits: bool = False
) -> float:
    """Share of (clip, class) pairs judged right: 1 - Hamming loss.

    Sparse labels make it high for a scorer that says no to everything: print it beside
    `all_negative_accuracy`.

    Args:
        scores: [N, K] probabilities, or logits where `logits` is set.
        labels: [N, K].
        threshold: a probability above it is a yes.
        logits: apply a sigmoid first.

    Raises:
        UsageError: values outside 0 to 1 that were not called logits.
    """
    scores, positive = _checked(scores, labels)
    if logits:
        scores = scores.sigmoid()
    elif scores.numel() and not bool(((scores >= 0) & (scores <= 1)).all()):
        raise UsageError(
            f"multilabel_accuracy: expected probabilities, found values from {float(scores.min())} "
            f"to {float(scores.max())}; pass logits=True for logits"
        )
    return float(((scores > threshold) == positive).double().mean())


def all_negative_accuracy(labels: Tensor) -> float:
    """`multilabel_accuracy` of a scorer that says no to everything."""
    return float((labels == 0).double().mean())


def chance_map(labels: Tensor) -> float:
    """Expected `mean_average_precision` of a random order without ties.

    For R positives among N rows the expected AP is ((R - 1) / (N - 1) (N - H_N) + H_N) / N with
    H_N the N-th harmonic number: a little above the share R / N.
    """
    positive = (labels != 0)[(labels != 0).any(1)].double()
    n, found = positive.shape[0], positive.sum(0)
    found = found[found > 0]
    if not len(found):
        return float("nan")
    harmonic = float((1.0 / torch.arange(1, n + 1, dtype=torch.float64)).sum())
    spread = (found - 1) / max(n - 1, 1) * (n - harmonic)
    return float(((spread + harmonic) / n).mean())


def harmonic_mean(a: float, b: float) -> float:
    """2ab / (a + b), and 0 where both are 0."""
    return 2 * a * b / (a + b) if a + b else a + b


def all_metrics(logits: Tensor, labels: Tensor, task: str) -> dict[str, Any]:
    """Every metric of both protocols, by their JSON names; fractions of one.

    Args:
        logits: [N, K] as the head gives them.
        labels: [N, K], N not filtered: clips without any label are left out of the ranking
            metrics (counted in `rows_unlabelled`), not of `accuracy`.
        task: `multilabel`, or `singlelabel`, where scores are compared after a softmax.

    Returns:
        `map, map_micro, map_official, map_charades, top1, top5, classes_scored,
        classes_without_positives, rows, rows_unlabelled, map_chance`, and for multilabel
        `accuracy, accuracy_all_negative`.
    """
    multilabel = task == "multilabel"
    scores = logits if multilabel else logits.double().log_softmax(1)
    macro = mean_average_precision(scores, labels)
    keep = (labels != 0).any(1)
    result: dict[str, Any] = {
        "map": float(macro),
        "map_micro": micro_average_precision(scores[keep], labels[keep]),
        "map_official": official_micro_average_precision(scores[keep], labels[keep]),
        "map_charades": float(charades_map(scores, labels)),
        "map_chance": chance_map(labels),
        "top1": topk_accuracy(scores, labels, 1),
        "top5": topk_accuracy(scores, labels, 5),
        "classes_scored": macro.classes_scored,
        "classes_without_positives": macro.classes_left_out,
        "rows": len(keep),
        "rows_unlabelled": macro.rows_left_out,
    }
    if multilabel:
        result["accuracy"] = multilabel_accuracy(logits, labels, logits=True)
        result["accuracy_all_negative"] = all_negative_accuracy(labels)
    return result


def _positives(hits: Tensor) -> Tensor:
    """Positives of each class [K], NaN in place of 0."""
    count = hits.sum(0)
    return torch.where(count > 0, count, torch.nan)


def _checked(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scores, and where the labels are positive.

    Raises:
        UsageError: not two tensors [N, K] of one shape.
        MsqError: NaN among the scores.
    """
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise UsageError(
            f"metrics: expected scores and labels of one shape [N, K], found {list(scores.shape)} "
            f"and {list(labels.shape)}"
        )
    if bool(scores.isnan().any()):
        rows = scores.isnan().any(1).nonzero().flatten().tolist()
        raise MsqError(f"metrics: NaN among the scores of {len(rows)} rows, the first is {rows[0]}")
    return scores, labels != 0
