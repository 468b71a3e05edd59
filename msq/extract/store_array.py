"""Verified reads of one array of a feature store.

Stores that msq wrote are read as raw files, each row checked against its crc32c. An array of
another layout (a store rewritten by plain zarr with a compressor or other chunks) is read through
zarr-python; files that are missing are an error there too, never zeros.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import zarr
from numpy.typing import NDArray

from msq.errors import StoreError
from msq.extract.location import zarr_store
from msq.extract.one_file import Bytes
from msq.extract.shard import read_chunk, read_rows
from msq.extract.store_seal import layout_is_changed, read_metadata

_ROW_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
# What zarr-python raises for metadata and chunks that it cannot read.
ZARR_ERRORS = (ValueError, TypeError, KeyError, RuntimeError, OSError, ArithmeticError, BadZipFile)
_FILLS = {"NaN": np.nan, 0: 0}

Name = Callable[[int], str]


class StoreArray:
    """One array `[clips, views, ...]` on disk.

    Args:
        path: the array's folder.

    Raises:
        StoreError: there is no array.

    Attributes:
        attributes: its `attributes.msq`, empty where it has none.
        shape: its shape.
        dtype: numpy dtype of what is on disk, little-endian.
        rows_per_file: of a shard; 0 for one row per plain file; None where only zarr can read it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            meta = read_metadata(path / "zarr.json")
        except FileNotFoundError:
            raise StoreError(
                f"{path / 'zarr.json'}: missing, no such array in the store; run msq extract again "
                "to complete it"
            ) from None
        if meta.get("node_type") != "array":
            raise StoreError(f"{path / 'zarr.json'}: expected an array, found a group")
        self._meta = meta
        try:
            self.attributes: dict[str, Any] = meta.get("attributes", {}).get("msq", {})
            self.shape: tuple[int, ...] = tuple(meta["shape"])
            self._plain = meta["data_type"] in ("uint8", "uint16", "float16", "float32")
            if self._plain:
                self.dtype = np.dtype(meta["data_type"]).newbyteorder("<")
            self.rows_per_file: int | None = self._layout()
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{path / 'zarr.json'}: not metadata of an array ({error!r})"
            ) from None

    @property
    def layout_is_changed(self) -> bool:
        """Whether its chunks or codecs are others than msq wrote."""
        return layout_is_changed(self._meta)

    def read(self, rows: NDArray[np.int64], view: int, name: Name) -> NDArray[np.generic]:
        """Rows `[n, ...]` of one view, verified.

        Args:
            rows: indices along clip, each within range.
            view: which view.
            name: row -> the clip's id, for messages.

        Raises:
            StoreError: naming the file and the clip.
        """
        if not 0 <= view < self.shape[1]:
            raise StoreError(f"{self.path}: view {view} asked for, it has {self.shape[1]}")
        if self.rows_per_file is None:
            return self._read_by_zarr(rows, view, name)
        out = np.empty((len(rows), *self.shape[2:]), dtype=self.dtype)
        if not len(rows):
            return out
        raw = out.reshape(len(rows), -1).view(np.uint8)
        if self.rows_per_file == 0:
            self._read_single(rows, view, raw, name)
        else:
            self._read_sharded(rows, view, raw, name)
        return out

    def status(self, view: int, rows: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
        """Status `[n]` of rows of a status array: 0 where a commit record is missing.

        Args:
            view: which view.
            rows: indices along clip, each within range; only the files of these are opened. None
                for all.

        Raises:
            StoreError: a commit record is damaged.
        """
        rows = np.arange(self.shape[0]) if rows is None else rows
        status = np.zeros(len(rows), dtype=np.uint8)
        size = self.rows_per_record
        if size is None:
            status[:] = self._read_by_zarr(rows, view, str)
            return status
        for shard, places in _by_shard(rows, size):
            path = self.file(shard, view)
            if path.exists():
                status[places] = read_chunk(path, size)[rows[places] - shard * size]
        return status

    @property
    def rows_per_record(self) -> int | None:
        """Of a status array: rows of a commit record; None where only zarr can read it.

        Raises:
            StoreError: the metadata is no array's.
        """
        try:
            grid = self._meta["chunk_grid"]["configuration"]["chunk_shape"]
            written = self._meta["codecs"] == [{"name": "bytes"}, {"name": "crc32c"}]
        except (KeyError, TypeError) as error:
            raise StoreError(f"{self.path / 'zarr.json'}: not an array ({error!r})") from None
        whole = written and grid[1:] == [1] and isinstance(grid[0], int) and grid[0] >= 1
        return int(grid[0]) if whole else None

    def _read_single(self, rows: NDArray[np.int64], view: int, raw: Bytes, name: Name) -> None:
        for place, row in enumerate(rows):
            try:
                raw[place] = read_chunk(self.file(int(row), view), raw.shape[1])
            except StoreError as error:
                raise StoreError(f"clip {name(int(row))!r}: {error}") from None

    def _read_sharded(self, rows: NDArray[np.int64], view: int, raw: Bytes, name: Name) -> None:
        size = self.rows_per_file or 1
        fill = np.full(self.shape[2:], _FILLS[self._meta["fill_value"]], dtype=self.dtype)
        fill_row = fill.reshape(-1).view(np.uint8)
        for shard, places in _by_shard(rows, size):
            slots = (rows[places] - shard * size).tolist()
            contiguous = int(places[-1]) - int(places[0]) + 1 == len(places) and bool(
                (np.diff(places) == 1).all()
            )
            # In-order reads land in the result itself; a shuffled one goes through a copy.
            part = raw[places[0] : places[-1] + 1] if contiguous else raw[places]
            ids = partial(_shifted, name, shard * size)
            read_rows(self.file(shard, view), slots, size, part, fill_row, ids)
            if not contiguous:
                raw[places] = part

    def _read_by_zarr(self, rows: NDArray[np.int64], view: int, name: Name) -> NDArray[np.generic]:
        try:
            return np.asarray(self._selected_by_zarr(rows, view, name))
        except ZARR_ERRORS as error:
            place = self.path / "zarr.json" if self.layout_is_changed else self.path
            raise StoreError(f"{place}: zarr cannot read these rows ({error})") from error

    def _selected_by_zarr(self, rows: NDArray[np.int64], view: int, name: Name) -> Any:
        grid = self._meta["chunk_grid"]["configuration"]["chunk_shape"]
        array = zarr.open_array(zarr_store(self.path), mode="r")
        inner = [range(-(-n // c)) for n, c in zip(self.shape[2:], grid[2:], strict=True)]
        for row in rows.tolist():
            for rest in itertools.product(*inner):
                key = array.metadata.encode_chunk_key((row // grid[0], view // grid[1], *rest))
                if not (self.path / key).exists():
                    raise StoreError(
                        f"{self.path / key}: missing although clip {name(row)!r} is recorded as "
                        "done (Zarr libraries would read zeros)"
                    )
        return array.oindex[rows, view]

    def file(self, unit: int, view: int) -> Path:
        """The file of a shard (or, unsharded, of a row) of one view."""
        rest = ("0" for _ in self.shape[2:])
        return self.path.joinpath("c", str(unit), str(view), *rest)

    def _layout(self) -> int | None:
        """Rows of one shard file; 0 for one row per plain file; None: leave it to zarr."""
        meta = self._meta
        row = list(self.shape[2:])
        keys = {"name": "default", "configuration": {"separator": "/"}}
        chunk = meta.get("chunk_grid", {}).get("configuration", {}).get("chunk_shape", [])
        if (
            not self._plain
            or len(self.shape) < 3
            or meta.get("chunk_key_encoding") != keys
            or meta.get("fill_value") not in _FILLS
            or chunk[1:] != [1, *row]
        ):
            return None
        codecs = meta.get("codecs", [])
        if codecs == _ROW_CODECS and chunk[0] == 1:
            return 0
        sharding = {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": [1, 1, *row],
                "codecs": _ROW_CODECS,
                "index_codecs": _ROW_CODECS,
                "index_location": "end",
            },
        }
        return int(chunk[0]) if codecs == [sharding] else None


def _by_shard(rows: NDArray[np.int64], size: int) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Each shard that rows lie in, and the places in `rows` of those that do, in their order."""
    order = np.argsort(rows // size, kind="stable")
    starts = np.flatnonzero(np.diff(rows[order] // size, prepend=-1))
    for start, stop in itertools.pairwise([*starts.tolist(), len(rows)]):
        places = order[start:stop]
        yield int(rows[places[0]]) // size, places


def _shifted(name: Name, first: int, slot: int) -> str:
    return name(first + slot)
