"""What is known of the rows of one shard: their values and status, and what went wrong.

`failures/SHARD.json` lists each clip that failed or decoded only in part once for each reason, with
the encoders and the views that it holds for; `views` is left out where it is the clean one alone.
`batches` is there where memory was short: what was encoded in smaller batches than were asked for,
which may change the last bits of features.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msq.extract.store_schema import IMAGE_FRAMES, FeatureArray
from msq.extract.store_seal import RECORD_KEY, record_is_whole, sealed_record

_CLEAN = "clean"


@dataclass(frozen=True)
class ShardRows:
    """What one encoder has to say about one view of the rows of one shard.

    Attributes:
        features: `[n, ...]` in the array's dtype on disk; rows that failed hold anything.
        times: `[n, T]` float32, seconds of the sampled frames, NaN where unknown.
        status: `[n]` uint8, one of the codes of `store_schema`.
        frames: `[n, T, D'']`, an image encoder's features of each frame, where the store has
            them; else None.
    """

    features: NDArray[np.generic]
    times: NDArray[np.float32]
    status: NDArray[np.uint8]
    frames: NDArray[np.generic] | None = None

    @classmethod
    def blank(cls, arrays: Sequence[FeatureArray], count: int) -> ShardRows:
        """`count` rows of which nothing is known, for `arrays` as `StoreState.arrays` has them."""
        features, *_, times = arrays
        per_frame = [array for array in arrays if array.name.startswith(f"{IMAGE_FRAMES}/")]
        return cls(
            np.zeros((count, *features.row), dtype=features.dtype),
            np.full((count, *times.row), np.nan, dtype=np.float32),
            np.zeros(count, dtype=np.uint8),
            *(np.zeros((count, *array.row), dtype=array.dtype) for array in per_frame),
        )

    def values(self) -> tuple[NDArray[np.generic], ...]:
        """All but the status, in the order of `StoreState.arrays`."""
        frames = () if self.frames is None else (self.frames,)
        return self.features, *frames, self.times


@dataclass(frozen=True)
class Failure:
    """One clip that failed (status 2) or decoded only in part (status 3): one encoder, one view."""

    row: int
    clip: str
    status: int
    reason: str
    message: str
    encoder: str
    view: str = _CLEAN


@dataclass(frozen=True)
class SmallerBatch:
    """Features of a shard that were made in batches of fewer clips than were asked for."""

    batch: int
    encoder: str
    view: str = _CLEAN


def read_failures(content: bytes) -> list[Failure]:
    """The failures in a file that `failures_document` made; none where it was changed since."""
    try:
        document = json.loads(content)
        if not record_is_whole(document):
            return []
        return [
            Failure(
                encoder=encoder,
                view=view,
                **{k: v for k, v in entry.items() if k not in ("encoders", "views")},
            )
            for entry in document["clips"]
            for encoder in entry["encoders"]
            for view in entry.get("views", [_CLEAN])
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # the shard counts as pending and is written again


def read_batches(content: bytes) -> list[SmallerBatch]:
    """The smaller batches in the same file."""
    try:
        document = json.loads(content)
        if not record_is_whole(document):
            return []
        return [
            SmallerBatch(entry["batch"], encoder, view)
            for entry in document.get("batches", [])
            for encoder in entry["encoders"]
            for view in entry.get("views", [_CLEAN])
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def batches_in(folder: Path) -> dict[int, list[SmallerBatch]]:
    """Shard -> the smaller batches that are recorded of it, in a store's folder of failures."""
    files = sorted(folder.glob("[0-9]*.json"))
    found = {int(path.stem): read_batches(path.read_bytes()) for path in files}
    return {shard: batches for shard, batches in found.items() if batches}


def same_record(found: bytes, content: bytes) -> bool:
    """Whether a file says what `content` does; an old one, without a digest, stays as it is."""
    if found == content:
        return True
    document = json.loads(content)
    del document[RECORD_KEY]
    try:
        return bool(json.loads(found) == document)
    except ValueError:
        return False


def failures_document(
    shard: int, failures: Iterable[Failure], batches: Iterable[SmallerBatch] = ()
) -> bytes | None:
    """The file of a shard's failures, the same whatever their order; None where there are none."""
    encoders: dict[tuple[Any, ...], set[str]] = {}
    for f in failures:
        encoders.setdefault((f.row, f.clip, f.status, f.reason, f.message, f.view), set()).add(
            f.encoder
        )
    views: dict[tuple[Any, ...], set[str]] = {}
    for (*said, view), names in encoders.items():
        views.setdefault((*said, tuple(sorted(names))), set()).add(view)
    smaller = _batch_entries(batches)
    if not views and not smaller:
        return None
    entries = []
    for key in sorted(views):
        entry = dict(
            zip(("row", "clip", "status", "reason", "message", "encoders"), key, strict=True)
        )
        entries.append(entry | _held(views[key]))
    content: dict[str, Any] = {"shard": shard, "clips": entries}
    document = sealed_record(content | ({"batches": smaller} if smaller else {}))
    text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False)
    return (text + "\n").encode()


def _batch_entries(batches: Iterable[SmallerBatch]) -> list[dict[str, Any]]:
    """One entry for each batch and encoder."""
    views: dict[tuple[int, str], set[str]] = {}
    for entry in batches:
        views.setdefault((entry.batch, entry.encoder), set()).add(entry.view)
    return [
        {"batch": batch, "encoders": [encoder]} | _held(views[batch, encoder])
        for batch, encoder in sorted(views)
    ]


def _held(views: set[str]) -> dict[str, list[str]]:
    """`views` of an entry, left out where it is the clean one alone."""
    held = sorted(views, key=lambda view: (view != _CLEAN, len(view), view))
    return {} if held == [_CLEAN] else {"views": held}
