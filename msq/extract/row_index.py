"""What callers may say for rows of a store -> row numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from msq.errors import StoreError

if TYPE_CHECKING:  # a store can be looked at without loading torch
    import torch

Rows: TypeAlias = "Sequence[int] | slice | torch.Tensor | NDArray[np.generic] | None"


def row_numbers(rows: Rows, count: int, store: Path) -> NDArray[np.int64]:
    """Rows as int64 `[n]`, each from 0 to `count - 1`.

    Args:
        rows: integers (negative ones count from the end), a slice, booleans `[count]`, or None
            for all.
        count: rows there are.
        store: for messages.

    Raises:
        StoreError: other values, or a row that is not there.
    """
    everything = np.arange(count, dtype=np.int64)
    if rows is None:
        return everything
    if isinstance(rows, slice):
        return everything[rows]
    index = _as_array(rows)
    if index.dtype == np.bool_ and index.shape == everything.shape:
        return np.flatnonzero(index)
    if index.size == 0:
        return everything[:0]
    if index.ndim != 1 or index.dtype.kind not in "iu":
        raise StoreError(f"rows: expected integers [n], found {index.dtype} {[*index.shape]}")
    numbers: NDArray[np.int64] = index.astype(np.int64)
    outside = numbers[(numbers < -count) | (numbers >= count)]
    if len(outside):
        raise StoreError(f"{store}: row {int(outside[0])} asked for, it has {count}")
    return np.where(numbers < 0, numbers + count, numbers)


def _as_array(rows: Sequence[int] | torch.Tensor | NDArray[np.generic]) -> NDArray[np.generic]:
    to_host = getattr(rows, "cpu", None)  # a tensor's, wherever it is
    try:
        return np.asarray(rows if to_host is None else to_host())
    except (TypeError, ValueError) as error:  # bfloat16; lists of several lengths
        raise StoreError(f"rows: expected integers [n], found {error}") from None
