"""The bytes of a Zarr v3 shard, written and read without zarr-python.

A shard of S rows under the `sharding_indexed` codec with inner codecs bytes(little) + crc32c:
the present rows back to back, each followed by the 4-byte crc32c of its bytes; then the index, S
pairs of little-endian uint64 (offset, row bytes + 4), a missing row being 2^64 - 1 twice; then
the 4-byte crc32c of the index. A row that equals the fill value is left out, as zarr-python does.
(Zarr v3 core and sharding-indexed codec specifications; `tests/test_shard.py` compares bytes.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from msq.errors import StoreError
from msq.extract.location import is_archive, is_local
from msq.extract.one_file import Bytes, Part, opened, read_file, read_object, through

MISSING = np.uint64(2**64 - 1)
CRC_BYTES = 4
_INDEX_ENTRY = 16
# Below this part of a shard, single reads move fewer bytes than reading the file whole.
_WHOLE_FILE_SHARE = 0.25


def checksum(data: Bytes) -> int:
    """crc32c (Castagnoli) of contiguous bytes; the array is not copied."""
    view = data.view()
    view.flags.writeable = False  # google-crc32c takes read-only buffers only
    return int(google_crc32c.value(view))


def as_rows(values: NDArray[np.generic]) -> Bytes:
    """View `[n, ...]` values as `[n, row bytes]`, little-endian, without a copy where possible."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return little.reshape(len(little), -1).view(np.uint8)


def equals_fill(values: NDArray[np.generic], fill: float) -> NDArray[np.bool_]:
    """Per row of `[n, ...]`: does it equal the fill value, by zarr-python's rule?

    A zero fill is compared bit by bit (so -0.0 is a value of its own); NaN equals any NaN.
    """
    flat = values.reshape(len(values), -1)
    if np.isnan(fill):
        return np.asarray(np.isnan(flat.astype(np.float64)).all(axis=1), dtype=np.bool_)
    if fill != 0:
        raise ValueError(f"a fill value is 0 or NaN, not {fill}")
    return np.asarray((as_rows(values) == 0).all(axis=1), dtype=np.bool_)


def encode_chunk(values: NDArray[np.generic]) -> list[bytes]:
    """One unsharded chunk: the bytes of `values` and their crc32c."""
    data = as_rows(values.reshape(1, -1))[0]
    return [data.tobytes(), checksum(data).to_bytes(CRC_BYTES, "little")]


def encode_shard(
    values: NDArray[np.generic],
    size: int,
    fill: float = 0.0,
    present: NDArray[np.bool_] | None = None,
) -> list[bytes]:
    """The bytes of one shard.

    Args:
        values: rows `[n, ...]`, n at most `size`.
        size: rows S of a full shard; rows from n on are missing.
        fill: the array's fill value, 0 or NaN.
        present: per row, False leaves the row out whatever it holds.

    Returns:
        Two pieces: the records (row, crc) and the index with its crc.
    """
    rows = as_rows(values)
    keep = ~equals_fill(values, fill)
    if present is not None:
        keep &= present
    slots = np.flatnonzero(keep)
    record = rows.shape[1] + CRC_BYTES
    records = np.empty((len(slots), record), dtype=np.uint8)
    records[:, :-CRC_BYTES] = rows[slots]
    checks = np.array([checksum(rows[slot]) for slot in slots], dtype="<u4")
    records[:, -CRC_BYTES:] = checks.reshape(-1, 1).view(np.uint8).reshape(-1, CRC_BYTES)
    index = np.full((size, 2), MISSING, dtype="<u8")
    index[slots, 0] = np.arange(len(slots), dtype=np.uint64) * np.uint64(record)
    index[slots, 1] = record
    index_bytes = index.reshape(-1).view(np.uint8)
    tail = index_bytes.tobytes() + checksum(index_bytes).to_bytes(CRC_BYTES, "little")
    return [records.tobytes(), tail]


def read_chunk(path: Path, expected: int) -> Bytes:
    """The payload of an unsharded chunk, its size and crc32c checked.

    Raises:
        StoreError: the file is missing, has another size or fails its checksum.
    """
    data = read_file(path)
    if len(data) != expected + CRC_BYTES:
        raise StoreError(
            f"{path}: expected {expected + CRC_BYTES} bytes, found {len(data)}; "
            "delete this file and run msq extract again"
        )
    payload = data[:expected]
    if checksum(payload) != int.from_bytes(data[expected:].tobytes(), "little"):
        raise StoreError(
            f"{path}: checksum wrong, the bytes changed after they were written; "
            "delete this file and run msq extract again"
        )
    return payload


