"""What is known of the rows of one shard: their values and status, and what went wrong.

`failures/SHARD.json` lists each clip that failed or decoded only in part once for each reason, with
the encoders and the views that it holds for; `views` is left out where it is the clean one alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CLEAN = "clean"


@dataclass(frozen=True)
class ShardRows:
    """What one encoder has to say about one view of the rows of one shard.

    Attributes:
        features: `[n, ...]` in the array's dtype on disk; rows that failed hold anything.
        times: `[n, T]` float32, seconds of the sampled frames, NaN where unknown.
        status: `[n]` uint8, one of the codes of `store_schema`.
    """

    features: NDArray[np.generic]
    times: NDArray[np.float32]
    status: NDArray[np.uint8]


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


def read_failures(content: bytes) -> list[Failure]:
    """The failures in a file that `failures_document` made; none where it was changed by hand."""
    try:
        return [
            Failure(
                encoder=encoder,
                view=view,
                **{k: v for k, v in entry.items() if k not in ("encoders", "views")},
            )
            for entry in json.loads(content)["clips"]
            for encoder in entry["encoders"]
            for view in entry.get("views", [_CLEAN])
        ]
    except (ValueError, KeyError, TypeError):
        return []  # the shard counts as pending and is written again


def failures_document(shard: int, failures: Iterable[Failure]) -> bytes | None:
    """The file of a shard's failures, the same whatever their order; None where there are none."""
    encoders: dict[tuple[Any, ...], set[str]] = {}
    for f in failures:
        encoders.setdefault((f.row, f.clip, f.status, f.reason, f.message, f.view), set()).add(
            f.encoder
        )
    views: dict[tuple[Any, ...], set[str]] = {}
    for (*said, view), names in encoders.items():
        views.setdefault((*said, tuple(sorted(names))), set()).add(view)
    if not views:
        return None
    entries = []
    for key in sorted(views):
        entry = dict(
            zip(("row", "clip", "status", "reason", "message", "encoders"), key, strict=True)
        )
        held = sorted(views[key], key=lambda view: (view != _CLEAN, len(view), view))
        entries.append(entry if held == [_CLEAN] else entry | {"views": held})
    document = {"shard": shard, "clips": entries}
    text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False)
    return (text + "\n").encode()
