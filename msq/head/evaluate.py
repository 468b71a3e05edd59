"""Scoring features with a trained head."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msq import config as configuration
from msq.config import FeatureConfig
from msq.errors import SpecMismatch, UsageError
from msq.head.checkpoint import load_model
from msq.head.class_difference import class_difference
from msq.head.ensemble import ensemble_scores
from msq.head.export import write_charades_submission
from msq.head.features import Features, StoreLike, choose_partition, configured_features
from msq.head.finite import bad_rows, refuse_clips
from msq.head.memory import StepShape, scoring_batch, waiting
from msq.head.metrics import (
    labelled,
    metrics_and_classes,
    official_micro_average_precision,
    ranking_scores,
    topk_accuracy,
)
from msq.head.model import MSQNet
from msq.head.packed import PackedHead
from msq.head.run_result import read_result
from msq.head.segments import class_segments
from msq.head.stream import StreamedTokens
from msq.head.token_batches import with_next


@torch.no_grad()
def score(
    model: MSQNet,
    features: Features,
    rows: Tensor | None = None,
    *,
    text: Tensor | None = None,
    trained: Tensor | None = None,
    batch: int = 64,
) -> Tensor:
    """Logits [n, K] of the given rows (all where None), without dropout, by the packed head.

    Args:
        model: the head; its parameters' precision is the one it is scored in.
        features: on the head's device.
        rows: [n] row numbers.
        text: other classes, as in `MSQNet.forward`.
        trained: likewise.
        batch: clips at a time; fewer where memory has no room for so many.

    Raises:
        UsageError: no room for a single one.
        StoreError: tokens read from disk that are not finite; names the clips.
    """
    if rows is None:
        rows = torch.arange(len(features.ids), device=features.tokens.device)
    if not rows.numel():
        like = trained if trained is not None else text
        return torch.zeros(0, model.classes if like is None else len(like), device=rows.device)
    dtype = model.memory.weight.dtype
    head, parts = PackedHead(model, frozen=True), []
    batch = scoring_batch(_scored(model, features, batch, text, trained), rows.device)
    bad = []  # tokens in memory were looked at when they were read
    for part, tokens in with_next(features.tokens, torch.split(rows, batch)):
        if isinstance(features.tokens, StreamedTokens):
            bad.append(bad_rows(tokens))
        image = None if features.image is None else features.image[part].to(dtype)
        parts.append(head(tokens.to(dtype), image, text=text, trained=trained)["logits"])
    if bad:
        refuse_clips(features, rows, torch.cat(bad))
    return torch.cat(parts)


def _scored(
    model: MSQNet, features: Features, batch: int, text: Tensor | None, trained: Tensor | None
) -> StepShape:
    """What the memory of scoring so many clips depends on."""
    config, asked = model.config, trained if trained is not None else text
    return StepShape(
        batch=batch,
        classes=model.classes if asked is None else len(asked),
        tokens=features.tokens.shape[1],
        token_width=features.tokens.shape[-1],
        width=model.width,
        ffn=config.ffn or 4 * model.width,
        layers=config.layers,
        encoder_layers=config.encoder_layers,
        heads=config.heads,
        waiting=waiting(features.tokens, features.labels.device),
    )


def probabilities(logits: Tensor, task: str) -> Tensor:
    """Sigmoid for `multilabel`, softmax over the classes for `singlelabel`."""
    return logits.sigmoid() if task == "multilabel" else logits.softmax(-1)


def official_score(logits: Tensor, labels: Tensor, task: str, known: Tensor | None = None) -> float:
    """The number the authors' code watches: micro AP per batch of 32, or top-1 for `singlelabel`.

    Clips without any label are left out, as their loaders do.
    """
    if task != "multilabel":
        return topk_accuracy(logits, labels, known=known)
    keep = labelled(labels, known)
    part = None if known is None else known[keep]
    return official_micro_average_precision(logits[keep], labels[keep], known=part)


def measure(
    logits: Tensor, features: Features, rows: Tensor, *, log_probabilities: bool = False
) -> dict[str, Any]:
    """`all_metrics` of some rows, with `per_class` AP by class name beside them.

    A device is waited for twice, see `msq.head.metrics.metrics_and_classes`.
    """
    labels = features.labels[rows]
    known = None if features.known is None else features.known[rows]
    metrics, per_class = metrics_and_classes(
        logits, labels, features.task, known=known, log_probabilities=log_probabilities
    )
    metrics |= class_segments(per_class, features.groups)
    named = dict(zip(features.classes, per_class.tolist(), strict=True))
    return {"metrics": metrics, "per_class": named}


def evaluate_run(
    run: Path,
    store: StoreLike | Features,
    split: str = "test",
    device: str = "cpu",
    *,
    export: Path | None = None,
    ensemble: str = "none",
    test_views: str | None = None,
) -> dict[str, Any]:
    """Score one split of a store with a run's head, under every protocol's metrics.

    Args:
        run: a finished run directory.
        store: an open feature store, or features already in memory.
        split: `train`, `val` or `test`.
        device: where to compute.
        export: a file to write the scores to, in the form of the official Charades scorer.
        ensemble: `none` scores the run's own view, the clean one unless told otherwise; `mean`
            or `max` combine the probabilities over all test views of the store.
        test_views: such as `10x3`, where the store has several sets of them.

    Returns:
        `run, protocol, metrics, epochs, seconds, seconds_per_epoch` (those of the training; None
        for a head that another loop trained and `save_head` wrote),
        `dataset, variant, split, partition, views` (such as `clean` or `10 clips x 3 crops,
        mean`), `clips, coverage, per_class, eval_seconds`, and
        `export{file, clips, without_line}` where a file was asked for: the last are ids of the
        split that have no features, which the official scorer ranks last.

    Raises:
        SpecMismatch: the store was made in another way than the features the head was trained on.
        UsageError: no clip in that split, or the run is unfinished or its result damaged.
    """
    model, meta = load_model(run / "head.safetensors", device)
    file = run / "config.toml"  # a head of a loop that is not msq's has none, and no result
    stored = read_result(run) if file.exists() or (run / "result.json").exists() else {}
    if isinstance(store, Features):
        features = store
    else:
        chosen = configuration.load(file).features if file.exists() else FeatureConfig()
        features = configured_features(store, as_recorded(chosen, meta, store))
    features = features.to(device)
    require_same_making(meta, features, str(run))
    rows = features.rows(split)
    if not rows.numel():
        raise UsageError(
            f"{run}: no usable clip in split {split!r}; found {sorted(set(features.splits))}"
        )
    began = time.perf_counter()
    several, views = ensemble != "none", features.view_name
    if several:
        if isinstance(store, Features):
            raise UsageError(f"{run}: --ensemble {ensemble} needs a feature store, for its views")
        found = ensemble_scores(model, store, features, split, ensemble, test_views)
        features, rows, logits, views = found.features, found.rows, found.logits, found.views
    else:
        logits = score(model, features, rows)
    measured = measure(logits, features, rows, log_probabilities=several)
    if export is not None:
        ids = [features.ids[row] for row in rows.tolist()]
        write_charades_submission(export, ids, ranking_scores(logits, features.task, several))
        lost = [] if isinstance(store, Features) else _lost(store, features, split)
        measured["export"] = {"file": str(export), "clips": len(ids), "without_line": lost}
    return {
        "run": str(run),
        "protocol": meta["protocol"],
        **measured,
        "dataset": features.name,
        "variant": features.variant,
        "split": split,
        "partition": features.partition,
        "views": views,
        "clips": len(rows),
        "coverage": features.coverage(),
        **{key: stored.get(key) for key in ("epochs", "seconds", "seconds_per_epoch")},
        "eval_seconds": time.perf_counter() - began,
    }


def as_recorded(chosen: FeatureConfig, meta: dict[str, Any], store: StoreLike) -> FeatureConfig:
    """What a run's head is scored on: the clean view, and of several encoders its own."""
    own = {
        kind: slug
        for kind, spec in meta["encoders"].items()
        if (slug := spec.get("slug")) in list(store.encoders(kind))
        and getattr(chosen, kind) is None
    }
    return dataclasses.replace(chosen, train_views="clean", **own)


