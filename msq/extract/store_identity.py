"""What a store on disk says of itself, and whether that is what is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from msq.errors import SpecMismatch, UsageError
from msq.extract import store_schema as schema
from msq.extract.datasets.dataset import Dataset
from msq.extract.encoders.spec import EncoderSpec
from msq.extract.location import zarr_store
from msq.extract.store_difference import encoder_difference, sequence_difference
from msq.extract.store_keys import metadata
from msq.extract.store_seal import read_metadata


def attributes_at(path: Path) -> dict[str, Any] | None:
    """`attributes.msq` of a `zarr.json`; None where there is none.

    Raises:
        StoreError: the file is there and damaged.
    """
    if not path.exists():
        return None
    try:
        found = read_metadata(path)["attributes"]["msq"]
    except (KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def refuse(store: Path, lines: Sequence[str], what: str, fix: str = "") -> None:
    """Refuse a store that `lines` tell from what is asked for; nothing where there are none.

    Args:
        store: whose it is.
        lines: the difference.
        what: part of the store.
        fix: what else can be done than to ask for the same, or to write to another store.

    Raises:
        SpecMismatch: with the lines.
    """
    if lines:
        difference = "\n".join(f"  {line}" for line in lines)
        raise SpecMismatch(
            f"{store}: {what} was made in another way than asked for:\n{difference}\n"
            f"Ask for what the store holds, or write to another store.{fix and f' {fix}'}"
        )


def compare_encoder(store: Path, content: Mapping[str, bytes]) -> None:
    """Refuse arrays that were made in another way than the metadata `content`, key -> bytes.

    Raises:
        SpecMismatch: the difference.
    """
    for key, value in content.items():
        found = attributes_at(store / key)
        if found is not None:
            wanted = metadata(value)["attributes"]["msq"]
            lines = encoder_difference(wanted, found)
            refuse(store, lines, key.removesuffix("/zarr.json"))


def first_rows(store: Path, dataset: Dataset) -> list[str]:
    """Where the clip lists part, as far as the store's small arrays can be read."""
    wanted: dict[str, list[str]] = {
        "clip": [clip.id for clip in dataset.clips],
        "split": [clip.split for clip in dataset.clips],
    }
    lines = []
    for name, values in wanted.items():
        if (store / name / "c" / "0").exists():
            found = np.asarray(zarr.open_array(zarr_store(store / name), mode="r")[:]).tolist()
            lines += sequence_difference(name, values, found)
    return lines


def check_names(store: Path, spec: EncoderSpec) -> None:
    """Refuse an encoder whose name cannot stand beside those that are in the store.

    Raises:
        UsageError: the name is a dimension's, or the other kind of encoder has it.
    """
    own = schema.encoder_dimensions(spec.slug)
    schema.check_slug(spec.slug, "encoder", [*dimensions_in(store), *own])
    names = {
        entry.name
        for group in ("tokens", "image", "text", "text/*")
        for entry in store.glob(f"{group}/*")
    }
    if taken := sorted(names & set(own)):
        raise UsageError(
            f"encoder {spec.slug!r}: its dimension would have the name of {taken[0]!r}, "
            "which the store already holds; choose another name"
        )
    other = "image" if spec.kind == "video" else "tokens"
    if (store / other / spec.slug).exists():
        raise UsageError(
            f"encoder {spec.slug!r}: the store has {other}/{spec.slug}, and a video and an "
            "image encoder need names of their own; choose another name"
        )


def dimensions_in(store: Path) -> list[str]:
    """Names of the dimensions that belong to the encoders of a store."""
    slugs = {
        entry.name
        for group in ("tokens", "image", "text")
        for entry in store.glob(f"{group}/*")
        if entry.is_dir()
    }
    return [name for slug in sorted(slugs) for name in schema.encoder_dimensions(slug)]
