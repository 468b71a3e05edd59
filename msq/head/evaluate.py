"""Scoring features with a trained head."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msq import config as configuration
from msq.errors import SpecMismatch, UsageError
from msq.head.checkpoint import load_model
from msq.head.features import Features, StoreLike, load_features
from msq.head.metrics import (
    all_metrics,
    average_precision,
    official_micro_average_precision,
    topk_accuracy,
)
from msq.head.model import MSQNet


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
    """Logits [n, K] of the given rows (all where None), without dropout.

    Args:
        model: the head; its mode is left as it was.
        features: on the head's device.
        rows: [n] row numbers.
        text: other classes, as in `MSQNet.forward`.
        trained: likewise.
        batch: clips at a time.
    """
    if rows is None:
        rows = torch.arange(len(features.ids), device=features.tokens.device)
    if not rows.numel():
        like = trained if trained is not None else text
        return torch.zeros(0, model.classes if like is None else len(like), device=rows.device)
    dtype = model.memory.weight.dtype
    mode = model.training
    model.eval()
    parts = []
    for part in torch.split(rows, batch):
        image = None if features.image is None else features.image[part].to(dtype)
        tokens = features.tokens[part].to(dtype)
        parts.append(model(tokens, image, text=text, trained=trained)["logits"])
    model.train(mode)
    return torch.cat(parts)


def probabilities(logits: Tensor, task: str) -> Tensor:
    """Sigmoid for `multilabel`, softmax over the classes for `singlelabel`."""
    return logits.sigmoid() if task == "multilabel" else logits.softmax(-1)


def official_score(logits: Tensor, labels: Tensor, task: str) -> float:
    """The number the authors' code watches: micro AP per batch of 32, or top-1 for `singlelabel`.

    Clips without any label are left out, as their loaders do.
    """
    if task != "multilabel":
        return topk_accuracy(logits, labels)
    keep = (labels != 0).any(1)
    return official_micro_average_precision(logits[keep], labels[keep])


def measure(logits: Tensor, features: Features, rows: Tensor) -> dict[str, Any]:
    """`all_metrics` of some rows, with `per_class` AP by class name beside them."""
    labels = features.labels[rows]
    keep = (labels != 0).any(1)
    scores = logits if features.task == "multilabel" else logits.double().log_softmax(1)
    per_class = average_precision(scores[keep], labels[keep]).tolist()
    metrics = all_metrics(logits, labels, features.task)
    return {"metrics": metrics, "per_class": dict(zip(features.classes, per_class, strict=True))}


def evaluate_run(
    run: Path, store: StoreLike | Features, split: str = "test", device: str = "cpu"
) -> dict[str, Any]:
    """Score one split of a store with a run's head, under every protocol's metrics.

    Args:
        run: a finished run directory.
        store: an open feature store, or features already in memory.
        split: `train`, `val` or `test`.
        device: where to compute.

    Returns:
        `run, protocol, metrics, epochs, seconds, seconds_per_epoch` (those of the training),
        `split, clips, coverage, per_class, eval_seconds`.

    Raises:
        SpecMismatch: the store was made in another way than the features the head was trained on.
        UsageError: no clip in that split.
    """
    model, meta = load_model(run / "head.safetensors", device)
    if isinstance(store, Features):
        features = store
    else:
        chosen = configuration.load(run / "config.toml").features
        features = load_features(store, chosen.video, chosen.image, chosen.text, chosen.prompt,
                                 chosen.view)  # fmt: skip
    features = features.to(device)
    require_same_making(meta, features, str(run))
    rows = features.rows(split)
    if not rows.numel():
        raise UsageError(
            f"{run}: no usable clip in split {split!r}; found {sorted(set(features.splits))}"
        )
    began = time.perf_counter()
    measured = measure(score(model, features, rows), features, rows)
    stored = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return {
        "run": str(run),
        "protocol": meta["protocol"],
        **measured,
        "split": split,
        "clips": len(rows),
        "coverage": features.coverage(),
        "epochs": stored["epochs"],
        "seconds": stored["seconds"],
        "seconds_per_epoch": stored["seconds_per_epoch"],
        "eval_seconds": time.perf_counter() - began,
    }


def require_same_making(meta: dict[str, Any], features: Features, name: str) -> None:
    """Refuse features that were not made as those a head was trained on.

    Args:
        meta: the header of `head.safetensors`.
        features: the ones at hand.
        name: of the run, for the message.

    Raises:
        SpecMismatch: other classes, encoders or prompt; the message holds the difference.
    """
    needed = {"video": meta["encoders"].get("video")}
    if meta["image_width"] is not None:
        needed["image"] = meta["encoders"].get("image")
    expected = {"classes": meta["classes"], "task": meta["task"], "encoders": needed}
    found = {
        "classes": list(features.classes),
        "task": features.task,
        "encoders": {kind: dict(features.specs.get(kind) or {}) for kind in needed},
    }
    expected["encoders"] = {kind: dict(spec or {}) for kind, spec in needed.items()}
    lines = configuration.difference(expected, json.loads(json.dumps(found)))
    if lines:
        raise SpecMismatch(
            f"{name}: the store was made in another way than the one the head was trained on:\n  "
            + "\n  ".join(lines)
        )
