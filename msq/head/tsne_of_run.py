"""The clips of a run before and after its decoder, in two pictures by t-SNE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msq import config as configuration
from msq.config_values import nearest
from msq.errors import UsageError
from msq.head.checkpoint import load_model
from msq.head.clip_embeddings import Weights, after_decoder, before_decoder
from msq.head.evaluate import as_recorded, require_same_making
from msq.head.features import Features, StoreLike, configured_features
from msq.head.model import MSQNet
from msq.head.partitions import require_one_run
from msq.head.tsne import PERPLEXITY, layout, panel, require_perplexity, require_tsne

MOST_CLASSES = 30  # that colours and shapes can tell apart
LIMIT = 2000


def tsne_of_run(
    run: Path,
    store: StoreLike | Features,
    split: str = "test",
    *,
    classes: Sequence[str] | None = None,
    most: int = 10,
    limit: int | None = LIMIT,
    seed: int = 0,
    perplexity: float = PERPLEXITY,
    weights: Weights = "mean",
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Lay out the clips of a split by their embedding before and after the decoder.

    Args:
        run: a finished run directory.
        store: an open feature store, or features already in memory.
        split: `train`, `val` or `test`.
        classes: only clips with one of these, and only these labels; None for all.
        most: without `classes`, how many classes are shown apart, those of most clips.
        limit: clips at most; more are drawn from, by the seed. None for all.
        seed: of that draw.
        perplexity: of t-SNE; less where there are few clips.
        weights: how K queries become one vector: see `after_decoder`.
        device: where the head computes.
        progress: told what comes next.

    Returns:
        `run, protocol, dataset, split, partition, views, seed, weights`; `clips` shown, `clips_of`
        (with features, in the split), `left_out` by reason, `coverage`; `before` and `after`:
        `what, dimensions, agreement, chance, neighbours, clips, distinct, perplexity, divergence`
        (`msq.head.tsne`); `classes`, those shown apart, by clips, with the number `clips` that
        bear their colour; `points`, in the order of the store: `clip, labels, class, before,
        after`. `class` is the rarest of the shown classes that the clip has, None where it has
        none of them.

    Raises:
        SpecMismatch: the store was made in another way than the features the head was trained on.
        UsageError: no clip in that split, an unknown class or an empty list of them, a perplexity
            that is not above 0, fewer than four clips that differ, values that are not finite, or
            scikit-learn is not there.
    """
    require_tsne()
    require_perplexity(perplexity)
    require_one_run(run)
    model, meta = load_model(run / "head.safetensors", device)
    features = _features(run, meta, store).to(device)
    there = features.rows(split).cpu()
    if not there.numel():
        raise UsageError(
            f"{run}: no usable clip in split {split!r}; found {sorted(set(features.splits))}"
        )
    columns = _columns(features, classes)
    rows, left_out = _shown(features, there, columns if classes else None, limit, seed)
    labels = _labels(features, rows)[:, columns]
    tell = progress or (lambda line: None)
    tell(f"{len(rows)} of {len(there)} clips of {split}: embeddings before and after the decoder")
    places, panels = [], []
    for name, what, x in _embedded(model, features, rows, weights):
        tell(f"t-SNE of {len(x)} clips {name} the decoder: {what}, {x.shape[1]} values")
        made = layout(x, perplexity)
        places.append(made.points.tolist())
        panels.append(panel(x, labels, made, what))
    names = [features.classes[column] for column in columns]
    colours = _colours(labels, MOST_CLASSES if classes else most)
    order = [k for k in _most_first(labels) if k in colours]
    points = [
        {
            "clip": features.ids[row],
            "labels": [names[k] for k in labels[place].nonzero().flatten().tolist()],
            "class": None if colour is None else names[colour],
            "before": places[0][place],
            "after": places[1][place],
        }
        for place, (row, colour) in enumerate(zip(rows.tolist(), colours, strict=True))
    ]
    return {
        "run": str(run),
        "protocol": meta["protocol"],
        "dataset": features.name,
        "split": split,
        "partition": features.partition,
        "views": features.view_name,
        "seed": seed,
        "weights": weights,
        "clips": len(rows),
        "clips_of": len(there),
        "left_out": left_out,
        "coverage": features.coverage(),
        "before": panels[0],
        "after": panels[1],
        "classes": [{"class": names[k], "clips": colours.count(k)} for k in order],
        "points": points,
    }


