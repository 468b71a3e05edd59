"""Writing a feature store: publish its metadata once, then commit shards, status last.

Every file appears whole or not at all. Within a shard the order is: failures, features, times,
status. A shard counts as done when its status chunk is whole, the index of each of its files fits,
and the recorded failures are those of the status: whatever a killed writer left half way is then
pending, and redoing it gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

import msq
from msq.errors import SpecMismatch, StoreError, UsageError
from msq.extract import store_schema as schema
from msq.extract.atomic import remove_file, remove_temporaries, write_file
from msq.extract.datasets.dataset import Dataset
from msq.extract.encoders.spec import EncoderSpec
from msq.extract.shard import encode_chunk, encode_shard, read_chunk, read_index


@dataclass(frozen=True)
class ShardRows:
    """What one encoder has to say about the rows of one shard.

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
    """One clip that failed (status 2) or decoded only in part (status 3), for one encoder."""

    row: int
    clip: str
    status: int
    reason: str
    message: str
    encoder: str


class StoreWriter:
    """Writes one store; hold its claim (`claims.claim_store`) for as long as it lives.

    Args:
        path: the store's directory; created where missing.
        dataset: whose clips are the rows.
        store_dtype: dtype of the features.
        shard: rows of one shard.
        label_known: `[clips, classes]`, False where a label is unknown; None when all are known.

    Raises:
        SpecMismatch: `path` holds a store of other clips, classes or task.
        StoreError: `path` holds something else, or a file of the store was changed.
        UsageError: `path` is a file, or the dataset has no clips.
    """

    def __init__(
        self,
        path: Path,
        dataset: Dataset,
        *,
        store_dtype: schema.StoreDtype = "float16",
        shard: int = 64,
        label_known: NDArray[np.bool_] | None = None,
    ) -> None:
        if not dataset.clips:
            raise UsageError(f"{path}: dataset {dataset.name!r} has no clips to write")
        if shard < 1:
            raise UsageError(f"shard: expected at least 1 row, found {shard}")
        if store_dtype not in schema.DISK_DTYPE:
            raise UsageError(
                f"store dtype: expected {', '.join(schema.DISK_DTYPE)}, found {store_dtype}"
            )
        self.path = path
        self.dataset = dataset
        self.store_dtype = store_dtype
        self.shard = shard
        self.specs: dict[str, EncoderSpec] = {}
        self._prepare_directory()
        self._publish_dataset(label_known)

    @property
    def shards(self) -> int:
        """How many shards cover the dataset."""
        return -(-len(self.dataset.clips) // self.shard)

    def rows(self, shard: int) -> range:
        """The rows of one shard."""
        return range(shard * self.shard, min((shard + 1) * self.shard, len(self.dataset.clips)))

    def add_encoder(self, spec: EncoderSpec) -> None:
        """Publish the arrays of a video or image encoder, or check those that are there.

        Raises:
            SpecMismatch: an encoder of this name made its features in another way.
            UsageError: the name is a dimension's, or the other kind of encoder has it.
        """
        self._check_names(spec)
        content = schema.encoder_keys(
            spec, self.dataset.name, len(self.dataset.clips), self.store_dtype, self.shard
        )
        self._compare_encoder(content)
        self._publish(content)
        self.specs[spec.slug] = spec

    def has_text(self, spec: EncoderSpec, prompt: str, template: str) -> bool:
        """Whether the class embeddings of this prompt are there.

        Raises:
            SpecMismatch: they were made by another encoder or template.
            UsageError: the prompt's name cannot stand in a store.
        """
        schema.check_slug(spec.slug, "text encoder", self._dimensions())
        schema.check_slug(prompt, "prompt", [*self._dimensions(), f"{spec.slug}_channel"])
        folder = self.path / "text" / spec.slug / prompt
        wanted = schema.text_attributes(spec, self.dataset.name, template)
        found = _attributes(folder / "zarr.json")
        if found is not None:
            self._refuse(schema.encoder_difference(wanted, found), f"text/{spec.slug}/{prompt}")
        return (folder / "c" / "0" / "0").exists()

    def add_text(
        self,
        spec: EncoderSpec,
        prompt: str,
        template: str,
        unknown_words: Mapping[str, Sequence[str]],
        values: NDArray[np.float32],
    ) -> None:
        """Publish class embeddings `[K, D]`; a no-op for keys that are there."""
        self._publish(
            schema.text_keys(spec, self.dataset.name, prompt, template, unknown_words, values)
        )

    def status(self, slug: str, shard: int) -> NDArray[np.uint8] | None:
        """Status `[n]` of a shard's rows; None where there is no whole commit record."""
        path = self._status_path(slug, shard)
        if not path.exists():
            return None
        try:
            return read_chunk(path, self.shard)[: len(self.rows(shard))]
        except StoreError:
            return None

    def is_whole(self, slug: str, shard: int, status: NDArray[np.uint8]) -> bool:
        """Whether each file that the status asks for is there and its index fits."""
        readable = np.isin(status, (schema.OK, schema.DEGRADED))
        for array in schema.feature_arrays(self.specs[slug], self.store_dtype):
            try:
                if array.sharded:
                    if readable.any():
                        read_index(self.path / array.key(shard), self.shard, array.row_bytes)
                    continue
                for row in np.asarray(self.rows(shard))[readable]:
                    if (self.path / array.key(row)).stat().st_size != array.row_bytes + 4:
                        return False
            except (StoreError, FileNotFoundError):
                return False
        return True

    def is_done(self, slug: str, shard: int) -> bool:
        """Whether nothing is left to do for this encoder and shard."""
        status = self.status(slug, shard)
        if status is None or (status == schema.MISSING).any():
            return False
        bad = {
            (row, int(code))
            for row, code in zip(self.rows(shard), status, strict=True)
            if code != schema.OK
        }
        recorded = {(f.row, f.status) for f in self.failures(shard) if f.encoder == slug}
        return bad == recorded and self.is_whole(slug, shard, status)

    def failures(self, shard: int) -> list[Failure]:
        """What is recorded for one shard, one entry for each encoder."""
        path = self._failures_path(shard)
        if not path.exists():
            return []
        try:
            return [
                Failure(encoder=encoder, **{k: v for k, v in entry.items() if k != "encoders"})
                for entry in json.loads(path.read_bytes())["clips"]
                for encoder in entry["encoders"]
            ]
        except (ValueError, KeyError, TypeError):
            return []  # changed by hand: the shard counts as pending and is written again

    def commit(self, shard: int, rows: Mapping[str, ShardRows], failures: Iterable[Failure]) -> int:
        """Write one shard of one or several encoders; their status goes last.

        Args:
            shard: which shard.
            rows: encoder -> its rows.
            failures: of these encoders; what is recorded of other encoders stays.

        Returns:
            Bytes written.
        """
        others = [f for f in self.failures(shard) if f.encoder not in rows]
        self._write_failures(shard, [*others, *failures])
        written = 0
        for slug, data in rows.items():
            written += self._write_arrays(slug, shard, data)
        for slug, data in rows.items():
            chunk = np.zeros(self.shard, dtype=np.uint8)
            chunk[: len(data.status)] = data.status
            written += write_file(self._status_path(slug, shard), encode_chunk(chunk))
        return written

    def _write_arrays(self, slug: str, shard: int, data: ShardRows) -> int:
        readable = np.isin(data.status, (schema.OK, schema.DEGRADED))
        features, times = schema.feature_arrays(self.specs[slug], self.store_dtype)
        written = 0
        for array, values in ((features, data.features), (times, data.times)):
            if not array.sharded:
                for row, ok, value in zip(self.rows(shard), readable, values, strict=True):
                    path = self.path / array.key(row)
                    written += write_file(path, encode_chunk(value)) if ok else remove_file(path)
                continue
            path = self.path / array.key(shard)
            if readable.any():
                pieces = encode_shard(values, self.shard, array.fill, readable)
                written += write_file(path, pieces)
            else:
                remove_file(path)
        return written

    def _write_failures(self, shard: int, failures: Iterable[Failure]) -> None:
        merged: dict[tuple[int, str, int, str, str], list[str]] = {}
        for f in failures:
            merged.setdefault((f.row, f.clip, f.status, f.reason, f.message), []).append(f.encoder)
        path = self._failures_path(shard)
        if not merged:
            remove_file(path)
            return
        entries = [
            dict(zip(("row", "clip", "status", "reason", "message"), key, strict=True))
            | {"encoders": sorted(merged[key])}
            for key in sorted(merged)
        ]
        document = {"shard": shard, "clips": entries}
        text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False)
        content = (text + "\n").encode()
        if not path.exists() or path.read_bytes() != content:
            write_file(path, [content])

    def _status_path(self, slug: str, shard: int) -> Path:
        return self.path / "status" / slug / "c" / str(shard) / "0"

    def _failures_path(self, shard: int) -> Path:
        return self.path / schema.FAILURES / f"{shard:05d}.json"

    def _prepare_directory(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path}: expected a folder for the feature store, found a file")
        if not self.path.exists():
            return
        remove_temporaries(self.path)
        if any(self.path.iterdir()) and _attributes(self.path / "zarr.json") is None:
            raise StoreError(
                f"{self.path}: not a feature store of msq (no zarr.json with its attributes); "
                "choose another place for the store, or an empty folder"
            )

    def _publish_dataset(self, label_known: NDArray[np.bool_] | None) -> None:
        found = _attributes(self.path / "zarr.json")
        if found is not None:
            lines = schema.root_difference(schema.root_attributes(self.dataset), found)
            self._refuse([*lines, *(self._first_rows() if lines else [])], "this store")
        content = schema.dataset_keys(self.dataset, msq.__version__, label_known)
        for key in self._publish(content):
            if not key.endswith("zarr.json") and (self.path / key).read_bytes() != content[key]:
                raise StoreError(
                    f"{self.path / key}: the bytes changed after they were written; "
                    "delete this file and run msq extract again"
                )

    def _first_rows(self) -> list[str]:
        """Where the clip lists part, as far as the store's small arrays can be read."""
        clips = self.dataset.clips
        wanted: dict[str, list[str]] = {
            "clip": [clip.id for clip in clips],
            "split": [clip.split for clip in clips],
        }
        lines = []
        for name, values in wanted.items():
            if (self.path / name / "c" / "0").exists():
                found = np.asarray(zarr.open_array(self.path / name, mode="r")[:]).tolist()
                lines += schema.sequence_difference(name, values, found)
        return lines

    def _publish(self, content: Mapping[str, bytes]) -> list[str]:
        """Write the keys that are missing; returns those that were there."""
        present = []
        for key, value in content.items():
            path = self.path / key
            if path.exists():
                present.append(key)
            else:
                write_file(path, [value])
        return present

    def _compare_encoder(self, content: Mapping[str, bytes]) -> None:
        for key, value in content.items():
            found = _attributes(self.path / key)
            if found is None:
                continue
            wanted = schema.metadata(value)["attributes"]["msq"]
            self._refuse(schema.encoder_difference(wanted, found), key.removesuffix("/zarr.json"))

    def _refuse(self, lines: Sequence[str], what: str) -> None:
        if lines:
            difference = "\n".join(f"  {line}" for line in lines)
            raise SpecMismatch(
                f"{self.path}: {what} was made in another way than asked for:\n{difference}\n"
                "Ask for what the store holds, or write to another store."
            )

    def _check_names(self, spec: EncoderSpec) -> None:
        own = schema.encoder_dimensions(spec.slug)
        schema.check_slug(spec.slug, "encoder", [*self._dimensions(), *own])
        names = {
            entry.name
            for group in ("tokens", "image", "text", "text/*")
            for entry in self.path.glob(f"{group}/*")
        }
        if taken := sorted(names & set(own)):
            raise UsageError(
                f"encoder {spec.slug!r}: its dimension would have the name of {taken[0]!r}, "
                "which the store already holds; choose another name"
            )
        other = "image" if spec.kind == "video" else "tokens"
        if (self.path / other / spec.slug).exists():
            raise UsageError(
                f"encoder {spec.slug!r}: the store has {other}/{spec.slug}, and a video and an "
                "image encoder need names of their own; choose another name"
            )

    def _dimensions(self) -> list[str]:
        slugs = {
            entry.name
            for group in ("tokens", "image", "text")
            for entry in self.path.glob(f"{group}/*")
            if entry.is_dir()
        }
        return [name for slug in sorted(slugs) for name in schema.encoder_dimensions(slug)]


def _attributes(path: Path) -> dict[str, Any] | None:
    """`attributes.msq` of a `zarr.json`; None where there is none."""
    if not path.exists():
        return None
    try:
        found = schema.metadata(path.read_bytes())["attributes"]["msq"]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None
