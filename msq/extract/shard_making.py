"""One pass over the clips of a shard: from decoded clips to rows ready to be committed.

Where memory is too short for a batch, the shard begins again with half the batch, and so do the
shards after it; their records say so, because the batch may change the last bits of features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain

import torch

from msq.errors import MsqError, is_out_of_memory
from msq.extract.decode_pool import Decoded, DecodeTask, decode_in_order
from msq.extract.device_batches import Sender, free_memory
from msq.extract.extract_result import Stages
from msq.extract.shard_builder import FrameEncoder, OnDegraded, Part, ShardBuilder
from msq.extract.store_writer import StoreWriter

Seen = Callable[[int, int], None]
Tasks = Callable[[Sequence[int], Sequence[Part]], Iterator[DecodeTask]]


@dataclass
class _Shortage:
    """Where memory was too short: rows encoded before, clips that were to be encoded, and why."""

    encoded: range
    window: list[Decoded]
    message: str


class ShardMaker:
    """Makes the rows of shards.

    Args:
        writer: of the store.
        encoders: name -> encoder.
        batch: clips of one forward pass.
        workers: decode processes, for what has to be decoded once more.
        on_degraded: see `ShardBuilder`.
        tasks: rows and parts -> what to decode.
        stages: is told of every batch.
        warnings: gets a line each time that the batch becomes smaller.

    Attributes:
        batch: clips of one forward pass now.
        reduced: shards that were made with less than was asked for -> their batch.
    """

    def __init__(
        self,
        writer: StoreWriter,
        encoders: Mapping[str, FrameEncoder],
        batch: int,
        workers: int,
        on_degraded: OnDegraded,
        tasks: Tasks,
        stages: Stages,
        warnings: list[str],
    ) -> None:
        self._writer = writer
        self._encoders = encoders
        self._workers = workers
        self._on_degraded = on_degraded
        self._tasks = tasks
        self._stages = stages
        self._asked = batch
        self._senders: dict[torch.device, Sender] = {}
        self._warnings = warnings
        self.batch = batch
        self.reduced: dict[int, int] = {}

    @property
    def smaller_batch(self) -> int | None:
        """The batch now, where it is less than was asked for."""
        return self.batch if self.batch < self._asked else None

    def make(
        self, shard: int, parts: Sequence[Part], stream: Iterator[Decoded], seen: Seen
    ) -> ShardBuilder:
        """One pass over a shard.

        Args:
            shard: which.
            parts: encoders and views.
            stream: the shard's clips, and what comes after them.
            seen: told of the clips of this pass so far: done, failed.

        Raises:
            MsqError: memory is too short for a single clip.
            VideoError: a clip is degraded and the run is to fail on that.
        """
        while True:
            made = self._attempt(shard, parts, stream, seen)
            if isinstance(made, ShardBuilder):
                if self.smaller_batch is not None:
                    self.reduced[shard] = self.smaller_batch
                return made
            free_memory()
            self._halve(shard, made.message)
            again = self._again(made.encoded, parts)
            stream = chain(again, made.window, stream)

    def _attempt(
        self, shard: int, parts: Sequence[Part], stream: Iterator[Decoded], seen: Seen
    ) -> ShardBuilder | _Shortage:
        rows = self._writer.rows(shard)
        slugs = dict.fromkeys(slug for slug, _ in parts)
        builder = ShardBuilder(
            self._writer.dataset.clips[rows.start : rows.stop],
            rows.start,
            {slug: self._encoders[slug] for slug in slugs},
            self._writer.store_dtype,
            self._on_degraded,
            parts,
            senders=self._senders,
            timed=lambda slug, frames, s: self._stages.add(f"encode {slug}", frames, s),
            image_frames=self._writer.image_frames,
        )
        done = failed = 0
        for first in range(rows.start, rows.stop, self.batch):
            window = self._window(stream, min(self.batch, rows.stop - first))
            try:
                builder.add(window)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                message = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                return _Shortage(range(rows.start, first), window, message)
            for result in window:
                result.release()
            good = sum(result.reason is None for result in window)
            done, failed = done + good, failed + len(window) - good
            seen(done, failed)
        builder.finish()
        return builder

    def _window(self, stream: Iterator[Decoded], count: int) -> list[Decoded]:
        window = []
        for _ in range(count):
            window.append(result := next(stream))
            if not result.counted:
                self._stages.add("decode", result.decoded, result.seconds, result.cpu)
                result.counted = True
        return window

    def _again(self, rows: range, parts: Sequence[Part]) -> Iterator[Decoded]:
        """Rows that were decoded before, and whose frames are gone."""
        workers = min(self._workers, len(rows))
        with closing(decode_in_order(self._tasks(rows, parts), workers)) as stream:
            yield from stream

    def _halve(self, shard: int, message: str) -> None:
        if self.batch == 1:
            raise MsqError(
                f"shard {shard}: memory is too short for a single clip ({message}); expected room "
                "for a batch of 1: try --precision bf16, fewer --frames, a smaller --size or "
                "encoder, another --device, or end what else uses this memory; what was finished "
                "is kept"
            )
        before, self.batch = self.batch, -(-self.batch // 2)
        self._warnings.append(
            f"out of memory in shard {shard} with {before} clips in a batch ({message}): this "
            f"shard was begun again, and all after it were made, with {self.batch}; --batch "
            f"{self.batch} says so from the start"
        )
