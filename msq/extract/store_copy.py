"""Rows of stores copied into another, shard by shard, bit by bit or in another number type."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from msq.errors import SpecMismatch, StoreError, UsageError
from msq.extract import store_schema as schema
from msq.extract.claims import claim_store
from msq.extract.datasets.dataset import Dataset
from msq.extract.encoders.spec import EncoderSpec
from msq.extract.image_frames import asked_for, frames_in
from msq.extract.location import is_archive, is_local
from msq.extract.store import FeatureStore
from msq.extract.store_folder import StoreFolder
from msq.extract.store_keys import with_attributes
from msq.extract.store_problems import listed
from msq.extract.store_records import Failure, ShardRows, read_batches, read_failures
from msq.extract.store_writer import StoreWriter
from msq.extract.stored_numbers import to_disk
from msq.extract.views import View

Progress = Callable[[dict[str, Any]], None]
_READABLE = (schema.OK, schema.DEGRADED)


@dataclass(frozen=True)
class Row:
    """One row of a source: which store, and which row of it."""

    store: FeatureStore
    row: int


def claim_target(out: Path) -> AbstractContextManager[None]:
    """The right to write `out`. Nothing can be claimed in an object store.

    Raises:
        StoreError: another process has it.
        UsageError: it is a zip file.
    """
    if is_archive(out) or (is_local(out) and out.suffix == ".zip"):
        raise UsageError(f"{out}: expected a folder or URL; msq store export writes a zip file")
    return claim_store(out) if is_local(out) else nullcontext()


def copy_rows(
    rows: Sequence[Row | None],
    out: Path,
    dataset: Dataset,
    encoders: Sequence[str],
    *,
    store_dtype: schema.StoreDtype | None,
    shard: int | None,
    views: Sequence[View] | None,
    lossy: bool,
    progress: Progress | None = None,
) -> int:
    """Write a store of rows of others; shards of it that are done already stay.

    Args:
        rows: where each row comes from, in the order of `dataset`; None where it is in no source.
            Shards with such a row are left to `msq extract`.
        out: the new store, claimed.
        dataset: what it is of.
        encoders: names of the video and image encoders to copy.
        store_dtype: of the features; None keeps each encoder's.
        shard: rows of a shard; None keeps each encoder's.
        views: those to keep; None keeps all that an encoder has.
        lossy: allow numbers to be rounded.
        progress: called with `stage, done, total, failed`.

    Returns:
        Rows copied, over all encoders and views.

    Raises:
        StoreError: a row cannot be read, or its numbers do not fit without rounding.
    """
    first = next(row.store for row in rows if row is not None)
    made = 0
    for slug in encoders:
        kind = "video" if slug in first.encoders("video") else "image"
        before = first.store_dtype(slug)
        dtype: Any = store_dtype or before
        writer = _Copy(
            out,
            dataset,
            store_dtype=dtype,
            shard=shard or first.shard(slug),
            converted=_widened(first, slug, before, dtype),
        )
        spec = first.spec(slug, kind)
        kept = [v for v in first.views(slug) if views is None or v in views]
        frames = first.has_image_frames(slug)
        _check_frames(out, spec, first)
        writer.add_encoder(spec, kept, frames)
        for view in kept:
            for number in range(writer.shards):
                here = [row for k in writer.rows(number) if (row := rows[k]) is not None]
                whole = len(here) == len(writer.rows(number))
                if whole and not writer.is_done(slug, number, view):
                    made += _copy_shard(writer, here, slug, kind, number, view, lossy)
                if progress is not None:
                    progress({"stage": "copy", "done": number + 1, "total": writer.shards,
                              "failed": 0})  # fmt: skip
    return made


def copy_text(store: FeatureStore, out: Path, dataset: Dataset, slugs: Iterable[str]) -> None:
    """Copy the class embeddings of text encoders."""
    writer = StoreWriter(out, dataset)
    for slug in slugs:
        spec = store.spec(slug, "text")
        for prompt in store.prompts(slug):
            templates = store.templates(slug, prompt)
            template = templates[0] if len(templates) == 1 else templates
            if not writer.has_text(spec, prompt, template):
                values = store.text(slug, prompt).numpy()
                unknown = store.unknown_words(slug, prompt)
                writer.add_text(spec, prompt, template, unknown, values)


class _Copy(StoreWriter):
    """A writer whose features may say that they had fewer digits before."""

    def __init__(self, *arguments: Any, converted: str | None, **options: Any) -> None:
        self._converted = converted
        super().__init__(*arguments, **options)

    def encoder_content(self, spec: EncoderSpec, views: Sequence[View]) -> dict[str, bytes]:
        content = super().encoder_content(spec, views)
        if self._converted is None:
            return content
        extra = {schema.CONVERTED: self._converted}
        return {key: with_attributes(value, extra) for key, value in content.items()}


def _widened(store: FeatureStore, slug: str, before: str, after: str) -> str | None:
    """What features were before they were made wider; None where nothing is hidden by that."""
    recorded = store.making(slug).get(schema.CONVERTED)
    if after == "float32" and before != "float32":
        return before
    return str(recorded) if recorded and after == before else None


def _check_frames(out: Path, spec: EncoderSpec, source: FeatureStore) -> None:
    """Refuse a store whose rows of an encoder have features of each frame where these have none.

    Raises:
        SpecMismatch: one of the two has them and the other not.
    """
    there, copied = frames_in(out, spec.slug), source.has_image_frames(spec.slug)
    if there and not copied:
        raise SpecMismatch(
            f"{out}: holds features of each frame of {spec.slug}, and {source.path} has none to "
            "copy; write to another store"
        )
    if copied and (there or asked_for(out, spec)) == "adding":
        raise SpecMismatch(
            f"{out}: has rows of {spec.slug} without features of each frame, and {source.path} has "
            "rows with them; write to another store"
        )


def _copy_shard(
    writer: StoreWriter,
    rows: Sequence[Row],
    slug: str,
    kind: str,
    shard: int,
    view: View,
    lossy: bool,
) -> int:
    """Copy one view of one shard from its rows; returns how many of them can be read."""
    numbers = writer.rows(shard)
    data = ShardRows.blank(writer.arrays(slug), len(numbers))
    failures: list[Failure] = []
    batches: set[int] = set()
    groups: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(id(row.store), []).append(place)
    for places in groups.values():
        store = rows[places[0]].store
        own = np.array([rows[place].row for place in places])
        data.status[places] = store.status(slug, view, own).numpy()
        readable = np.isin(data.status[places], _READABLE)
        here = np.asarray(places)[readable]
        if len(here):
            read = {"features": store.tokens if kind == "video" else store.image}
            if data.frames is not None:
                read["frames"] = store.image_frames
            for name, reader in read.items():
                values = reader(own[readable], slug, view)
                _check_exact(store, values, own[readable], writer.store_dtype, lossy, slug)
                getattr(data, name)[here] = to_disk(values.float(), writer.store_dtype)
            data.times[here] = store.time(own[readable], slug, view).numpy()
        failures += _failures(store, dict(zip(own.tolist(), places, strict=True)), numbers.start,
                              slug, view)  # fmt: skip
        batches |= _batches(store, own.tolist(), slug, view)
    if (data.status == schema.MISSING).all():
        return 0  # not extracted yet, and no more so in the copy
    writer.commit(shard, {slug: data}, failures, view, batches)
    return int(np.isin(data.status, _READABLE).sum())


def _check_exact(
    store: FeatureStore,
    values: torch.Tensor,
    rows: NDArray[np.int64],
    store_dtype: str,
    lossy: bool,
    slug: str,
) -> None:
    target = getattr(torch, store_dtype)
    cast = values.to(target)
    lost = ~torch.isfinite(cast.float()).flatten(1).all(dim=1)
    what = f"overflow {store_dtype}"
    if not lost.any() and not lossy:
        lost = (cast.to(torch.float64) != values.to(torch.float64)).flatten(1).any(dim=1)
        what = f"cannot be held by {store_dtype} without rounding (--lossy rounds them)"
    if lost.any():
        names = [store.clips[row] for row in rows[lost.numpy()]]
        raise StoreError(
            f"{store.path}: features of {slug} of {len(names)} clips {what}: {listed(names)}"
        )


def _failures(
    store: StoreFolder, places: dict[int, int], first: int, slug: str, view: View
) -> list[Failure]:
    """What is recorded of some rows of one source, by their rows in the copy."""
    found = []
    for content in _records(store, places, slug):
        for failure in read_failures(content):
            mine = failure.encoder == slug and failure.view == str(view)
            if mine and failure.row in places:
                found.append(replace(failure, row=first + places[failure.row]))
    return found


def _batches(store: StoreFolder, rows: Iterable[int], slug: str, view: View) -> set[int]:
    """The smaller batches that some rows of one source were made in, as far as is recorded.

    A record is of a whole shard. In a copy with other shards it is that of each shard which has a
    row of it.
    """
    recorded = [b for content in _records(store, rows, slug) for b in read_batches(content)]
    return {b.batch for b in recorded if b.encoder == slug and b.view == str(view)}


def _records(store: StoreFolder, rows: Iterable[int], slug: str) -> Iterator[bytes]:
    """The files in which something is recorded of the shards of these rows."""
    size = store.shard(slug)
    for shard in sorted({row // size for row in rows}):
        path = store.path / schema.FAILURES / f"{shard:05d}.json"
        if path.exists():
            yield path.read_bytes()