def read_index(
    path: Path, size: int, row_bytes: int, descriptor: int | None = None
) -> NDArray[np.uint64]:
    """The index `[size, 2]` of a shard file, checked against its crc32c and the file's size.

    Args:
        path: the shard file.
        size: rows S of a full shard.
        row_bytes: of one row.
        descriptor: of the file where it is open. Rows that are read through it are those of this
            index, though another file may have taken the name since.

    Raises:
        StoreError: the file is missing or cut, or the index is damaged.
    """
    if descriptor is not None:
        return _index(path, *through(descriptor), size, row_bytes)
    with opened(path, whole=False) as (part, total):
        return _index(path, part, total, size, row_bytes)


def read_rows(
    path: Path,
    slots: Sequence[int],
    size: int,
    out: Bytes,
    fill_row: Bytes,
    name: Callable[[int], str],
) -> None:
    """Read rows of one shard file, each verified against its crc32c.

    All are of one file, also where another takes its name meanwhile (`msq extract
    --retry-failed`): the rows of one by the index of the other would be those of other clips.

    Args:
        path: the shard file.
        slots: positions inside the shard, one per row of `out`.
        size: rows S of a full shard.
        out: destination `[len(slots), row bytes]`.
        fill_row: `[row bytes]`, what a row that the index marks as missing holds.
        name: slot -> the clip's id, for messages.

    Raises:
        StoreError: naming the file and the clip.
    """
    whole = len(slots) >= size * _WHOLE_FILE_SHARE
    changes = not (whole or is_local(path) or is_archive(path))  # an object has no descriptor
    replaced = False
    while True:
        try:
            with opened(path, whole=whole) as (part, total):
                index = _index(path, part, total, size, out.shape[1])
                error = _read_slots(path, slots, index, part, out, fill_row, name)
        except StoreError as unread:
            if changes and not replaced:  # perhaps between its size and its index
                replaced = True
                continue
            raise StoreError(f"clip {name(int(slots[0]))!r}: {unread}") from None
        if changes and _is_replaced(path, index):
            continue
        if error is not None:
            raise error
        return


def _read_slots(
    path: Path,
    slots: Sequence[int],
    index: NDArray[np.uint64],
    part: Part,
    out: Bytes,
    fill_row: Bytes,
    name: Callable[[int], str],
) -> StoreError | None:
    """Rows by an index; the error of the first that is damaged."""
    row_bytes = out.shape[1]
    for position, slot in enumerate(slots):
        offset = index[slot, 0]
        if offset == MISSING:
            out[position] = fill_row
            continue
        start, stop = int(offset), int(offset) + row_bytes + CRC_BYTES
        record = part(start, stop)
        payload = record[:row_bytes]
        stored = int.from_bytes(record[row_bytes:].tobytes(), "little")
        if len(record) != stop - start or checksum(payload) != stored:
            return StoreError(
                f"clip {name(int(slot))!r}: {path}: checksum wrong, the bytes changed after they "
                "were written; delete this file and run msq extract again"
            )
        out[position] = payload
    return None


def _index(path: Path, part: Part, total: int, size: int, row_bytes: int) -> NDArray[np.uint64]:
    tail = size * _INDEX_ENTRY + CRC_BYTES
    if total < tail:
        raise StoreError(
            f"{path}: cut short, expected at least {tail} bytes, found {total}; "
            "delete this file and run msq extract again"
        )
    data = part(total - tail, total)
    body = data[:-CRC_BYTES]
    if checksum(body) != int.from_bytes(data[-CRC_BYTES:].tobytes(), "little"):
        raise StoreError(
            f"{path}: the index at the end fails its checksum (file cut or changed); "
            "delete this file and run msq extract again"
        )
    index: NDArray[np.uint64] = body.view("<u8").reshape(size, 2).astype(np.uint64)
    found = index[index[:, 0] != MISSING]
    record = row_bytes + CRC_BYTES
    if len(found) and (
        (found[:, 1] != record).any() or int(found[:, 0].max()) + record > total - tail
    ):
        raise StoreError(
            f"{path}: the index does not fit the file or the array; "
            "delete this file and run msq extract again"
        )
    return index


def _is_replaced(path: Path, index: NDArray[np.uint64]) -> bool:
    """Whether a remote object has another index now."""
    end = read_object(path, -(len(index) * _INDEX_ENTRY + CRC_BYTES), None)
    return end[:-CRC_BYTES].tobytes() != index.astype("<u8").tobytes()
