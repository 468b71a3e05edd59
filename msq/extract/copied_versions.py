"""With which versions the features of a copied store were made, and with which they were copied.

The root of a store that was extracted says with which versions it was begun (`version`,
`versions`). A copy says the same of its features, whatever copied them, and what that was in
`copied_by`. Where stores of different versions were merged, `made_with` lists them in the order of
the rows, encoder by encoder, and the root has no versions of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import msq
from msq.extract.datasets.dataset import Dataset
from msq.extract.store import FeatureStore
from msq.extract.store_copy import Row
from msq.extract.store_keys import metadata
from msq.extract.store_seal import sealed
from msq.extract.store_versions import library_versions
from msq.extract.store_writer import StoreWriter

Making = dict[str, Any]  # `version` and `versions`, as far as they are known
_NAMES = ("version", "versions")


def begin_copy(
    out: Path, dataset: Dataset, rows: Sequence[Row | None], encoders: Sequence[str], by: str
) -> None:
    """Write what depends on the dataset alone of a copy; nothing where it is there already.

    Args:
        out: the copy, claimed.
        dataset: what it is of.
        rows: where each of its rows comes from; None is one that is still to be extracted.
        encoders: those that are copied; class embeddings come from the store of the first row.
        by: what copies, `convert`, `merge` or `relabel`.

    Raises:
        SpecMismatch: `out` is a store of other clips, classes or task.
    """
    _Beginning(out, dataset, root_versions(rows, encoders, by))


def root_versions(rows: Sequence[Row | None], encoders: Sequence[str], by: str) -> Making:
    """What the root of a copy says of versions: `version` and `versions`, or `made_with`.

    See `begin_copy`. `copied_by` is beside them in any case.
    """
    stores = {id(row.store): row.store for row in rows if row is not None}
    first = next(iter(stores.values()))
    own: Making = {"version": msq.__version__, "versions": library_versions()}
    features = {*first.encoders("video"), *first.encoders("image")}
    made: dict[str, list[Making]] = {}
    for slug in encoders:
        if slug in features:
            known = {key: _by_row(store, slug) for key, store in stores.items()}
            made[slug] = _runs(
                [own if row is None else known[id(row.store)][row.row] for row in rows]
            )
        else:  # class embeddings have no rows
            recorded = first.attributes.get("made_with", {}).get(slug)
            made[slug] = [dict(recorded[0])] if recorded else [_root_making(first)]
    copied = {"copied_by": {"by": by, **own}}
    without = [{k: run[k] for k in _NAMES if k in run} for runs in made.values() for run in runs]
    if all(making == without[0] for making in without):
        return {**(without[0] if without else _root_making(first)), **copied}
    return {"made_with": made, **copied}


def _root_making(store: FeatureStore) -> Making:
    return {name: store.attributes[name] for name in _NAMES if name in store.attributes}


def _by_row(store: FeatureStore, slug: str) -> list[Making]:
    """With which versions each row of an encoder was made."""
    recorded = store.attributes.get("made_with", {}).get(slug)
    if recorded is None:
        return [_root_making(store)] * len(store)
    return [
        making
        for run in recorded
        for making in [{k: run[k] for k in _NAMES if k in run}] * int(run["clips"])
    ]


def _runs(by_row: Sequence[Making]) -> list[Making]:
    """Rows that follow one another and were made alike, as one entry with their number."""
    return [{**making, "clips": len(list(rows))} for making, rows in groupby(by_row)]


class _Beginning(StoreWriter):
    """A writer whose root says other versions than those of this process."""

    def __init__(self, path: Path, dataset: Dataset, root: Mapping[str, Any]) -> None:
        self._root = root
        super().__init__(path, dataset)

    def _publish(self, content: Mapping[str, bytes]) -> list[str]:
        document = metadata(content["zarr.json"])
        own = document["attributes"]["msq"]
        rest = {name: value for name, value in own.items() if name not in _NAMES}
        document["attributes"]["msq"] = {**rest, **self._root}
        return super()._publish({**content, "zarr.json": sealed(json.dumps(document).encode())})
