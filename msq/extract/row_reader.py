"""Rows of a feature array read straight into the caller's memory, by several threads.

For stores that do not fit into memory: a patch-mode row is megabytes, and what counts is that its
bytes are moved once. `preadv` puts the payload where the batch wants it and the 4 checksum bytes
beside it; crc32c and the system call both leave the interpreter's lock, so threads help. Only the
layouts that msq writes are read here; `StoreArray.read` reads all.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from msq.errors import StoreError
from msq.extract.location import is_local
from msq.extract.one_file import Bytes
from msq.extract.shard import CRC_BYTES, MISSING, checksum, read_index
from msq.extract.store_array import StoreArray

_OPEN_FILES = 64
_DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


class RowReader:
    """Reads rows of one view of an array; close it, or use it as a context.

    Args:
        array: tokens or image features of a store.
        view: which view.
        name: row -> the clip's id, for messages.
        threads: reading at a time; 0 reads in the calling thread.

    Raises:
        StoreError: the array has a layout that msq does not write.

    Attributes:
        row_bytes: bytes of one row.
        row_shape: its shape, (S, D') or (D'',).
        dtype: of its values, bfloat16 where they are stored as its bits.
    """

    def __init__(
        self, array: StoreArray, view: int, name: Callable[[int], str], threads: int = 2
    ) -> None:
        if not is_local(array.path):
            raise StoreError(
                f"{array.path}: only a store on a disk can be streamed; copy it with msq store "
                "convert, or load it whole"
            )
        if array.rows_per_file is None:
            raise StoreError(
                f"{array.path}: another layout than msq writes cannot be streamed; write the store "
                "again, or load it whole"
            )
        self._array, self._view, self._name = array, view, name
        self._size = array.rows_per_file
        self.row_bytes = int(np.prod(array.shape[2:])) * array.dtype.itemsize
        self.row_shape = array.shape[2:]
        self.dtype = _DTYPES[array.attributes.get("store_dtype", array.dtype.name)]
        self._pool = ThreadPoolExecutor(threads, "row-reader") if threads else None
        self._files: OrderedDict[int, tuple[int, NDArray[np.uint64] | None]] = OrderedDict()
        self._users: dict[int, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and close the files."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for descriptor, _ in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, rows: Sequence[int], out: Bytes) -> None:
        """Read rows into `out` `[n, row_bytes]`, each verified against its crc32c.

        Args:
            rows: indices along clip whose status says that they are there.
            out: uint8, C-contiguous along the second axis.

        Raises:
            StoreError: naming the clip and the file; `out` then holds anything.
        """
        if out.dtype != np.uint8 or out.shape != (len(rows), self.row_bytes):
            raise ValueError(
                f"expected uint8 [{len(rows)}, {self.row_bytes}], found {out.dtype} {out.shape}"
            )
        if self._pool is None:
            for row, slot in zip(rows, out, strict=True):
                self._read_row(row, slot)
            return
        for _ in self._pool.map(self._read_row, rows, out):
            pass

    def _read_row(self, row: int, slot: Bytes) -> None:
        unit = row if self._size == 0 else row // self._size
        try:
            descriptor, index = self._open(unit)
        except StoreError as error:
            raise StoreError(f"clip {self._name(row)!r}: {error}") from None
        try:
            offset = 0
            if index is not None:
                start = index[row - unit * self._size, 0]
                if start == MISSING:  # equals the fill value, and zarr leaves such rows out
                    slot[:] = 0
                    return
                offset = int(start)
            self._read_at(row, unit, descriptor, offset, slot)
        finally:
            self._release(unit)

    def _read_at(self, row: int, unit: int, descriptor: int, offset: int, slot: Bytes) -> None:
        stored = bytearray(CRC_BYTES)
        wanted = self.row_bytes + CRC_BYTES
        got = 0
        while got < wanted:  # once, but for signals and file systems that give less at a time
            parts = [slot.data[got:]] if got < self.row_bytes else []
            parts.append(memoryview(stored)[max(0, got - self.row_bytes) :])
            more = os.preadv(descriptor, parts, offset + got)
            if more == 0:
                break
            got += more
        if got != wanted or checksum(slot) != int.from_bytes(stored, "little"):
            raise StoreError(
                f"clip {self._name(row)!r}: {self._array.file(unit, self._view)}: checksum wrong, "
                "the bytes changed after they were written; delete this file and run msq extract "
                "again"
            )

    def _open(self, unit: int) -> tuple[int, NDArray[np.uint64] | None]:
        """Descriptor and index of a file; it stays open until it was not used for long."""
        with self._lock:
            found = self._files.get(unit)
            if found is None:
                found = self._open_file(unit)
                self._files[unit] = found
            self._files.move_to_end(unit)
            self._users[unit] = self._users.get(unit, 0) + 1
            self._close_idle()
            return found

    def _open_file(self, unit: int) -> tuple[int, NDArray[np.uint64] | None]:
        path = self._array.file(unit, self._view)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(
                f"{path}: missing although its rows are recorded as done "
                "(Zarr libraries would read zeros); run msq extract again"
            ) from None
        try:
            index = None
            if self._size:
                index = read_index(path, self._size, self.row_bytes, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor, index

    def _close_idle(self) -> None:
        for unit in list(self._files):
            if len(self._files) <= _OPEN_FILES:
                return
            if not self._users.get(unit):
                os.close(self._files.pop(unit)[0])

    def _release(self, unit: int) -> None:
        with self._lock:
            self._users[unit] -= 1
            if not self._users[unit]:
                del self._users[unit]
