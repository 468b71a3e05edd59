"""Average precision: how well scores rank clips, whatever their scale.

Shapes: scores and labels are [N, K] (N clips, K classes), and labels count as positive where they
are not zero; see `msq.head.metrics`, which has all of this and every other number that msq reports.
"""

from __future__ import annotations

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
        scored = (~per_class.isnan()).sum()
        # Read together: on a GPU each reading waits for it. Without a class 0 / 0 makes it NaN.
        value, count = torch.stack([per_class.nansum() / scored, scored.double()]).tolist()
        self = super().__new__(cls, value)
        self.per_class = per_class
        self.classes_scored = int(count)
        self.classes_left_out = per_class.numel() - self.classes_scored
        self.rows_scored = rows_scored
        self.rows_left_out = rows_left_out
        return self


def average_precision(scores: Tensor, labels: Tensor, known: Tensor | None = None) -> Tensor:
    """AP of each class: the sum of (recall step x precision), not interpolated.

    Tied scores form one step, as in scikit-learn and torchmetrics: the result does not depend on
    the order of the rows.

    Args:
        scores: [N, K].
        labels: [N, K].
        known: [N, K], zero where a pair is left out; None where all count.

    Returns:
        [K] float64, NaN for a class without positives.

    Raises:
        UsageError: shapes that do not fit.
        MsqError: NaN among the scores.
    """
    scores, positive = checked_labels(scores, labels, known)
    return class_tensor(scores, positive, known)


def class_tensor(scores: Tensor, positive: Tensor, known: Tensor | None) -> Tensor:
    """`average_precision` of what is checked; `positive` [N, K] bool, where it is known."""
    ranked, order = scores.sort(dim=0, descending=True)
    hits = positive.gather(0, order).double()
    n = ranked.shape[0]
    place = torch.arange(n, device=ranked.device)[:, None].expand_as(ranked)
    last = torch.ones_like(ranked, dtype=torch.bool)
    last[:-1] = ranked[:-1] != ranked[1:]
    # For each row the place where its group of ties ends: the nearest `last` at or below it.
    end = torch.where(last, place, n).flip(0).cummin(dim=0).values.flip(0)
    rows = end + 1 if known is None else _known_so_far(known, order).gather(0, end)
    precision = hits.cumsum(0).gather(0, end) / rows
    return (hits * precision).sum(0) / _positives(hits)


def mean_average_precision(scores: Tensor, labels: Tensor, known: Tensor | None = None) -> MeanAP:
    """Macro mAP over the whole set; a float with counts.

    Rows without any label are left out and counted, as are classes without positives (as
    SlowFast's and Animal Kingdom's scorers do; torchmetrics counts such a class as 0).
    """
    rows = labelled(labels, known).nonzero().flatten()
    per_class = average_precision(
        scores[rows], labels[rows], None if known is None else known[rows]
    )
    return MeanAP(per_class, len(rows), len(labels) - len(rows))


def macro_ap(scores: Tensor, labels: Tensor, known: Tensor | None = None) -> Tensor:
    """`mean_average_precision` for a training loop: nothing here waits for the device.

    Args:
        scores: [N, K] of rows that all have a label.
        labels: [N, K].
        known: [N, K], as there.

    Returns:
        [2] float64: the mean over the classes with a positive, NaN where there is none, and how
        many of the scores are NaN, in which case the first number means nothing.
    """
    positive = labels != 0 if known is None else (labels != 0) & (known != 0)
    per_class = class_tensor(scores, positive, known)
    value = per_class.nansum() / (~per_class.isnan()).sum()
    return torch.stack([value, scores.isnan().sum().to(value)])


def labelled(labels: Tensor, known: Tensor | None = None) -> Tensor:
    """Which clips [N] have a label, and a known one."""
    positive = labels != 0
    return (positive if known is None else positive & (known != 0)).any(1)


def micro_average_precision(scores: Tensor, labels: Tensor, known: Tensor | None = None) -> float:
    """AP over all (clip, class) pairs taken together, ties grouped; NaN without positives."""
    checked_labels(scores, labels, known)
    column = None if known is None else known.reshape(-1, 1)
    return float(average_precision(scores.reshape(-1, 1), labels.reshape(-1, 1), column)[0])


