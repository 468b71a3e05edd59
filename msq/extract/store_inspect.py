"""What a store is: how its parts were made, how complete they are, what went wrong, how large."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

import msq
from msq.extract.location import is_local
from msq.extract.store import FeatureStore
from msq.extract.store_records import batches_in
from msq.extract.store_schema import FAILURES, array_names
from msq.extract.store_seal import KEY

STATUS = ("missing", "ok", "failed", "degraded")  # by the store's status code


def inspect_store(store: FeatureStore) -> dict[str, Any]:
    """A JSON-able description.

    Raises:
        StoreError: a commit record or a small array is damaged.
    """
    sizes = _sizes(store)
    return {
        "store": str(store.path),
        "dataset": store.name,
        "variant": store.variant,
        "task": store.task,
        "metric": store.metric,
        "version": store.attributes.get("version"),
        "versions": dict(store.attributes.get("versions", {})),
        "made_with": dict(store.attributes.get("made_with", {})),
        "copied_by": store.attributes.get("copied_by"),
        "msq": msq.__version__,
        "metadata_digests": KEY in store.attributes,
        "clips": len(store),
        "splits": {s: store.splits.count(s) for s in dict.fromkeys(store.splits)},
        "partitions": {
            name: {s or "unused": splits.count(s) for s in dict.fromkeys(splits)}
            for name, splits in store.partitions.items()
        },
        "classes": len(store.classes),
        "encoders": {
            slug: _encoder(store, slug, kind, sizes)
            for kind in ("video", "image")
            for slug in store.encoders(kind)
        },
        "text": {slug: store.prompts(slug) for slug in store.encoders("text")},
        "failures": store.failures(),
        "reasons": _reasons(store),
        "smaller_batches": [
            {"shard": shard, **asdict(smaller)}
            for shard, recorded in batches_in(store.path / FAILURES).items()
            for smaller in recorded
        ],
        "bytes": {**{name: n for name, n in sorted(sizes.items()) if "/" not in name}},
        "files": sum(1 for f in store.path.rglob("*") if f.is_file()),
    }


def _encoder(store: FeatureStore, slug: str, kind: str, sizes: dict[str, int]) -> dict[str, Any]:
    views: list[dict[str, Any]] = [
        {"view": str(view), **_counts(store.status_codes(slug, view))} for view in store.views(slug)
    ]
    making = store.making(slug, kind)
    names = array_names(kind, slug, store.has_image_frames(slug))
    done = sum(view["ok"] + view["degraded"] for view in views)
    return {
        "kind": kind,
        "spec": store.spec(slug, kind).line(store.name),
        "made_by": making.get("encoder", {}),
        "stored": store.store_dtype(slug),
        "converted_from": making.get("converted_from"),
        "shard": store.shard(slug),
        "shapes": {name: list(store.shape(name)) for name in names},
        "bytes": sum(sizes.get(name, 0) for name in names),
        "coverage": done / max(1, len(views) * len(store)),
        **{word: views[0][word] for word in STATUS},
        "views": views,
    }


def _counts(status: NDArray[np.uint8]) -> dict[str, int]:
    """Rows of each status."""
    return {word: int((status == code).sum()) for code, word in enumerate(STATUS)}


def _reasons(store: FeatureStore) -> list[dict[str, Any]]:
    """How many clips have failed or are degraded for each reason, the most frequent first."""
    distinct = {(f["status"], f["reason"], f["row"]) for f in store.failures()}
    clips = Counter((status, reason) for status, reason, _ in distinct)
    return [
        {"status": STATUS[status], "reason": reason, "clips": count}
        for (status, reason), count in sorted(clips.items(), key=lambda item: (-item[1], item[0]))
    ]


def _sizes(store: FeatureStore) -> dict[str, int]:
    """Bytes on disk of the store (`total`), of its groups, and of each array of an encoder."""
    sizes = Counter({"total": 0})
    for path in store.path.rglob("*"):
        if not path.is_file():
            continue
        size = path.stat().st_size
        parts = path.relative_to(store.path).parts
        sizes["total"] += size
        sizes[parts[0] if len(parts) > 1 else "root"] += size
        if len(parts) > 2:
            sizes["/".join(parts[:2])] += size
    if is_local(store.path):
        blocks = (p.stat().st_blocks * 512 for p in store.path.rglob("*") if p.is_file())
        sizes["allocated"] = sum(blocks)
    return dict(sizes)
