"""Is a store made of these clips? Asked where features of a store go with videos read anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from msq.errors import SpecMismatch
from msq.extract.datasets.dataset import Dataset
from msq.extract.store import FeatureStore
from msq.extract.store_schema import known_matrix, label_matrix

_EXAMPLES = 3


@dataclass(frozen=True)
class ClipMatch:
    """Which row of a store is which clip of a dataset.

    Attributes:
        rows: [clips] the row of each clip, -1 for those that the store does not have.
        extra: rows of the store that are no clip of the dataset.
    """

    rows: NDArray[np.int64]
    extra: int

    def notes(self, dataset: str, store: str) -> list[str]:
        """What the two do not have in common, one line each; nothing where they agree."""
        absent = int((self.rows < 0).sum())
        lines = []
        if absent:
            lines.append(
                f"{absent} of {len(self.rows)} clips of {dataset} have no row in {store} and are "
                "left out"
            )
        if self.extra:
            lines.append(f"{self.extra} clips of {store} are not in {dataset}")
        return lines


def match_clips(
    data: Dataset, splits: Sequence[str], store: FeatureStore, partition: str | None = None
) -> ClipMatch:
    """Find the clips of a dataset in a store, by their ids.

    Args:
        data: the dataset, read anew.
        splits: of its clips, in the partition in use; "" for clips that it does not use.
        store: made of the same clips, or some of them, or more.
        partition: in use, where the store has several.

    Raises:
        SpecMismatch: no clip in common, other classes, or other labels, splits or cuts of the
            clips that both have; the message names some.
    """
    place = {clip: row for row, clip in enumerate(store.clips)}
    rows = np.array([place.get(clip.id, -1) for clip in data.clips], dtype=np.int64)
    common = np.flatnonzero(rows >= 0)
    if not len(common):
        raise SpecMismatch(
            f"{store.path}: made of other clips than {data.name}: no id in common, such as "
            f"{_listed([clip.id for clip in data.clips])} of {data.name} and "
            f"{_listed(store.clips)} of the store of {store.name}"
        )
    lines = [*_classes(data, store)]
    if not lines:
        lines += _labels(data, common, rows, store)
        lines += _splits(data, common, rows, splits, store, partition)
    same_list = tuple(clip.id for clip in data.clips) == store.clips
    recorded = store.attributes.get("clip_list_hash")
    if not lines and same_list and recorded not in (None, data.clip_list_hash()):
        lines.append("start, end, frame rate or kept intervals of some clips: others in the store")
    if lines:
        raise SpecMismatch(
            f"{store.path}: made of another reading of {data.name} (expected: the store's, found: "
            "the one to train on); extract again, or read the same\n  " + "\n  ".join(lines)
        )
    return ClipMatch(rows, len(store.clips) - len(common))


def _classes(data: Dataset, store: FeatureStore) -> list[str]:
    lines = []
    if data.task != store.task:
        lines.append(f"task: expected {store.task}, found {data.task} (--task)")
    if data.classes == store.classes:
        return lines
    lacking = [name for name in store.classes if name not in data.classes]
    more = [name for name in data.classes if name not in store.classes]
    if lacking or more:
        lines.append(
            f"classes: expected {len(store.classes)}, found {len(data.classes)}; missing "
            f"{_listed(lacking)}, unknown {_listed(more)}"
        )
    else:
        k = next(k for k, name in enumerate(data.classes) if name != store.classes[k])
        lines.append(
            f"order of the classes: expected {store.classes[k]!r} in place {k + 1}, found "
            f"{data.classes[k]!r} (--classes FILE fixes it)"
        )
    return lines


def _labels(
    data: Dataset, common: NDArray[np.intp], rows: NDArray[np.int64], store: FeatureStore
) -> list[str]:
    known, stored = known_matrix(data), torch.from_numpy(rows[common])
    here = label_matrix(data)[common]
    there = store.labels(stored).numpy()
    differ = (here != there).any(axis=1)
    recorded = store.label_known(stored)
    mine = np.ones(here.shape, bool) if known is None else known[common]
    theirs = np.ones(here.shape, bool) if recorded is None else recorded.numpy()
    differ |= (mine != theirs).any(axis=1)
    if not differ.any():
        return []
    k = int(np.flatnonzero(differ)[0])
    return [
        f"labels of {int(differ.sum())} of {len(common)} clips, such as "
        f"{data.clips[common[k]].id!r}: expected {_named(there[k], store.classes)}, found "
        f"{_named(here[k], data.classes)}"
    ]


def _splits(
    data: Dataset,
    common: NDArray[np.intp],
    rows: NDArray[np.int64],
    splits: Sequence[str],
    store: FeatureStore,
    partition: str | None,
) -> list[str]:
    if store.partitions and partition not in store.partitions:
        return [f"partitions: expected {', '.join(store.partitions)}, found {partition or 'none'}"]
    recorded = store.partitions[partition] if store.partitions and partition else store.splits
    differ = [i for i in common.tolist() if splits[i] != recorded[rows[i]]]
    if not differ:
        return []
    i = differ[0]
    return [
        f"split of {len(differ)} of {len(common)} clips, such as {data.clips[i].id!r}: expected "
        f"{recorded[rows[i]] or 'unused'}, found {splits[i] or 'unused'}"
    ]


def _named(labels: NDArray[np.uint8], classes: Sequence[str]) -> str:
    return "; ".join(classes[int(k)] for k in np.flatnonzero(labels)) or "nothing"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_EXAMPLES])
    return (shown or "none") + (", …" if len(names) > _EXAMPLES else "")