def official_micro_average_precision(
    scores: Tensor, labels: Tensor, batch_size: int = 32, known: Tensor | None = None
) -> float:
    """What the authors' code calls mAP: micro AP of each batch, averaged.

    Batches are taken in row order and weighted by their size, the last one being shorter. A batch
    without positives counts as 0, as torchmetrics has it. It is not comparable with mAP: a scorer
    that ignores the video gets 13.8 % on Charades here and 5.7 % macro.
    """
    scores, positive = checked_labels(scores, labels, known)
    return float(official_tensor(scores, positive, batch_size, known))


def official_tensor(
    scores: Tensor, positive: Tensor, batch_size: int = 32, known: Tensor | None = None
) -> Tensor:
    """`official_micro_average_precision` of what is checked, 0-dimensional on its device."""
    if not scores.numel():
        return scores.new_full((), float("nan"))
    whole = len(scores) // batch_size * batch_size
    values = [scores.new_zeros(0, dtype=torch.float64)]
    for first, last, size in ((0, whole, batch_size), (whole, len(scores), len(scores) - whole)):
        if first < last:  # a column for each batch: all batches of one size are ranked at once
            shape = (-1, size * scores.shape[1])
            per_batch = class_tensor(
                scores[first:last].reshape(shape).t(),
                positive[first:last].reshape(shape).t(),
                None if known is None else known[first:last].reshape(shape).t(),
            )
            values.append(per_batch.nan_to_num(0.0) * size)
    return torch.cat(values).sum() / len(scores)


def charades_map(scores: Tensor, labels: Tensor, known: Tensor | None = None) -> MeanAP:
    """The official Charades scorer: stable ties, unlabelled clips ranked last.

    AP is the mean, over the positives, of the precision at each one's place in a stable descending
    sort: tied rows stay in input order, so the result depends on it. Scores of clips without any
    label become -inf.
    """
    scores, positive = checked_labels(scores, labels, known)
    kept = int(positive.any(1).sum())
    return MeanAP(charades_tensor(scores, positive, known), kept, len(positive) - kept)


def charades_tensor(scores: Tensor, positive: Tensor, known: Tensor | None = None) -> Tensor:
    """AP of each class [K] as `charades_map` has it, of what is checked."""
    keep = positive.any(1)
    ranked = scores.double().masked_fill(~keep[:, None], -torch.inf)
    order = ranked.argsort(dim=0, descending=True, stable=True)
    hits = positive.gather(0, order).double()
    place = torch.arange(1, len(hits) + 1, device=hits.device, dtype=torch.float64)[:, None]
    if known is not None:
        place = _known_so_far(known, order)
    return (hits * hits.cumsum(0) / place).sum(0) / _positives(hits)


def _known_so_far(known: Tensor, order: Tensor) -> Tensor:
    """Known rows among the first 1, 2, … of each class's ranking [N, K], at least 1."""
    return (known != 0).gather(0, order).double().cumsum(0).clamp(min=1)


def _positives(hits: Tensor) -> Tensor:
    """Positives of each class [K], NaN in place of 0."""
    count = hits.sum(0)
    return torch.where(count > 0, count, torch.nan)


def checked_labels(
    scores: Tensor, labels: Tensor, known: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scores, and where the labels are known and positive.

    Raises:
        UsageError: not two tensors [N, K] of one shape.
        MsqError: NaN among the scores.
    """
    positive = fitting_labels(scores, labels, known)
    if bool(scores.isnan().any()):
        rows = scores.isnan().any(1).nonzero().flatten().tolist()
        raise MsqError(f"metrics: NaN among the scores of {len(rows)} rows, the first is {rows[0]}")
    return scores, positive


def fitting_labels(scores: Tensor, labels: Tensor, known: Tensor | None = None) -> Tensor:
    """Where labels [N, K] are known and positive; nothing here waits for the device.

    Raises:
        UsageError: not tensors [N, K] of one shape.
    """
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise UsageError(
            f"metrics: expected scores and labels of one shape [N, K], found {list(scores.shape)} "
            f"and {list(labels.shape)}"
        )
    if known is None:
        return labels != 0
    if known.shape != labels.shape:
        raise UsageError(
            f"metrics: expected what is known as [N, K] like the labels, found {list(known.shape)} "
            f"and {list(labels.shape)}"
        )
    return (labels != 0) & (known != 0)
