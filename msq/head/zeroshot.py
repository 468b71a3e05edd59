"""Zero-shot: train on some classes, score on the others.

Training sees the training clips that have a seen label, and the seen columns only: a clip that
also shows an unseen class is kept, and its unseen labels are dropped. Validation clips come from
the training clips (or the validation split) and are scored on seen classes.

*Unseen-only*: test clips with at least one unseen label, unseen classes as the only queries.
*Generalised*: all test clips with a label, all classes as queries at once; the numbers of seen and
unseen classes are then told apart and joined by their harmonic mean. For single-label sets, where
the metric is top-1 accuracy, a clip counts as seen or unseen by its label.

Where no classifier is named, `text` and `multimodal` queries get the `text` classifier, which
learns faster and reaches further, and `vanilla` queries the `shared` one: with `text` they would be
told the unseen classes' words through the classifier, and their ablation would mean nothing.

Class splits are made in `msq.head.class_splits`.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msq.config import Classifier, Queries, RunConfig
from msq.errors import UsageError
from msq.head.class_splits import (
    ClassSplit,
    Leak,
    class_split,
    clip_labels,
    coinciding_classes,
    leaks,
)
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
from msq.head.train import Progress, train_head

__all__ = [
    "ALL_QUERIES",
    "ClassSplit",
    "class_split",
    "evaluate_split",
    "seen_features",
    "spread",
    "zero_shot",
    "zero_shot_classifier",
]

ALL_QUERIES: tuple[Queries, ...] = ("vanilla", "text", "multimodal")


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
    """
    multilabel = features.task == "multilabel"
    test = features.rows("test")
    column = {name: k for k, name in enumerate(features.classes)}
    seen, unseen = [column[n] for n in split.seen], [column[n] for n in split.unseen]

    def logits(columns: list[int], rows: Tensor) -> Tensor:
        trained = [seen.index(k) if k in seen else -1 for k in columns]
        text = None if model.text is None or features.text is None else features.text[columns]
        return score(model, features, rows, text=text, trained=torch.tensor(trained))

    def known_of(rows: Tensor, columns: list[int]) -> Tensor | None:
        return None if features.known is None else features.known[rows][:, columns]

    def rows_with(columns: list[int]) -> Tensor:
        return test[labelled(features.labels[test][:, columns], known_of(test, columns))]

    def metric(scores: Tensor, rows: Tensor, columns: list[int]) -> float:
        labels, known = features.labels[rows][:, columns], known_of(rows, columns)
        if multilabel:
            return float(average_precision(scores, labels, known).nanmean())
        return topk_accuracy(scores, labels, known=known)

    rows = rows_with(unseen)
    alone = logits(unseen, rows)
    labels, known = features.labels[rows][:, unseen], known_of(rows, unseen)
    ranking = alone if multilabel else alone.double().log_softmax(1)
    seen_rows = rows_with(seen)
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


