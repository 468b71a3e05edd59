"""Tokens that stay on disk: for stores that do not fit into memory, patch mode above all.

`StreamedTokens` stands where a tensor of tokens would: it has a shape, and indexing it with row
numbers gives a tensor. Whoever knows which rows come next says so with `prefetch`, and they are
read while the step before them runs. The threads that read also check and widen what they read, a
row at a time while it is in the processor's cache, and the buffers are used again: most of the time
of a batch of 150 MB would go into pages that the system has to hand out anew.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msq.errors import UsageError
from msq.head.sending import copying_stream

# Reads rows of the store into uint8 [n, row bytes], each verified; from any thread.
ReadRows = Callable[[Sequence[int], NDArray[np.uint8]], None]
AHEAD = 2
THREADS = 2
_PART = 1 << 20  # bytes that a thread reads at least before it looks for other work
_QUEUED = 2  # batches that a GPU is given before it has come to them
_PIECE = 32_000  # numbers; torch shares work on 32,768 and more between threads of its own


class _Reading(NamedTuple):
    """A batch under way."""

    rows: list[int]
    buffer: Tensor  # [at least n, S, D']
    parts: list[Future[None]]


def waiting_bytes(stored: torch.dtype, dtype: torch.dtype, device: str | torch.device) -> int:
    """Bytes of a device that streamed tokens take beside the batch that is computed with.

    On a GPU lie the batch of the step that runs, as it is stored, and those of `_QUEUED` steps
    behind it, and one is widened at a time. Elsewhere a batch is lent while `AHEAD` are read into
    buffers of their own, as wide.

    Args:
        stored: dtype of what is read.
        dtype: of the batch that is computed with.
        device: where it is.

    Returns:
        Bytes for each number of a batch.
    """
    if torch.device(device).type != "cuda":
        return AHEAD * dtype.itemsize
    return (_QUEUED + (stored != dtype)) * stored.itemsize


class StreamedTokens:
    """[N, S, D'] on disk.

    Args:
        read: reads rows of the store, from any thread.
        rows: [N] the store's row of each of these.
        row_shape: (S, D').
        stored: dtype of what is read; bfloat16 as its bits is fine.
        dtype: dtype of what indexing gives; None for the stored one.
        device: where it gives it.
        ahead: batches under way at a time, with the one that is asked for next.
        threads: that read.

    Attributes:
        shape: (N, S, D').
        dtype: of what indexing gives.
        device: of what indexing gives.
        ahead: as given.
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
        threads: int = THREADS,
    ) -> None:
        self._read, self._rows, self._stored = read, rows.cpu(), stored
        self.shape = torch.Size((len(rows), *row_shape))
        self.dtype = dtype or stored
        self.device = torch.device(device)
        self.ahead, self._threads = ahead, threads
        self._pool = ThreadPoolExecutor(threads, "stream")
        self._own = threading.local()
        self._under_way: deque[_Reading] = deque()
        # Each with the event after which it may be written again; None: at once.
        self._free: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._lent: Tensor | None = None
        self._begun: deque[torch.cuda.Event] = deque()  # on a GPU: when each batch was asked for

    def __len__(self) -> int:
        """N."""
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows on disk."""
        return self.shape.numel() * self._stored.itemsize

    def waiting(self, dtype: torch.dtype, device: str | torch.device) -> int:
        """Bytes of a device for each number of a batch in `dtype`; see `waiting_bytes`."""
        return waiting_bytes(self._stored, dtype, device)

    def prefetch(self, rows: Tensor) -> None:
        """Begin to read rows [n] that will be asked for, unless they are under way.

        Without effect where `ahead` batches are under way.
        """
        wanted = rows.tolist()
        known = any(reading.rows == wanted for reading in self._under_way)
        if not known and len(self._under_way) < self.ahead:
            self._under_way.append(self._begin(wanted))

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows [n] -> [n, S, D'], a tensor of its own.

        Raises:
            StoreError: a row is damaged; names the clip and the file.
        """
        wanted = rows.tolist()
        buffer = self._finished(wanted)
        return self._on_device(buffer, len(wanted)) if self._pinned else buffer[: len(wanted)]

    def lend(self, rows: Tensor) -> Tensor:
        """The same in memory that is used again: valid until the next call.

        Raises:
            StoreError: as indexing.
        """
        wanted = rows.tolist()
        buffer = self._finished(wanted)
        if self._pinned:
            return self._on_device(buffer, len(wanted))
        if self._lent is not None:
            self._free.append((self._lent, None))
        self._lent = buffer
        return buffer[: len(wanted)]

    def select(self, rows: Tensor) -> StreamedTokens:
        """The same for some of the rows, in the order given."""
        return self._like(rows=self._rows[rows.cpu()])

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> StreamedTokens:
        """The same, given on another device or in another dtype."""
        return self._like(device=device, dtype=dtype)

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _like(
        self,
        rows: Tensor | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> StreamedTokens:
        return StreamedTokens(
            self._read, self._rows if rows is None else rows, (self.shape[1], self.shape[2]),
            self._stored, dtype or self.dtype, device or self.device, self.ahead, self._threads,
        )  # fmt: skip

    @property
    def _pinned(self) -> bool:
        """Whether batches go to a GPU: as they are stored, to be widened there."""
        return self.device.type == "cuda"

    def _begin(self, wanted: list[int]) -> _Reading:
        """The threads are told to read rows, several of them where they are small."""
        buffer = self._buffer(len(wanted))
        slots = buffer[: len(wanted)]
        many = max(1, _PART // max(1, self.shape[1] * self.shape[2] * self._stored.itemsize))
        parts = [
            self._pool.submit(self._load, wanted[i : i + many], slots[i : i + many])
            for i in range(0, len(wanted), many)
        ]
        return _Reading(wanted, buffer, parts)

    def _finished(self, wanted: list[int]) -> Tensor:
        """The buffer with these rows, read ahead or now."""
        reading = None
        while self._under_way and reading is None:
            first = self._under_way.popleft()
            if first.rows == wanted:
                reading = first
            else:  # the plan changed: what was read ahead is not wanted
                for part in first.parts:
                    part.cancel()
                wait(first.parts)
                self._free.append((first.buffer, None))
        reading = reading or self._begin(wanted)
        wait(reading.parts)
        try:
            for part in reading.parts:
                part.result()
        except BaseException:
            self._free.append((reading.buffer, None))
            raise
        return reading.buffer

    def _buffer(self, count: int) -> Tensor:
        """Of at least so many rows, used before where there is one."""
        while self._free:
            buffer, copied = self._free.pop()
            if len(buffer) >= count:
                if copied is not None:
                    copied.synchronize()
                return buffer
        dtype = self._stored if self._pinned else self.dtype
        return torch.empty((count, *self.shape[1:]), dtype=dtype, pin_memory=self._pinned)

    def _load(self, rows: list[int], slots: Tensor) -> None:
        """In a thread: bytes of some rows, verified, and widened where that is asked for."""
        numbers = self._rows[torch.tensor(rows, dtype=torch.long)].tolist()
        source = slots
        if slots.dtype != self._stored:
            kept: Tensor | None = getattr(self._own, "rows", None)
            if kept is None or len(kept) < len(rows):
                kept = self._own.rows = torch.empty(slots.shape, dtype=self._stored)
            source = kept[: len(rows)]
        self._read(numbers, source.view(torch.uint8).reshape(len(rows), -1).numpy())
        if source is not slots:
            _widen(source, slots)

    def _on_device(self, buffer: Tensor, count: int) -> Tensor:
        """A copy on the GPU, made beside the step before; only who writes the buffer waits for it.

        It has a stream of its own: in that of the steps it would stand behind them, and so would
        whoever waits for the buffer. So that batches do not pile up on the GPU where reading is
        faster than the steps, the processor is at most `_QUEUED` batches before it.
        """
        stream, current = copying_stream(self.device), torch.cuda.current_stream(self.device)
        begun, copied = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        begun.record(current)
        self._begun.append(begun)
        if len(self._begun) > _QUEUED:
            self._begun.popleft().synchronize()
        with torch.cuda.stream(stream):
            stored = buffer[:count].to(self.device, non_blocking=True)
            copied.record(stream)
        self._free.append((buffer, copied))
        current.wait_stream(stream)
        stored.record_stream(current)
        return stored.to(self.dtype)


def _widen(source: Tensor, target: Tensor) -> None:
    """Copy into another dtype by this thread alone: it is one of several that do so."""
    if torch.get_num_threads() == 1:
        target.copy_(source)
        return
    pieces = torch.split(source.flatten(), _PIECE), torch.split(target.flatten(), _PIECE)
    for narrow, wide in zip(*pieces, strict=True):
        wide.copy_(narrow)


def stream_tokens(
    store: object, rows: Tensor, encoder: str, view: Any = 0, threads: int = THREADS
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
    reader = store.token_reader(encoder, view, threads=0)  # the threads are those of the stream
    shape = (reader.row_shape[0], reader.row_shape[1])
    return StreamedTokens(reader.read, rows, shape, reader.dtype, threads=threads)
