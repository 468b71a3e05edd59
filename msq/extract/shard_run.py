"""One run over the shards of a store that are not done: decode, encode, commit.

The unit of commit is one view of one shard. All views and encoders that a shard lacks are made in
one pass over its clips, each decoded once, unless they would take too much memory at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msq.extract.commits import Commits
from msq.extract.crew import Crew
from msq.extract.decode_pool import Decoded, decode_in_order
from msq.extract.extract_result import Stages
from msq.extract.frames_added import AddedFrames
from msq.extract.shard_builder import FrameEncoder, OnDegraded, Part, ShardBuilder
from msq.extract.shard_claims import Member
from msq.extract.shard_making import ShardMaker
from msq.extract.shard_plan import READABLE, ShardPlan, failed_rows
from msq.extract.shard_queue import Job, ShardQueue
from msq.extract.store_writer import StoreWriter
from msq.extract.views import CLEAN, View, parse_view

Progress = Callable[[dict[str, Any]], None]


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
        self._shards = ShardPlan(writer, encoders, self.views, batch, workers)
        self.parts = self._shards.parts
        self.warnings: list[str] = []
        self._batch = batch
        self._workers = workers
        self._progress = progress
        self.stages = Stages(workers)
        self._started = time.perf_counter()
        self._made = 0
        self._done = 0
        self._failed = 0
        self._made_before = self._failed_before = 0
        self._todo: dict[int, list[Part]] = {}
        self._live = 0, 0  # of the shard under way: clips done, failed
        self._commits = Commits()
        self._maker = ShardMaker(
            writer,
            encoders,
            batch,
            workers,
            on_degraded,
            self._shards.tasks,
            self.stages,
            self.warnings,
        )
        self._added = AddedFrames(writer)
        self._again: dict[int, list[Part]] = {}
        self._crew = Crew(None, self.told)

    def plan(self, retry_failed: bool, member: Member | None = None, first: bool = True) -> None:
        """Find out what is missing, and which failed clips would come out otherwise today.

        Args:
            retry_failed: decode failed clips again.
            member: this worker among others, who all do what the `first` of them found.
            first: whether that is this worker.
        """
        if first:
            self.writer.complete_frames()  # a run that was killed may have come so far
        self._todo = self._shards.pending()
        if retry_failed and first:
            self._again = self._shards.recoverable(self._todo)
            if member is not None and self._again:
                found = {s: [[slug, str(v)] for slug, v in p] for s, p in self._again.items()}
                member.plan_again(found)
        elif retry_failed and member is not None:
            found = member.planned_again()
            self._again = {s: [(slug, parse_view(v)) for slug, v in p] for s, p in found.items()}

    def fill(
        self,
        member: Member | None = None,
        only: Collection[int] | None = None,
        start: float = 0.0,
    ) -> int:
        """Make what is missing, see `plan`; returns the number of rows that this worker made.

        Args:
            member: this worker among others; the end is when nothing is missing, whoever made it.
            only: nothing but these shards, without a wait for those that others make.
            start: from 0 to 1, where in the store to begin; workers begin at different places.
        """
        self._done = self._failed = 0
        self._made_before = self._made
        shards = sorted({*self._todo, *self._again})
        for shard in set(range(self.writer.shards)).difference(shards):
            self._count(shard)
        self._failed_before = self._failed
        self._crew = Crew(member, self.told)
        self._report()
        if only is not None:
            shards = [shard for shard in shards if shard in only]
        first = int(start * len(shards))
        shards = shards[first:] + shards[:first]
        rows = sum(len(self.writer.rows(shard)) for shard in shards)
        workers = min(self._workers, rows)
        ahead = 2 * (workers + self._batch)
        queue = ShardQueue(
            shards, self._left, self._shards.job, self._shards.tasks_of, member, ahead
        )
        pause = 0.05
        while (job := queue.next_job()) is not None or (queue.unfinished and only is None):
            if job is None:
                time.sleep(pause)
                pause = min(2 * pause, 2.0)
                self._report()
                continue
            with (
                closing(Commits()) as self._commits,
                closing(decode_in_order(queue, workers)) as stream,
            ):
                while job is not None:
                    self._do(job, queue, stream)
                    job = queue.next_job() or self._settled(queue)
            pause = 0.05
        self._added.end()
        return self._made - self._made_before

    def missing(self) -> list[int]:
        """The shards that are left of those that were to be made when `plan` looked."""
        return [shard for shard in sorted({*self._todo, *self._again}) if self._left(shard)]

    def _settled(self, queue: ShardQueue) -> Job | None:
        """What there is to do once the last commit is at its end."""
        self._commits.settle()
        return queue.next_job()

    def shares(self) -> list[dict[str, Any]]:
        """What other workers made meanwhile; see `Crew.shares`."""
        return self._crew.shares()

    def _do(self, job: Job, queue: ShardQueue, stream: Iterator[Decoded]) -> None:
        """One shard: make it, or skip what was decoded of it in vain."""
        ours = queue.begin(job)
        for parts in job.passes:
            if ours:
                self._make(job.shard, parts, stream, last=parts is job.passes[-1])
                continue
            for _ in self.writer.rows(job.shard):
                next(stream).release()
        if ours:
            self._commits.then(lambda: self._finish(job, queue))

    def _finish(self, job: Job, queue: ShardQueue) -> None:
        """A shard was committed, or lost to another worker."""
        kept = self._crew.keeps(job.shard)
        if kept and job.shard in self._again:
            del self._again[job.shard]
            self._crew.made_again(job.shard)
        self._crew.tell(self._made - self._made_before)
        queue.finish(job, done=kept)

    def told(self) -> dict[str, Any]:
        """What this worker tells others of what it has done."""
        stages = self.stages.summary(list(self.encoders))
        failed = self._failed - self._failed_before
        return {"failed": failed, "stages": stages, "warnings": list(self.warnings)}

    def _left(self, shard: int) -> list[Part]:
        """What is to be made of a shard right now."""
        again = self._again.get(shard, ())
        if again and self._crew.is_made_again(shard):
            again = ()
        return self._shards.left(shard, again)

    def _make(
        self, shard: int, parts: Sequence[Part], stream: Iterator[Decoded], *, last: bool
    ) -> None:
        """One pass over a shard: decode, encode, begin to commit; clips count in the `last` one."""

        def seen(done: int, failed: int) -> None:
            if last:
                self._live = done, failed
            self._commits.poll()
            self._report()

        builder = self._maker.make(shard, parts, stream, seen)
        done, failed = self._live
        self._live = 0, 0
        self._done, self._failed = self._done + done, self._failed + failed
        self._made += done + failed
        written: list[tuple[int, float]] = []
        if self._crew.keeps(shard):
            self._commits.submit(lambda: written.append(self._commit(shard, builder)))

        def committed() -> None:
            for frames, seconds in written:
                self.stages.add("write", frames, seconds)
            self._done, self._failed = self._done - done, self._failed - failed
            if last:
                self._count(shard)
            self._report()

        self._commits.then(committed)

    def _commit(self, shard: int, builder: ShardBuilder) -> tuple[int, float]:
        """Write what was made, in the thread of commits; returns frames and seconds."""
        started = time.perf_counter()
        reduced = self._maker.reduced.get(shard)
        batches = () if reduced is None else (reduced,)
        added = {
            part: data
            for part, data in builder.rows.items()
            if part not in self._again.get(shard, ()) and self._added.takes(part, shard)
        }
        for part, data in added.items():
            self._added.add(part, shard, data, builder.failures, batches)
        rows = {part: data for part, data in builder.rows.items() if part not in added}
        for slug, view in tuple(rows):
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
            self.writer.commit(shard, these, failures, view, batches)
        frames = sum(
            len(data.status) * self.encoders[slug].spec.frames
            for (slug, _), data in (rows | added).items()
        )
        return frames, time.perf_counter() - started

    def _lost(self, slug: str, shard: int, status: NDArray[np.uint8], view: View) -> list[int]:
        """Rows that are whole in the store now and would not be after the commit."""
        before = self.writer.status(slug, shard, view)
        if before is None or not self.writer.is_whole(slug, shard, before, view, only_frames=False):
            return []
        lost = np.isin(before, READABLE) & ~np.isin(status, READABLE)
        return [self.writer.rows(shard)[int(place)] for place in np.flatnonzero(lost)]

    def _count(self, shard: int) -> None:
        failed = failed_rows(self.writer, self.parts, shard)
        self._failed += int(failed.sum())
        self._done += int((~failed).sum())

    def _report(self) -> None:
        if self._progress is None:
            return
        seconds = time.perf_counter() - self._started
        total = len(self.writer.dataset.clips)
        others, failed = self._crew.others()
        made = self._made + sum(self._live) + others
        done = min(total, self._done + self._failed + sum(self._live) + others)
        self._progress(
            {
                "stage": "extract",
                "done": done,
                "total": total,
                "failed": self._failed + self._live[1] + failed,
                "clips_per_second": made / seconds if seconds > 0 else 0.0,
                "stages": self.stages.rates(),
                "seconds_left": (total - done) * seconds / made if made else None,
                "smaller_batch": self._maker.smaller_batch,
            }
        )
