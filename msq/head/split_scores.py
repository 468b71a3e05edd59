"""Scoring on classes never trained, alone and among all classes; what training may see of a split.

Training sees the training clips that have a seen label, and the seen columns only: a clip that
also shows an unseen class is kept, and its unseen labels are dropped. Validation clips come from
the training clips (or the validation split) and are scored on seen classes.

*Unseen-only*: test clips with at least one unseen label, unseen classes as the only queries.
*Generalised*: all test clips with a label, all classes as queries at once; the numbers of seen and
unseen classes are then told apart and joined by their harmonic mean. For single-label sets, where
the metric is top-1 accuracy, a clip counts as seen or unseen by its label.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from msq.errors import UsageError
from msq.head.baselines import clip_similarity
from msq.head.class_splits import ClassSplit
from msq.head.evaluate import score
from msq.head.features import Features
from msq.head.metrics import (
    average_precision,
    chance_map,
    harmonic_mean,
    labelled,
    topk_accuracy,
)
from msq.head.model import MSQNet

Scorer = Callable[[list[int], Tensor], Tensor]


def seen_features(features: Features, split: ClassSplit) -> Features:
    """What training may see: the seen columns, and of the training clips those with a seen label.

    Validation clips without a seen label go too. Test clips all stay; those without a seen label
    are left out by the metrics.
    """
    columns = [features.classes.index(name) for name in split.seen]
    known = None if features.known is None else features.known[:, columns]
    seen = labelled(features.labels[:, columns], known)
    test = torch.tensor([s == "test" for s in features.splits], device=seen.device)
    return features.select(rows=(seen | test).nonzero().flatten(), columns=columns)


def require_test_clips(features: Features, split: ClassSplit) -> None:
    """Refuse a split that cannot be scored, which is known before anything is trained on it.

    Raises:
        UsageError: no test clip shows an unseen class, or none a seen one.
    """
    test = features.rows("test")
    for side, names in (("unseen", split.unseen), ("seen", split.seen)):
        columns = [features.classes.index(name) for name in names]
        known = None if features.known is None else features.known[test][:, columns]
        if not labelled(features.labels[test][:, columns], known).any():
            raise UsageError(
                f"class split {split.source or split.hash[:12]}: expected test clips of "
                f"{features.name} that show one of its {side} classes, found none among "
                f"{len(test)}; choose other classes"
            )


def trained_logits(model: MSQNet, features: Features, seen: list[int]) -> Scorer:
    """Logits of a head for any columns; `seen` are those it was trained on, in its order."""

    def logits(columns: list[int], rows: Tensor) -> Tensor:
        trained = [seen.index(k) if k in seen else -1 for k in columns]
        text = None if model.text is None or features.text is None else features.text[columns]
        return score(model, features, rows, text=text, trained=torch.tensor(trained))

    return logits


def evaluate_split(model: MSQNet, features: Features, split: ClassSplit) -> dict[str, Any]:
    """Score a head that was trained on `split.seen` on the test clips, both ways.

    Args:
        model: trained on `seen_features(features, split)`.
        features: of all classes, on the head's device.
        split: the classes.

    Returns:
        `unseen, seen, generalised_seen, generalised_unseen, harmonic` (macro mAP, or top-1 for
        singlelabel), `chance` (of `unseen`), `unseen_clips`, `per_class` (AP of each unseen class,
        unseen-only).

    Raises:
        UsageError: no test clip shows an unseen class, or none a seen one.
    """
    seen = [features.classes.index(name) for name in split.seen]
    return _both_ways(trained_logits(model, features, seen), features, split)


def clip_baseline(features: Features, split: ClassSplit) -> dict[str, Any] | None:
    """The same numbers by CLIP's own similarity of image and class text, without any training.

    None where the store has no such pair in one space: poolers, another text encoder, no image, or
    specs that do not say.
    """
    image, text = features.image, features.text
    if image is None or text is None or image.shape[1] != text.shape[1]:
        return None
    specs = [features.specs.get(kind, {}) for kind in ("image", "text")]
    if any(spec.get("output") != "projected" for spec in specs):
        return None
    if specs[0].get("sha256") != specs[1].get("sha256"):
        return None  # the widths agree by chance: BERT's words beside CLIP's pictures
    return _both_ways(lambda columns, rows: clip_similarity(features, rows, columns),
                      features, split)  # fmt: skip


def _both_ways(logits: Scorer, features: Features, split: ClassSplit) -> dict[str, Any]:
    require_test_clips(features, split)
    multilabel = features.task == "multilabel"
    test = features.rows("test")
    column = {name: k for k, name in enumerate(features.classes)}
    seen, unseen = [column[n] for n in split.seen], [column[n] for n in split.unseen]

    def known_of(rows: Tensor, columns: list[int]) -> Tensor | None:
        return None if features.known is None else features.known[rows][:, columns]

    def rows_with(columns: list[int]) -> Tensor:
        return test[labelled(features.labels[test][:, columns], known_of(test, columns))]

    def metric(scores: Tensor, rows: Tensor, columns: list[int]) -> float:
        labels, known = features.labels[rows][:, columns], known_of(rows, columns)
        if multilabel:
            return float(average_precision(scores, labels, known).nanmean())
        return topk_accuracy(scores, labels, known=known)

    rows, seen_rows = rows_with(unseen), rows_with(seen)
    alone = logits(unseen, rows)
    labels, known = features.labels[rows][:, unseen], known_of(rows, unseen)
    ranking = alone if multilabel else alone.double().log_softmax(1)
    both = seen + unseen
    all_rows = rows_with(both)
    together = logits(both, all_rows)
    if multilabel:
        of_seen = metric(together[:, : len(seen)], all_rows, seen)
        of_unseen = metric(together[:, len(seen) :], all_rows, unseen)
    else:
        is_seen = labelled(features.labels[all_rows][:, seen], known_of(all_rows, seen))
        of_seen = metric(together[is_seen], all_rows[is_seen], both)
        of_unseen = metric(together[~is_seen], all_rows[~is_seen], both)
    return {
        "unseen": metric(alone, rows, unseen),
        "chance": chance_map(labels, known) if multilabel else 1 / len(unseen),
        "seen": metric(logits(seen, seen_rows), seen_rows, seen),
        "generalised_seen": of_seen,
        "generalised_unseen": of_unseen,
        "harmonic": harmonic_mean(of_seen, of_unseen),
        "unseen_clips": len(rows),
        "per_class": dict(
            zip(split.unseen, average_precision(ranking, labels, known).tolist(), strict=True)
        ),
    }
