"""Tokens that stay on disk: for stores that do not fit into memory, patch mode above all.

`StreamedTokens` stands where a tensor of tokens would: it has a shape, and indexing it with row
numbers gives a tensor. Whoever knows which rows come next says so with `prefetch`, and they are
read while the step before them runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msq.errors import UsageError
from msq.head.memory import fits

# Reads rows of the store into uint8 [n, row bytes], each verified.
ReadRows = Callable[[Sequence[int], NDArray[np.uint8]], None]
AHEAD = 2


class StreamedTokens:
    """[N, S, D'] on disk.

    Args:
        read: reads rows of the store, from any thread.
        rows: [N] the store's row of each of these.
        row_shape: (S, D').
        stored: dtype of what is read; bfloat16 as its bits is fine.
        dtype: dtype of what indexing gives; None for the stored one.
        device: where it gives it.
        ahead: batches that may be read before they are asked for.

    Attributes:
        shape: (N, S, D').
        dtype: of what indexing gives.
        device: of what indexing gives.
    """

    def __init__(
        self,
        read: ReadRows,
        rows: Tensor,
        row_shape: tuple[int, int],
        stored: torch.dtype,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        ahead: int = AHEAD,
    ) -> None:
        self._read, self._rows, self._stored = read, rows.cpu(), stored
        self.shape = torch.Size((len(rows), *row_shape))
        self.dtype = dtype or stored
        self.device = torch.device(device)
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(1, "stream")
        self._under_way: deque[tuple[list[int], Future[Tensor]]] = deque()
        self._free: list[Tensor] = []

    def __len__(self) -> int:
        """N."""
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows on disk."""
        return self.shape.numel() * self._stored.itemsize

    def prefetch(self, rows: Tensor) -> None:
        """Begin to read rows [n] that will be asked for; no more than `ahead` such calls count."""
        if len(self._under_way) < self._ahead:
            wanted = rows.tolist()
            self._under_way.append((wanted, self._pool.submit(self._load, wanted)))

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows [n] -> [n, S, D'], a tensor of its own.

        Raises:
            StoreError: a row is damaged; names the clip and the file.
        """
        wanted = rows.tolist()
        while self._under_way:
            promised, future = self._under_way.popleft()
            buffer = future.result()
            if promised == wanted:
                return self._given(buffer, len(wanted))
            self._free.append(buffer)  # the plan changed: what was read ahead is not wanted
        return self._given(self._load(wanted), len(wanted))

    def select(self, rows: Tensor) -> StreamedTokens:
        """The same for some of the rows, in the order given."""
        chosen = self._rows[rows.cpu()]
        return StreamedTokens(
            self._read, chosen, (self.shape[1], self.shape[2]), self._stored, self.dtype,
            self.device, self._ahead,
        )  # fmt: skip

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> StreamedTokens:
        """The same, given on another device or in another dtype."""
        return StreamedTokens(
            self._read, self._rows, (self.shape[1], self.shape[2]), self._stored,
            dtype or self.dtype, device or self.device, self._ahead,
        )  # fmt: skip

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, rows: Sequence[int]) -> Tensor:
        """Bytes of rows in a buffer [at least n, S, D'] of the stored dtype."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = torch.empty(0)
        if len(buffer) < len(rows):
            pinned = self.device.type == "cuda"
            buffer = torch.empty(
                (len(rows), *self.shape[1:]), dtype=self._stored, pin_memory=pinned
            )
        raw = buffer[: len(rows)].view(torch.uint8).reshape(len(rows), -1).numpy()
        self._read(self._rows[torch.tensor(rows, dtype=torch.long)].tolist(), raw)
        return buffer

    def _given(self, buffer: Tensor, count: int) -> Tensor:
        """A copy in the dtype and on the device asked for; the buffer is used again."""
        given = buffer[:count].to(self.device, self.dtype, non_blocking=True, copy=True)
        if given.is_cuda:
            torch.cuda.current_stream(given.device).synchronize()
        self._free.append(buffer)
        return given


def with_next(
    tokens: Tensor | StreamedTokens, parts: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each of several lists of rows with its tokens; streamed ones are read ahead."""
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        here = tokens[part]
        if isinstance(tokens, StreamedTokens) and after is not None:
            tokens.prefetch(after)
        yield part, here


def placed(tokens: Tensor | StreamedTokens, device: str | torch.device) -> Tensor | StreamedTokens:
    """Tokens on a device; on a GPU that has no room for them they come batch by batch."""
    device = torch.device(device)
    if isinstance(tokens, StreamedTokens) or device.type != "cuda" or tokens.is_cuda:
        return tokens.to(device)
    if fits(tokens.nbytes, device):
        return tokens.to(device)
    flat = tokens.contiguous().view(torch.uint8).flatten(1).numpy()

    def read(rows: Sequence[int], out: NDArray[np.uint8]) -> None:
        np.take(flat, np.asarray(rows), axis=0, out=out)

    shape = (tokens.shape[1], tokens.shape[2])
    return StreamedTokens(read, torch.arange(len(tokens)), shape, tokens.dtype, device=device)


def stream_tokens(
    store: object, rows: Tensor, encoder: str, view: Any = 0, threads: int = 2
) -> StreamedTokens:
    """Tokens of some rows of an open `FeatureStore`, left on disk.

    Args:
        store: `msq.extract.store.FeatureStore`.
        rows: [N] rows whose status says that they are there.
        encoder: name of the video encoder.
        view: which view, as the store takes it.
        threads: reading at a time.

    Raises:
        UsageError: not a store on disk.
        StoreError: the store has another layout than msq writes.
    """
    from msq.extract.store import FeatureStore

    if not isinstance(store, FeatureStore):
        raise UsageError("tokens can be streamed from a feature store on disk only")
    reader = store.token_reader(encoder, view, threads)
    row_shape = reader.row_shape
    return StreamedTokens(reader.read, rows, (row_shape[0], row_shape[1]), reader.dtype)
