"""In which order a worker makes shards: what it decodes next, what it encodes next.

A worker that is busy with one shard reserves the next, so that its decode processes can go ahead.
A reservation is soft: who has nothing else to do takes over what is reserved and not begun, so that
at the end nobody waits for more than the shard that another worker is in the middle of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Self

from msq.extract.decode_pool import DecodeTask
from msq.extract.shard_builder import Part
from msq.extract.shard_claims import Member


@dataclass
class Job:
    """One shard: what is made of it, in one pass over its clips or several."""

    shard: int
    passes: list[list[Part]]
    clips: int
    taken: bool = field(default=False)


class ShardQueue:
    """Decode tasks of one shard after the other, and the jobs that they belong to, in one order.

    Iterating ends when there is nothing to decode at the moment; there may be more afterwards.

    Args:
        shards: those that may be left to do.
        left: what is left of a shard right now.
        plan: a shard and what is left of it -> the job.
        tasks: what to decode for a job.
        member: this worker among others; None for a store that nobody else can write.
        ahead: clips that may be reserved before they are begun; one shard may be in any case.
    """

    def __init__(
        self,
        shards: Iterable[int],
        left: Callable[[int], Sequence[Part]],
        plan: Callable[[int, Sequence[Part]], Job],
        tasks: Callable[[Job], Iterable[DecodeTask]],
        member: Member | None,
        ahead: int,
    ) -> None:
        self._open = deque(shards)
        self._left = left
        self._plan = plan
        self._tasks_of = tasks
        self._member = member
        self._ahead = ahead
        self._reserved: deque[Job] = deque()
        self._tasks: Iterator[DecodeTask] = iter(())
        self._begun = 0

    @property
    def unfinished(self) -> bool:
        """Whether shards are left that other workers make, or that are to be looked at again."""
        return bool(self._open)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> DecodeTask:
        while (task := next(self._tasks, None)) is None:
            far = self._member is not None and self._far()
            if far or not self._reserve():
                raise StopIteration
        return task

    def _far(self) -> bool:
        waiting = sum(job.clips for job in self._reserved)
        return waiting > 0 and waiting >= self._ahead

    def next_job(self) -> Job | None:
        """The job whose clips come next; None where others make all that is left."""
        if self._reserved or self._reserve():
            return self._reserved.popleft()
        return None

    def begin(self, job: Job) -> bool:
        """Take a job for good; False where another worker took it, or has finished it."""
        if self._member is None:
            return True
        if not (job.taken or self._member.take(job.shard)) or not self._left(job.shard):
            self._give_up(job)
            return False
        self._begun += 1
        return True

    def finish(self, job: Job, *, done: bool) -> None:
        """A job is at its end; a shard that is not `done` is open to all again."""
        self._begun -= 1
        if self._member is None:
            return
        if done:
            self._member.release(job.shard)
        else:
            self._give_up(job)

    def _give_up(self, job: Job) -> None:
        assert self._member is not None
        self._member.release(job.shard)
        self._open.append(job.shard)

    def _reserve(self) -> bool:
        """Reserve one more shard, behind those reserved already."""
        idle = not self._begun and not self._reserved
        for _ in range(len(self._open)):
            shard = self._open.popleft()
            if parts := self._left(shard):
                if self._get(shard, idle):
                    self._append(shard, parts, idle)
                    return True
                self._open.append(shard)
        return idle and self._take_over()

    def _get(self, shard: int, idle: bool) -> bool:
        if self._member is None:
            return True
        if not (self._member.is_free(shard) and self._member.reserve(shard)):
            return False
        if idle and not self._member.take(shard):
            self._member.release(shard)
            return False
        return True

    def _take_over(self) -> bool:
        """With nothing else to do: take what another worker has reserved and not begun."""
        for shard in tuple(self._open):
            parts = self._left(shard)
            if parts and self._member is not None and self._member.take(shard):
                self._open.remove(shard)
                self._append(shard, parts, taken=True)
                return True
        return False

    def _append(self, shard: int, parts: Sequence[Part], taken: bool) -> None:
        job = self._plan(shard, parts)
        job.taken = taken
        self._reserved.append(job)
        self._tasks = chain(self._tasks, self._tasks_of(job))
