"""One run over the shards of a store that are not done: decode, encode, commit.

The unit of commit is one view of one shard. All views and encoders that a shard lacks are made in
one pass over its clips, each decoded once, unless they would take too much memory at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msq.extract import store_schema as schema
from msq.extract.decode_pool import Decoded, DecodeTask, Picture, decode_in_order
from msq.extract.extract_result import Stages
from msq.extract.sampling import FrameChoice
from msq.extract.shard_builder import FrameEncoder, OnDegraded, Part, ShardBuilder, pictures_of
from msq.extract.store_writer import StoreWriter
from msq.extract.views import CLEAN, View, parse_view

Progress = Callable[[dict[str, Any]], None]

FRAMES_AT_ONCE = 192  # of one clip at full size, in a decode worker
WINDOW_BYTES = 2**30  # of the resized frames of one batch of clips
SHARD_BYTES = 2**30  # of the features of one shard

_READABLE = (schema.OK, schema.DEGRADED)


class ShardRun:
    """One run over the pending shards of a store.

    Args:
        writer: of the store; it knows the encoders and their views.
        encoders: name -> encoder.
        batch: clips of one forward pass.
        workers: decode processes; 0 decodes in this one.
        on_degraded: see `ShardBuilder`.
        progress: see `pipeline.extract`.
        views: what is asked of each clip.
    """

    def __init__(
        self,
        writer: StoreWriter,
        encoders: Mapping[str, FrameEncoder],
        batch: int,
        workers: int,
        on_degraded: OnDegraded,
        progress: Progress | None,
        views: Sequence[View] = (CLEAN,),
    ) -> None:
        self.writer = writer
        self.encoders = encoders
        self.views = tuple(views)
        self.parts: list[Part] = [(slug, view) for view in views for slug in encoders]
        self.warnings: list[str] = []
        self._batch = batch
        self._workers = workers
        self._on_degraded = on_degraded
        self._progress = progress
        self.stages = Stages(workers)
        self._started = time.perf_counter()
        self._made = 0
        self._done = 0
        self._failed = 0

    def fill(self, retry_failed: bool) -> int:
        """Make what is missing; returns the number of rows that were made."""
        pending = self._pending()
        if retry_failed:
            pending |= self._recoverable(pending)
        rows = {shard: self.writer.rows(shard) for shard in sorted(pending)}
        made = sum(len(r) for r in rows.values())
        for shard in range(self.writer.shards):
            if shard not in pending:
                self._count(shard)
        self._report()
        if not made:
            return 0
        passes = [(shard, parts) for shard in rows for parts in self._passes(pending[shard])]
        tasks = (task for shard, parts in passes for task in self._tasks(rows[shard], parts))
        with closing(decode_in_order(tasks, min(self._workers, made))) as stream:
            for place, (shard, parts) in enumerate(passes):
                last = place + 1 == len(passes) or passes[place + 1][0] != shard
                self._make(shard, parts, stream, last=last)
        return made

    def _pending(self) -> dict[int, list[Part]]:
        """Shard -> encoders and views for which it is not done."""
        pending = {}
        for shard in range(self.writer.shards):
            parts = [
                part for part in self.parts if not self.writer.is_done(part[0], shard, part[1])
            ]
            if parts:
                pending[shard] = parts
        return pending

    def _recoverable(self, pending: Mapping[int, Sequence[Part]]) -> dict[int, list[Part]]:
        """Done shards with failed rows that would come out otherwise today -> what to redo."""
        failed: dict[int, dict[Part, tuple[str, str]]] = {}
        for shard in range(self.writer.shards):
            for failure in self.writer.failures(shard):
                part = failure.encoder, parse_view(failure.view)
                todo = part in self.parts and failure.status == schema.UNDECODABLE
                if todo and part not in pending.get(shard, ()):
                    failed.setdefault(failure.row, {})[part] = (failure.reason, failure.message)
        looks: list[tuple[int, list[Part]]] = []
        for row in sorted(failed):
            views = {view for _, view in failed[row]}
            every = [part for part in self.parts if part[1] in views]
            looks += [(row, parts) for parts in self._passes(every)]
        if not looks:
            return {}
        found: dict[int, set[Part]] = {}
        tasks = [task for row, parts in looks for task in self._tasks([row], parts)]
        with closing(decode_in_order(tasks, min(self._workers, len(tasks)))) as stream:
            for (row, parts), result in zip(looks, stream, strict=True):
                for part in parts:
                    if failed[row].get(part, (result.reason, result.message)) != (
                        result.reason,
                        result.message,
                    ):
                        shard = row // self.writer.shard
                        found.setdefault(shard, set(pending.get(shard, ()))).add(part)
        return {shard: [p for p in self.parts if p in parts] for shard, parts in found.items()}

    def _passes(self, parts: Sequence[Part]) -> list[list[Part]]:
        """`parts` in order, cut between views where one pass would hold too much in memory."""
        passes: list[list[Part]] = []
        for view in dict.fromkeys(view for _, view in parts):
            more = [part for part in parts if part[1] == view]
            if passes and self._fits([*passes[-1], *more]):
                passes[-1] += more
            else:
                passes.append(more)
        return passes

    def _fits(self, parts: Sequence[Part]) -> bool:
        """Whether a pass with these parts stays within what it may hold."""
        pictures = pictures_of(parts, self.encoders)
        rows = sum(
            array.row_bytes
            for slug, _ in parts
            for array in schema.feature_arrays(self.encoders[slug].spec, self.writer.store_dtype)
        )
        return (
            sum(choice.frames for choice in {_choice(p) for p in pictures}) <= FRAMES_AT_ONCE
            and self._batch * sum(p.bytes for p in pictures) <= WINDOW_BYTES
            and self.writer.shard * rows <= SHARD_BYTES
        )

    def _tasks(self, rows: Sequence[int], parts: Sequence[Part]) -> Iterator[DecodeTask]:
        pictures = pictures_of(parts, self.encoders)
        for row in rows:
            clip = self.writer.dataset.clips[row]
            yield DecodeTask(
                row, clip.path, clip.start, clip.end, pictures, clip.fps, clip.id, clip.keep
            )

    def _make(
        self, shard: int, parts: Sequence[Part], stream: Iterator[Decoded], *, last: bool
    ) -> None:
        """One pass over a shard: decode, encode, commit; clips count in the `last` one."""
        rows = self.writer.rows(shard)
        slugs = dict.fromkeys(slug for slug, _ in parts)
        builder = ShardBuilder(
            self.writer.dataset.clips[rows.start : rows.stop],
            rows.start,
            {slug: self.encoders[slug] for slug in slugs},
            self.writer.store_dtype,
            self._on_degraded,
            parts,
        )
        before = self._done, self._failed
        for first in range(rows.start, rows.stop, self._batch):
            window = [next(stream) for _ in range(first, min(first + self._batch, rows.stop))]
            for result in window:
                self.stages.add("decode", result.decoded, result.seconds)
            clips = sum(result.reason is None for result in window)
            for slug, seconds in builder.add(window).items():
                views = sum(slug == other for other, _ in parts)
                count = clips * views * self.encoders[slug].spec.frames
                self.stages.add(f"encode {slug}", count, seconds)
            if last:
                self._done += clips
                self._failed += len(window) - clips
                self._made += len(window)
            self._report()
        self._commit(shard, builder)
        self._done, self._failed = before
        if last:
            self._count(shard)
        self._report()

    def _commit(self, shard: int, builder: ShardBuilder) -> None:
        started = time.perf_counter()
        rows = dict(builder.rows)
        for slug, view in builder.rows:
            if lost := self._lost(slug, shard, rows[slug, view].status, view):
                del rows[slug, view]
                shown = ", ".join(repr(self.writer.dataset.clips[row].id) for row in lost[:5])
                what = slug if view == CLEAN else f"{slug}, view {view},"
                self.warnings.append(
                    f"shard {shard} of {what} keeps its earlier features: {len(lost)} clips that "
                    f"were extracted before cannot be now ({shown})"
                )
        for view in dict.fromkeys(view for _, view in rows):
            these = {slug: data for (slug, other), data in rows.items() if other == view}
            failures = [f for f in builder.failures if f.encoder in these and f.view == str(view)]
            self.writer.commit(shard, these, failures, view)
        frames = sum(
            len(data.status) * self.encoders[slug].spec.frames for (slug, _), data in rows.items()
        )
        self.stages.add("write", frames, time.perf_counter() - started)

    def _lost(self, slug: str, shard: int, status: NDArray[np.uint8], view: View) -> list[int]:
        """Rows that are whole in the store now and would not be after the commit."""
        before = self.writer.status(slug, shard, view)
        if before is None or not self.writer.is_whole(slug, shard, before, view):
            return []
        lost = np.isin(before, _READABLE) & ~np.isin(status, _READABLE)
        return [self.writer.rows(shard)[int(place)] for place in np.flatnonzero(lost)]

    def _count(self, shard: int) -> None:
        failed = failed_rows(self.writer, self.parts, shard)
        self._failed += int(failed.sum())
        self._done += int((~failed).sum())

    def _report(self) -> None:
        if self._progress is None:
            return
        seconds = time.perf_counter() - self._started
        self._progress(
            {
                "stage": "extract",
                "done": self._done + self._failed,
                "total": len(self.writer.dataset.clips),
                "failed": self._failed,
                "clips_per_second": self._made / seconds if seconds > 0 else 0.0,
                "stages": self.stages.rates(),
            }
        )


def failed_rows(writer: StoreWriter, parts: Sequence[Part], shard: int) -> NDArray[np.bool_]:
    """Rows `[n]` of a shard that cannot be read for at least one encoder and view."""
    failed = np.zeros(len(writer.rows(shard)), dtype=np.bool_)
    for slug, view in parts:
        status = writer.status(slug, shard, view)
        failed |= True if status is None else ~np.isin(status, _READABLE)
    return failed


def _choice(picture: Picture) -> FrameChoice:
    return picture.choice("")