def zero_shot(
    features: Features,
    config: RunConfig,
    out: Path | None = None,
    *,
    seen: Sequence[float] = (50, 75),
    splits: int = 10,
    queries: Sequence[Queries] = ALL_QUERIES,
    classifier: Classifier | None = None,
    class_splits: Sequence[ClassSplit] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Sweep class splits: train a head for each (seen, split, queries) and score it.

    Split i of a share is drawn with seed i, the same for every query mode; `train.seed` is the
    head's own. Finished runs in `out` are taken as they are, unfinished ones go on.

    Args:
        features: of all classes.
        config: of each run; its queries and classifier are replaced.
        out: parent of the run directories `seenNN/splitI/QUERIES`; None writes nothing.
        seen: percent of classes seen.
        splits: how many splits of each share.
        queries: the modes to compare.
        classifier: `shared` or `text`; None chooses by the queries, see above.
        class_splits: use these in place of drawn ones; `seen` is then what they come to, and those
            with equally many seen classes make one object.
        device: where to train.
        progress: called with a dict after each run: `event, seen, split, queries, unseen, seconds`.

    Returns:
        One object per (seen, queries): `seen` (percent), `splits` (how many), `queries`,
        `protocol`, `classifier`, `unseen` {map or top1: mean, std, values}, `generalised` {seen,
        unseen, harmonic} (means over splits), `generalised_splits` (the same with std and values),
        `seen_only`, `chance`, `leaking_splits` (how many), and `runs` with hash, source, lists,
        leaks and per-class AP of each split.
        std is the sample standard deviation, None for one value.

    Raises:
        UsageError: classifier `per-class`, which has no weights for unseen classes, or protocol
            `official`, which has no other.
    """
    if config.train.protocol == "official":
        raise UsageError("zero-shot: protocol official has classifier 'per-class', which has no "
                         "weights for classes never trained, and the authors' code evaluates none; "
                         "leave out --protocol official")  # fmt: skip
    if classifier == "per-class":
        raise UsageError("zero-shot: classifier 'per-class' has no weights for classes never "
                         "trained; use --classifier shared or --classifier text")  # fmt: skip
    features = features.to(device)
    names = features.classes
    plan: list[tuple[float, list[ClassSplit]]]
    if class_splits is not None:
        by_share: dict[float, list[ClassSplit]] = {}
        for split in class_splits:
            part = len(split.seen) / (len(split.seen) + len(split.unseen))
            by_share.setdefault(round(100 * part, 1), []).append(split)
        plan = list(by_share.items())
    else:
        plan = [(p, [class_split(names, p / 100, i) for i in range(splits)]) for p in seen]
    coinciding = coinciding_classes(clip_labels(features), names)
    results = []
    for percent, drawn in plan:
        for mode in queries:
            runs = []
            kind = classifier or zero_shot_classifier(mode)
            for number, split in enumerate(drawn):
                head = dataclasses.replace(config.head, queries=mode, classifier=kind)
                each = dataclasses.replace(config, head=head)
                place = None if out is None else out / f"seen{percent:g}" / f"split{number}" / mode
                trained = train_head(seen_features(features, split), each, place, device=device)
                scored = evaluate_split(trained.model, features, split)
                seconds = trained.result["seconds"]
                runs.append({"split": number, "seed": split.seed, "hash": split.hash,
                             "source": split.source, "leaks": _plain(leaks(split, coinciding)),
                             **scored,
                             "seen_classes": list(split.seen), "unseen_classes": list(split.unseen),
                             "seconds": seconds})  # fmt: skip
                if progress is not None:
                    progress({"event": "run", "seen": percent, "split": number, "queries": mode,
                              "unseen": scored["unseen"], "seconds": seconds})  # fmt: skip
            summary = _summary(percent, mode, kind, features.task, runs)
            results.append(
                {
                    **summary,
                    "protocol": config.train.protocol,
                    "dataset": features.name,
                    "variant": features.variant,
                    "partition": features.partition,
                    "views": features.view_name,
                }
            )
    return results


def _plain(found: Sequence[Leak]) -> list[dict[str, Any]]:
    return [leak._asdict() for leak in found]


def zero_shot_classifier(queries: Queries) -> Classifier:
    """The classifier for a query mode where none is named; the reasons are at the top."""
    return "shared" if queries == "vanilla" else "text"


def _summary(
    percent: float, mode: str, classifier: str, task: str, runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """One object of the result; see `zero_shot`."""
    metric = "map" if task == "multilabel" else "top1"
    generalised = {
        "seen": spread([run["generalised_seen"] for run in runs]),
        "unseen": spread([run["generalised_unseen"] for run in runs]),
        "harmonic": spread([run["harmonic"] for run in runs]),
    }
    return {
        "seen": int(percent) if percent == int(percent) else percent,
        "splits": len(runs),
        "queries": mode,
        "classifier": classifier,
        "unseen": {metric: spread([run["unseen"] for run in runs])},
        "generalised": {key: value["mean"] for key, value in generalised.items()},
        "generalised_splits": generalised,
        "seen_only": {metric: spread([run["seen"] for run in runs])},
        "chance": spread([run["chance"] for run in runs]),
        "leaking_splits": sum(bool(run["leaks"]) for run in runs),
        "runs": runs,
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """`mean`, sample standard deviation `std` (None for one value) and the `values`."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "values": list(values)}
