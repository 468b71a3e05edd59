"""Cross-actor transfer: what training may see, and the scores on the clips of other actors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msq.head.actors import ActorSplit
from msq.head.features import Features
from msq.head.metrics import average_precision, labelled, ranking_scores, topk_accuracy
from msq.head.model import MSQNet
from msq.head.split_scores import trained_logits


def _rows(features: Features, clips: Sequence[str]) -> Tensor:
    wanted = set(clips)
    found = [row for row, clip in enumerate(features.ids) if clip in wanted]
    return torch.tensor(found, dtype=torch.long, device=features.tokens.device)


def actor_features(features: Features, split: ActorSplit) -> Features:
    """What training may see, and the test clips of the others; classes that training clips show.

    Classes that no training clip shows are left out of training; they are scored by their text.
    """
    rows = _rows(features, (*split.train_clips, *split.test_clips))
    return features.select(rows=rows, columns=trained_columns(features, split))


def trained_columns(features: Features, split: ActorSplit) -> list[int]:
    """Indices of the classes that the training clips show."""
    train = _rows(features, split.train_clips)
    found: list[int] = (features.labels[train] != 0).any(0).nonzero().flatten().tolist()
    return found


def evaluate_actors(model: MSQNet, features: Features, split: ActorSplit) -> dict[str, Any]:
    """Score a head trained on some actors on the test clips of the others, and of the same ones.

    Returns:
        `transfer` (other actors), `same_actors` (macro mAP, or top-1 for singlelabel; NaN without
        such clips), both over the classes trained, and `per_class` (AP on other actors);
        `transfer_clips, classes_trained, train_actors, test_actors`.
    """
    columns = trained_columns(features, split)
    logits = trained_logits(model, features, columns)

    def metric(clips: Sequence[str]) -> tuple[float, list[float], int]:
        rows = _rows(features, clips)
        known = None if features.known is None else features.known[rows][:, columns]
        labels = features.labels[rows][:, columns]
        keep = labelled(labels, known)
        rows, labels = rows[keep], labels[keep]
        known = None if known is None else known[keep]
        if not len(rows):
            return float("nan"), [float("nan")] * len(columns), 0
        scores = logits(columns, rows)
        ap = average_precision(ranking_scores(scores, features.task), labels, known)
        if features.task == "multilabel":
            return float(ap.nanmean()), ap.tolist(), len(rows)
        return topk_accuracy(scores, labels, known=known), ap.tolist(), len(rows)

    transfer, per_class, clips = metric(split.test_clips)
    return {
        "transfer": transfer,
        "same_actors": metric(split.same_clips)[0],
        "transfer_clips": clips,
        "classes_trained": len(columns),
        "train_actors": list(split.train),
        "test_actors": list(split.test),
        "per_class": dict(zip((features.classes[k] for k in columns), per_class, strict=True)),
    }
