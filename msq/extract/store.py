"""Reading a feature store: `open_store`.

Rows of status 1 (ok) and 3 (degraded, kept) are read; rows of status 0 (not extracted) and 2
(failed) are refused by name, since every Zarr library would read zeros for them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from msq.errors import StoreError, StoreNotFound
from msq.extract import store_schema as schema
from msq.extract.encoders.spec import EncoderSpec
from msq.extract.row_reader import RowReader
from msq.extract.shard import read_chunk
from msq.extract.store_array import StoreArray

Rows: TypeAlias = Sequence[int] | slice | torch.Tensor | NDArray[np.generic] | None
_SHOWN = 5


class FeatureStore:
    """A feature store on disk, opened for reading; see `open_store`.

    Attributes:
        path: its folder.
        name: name of the dataset.
        task: `multilabel` or `singlelabel`.
        metric: what the field reports for the dataset.
        classes: K class names.
        attributes: `attributes.msq` of the root.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attributes: dict[str, Any] = _root(path)
        self.name: str = self.attributes["dataset"]
        self.task: str = self.attributes["task"]
        self.metric: str = self.attributes["metric"]
        self.classes: tuple[str, ...] = tuple(self.attributes["classes"])
        self._arrays: dict[str, StoreArray] = {}
        self._matrices: dict[str, torch.Tensor] = {}
        for slug in self.encoders():
            self.spec(slug)

    def __len__(self) -> int:
        """Number of rows, whatever their status."""
        return len(self.clips)

    def __repr__(self) -> str:
        return (
            f"FeatureStore({str(self.path)!r}, {self.name}: {len(self)} clips, "
            f"{len(self.classes)} classes, encoders {', '.join(self.encoders())})"
        )

    @cached_property
    def clips(self) -> tuple[str, ...]:
        """Ids of all rows."""
        return self._strings("clip")

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """Split of each row: `train`, `val` or `test`."""
        return self._strings("split")

    def encoders(self, kind: str | None = None) -> list[str]:
        """Names of the encoders of one kind (`video`, `image`, `text`), or of all.

        Raises:
            StoreError: there is no such kind.
        """
        if kind is not None and kind not in schema.FEATURE_GROUP:
            raise StoreError(f"encoder kind: expected video, image or text, found {kind!r}")
        names: dict[str, None] = {}
        for known, group in schema.FEATURE_GROUP.items():
            if kind in (None, known):
                # A text encoder has a folder, and an array in it for each prompt.
                pattern = "*/*/zarr.json" if known == "text" else "*/zarr.json"
                for entry in sorted((self.path / group).glob(pattern)):
                    names[entry.relative_to(self.path / group).parts[0]] = None
        return list(names)

    def spec(self, encoder: str, kind: str | None = None) -> EncoderSpec:
        """How an encoder's features were made; image and text towers may share a name.

        Raises:
            StoreError: no such encoder, or its spec does not have the recorded hash.
        """
        attributes = self._attributes(encoder, kind)
        line, recorded = str(attributes.get("spec")), attributes.get("spec_hash")
        spec = EncoderSpec.from_dict(attributes["encoder"])
        computed = hashlib.sha256(line.encode()).hexdigest()
        if recorded != computed or spec.line(self.name) != line:
            raise StoreError(
                f"{self.path}: the spec of encoder {encoder!r} does not agree with itself: "
                f"recorded {line!r} with hash {recorded}, its fields say "
                f"{spec.line(self.name)!r}; the metadata was changed after it was written"
            )
        return spec

    def store_dtype(self, encoder: str) -> str:
        """`float16`, `float32` or `bfloat16`: the dtype in which features are returned."""
        return str(self._attributes(encoder, None).get("store_dtype", "float32"))

    def status(self, encoder: str, view: int = 0) -> torch.Tensor:
        """Status `[N]` uint8: 0 missing, 1 ok, 2 failed, 3 degraded but kept.

        Raises:
            StoreError: no such encoder, or a commit record is damaged.
        """
        self._need(encoder, [*self.encoders("video"), *self.encoders("image")], "encoder")
        return torch.from_numpy(self._array(f"status/{encoder}").status(view))

    def ok_rows(self, encoders: Sequence[str] | None = None, view: int = 0) -> torch.Tensor:
        """Rows `[n]` int64 that can be read for all the named encoders (or all there are)."""
        names = encoders or [*self.encoders("video"), *self.encoders("image")]
        readable = torch.ones(len(self), dtype=torch.bool)
        for encoder in names:
            status = self.status(encoder, view)
            readable &= (status == schema.OK) | (status == schema.DEGRADED)
        return torch.nonzero(readable).flatten()

    def tokens(self, rows: Rows = None, encoder: str | None = None, view: int = 0) -> torch.Tensor:
        """Video tokens `[n, S, D']` in the stored dtype; all rows where `rows` is None.

        Raises:
            StoreError: an asked-for row is missing or failed; a file is missing or damaged; no or
                several video encoders and none named.
        """
        return self._features("video", rows, encoder, view)

    def token_reader(
        self, encoder: str | None = None, view: int = 0, threads: int = 2
    ) -> RowReader:
        """Reads tokens of one view straight into the caller's memory; see `RowReader`.

        Unlike `tokens` it does not look at the status: ask it for `ok_rows()` only.

        Raises:
            StoreError: no or several video encoders and none named, or a layout that msq does not
                write.
        """
        slug = self._choose(self.encoders("video"), encoder, "video encoder")
        array = self._array(f"tokens/{slug}")
        return RowReader(array, view, self.clips.__getitem__, threads)

    def image(self, rows: Rows = None, encoder: str | None = None, view: int = 0) -> torch.Tensor:
        """Image features, mean over frames, `[n, D'']` in the stored dtype; as `tokens`."""
        return self._features("image", rows, encoder, view)

    def time(self, rows: Rows = None, encoder: str | None = None, view: int = 0) -> torch.Tensor:
        """Seconds of the sampled frames `[n, T]` float32, NaN where unknown; as `tokens`."""
        names = [*self.encoders("video"), *self.encoders("image")]
        slug = self._choose(names, encoder, "encoder")
        return self._read("time", rows, slug, view)

    def labels(self, rows: Rows = None) -> torch.Tensor:
        """Labels `[n, K]` uint8."""
        return self._labels("label")[self._rows(rows)]

    def label_known(self, rows: Rows = None) -> torch.Tensor | None:
        """`[n, K]` bool, False where a label is unknown; None where all are known."""
        if not (self.path / "label_known").exists():
            return None
        return self._labels("label_known")[self._rows(rows)].bool()

    def text(self, encoder: str | None = None, prompt: str | None = None) -> torch.Tensor:
        """Class embeddings `[K, D]` float32 of one prompt.

        Raises:
            StoreError: no or several encoders or prompts and none named; a damaged file.
        """
        array = self._text_array(encoder, prompt)
        payload = read_chunk(
            array.path / "c" / "0" / "0", int(np.prod(array.shape)) * array.dtype.itemsize
        )
        return torch.from_numpy(payload.view(array.dtype).reshape(array.shape).copy())

    def prompts(self, encoder: str | None = None) -> dict[str, str]:
        """Prompt name -> template of one text encoder."""
        slug = self._choose(self.encoders("text"), encoder, "text encoder")
        names = sorted(p.parent.name for p in (self.path / "text" / slug).glob("*/zarr.json"))
        return {
            name: str(self._array(f"text/{slug}/{name}").attributes["template"]) for name in names
        }

    def unknown_words(
        self, encoder: str | None = None, prompt: str | None = None
    ) -> dict[str, list[str]]:
        """Class -> words of it that the text encoder's tokenizer does not know."""
        return dict(self._text_array(encoder, prompt).attributes["unknown_words"])

    def failures(self) -> list[dict[str, Any]]:
        """Clips that failed (status 2) or are degraded (status 3), in row order.

        Each has `row, clip, status, reason, message, encoders`.

        Raises:
            StoreError: a file of the list is not readable.
        """
        found: list[dict[str, Any]] = []
        for path in sorted((self.path / schema.FAILURES).glob("[0-9]*.json")):
            try:
                found += json.loads(path.read_bytes())["clips"]
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(f"{path}: not a list of failures ({error})") from None
        return found

    def verify(self) -> list[str]:
        """Read every row that is recorded as done; returns what is wrong, one line each."""
        problems: list[str] = []
        for kind in ("video", "image"):
            for slug in self.encoders(kind):
                try:
                    rows = self.ok_rows([slug])
                except StoreError as error:
                    problems.append(str(error))
                    continue
                size = max(1, int(self._attributes(slug, kind).get("shard", 64)))
                for part in torch.split(rows, size):
                    for group in (schema.FEATURE_GROUP[kind], "time"):
                        try:
                            self._read(group, part, slug, 0)
                        except StoreError as error:
                            problems.append(str(error))
        for slug in self.encoders("text"):
            for prompt in self.prompts(slug):
                try:
                    self.text(slug, prompt)
                except StoreError as error:
                    problems.append(str(error))
        return problems

    def _features(self, kind: str, rows: Rows, encoder: str | None, view: int) -> torch.Tensor:
        slug = self._choose(self.encoders(kind), encoder, f"{kind} encoder")
        return self._read(schema.FEATURE_GROUP[kind], rows, slug, view)

    def _read(self, group: str, rows: Rows, slug: str, view: int) -> torch.Tensor:
        wanted = self._rows(rows)
        self._refuse_unreadable(wanted, slug, view)
        array = self._array(f"{group}/{slug}")
        values = torch.from_numpy(array.read(wanted.numpy(), view, self.clips.__getitem__))
        bits = values.dtype == torch.uint16 and self.store_dtype(slug) == "bfloat16"
        return values.view(torch.bfloat16) if bits else values

    def _refuse_unreadable(self, rows: torch.Tensor, slug: str, view: int) -> None:
        status = self.status(slug, view)[rows]
        for code, words in (
            (schema.UNDECODABLE, "failed (see failures(), or msq extract --retry-failed)"),
            (schema.MISSING, "were not extracted yet (run msq extract again)"),
        ):
            bad = rows[status == code].tolist()
            if bad:
                shown = ", ".join(repr(self.clips[row]) for row in bad[:_SHOWN])
                more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
                raise StoreError(
                    f"{self.path}: {len(bad)} of the {len(rows)} rows asked for of {slug!r} "
                    f"{words}: {shown}{more}; ok_rows() lists the rows that can be read"
                )

    def _rows(self, rows: Rows) -> torch.Tensor:
        everything = torch.arange(len(self))
        if rows is None:
            return everything
        if isinstance(rows, slice):
            return everything[rows]
        index = rows.cpu() if isinstance(rows, torch.Tensor) else torch.as_tensor(np.asarray(rows))
        if index.dtype == torch.bool and index.shape == everything.shape:
            return everything[index]
        if index.numel() == 0:
            return everything[:0]
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise StoreError(f"rows: expected integers [n], found {index.dtype} {[*index.shape]}")
        index = index.long()
        outside = index[(index < -len(self)) | (index >= len(self))]
        if len(outside):
            raise StoreError(f"{self.path}: row {int(outside[0])} asked for, it has {len(self)}")
        return everything[index]

    def _strings(self, name: str) -> tuple[str, ...]:
        return tuple(str(value) for value in self._small(name).tolist())

    def _labels(self, name: str) -> torch.Tensor:
        if name not in self._matrices:
            self._matrices[name] = torch.from_numpy(np.array(self._small(name), dtype=np.uint8))
        return self._matrices[name]

    def _small(self, name: str) -> NDArray[np.generic]:
        """All of a small array through zarr, whose crc32c codec verifies it."""
        array = self._array(name)
        if not any(entry.is_file() for entry in (array.path / "c").rglob("*")):
            raise StoreError(f"{array.path}: its data is missing; run msq extract again")
        try:
            return np.asarray(zarr.open_array(array.path, mode="r")[...])
        except (ValueError, RuntimeError, OSError) as error:
            raise StoreError(f"{array.path}: damaged ({error})") from error

    def _text_array(self, encoder: str | None, prompt: str | None) -> StoreArray:
        slug = self._choose(self.encoders("text"), encoder, "text encoder")
        name = self._choose(list(self.prompts(slug)), prompt, "prompt")
        return self._array(f"text/{slug}/{name}")

    def _attributes(self, encoder: str, kind: str | None) -> dict[str, Any]:
        self._need(encoder, self.encoders(kind), f"{kind or ''} encoder".strip())
        for known, group in schema.FEATURE_GROUP.items():
            if kind not in (None, known) or encoder not in self.encoders(known):
                continue
            if known != "text":
                return self._array(f"{group}/{encoder}").attributes
            prompts = sorted((self.path / group / encoder).glob("*/zarr.json"))
            if prompts:
                return self._array(f"text/{encoder}/{prompts[0].parent.name}").attributes
        raise StoreError(f"{self.path}: encoder {encoder!r} has no arrays; run msq extract again")

    def _array(self, name: str) -> StoreArray:
        if name not in self._arrays:
            self._arrays[name] = StoreArray(self.path / name)
        return self._arrays[name]

    def _choose(self, names: list[str], chosen: str | None, what: str) -> str:
        if chosen is not None:
            self._need(chosen, names, what)
            return chosen
        if len(names) != 1:
            raise StoreError(
                f"{self.path}: expected one {what}, found {', '.join(names) or 'none'}"
                + ("; name the one to read" if names else "")
            )
        return names[0]

    def _need(self, name: str, names: list[str], what: str) -> None:
        if name not in names:
            raise StoreError(
                f"{self.path}: no {what} {name!r}; there are: {', '.join(names) or 'none'}"
            )


def open_store(path: str | Path) -> FeatureStore:
    """Open a feature store for reading.

    Raises:
        StoreError: there is no store, it is of another schema, or its metadata was changed.
    """
    return FeatureStore(Path(path))


def _root(path: Path) -> dict[str, Any]:
    document = path / "zarr.json"
    if not document.is_file():
        raise StoreNotFound(
            f"{path}: no feature store here (expected the file {document.name} in it)"
        )
    try:
        attributes: dict[str, Any] = json.loads(document.read_bytes())["attributes"]["msq"]
        schema_found = attributes["schema"]
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{path}: a Zarr group, but not a feature store of msq") from None
    if schema_found != schema.SCHEMA:
        raise StoreError(
            f"{path}: expected schema {schema.SCHEMA}, found {schema_found}; "
            "it was written by another version of msq"
        )
    return attributes