def _lost(store: StoreLike, features: Features, split: str) -> list[str]:
    """Ids of the split's clips that have no features."""
    there = set(features.ids)
    splits = choose_partition(store, features.partition)[1]
    return [
        clip
        for clip, part in zip(store.clips, splits, strict=True)
        if part == split and clip not in there
    ]


def require_same_making(
    meta: Mapping[str, Any], features: Features, name: str, *, labels: bool = True
) -> None:
    """Refuse features that were not made as those a head was trained on.

    The dtype that the store keeps them in may be another: both are scored in float32, and differ by
    its rounding, far below the noise of what was trained. (A run is resumed on the same one only.)

    Args:
        meta: the header of `head.safetensors`.
        features: the ones at hand.
        name: of the run, for the message.
        labels: whether those of the features are read; else their classes may be any.

    Raises:
        SpecMismatch: other classes, encoders or widths; the message holds the difference.
    """
    needed = {"video": meta["encoders"].get("video")}
    widths: dict[str, Any] = {"tokens": meta["token_width"]}
    here: dict[str, Any] = {"tokens": features.tokens.shape[-1]}
    if meta["image_width"] is not None:
        widths["image"] = meta["image_width"]
        here["image"] = None if features.image is None else features.image.shape[-1]
        needed["image"] = meta["encoders"].get("image")
    specs = {kind: dict(spec or {}) for kind, spec in needed.items()}
    found = {kind: dict(features.specs.get(kind) or {}) for kind in needed}
    lines = configuration.difference(
        {"encoders": specs, "width": widths},
        json.loads(json.dumps({"encoders": found, "width": here})),
    )
    if labels:
        classes = class_difference(meta["classes"], features.classes)
        task = configuration.difference({"task": meta["task"]}, {"task": features.task})
        lines = [*([classes] if classes else []), *task, *lines]
    if lines:
        raise SpecMismatch(
            f"{name}: the store was made in another way than the one the head was trained on:\n  "
            + "\n  ".join(lines)
        )