def _features(run: Path, meta: dict[str, Any], store: StoreLike | Features) -> Features:
    """Features of the store as the run read them, or those given where they are of its making."""
    if isinstance(store, Features):
        features = store
    else:
        chosen = configuration.load(run / "config.toml").features
        features = configured_features(store, as_recorded(chosen, meta, store))
    require_same_making(meta, features, str(run))
    return features


def _embedded(
    model: MSQNet, features: Features, rows: Tensor, weights: Weights
) -> list[tuple[str, str, Tensor]]:
    """Embeddings [n, D'] and [n, D] before and after the decoder, with what they are."""
    rows = rows.to(features.tokens.device)
    tokens = f"mean over {features.tokens.shape[1]} tokens of {_encoder(features)}"
    queries = f"{'mean' if weights == 'mean' else 'mean by score'} over {model.classes} queries"
    return [
        ("before", tokens, before_decoder(features, rows)),
        ("after", queries, after_decoder(model, features, rows, weights)),
    ]


def _columns(features: Features, classes: Sequence[str] | None) -> list[int]:
    """Columns of the classes asked for, in the order of the features; all where none are."""
    if classes is None:
        return list(range(len(features.classes)))
    if not classes:
        raise UsageError("--classes: expected at least one name, found none")
    unknown = [name for name in classes if name not in features.classes]
    if unknown:
        near = nearest(unknown[0], features.classes)
        raise UsageError(f"--classes: no class {unknown[0]!r} in {features.name}{near}")
    if len(set(classes)) > MOST_CLASSES:
        raise UsageError(
            f"--classes: expected at most {MOST_CLASSES}, which colours and shapes can tell "
            f"apart, found {len(set(classes))}"
        )
    return sorted({features.classes.index(name) for name in classes})


def _shown(
    features: Features, there: Tensor, columns: Sequence[int] | None, limit: int | None, seed: int
) -> tuple[Tensor, dict[str, int]]:
    """Rows in ascending order, and how many others are not shown, by reason."""
    left_out = {}
    rows = there
    if columns is not None:
        rows = there[(_labels(features, there)[:, columns] != 0).any(1)]
        left_out["without a class asked for"] = len(there) - len(rows)
    if limit is not None and len(rows) > limit:
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:limit]
        left_out["beyond the limit"] = len(rows) - limit
        rows = rows[drawn.sort().values]
    if not rows.numel():
        raise UsageError(f"{features.name}: no clip of the split has a class asked for")
    return rows, left_out


def _labels(features: Features, rows: Tensor) -> Tensor:
    """[n, K] on the CPU; of what nobody knows, nothing is said."""
    labels = features.labels.cpu()[rows]
    return labels if features.known is None else labels * features.known.cpu()[rows]


def _colours(labels: Tensor, most: int) -> list[int | None]:
    """Of each clip [n, K] the class that it is drawn as: the rarest that it has of those shown."""
    shown = _most_first(labels)[:most][::-1]
    return [next((k for k in shown if row[k]), None) for row in labels.tolist()]


def _most_first(labels: Tensor) -> list[int]:
    """Classes of labels [n, K] by their clips, the first of those that are equal first."""
    counts = (labels != 0).sum(0).tolist()
    return sorted(range(len(counts)), key=lambda k: (-counts[k], k))


def _encoder(features: Features) -> str:
    return str((features.specs.get("video") or {}).get("slug", "the video encoder"))
