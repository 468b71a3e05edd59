"""What of a store's shards is left to make, what today's decoder would make otherwise, and how.

All views and encoders that a shard lacks are made in one pass over its clips, unless they would
take too much memory at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from msq.extract import store_schema as schema
from msq.extract.decode_pool import DecodeTask, Picture, decode_in_order
from msq.extract.sampling import FrameChoice
from msq.extract.shard_builder import FrameEncoder, Part, pictures_of
from msq.extract.shard_queue import Job
from msq.extract.store_writer import StoreWriter
from msq.extract.views import View, parse_view

FRAMES_AT_ONCE = 192  # of one clip at full size, in a decode worker
WINDOW_BYTES = 2**30  # of the resized frames of one batch of clips
SHARD_BYTES = 2**30  # of the features of one shard

READABLE = (schema.OK, schema.DEGRADED)


class ShardPlan:
    """What is asked of the shards of a store, and what of it is not there.

    Args:
        writer: of the store; it knows the encoders and their views.
        encoders: name -> encoder.
        views: what is asked of each clip.
        batch: clips of one forward pass.
        workers: decode processes.

    Attributes:
        parts: what is asked of each shard.
        owed: what is not asked for, and has features of each frame to come where it is done: the
            store shows them when no done row of any view is without.
    """

    def __init__(
        self,
        writer: StoreWriter,
        encoders: Mapping[str, FrameEncoder],
        views: Sequence[View],
        batch: int,
        workers: int,
    ) -> None:
        self._writer = writer
        self._encoders = encoders
        self._batch = batch
        self._workers = workers
        self.parts: list[Part] = [(slug, view) for view in views for slug in encoders]
        self.owed: list[Part] = [
            (slug, view)
            for slug in encoders
            if slug in writer.adding
            for view in writer.views[slug]
            if view not in views
        ]

    def left(self, shard: int, again: Collection[Part] = ()) -> list[Part]:
        """What of a shard is to be made: what it lacks, and what is to be made `again`."""
        done, lacks_frames = self._writer.is_done, self._writer.lacks_frames
        return [
            *(p for p in self.parts if p in again or not done(p[0], shard, p[1])),
            *(p for p in self.owed if lacks_frames(p[0], shard, p[1])),
        ]

    def pending(self) -> dict[int, list[Part]]:
        """Shard -> encoders and views for which it is not done."""
        found = {shard: self.left(shard) for shard in range(self._writer.shards)}
        return {shard: parts for shard, parts in found.items() if parts}

    def recoverable(self, pending: Mapping[int, Sequence[Part]]) -> dict[int, list[Part]]:
        """Shards with failed rows that would come out otherwise today -> what to redo.

        Those that are `pending` are made in any case, but for features of each frame that are
        added to done rows.
        """
        lacks_frames = self._writer.lacks_frames
        pending = {
            shard: [p for p in parts if not lacks_frames(p[0], shard, p[1])]
            for shard, parts in pending.items()
        }
        failed: dict[int, dict[Part, tuple[str, str]]] = {}
        for shard in range(self._writer.shards):
            for failure in self._writer.failures(shard):
                part = failure.encoder, parse_view(failure.view)
                todo = part in self.parts and failure.status == schema.UNDECODABLE
                if todo and part not in pending.get(shard, ()):
                    failed.setdefault(failure.row, {})[part] = (failure.reason, failure.message)
        looks: list[tuple[int, list[Part]]] = []
        for row in sorted(failed):
            views = {view for _, view in failed[row]}
            every = [part for part in self.parts if part[1] in views]
            looks += [(row, parts) for parts in self.passes(every)]
        if not looks:
            return {}
        found: dict[int, set[Part]] = {}
        tasks = [task for row, parts in looks for task in self.tasks([row], parts)]
        with closing(decode_in_order(tasks, min(self._workers, len(tasks)))) as stream:
            for (row, parts), result in zip(looks, stream, strict=True):
                for part in parts:
                    if failed[row].get(part, (result.reason, result.message)) != (
                        result.reason,
                        result.message,
                    ):
                        shard = row // self._writer.shard
                        found.setdefault(shard, set(pending.get(shard, ()))).add(part)
                result.release()
        return {shard: [p for p in self.parts if p in parts] for shard, parts in found.items()}

    def passes(self, parts: Sequence[Part]) -> list[list[Part]]:
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
        pictures = pictures_of(parts, self._encoders)
        rows = sum(array.row_bytes for slug, _ in parts for array in self._writer.arrays(slug))
        return (
            sum(choice.frames for choice in {_choice(p) for p in pictures}) <= FRAMES_AT_ONCE
            and self._batch * sum(p.bytes for p in pictures) <= WINDOW_BYTES
            and self._writer.shard * rows <= SHARD_BYTES
        )

    def tasks(self, rows: Sequence[int], parts: Sequence[Part]) -> Iterator[DecodeTask]:
        """What to decode of each row."""
        pictures = pictures_of(parts, self._encoders)
        for row in rows:
            clip = self._writer.dataset.clips[row]
            yield DecodeTask(
                row, clip.path, clip.start, clip.end, pictures, clip.fps, clip.id, clip.keep
            )

    def job(self, shard: int, parts: Sequence[Part]) -> Job:
        """The making of these parts of a shard."""
        return Job(shard, self.passes(parts), len(self._writer.rows(shard)))

    def tasks_of(self, job: Job) -> Iterator[DecodeTask]:
        """What to decode for a job, pass after pass."""
        rows = self._writer.rows(job.shard)
        return (task for parts in job.passes for task in self.tasks(rows, parts))


def failed_rows(writer: StoreWriter, parts: Sequence[Part], shard: int) -> NDArray[np.bool_]:
    """Rows `[n]` of a shard that cannot be read for at least one encoder and view."""
    failed = np.zeros(len(writer.rows(shard)), dtype=np.bool_)
    for slug, view in parts:
        status = writer.status(slug, shard, view)
        failed |= True if status is None else ~np.isin(status, READABLE)
    return failed


def _choice(picture: Picture) -> FrameChoice:
    return picture.choice("")
