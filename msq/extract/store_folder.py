"""The part of an open store that is not features: dataset, labels, encoders, failures."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray

from msq.errors import StoreError, StoreNotFound
from msq.extract import store_schema as schema
from msq.extract.encoders.spec import EncoderSpec
from msq.extract.image_frames import FramesState, frames_in
from msq.extract.location import zarr_store
from msq.extract.row_index import Rows, row_numbers
from msq.extract.store_array import ZARR_ERRORS, StoreArray
from msq.extract.store_seal import read_metadata, record_is_whole

if TYPE_CHECKING:  # it is loaded where a tensor is asked for
    import torch


class StoreFolder:
    """A store's folder: what it says of its dataset and its encoders.

    Args:
        path: its folder.
        lenient: leave the specs of the encoders unchecked, so that a store can be looked at in
            which one of them is damaged.

    Attributes:
        path: its folder.
        name: name of the dataset.
        task: `multilabel` or `singlelabel`.
        metric: what the field reports for the dataset.
        classes: K class names.
        attributes: `attributes.msq` of the root.
    """

    def __init__(self, path: Path, *, lenient: bool = False) -> None:
        self.path = path
        self.attributes: dict[str, Any] = read_root(path)
        self.name: str = self.attributes["dataset"]
        self.task: str = self.attributes["task"]
        self.metric: str = self.attributes["metric"]
        self.classes: tuple[str, ...] = tuple(self.attributes["classes"])
        self._arrays: dict[str, StoreArray] = {}
        self._matrices: dict[str, NDArray[np.uint8]] = {}
        for slug in () if lenient else self.encoders():
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

    @cached_property
    def partitions(self) -> dict[str, tuple[str, ...]]:
        """Name -> split of each row in it, "" where unused; empty where there is one split only.

        The first counts where none is chosen, `splits` does not.
        """
        names = [str(p["name"]) for p in self.attributes.get("partitions", ())]
        return {name: self._strings(f"partition/{name}") for name in names}

    def rows(self, *splits: str) -> torch.Tensor:
        """Rows `[n]` int64 of the clips of some splits, in store order, whatever their status.

        Args:
            splits: `train`, `val` or `test`; of several the rows of all.

        Raises:
            StoreError: no split is named, or one that no clip is in.
        """
        there = list(dict.fromkeys(self.splits))
        for name in splits or ("",):
            self._need(name, there, "split")
        found = [row for row, split in enumerate(self.splits) if split in splits]
        return as_tensor(np.array(found, dtype=np.int64))

    @property
    def variant(self) -> str:
        """Which reading of the dataset this is; "" where there is one only."""
        return str(self.attributes.get("variant", ""))

    @cached_property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """Name -> class indices, where the field reports groups of classes."""
        found: dict[str, list[int]] = self.attributes.get("groups", {})
        return {name: tuple(members) for name, members in found.items()}

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

    def shard(self, encoder: str) -> int:
        """Rows of one shard of a video or image encoder."""
        return max(1, int(self._attributes(encoder, None).get("shard", 64)))

    def has_image_frames(self, encoder: str) -> bool:
        """Whether an image encoder's features of each frame are here, be they damaged."""
        return self.image_frames_state(encoder) == "stored"

    def image_frames_state(self, encoder: str) -> FramesState:
        """Whether they are here, or are `adding`: then the next extraction completes them."""
        return frames_in(self.path, encoder)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one array, by its path in the store."""
        return self._array(name).shape

    def making(self, encoder: str, kind: str | None = None) -> dict[str, Any]:
        """`attributes.msq` of an encoder's features: how they were made.

        Raises:
            StoreError: no such encoder.
        """
        return self._attributes(encoder, kind)

    def labels(self, rows: Rows = None) -> torch.Tensor:
        """Labels `[n, K]` uint8."""
        return as_tensor(self._labels("label")[self._rows(rows)])

    def label_known(self, rows: Rows = None) -> torch.Tensor | None:
        """`[n, K]` bool, False where a label is unknown; None where all are known."""
        if not (self.path / "label_known").exists():
            return None
        return as_tensor(self._labels("label_known")[self._rows(rows)] != 0)

    def failures(self) -> list[dict[str, Any]]:
        """Clips that failed (status 2) or are degraded (status 3), in row order.

        Each has `row, clip, status, reason, message, encoders`, and `views` where it is not the
        clean view alone.

        Raises:
            StoreError: a file of the list is not readable.
        """
        found: list[dict[str, Any]] = []
        for path in sorted((self.path / schema.FAILURES).glob("[0-9]*.json")):
            try:
                document = json.loads(path.read_bytes())
                found += document["clips"]
                whole = record_is_whole(document)
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(f"{path}: not a list of failures ({error})") from None
            if not whole:
                raise StoreError(
                    f"{path}: checksum wrong, the file was changed after it was written; "
                    "msq store repair, then msq extract, make it again"
                )
        return found

    def _rows(self, rows: Rows) -> NDArray[np.int64]:
        return row_numbers(rows, len(self), self.path)

    def _strings(self, name: str) -> tuple[str, ...]:
        return tuple(str(value) for value in self.small_array(name).tolist())

    def _labels(self, name: str) -> NDArray[np.uint8]:
        if name not in self._matrices:
            self._matrices[name] = np.array(self.small_array(name), dtype=np.uint8)
        return self._matrices[name]

    def small_array(self, name: str) -> NDArray[np.generic]:
        """All of a small array through zarr, whose crc32c codec verifies it.

        Raises:
            StoreError: it is missing or damaged.
        """
        array = self._array(name)
        files = [entry for entry in (array.path / "c").rglob("*") if entry.is_file()]
        if not files:
            raise StoreError(f"{array.path}: its data is missing; run msq extract again")
        try:
            return np.asarray(zarr.open_array(zarr_store(array.path), mode="r")[...])
        except ZARR_ERRORS as error:
            place = files[0] if len(files) == 1 else array.path
            if array.layout_is_changed:
                place = array.path / "zarr.json"
            raise StoreError(f"{place}: damaged ({error})") from error

    def _attributes(self, encoder: str, kind: str | None) -> dict[str, Any]:
        self._need(encoder, self.encoders(kind), f"{kind or ''} encoder".strip())
        for known, group in schema.FEATURE_GROUP.items():
            if kind not in (None, known) or encoder not in self.encoders(known):
                continue
            if known != "text":
                return self._making(f"{group}/{encoder}")
            prompts = sorted((self.path / group / encoder).glob("*/zarr.json"))
            if prompts:
                return self._making(f"text/{encoder}/{prompts[0].parent.name}")
        raise StoreError(f"{self.path}: encoder {encoder!r} has no arrays; run msq extract again")

    def _making(self, name: str) -> dict[str, Any]:
        """`attributes.msq` of an encoder's array."""
        array = self._array(name)
        needed = {"spec", "encoder"} | ({"template"} if name.startswith("text/") else set())
        if not needed <= array.attributes.keys():
            raise StoreError(
                f"{array.path / 'zarr.json'}: its attributes do not say how it was made; the "
                "metadata was changed after it was written"
            )
        return array.attributes

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


def as_tensor(values: NDArray[np.generic]) -> torch.Tensor:
    """The tensor of the same memory."""
    import torch

    return torch.from_numpy(values)


def read_root(path: Path) -> dict[str, Any]:
    """`attributes.msq` of a store's root.

    Raises:
        StoreError: the metadata is damaged, or of another schema.
        StoreNotFound: there is no store.
    """
    document = path / "zarr.json"
    if not document.is_file():
        raise StoreNotFound(
            f"{path}: no feature store here (expected the file {document.name} in it)"
        )
    try:
        attributes: dict[str, Any] = read_metadata(document)["attributes"]["msq"]
        schema_found = attributes["schema"]
    except (KeyError, TypeError):
        raise StoreError(f"{document}: a Zarr group, but not a feature store of msq") from None
    if schema_found != schema.SCHEMA:
        raise StoreError(
            f"{path}: expected schema {schema.SCHEMA}, found {schema_found}; "
            "it was written by another version of msq"
        )
    return attributes
