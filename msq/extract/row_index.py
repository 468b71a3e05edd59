"""What callers may say for rows of a store -> row numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from msq.errors import StoreError

Rows: TypeAlias = Sequence[int] | slice | torch.Tensor | NDArray[np.generic] | None


def row_numbers(rows: Rows, count: int, store: Path) -> torch.Tensor:
    """Rows as int64 `[n]`, each from 0 to `count - 1`.

    Args:
        rows: integers (negative ones count from the end), a slice, booleans `[count]`, or None
            for all.
        count: rows there are.
        store: for messages.

    Raises:
        StoreError: other values, or a row that is not there.
    """
    everything = torch.arange(count)
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
    outside = index[(index < -count) | (index >= count)]
    if len(outside):
        raise StoreError(f"{store}: row {int(outside[0])} asked for, it has {count}")
    return everything[index]
