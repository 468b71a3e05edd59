"""The dataset that a store is of, as far as the store knows it: no paths and no cuts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from msq.extract.datasets.dataset import Clip, Dataset, Split, Task
from msq.extract.store import FeatureStore


@dataclass(frozen=True, slots=True)
class StoredDataset(Dataset):
    """A dataset read from a store.

    Attributes:
        recorded_hash: what counts as the hash of its clip list.
    """

    recorded_hash: str = ""

    def clip_list_hash(self) -> str:
        """The hash that the store recorded: cuts are part of it, and no store holds them."""
        return self.recorded_hash


def stored_dataset(store: FeatureStore, rows: Sequence[int] | None = None) -> StoredDataset:
    """The dataset of a store, or some rows of it.

    The clip list of some rows has a hash of its own, made from the whole list's and the rows': a
    request for the same clips does not have it, and is refused.
    """
    chosen = range(len(store)) if rows is None else rows
    labels, known = store.labels().numpy(), store.label_known()
    unknown = np.zeros_like(labels) if known is None else ~known.numpy()
    clips = tuple(
        Clip(
            store.clips[row],
            Path(),
            None,
            None,
            tuple(np.flatnonzero(labels[row]).tolist()),
            cast("Split", store.splits[row]),
            unknown=tuple(np.flatnonzero(unknown[row]).tolist()),
        )
        for row in chosen
    )
    recorded = str(store.attributes["clip_list_hash"])
    if rows is not None and list(rows) != list(range(len(store))):
        recorded = joined_hash("rows", [recorded, *map(str, rows)])
    return StoredDataset(
        store.name,
        store.classes,
        cast("Task", store.task),
        clips,
        store.metric,
        partitions={k: tuple(v[row] for row in chosen) for k, v in store.partitions.items()},
        groups=store.groups,
        variant=store.variant,
        recorded_hash=recorded,
    )


def joined_hash(what: str, parts: Sequence[str]) -> str:
    """SHA-256 over lines."""
    return hashlib.sha256("\n".join([what, *parts]).encode()).hexdigest()
