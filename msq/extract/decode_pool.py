"""Decoding in worker processes, in order, ahead of the encoders, and not upset by a crash.

Frames come back as uint8, through shared memory where there is some (`frame_arena`). Workers die
with their parent, also when it is killed, and give way to the encoders: together they keep all
cores busy, whichever of the two takes longer.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait

import torch

from msq.errors import MsqError
from msq.extract.cores import cores
from msq.extract.decode_task import Decoded, DecodeTask, Picture, decode, without_paths
from msq.extract.frame_arena import Address, FrameArena, attach, write

__all__ = [
    "DecodeTask",
    "Decoded",
    "Picture",
    "cores",
    "decode",
    "decode_in_order",
    "intra_op_threads",
    "multiplies_bf16",
    "without_paths",
]

LOOK_AHEAD_BYTES = 256 * 2**20
LOOK_AHEAD_CLIPS = 128  # or four for each worker
NICENESS = 10  # of decode workers
_PR_SET_PDEATHSIG = 1


@dataclass
class _Waiting:
    """A task under way, the bytes of its frames and their place in shared memory.

    One whose future is None was under way when a worker died; it is tried again alone. One that is
    `settled` came out well, or nothing is decoded instead.
    """

    task: DecodeTask
    size: int
    place: int | None
    future: Future[Decoded] | None
    settled: bool = False


def decode_in_order(
    tasks: Iterable[DecodeTask],
    workers: int,
    look_ahead: int = LOOK_AHEAD_BYTES,
    instead: Callable[[Decoded], DecodeTask | None] | None = None,
) -> Generator[Decoded, None, None]:
    """Results in the order of the tasks, decoded ahead of the caller by `workers` processes.

    The frames of a result may be used until its `release` is called.

    A source that has nothing now may have more later, as `ShardQueue` does: it is asked again
    before each result, and the end is when nothing is under way and it has no more.

    Args:
        tasks: clips in row order.
        workers: processes; 0 decodes in this one, when asked for the next result.
        look_ahead: bytes of finished frames that may wait for the caller, roughly; there are
            always enough tasks under way to keep every worker busy.
        instead: asked about every clip that failed, as soon as that is known: the task, of the
            same pictures, whose result stands in its place, or None to hand on the failure.

    Raises:
        MsqError: worker processes cannot be started at all.
    """
    if workers == 0:
        for wanted in tasks:
            result = decode(wanted)
            while other := _other(result, instead):
                result = decode(other)
            yield result
        return
    source = iter(tasks)
    first = next(source, None)
    if first is None:
        return
    # What waits, what is under way, and what the caller holds and has not released.
    arena = FrameArena(2 * look_ahead + (workers + 2) * first.bytes)
    with closing(arena), _Pool(workers, arena.address) as pool:

        def start(task: DecodeTask) -> _Waiting:
            size = task.bytes
            place = arena.take(size)
            return _Waiting(task, size, place, pool.submit(task, place))

        waiting: deque[_Waiting] = deque()
        held = lost = 0

        def outcome(entry: _Waiting) -> Decoded:
            nonlocal lost
            if entry.future is None:
                lost -= 1
                return pool.run_alone(entry.task, entry.place)
            try:
                return entry.future.result()
            except BrokenProcessPool:
                pool.restart()
                for other in waiting:
                    if other.future is not None and not _whole(other.future):
                        other.future, lost = None, lost + 1
                return pool.run_alone(entry.task, entry.place)

        def settle(entry: _Waiting, result: Decoded) -> None:
            if (other := _other(result, instead)) is None:
                entry.settled = True
            else:
                entry.task, entry.future = other, pool.submit(other, entry.place)

        waiting.append(start(first))
        held += waiting[0].size
        most = max(LOOK_AHEAD_CLIPS, 4 * workers)
        while True:
            while not lost and len(waiting) < most:
                if len(waiting) > workers and held >= look_ahead:
                    break
                if (task := next(source, None)) is None:
                    break
                waiting.append(start(task))
                held += waiting[-1].size
            if not waiting:
                return
            for entry in () if instead is None or lost else waiting:
                if not entry.settled and entry.future is not None and _whole(entry.future):
                    settle(entry, entry.future.result())
            entry = waiting.popleft()
            held -= entry.size
            result = outcome(entry)
            while not entry.settled:
                settle(entry, result)
                result = result if entry.settled else outcome(entry)
            yield _found(result, entry, arena)


def _other(
    result: Decoded, instead: Callable[[Decoded], DecodeTask | None] | None
) -> DecodeTask | None:
    """What to decode in the place of a clip that failed."""
    return None if instead is None or result.reason is None else instead(result)


def _found(result: Decoded, entry: _Waiting, arena: FrameArena) -> Decoded:
    """The result with its frames, which a worker may have left in shared memory."""
    place = entry.place
    if place is not None and result.shared:
        result.frames = arena.read(place, [picture.shape for picture in entry.task.pictures])
        result.free = functools.partial(arena.give, place)
    elif place is not None:
        arena.give(place)
    return result


def _whole(future: Future[Decoded]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


class _Pool:
    """Worker processes that can be started afresh after one of them died."""

    def __init__(self, workers: int, memory: Address | None = None) -> None:
        self._workers = workers
        self._memory = memory
        methods = multiprocessing.get_all_start_methods()
        # A fork server imports torch once for all workers; fork itself would copy the lock states
        # of this process's threads.
        self._context = multiprocessing.get_context(
            "forkserver" if "forkserver" in methods else "spawn"
        )
        if self._context.get_start_method() == "forkserver":
            self._context.set_forkserver_preload([__name__])

    def __enter__(self) -> _Pool:
        self._executor = self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def submit(self, task: DecodeTask, place: int | None = None) -> Future[Decoded]:
        try:
            return self._executor.submit(_decode_there, task, place)
        except BrokenProcessPool as error:  # known before this task could start
            failed: Future[Decoded] = Future()
            failed.set_exception(error)
            return failed

    def restart(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._executor = self._start()

    def run_alone(self, task: DecodeTask, place: int | None = None) -> Decoded:
        """Run a task while nothing else runs, so that a crash is known to be its own."""
        try:
            return self.submit(task, place).result()
        except BrokenProcessPool:
            self.restart()
            reason = "the decoder process died on this clip, twice (crash or out of memory)"
            return Decoded(task.row, reason=reason)

    def _start(self) -> ProcessPoolExecutor:
        executor = ProcessPoolExecutor(
            self._workers,
            mp_context=self._context,
            initializer=_prepare_worker,
            initargs=(self._memory,),
        )
        try:
            executor.submit(os.getpid).result()
        except BrokenProcessPool as error:
            executor.shutdown(wait=False)
            raise MsqError(
                "decode processes cannot be started; a script that calls extract() needs "
                "`if __name__ == '__main__':` around its main part, or workers=0"
            ) from error
        return executor


_memory: mmap.mmap | None = None  # of a worker: the parent's arena


def _prepare_worker(memory: Address | None) -> None:
    global _memory
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    torch.set_num_threads(1)
    os.nice(NICENESS)
    _memory = None if memory is None else attach(memory)
    die_with_parent()


def _decode_there(task: DecodeTask, place: int | None) -> Decoded:
    """In a worker: decode, and leave the frames at a place in shared memory where there is one."""
    started = time.perf_counter(), time.process_time()
    result = decode(task)
    shapes = [picture.shape for picture in task.pictures]
    fits = [array.shape for array in result.frames] == shapes
    if _memory is not None and place is not None and fits:
        write(_memory, place, result.frames)
        result.frames, result.shared = [], True
    result.seconds = time.perf_counter() - started[0]
    result.cpu = time.process_time() - started[1]
    return result


def die_with_parent() -> None:
    """End this process when the one that started it is gone, even by kill -9."""
    if sys.platform == "linux":
        # Under a fork server the parent is that server, which ends with the main process.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """At most `count` threads for the encoders: decode workers and they share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def multiplies_bf16() -> bool | None:
    """Whether this processor has products of bfloat16 numbers; None where torch cannot tell."""
    tell = getattr(torch.cpu, "get_capabilities", None)
    found = {} if tell is None else tell()
    known = [found[name] for name in ("avx512_bf16", "amx_bf16") if name in found]
    return any(known) if known else None
