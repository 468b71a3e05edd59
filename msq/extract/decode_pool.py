"""Decoding in worker processes, in order, ahead of the encoders, and not upset by a crash.

A task is one clip: it is opened and decoded once for all encoders of a run, whatever frames each
wants of it (damaged files excepted, see `decode_samples`), resized to each distinct size, and sent
back as uint8. Workers die with their parent, also when it is killed.
"""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from msq.errors import MsqError, VideoError
from msq.extract.augment import augment, draw, draw_places
from msq.extract.sampling import FrameChoice
from msq.extract.transforms import resize_crop
from msq.extract.video import decode_samples
from msq.extract.views import CLEAN, View

if TYPE_CHECKING:  # the encoders' libraries take seconds to import, and workers need none of them
    from msq.extract.encoders.spec import EncoderSpec

LOOK_AHEAD_BYTES = 256 * 2**20
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Picture:
    """What one encoder wants of a clip: T frames, chosen by `sampling`, square of `size`.

    `short_side` is that of the frames before the crop, 0 for `size`; `view` is which look at the
    clip it is. What an augmented view shows depends on the clip's id, too.
    """

    frames: int
    sampling: str
    size: int
    resize: str
    short_side: int = 0
    view: View = CLEAN

    @classmethod
    def of(cls, spec: EncoderSpec, view: View = CLEAN) -> Picture:
        """The wish of one encoder for one view."""
        return cls(spec.frames, spec.sampling, spec.size, spec.resize, spec.short_side, view)

    def choice(self, clip: str) -> FrameChoice:
        """Which frames it takes of the clip with this id."""
        view = self.view
        places = draw_places(view.seed, clip, self.frames) if view.kind == "augmented" else ()
        return FrameChoice(self.frames, self.sampling, view.clip, view.clips, places)

    def pixels(self, frames: NDArray[np.uint8], clip: str) -> NDArray[np.uint8]:
        """Uint8 `[T, 3, size, size]` of the chosen frames `[T, H, W, 3]`."""
        if self.view.kind == "augmented":
            return augment(frames, draw(self.view.seed, clip), self.size, self.resize).numpy()
        return resize_crop(
            frames,
            self.size,
            self.resize,
            short_side=self.short_side,
            crop=self.view.crop,
            crops=self.view.crops,
        ).numpy()

    @property
    def bytes(self) -> int:
        """Bytes of the uint8 frames `[T, 3, size, size]`."""
        return self.frames * 3 * self.size**2


@dataclass(frozen=True)
class DecodeTask:
    """One clip to decode: its row and what is wanted of it; `fps` is that of a frame folder.

    `id` is the clip's, which augmented views are drawn from; `keep` are open intervals in seconds:
    where there are any, only their frames may be shown.
    """

    row: int
    path: Path
    start: float | None
    end: float | None
    pictures: tuple[Picture, ...]
    fps: float | None = None
    id: str = ""
    keep: tuple[tuple[float, float], ...] = ()


@dataclass
class Decoded:
    """What came of a task.

    Attributes:
        row: the task's row.
        frames: per picture uint8 `[T, 3, size, size]`; empty where decoding failed.
        times: per picture float32 `[T]`, seconds.
        degraded: per picture what was wrong with a video that still gave frames, None for a clean
            one. It is the same whatever other pictures the task asks for, so that a store does
            not depend on which encoders ran together.
        reason: why there are no frames; None where there are.
        message: the decoder's own words.
        decoded: frames that were sampled; encoders that agree share them.
        seconds: time spent decoding and resizing.
    """

    row: int
    frames: list[NDArray[np.uint8]] = field(default_factory=list)
    times: list[NDArray[np.float32]] = field(default_factory=list)
    degraded: list[str | None] = field(default_factory=list)
    reason: str | None = None
    message: str = ""
    decoded: int = 0
    seconds: float = 0.0


def decode(task: DecodeTask) -> Decoded:
    """Decode and resize one clip; a video that cannot be decoded is a result, not an error."""
    started = time.perf_counter()
    result = Decoded(task.row)
    choices = [picture.choice(task.id) for picture in task.pictures]
    wanted = tuple(dict.fromkeys(choices))
    try:
        samples = decode_samples(
            task.path, wanted, start=task.start, end=task.end, fps=task.fps, keep=task.keep
        )
        clips = dict(zip(wanted, samples, strict=True))
        for picture, choice in zip(task.pictures, choices, strict=True):
            clip = clips[choice]
            result.frames.append(picture.pixels(clip.frames, task.id))
            result.times.append(clip.times)
            degraded = clip.degraded
            result.degraded.append(degraded and without_paths(degraded, task.path))
        result.decoded = sum(choice.frames for choice in wanted)
    except (VideoError, OSError, MemoryError) as error:
        result.frames, result.times, result.degraded = [], [], []
        result.reason = without_paths(str(getattr(error, "reason", "") or error), task.path)
        result.message = without_paths(_own_words(error), task.path)
    result.seconds = time.perf_counter() - started
    return result


def without_paths(text: str, path: Path) -> str:
    """`text` without where the clip lies on this machine, which is no part of a store."""
    text = text.removeprefix(f"{path}: ")
    places = sorted({str(path), str(path.absolute()), os.path.realpath(path)}, key=len)
    for place in reversed(places):
        folder = os.path.dirname(place)
        for spelled in (place, repr(place)[1:-1]):
            text = text.replace(spelled, path.name)
        if len(folder) > 1:
            text = text.replace(folder + os.sep, "")
    return text


def _own_words(error: BaseException) -> str:
    words = getattr(error, "message", None)
    if isinstance(words, str):
        return words
    return str(error.__cause__) if error.__cause__ is not None else ""


def decode_in_order(
    tasks: Iterable[DecodeTask], workers: int, look_ahead: int = LOOK_AHEAD_BYTES
) -> Generator[Decoded, None, None]:
    """Results in the order of the tasks, decoded ahead of the caller by `workers` processes.

    Args:
        tasks: clips in row order.
        workers: processes; 0 decodes in this one, when asked for the next result.
        look_ahead: bytes of finished frames that may wait for the caller, roughly; there are
            always enough tasks under way to keep every worker busy.

    Raises:
        MsqError: worker processes cannot be started at all.
    """
    if workers == 0:
        yield from map(decode, tasks)
        return
    with _Pool(workers) as pool:
        source = iter(tasks)
        # A task whose future is None was under way when a worker died; it is tried again alone.
        waiting: deque[tuple[DecodeTask, Future[Decoded] | None]] = deque()
        while True:
            if all(future is not None for _, future in waiting):
                for task in _fitting(source, waiting, workers, look_ahead):
                    waiting.append((task, pool.submit(task)))
            if not waiting:
                return
            task, future = waiting.popleft()
            if future is None:
                yield pool.run_alone(task)
                continue
            try:
                result = future.result()
            except BrokenProcessPool:
                pool.restart()
                waiting = deque((t, f if f is not None and _whole(f) else None) for t, f in waiting)
                result = pool.run_alone(task)
            yield result


def _fitting(
    source: Iterator[DecodeTask],
    waiting: deque[tuple[DecodeTask, Future[Decoded] | None]],
    workers: int,
    look_ahead: int,
) -> Iterator[DecodeTask]:
    """The next tasks that may be started, given what is under way."""
    held = sum(picture.bytes for task, _ in waiting for picture in task.pictures)
    for count in itertools.count(len(waiting)):
        if count > workers and held >= look_ahead:
            return
        task = next(source, None)
        if task is None:
            return
        held += sum(picture.bytes for picture in task.pictures)
        yield task


def _whole(future: Future[Decoded]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


class _Pool:
    """Worker processes that can be started afresh after one of them died."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
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

    def submit(self, task: DecodeTask) -> Future[Decoded]:
        try:
            return self._executor.submit(decode, task)
        except BrokenProcessPool as error:  # known before this task could start
            failed: Future[Decoded] = Future()
            failed.set_exception(error)
            return failed

    def restart(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._executor = self._start()

    def run_alone(self, task: DecodeTask) -> Decoded:
        """Run a task while nothing else runs, so that a crash is known to be its own."""
        try:
            return self.submit(task).result()
        except BrokenProcessPool:
            self.restart()
            reason = "the decoder process died on this clip, twice (crash or out of memory)"
            return Decoded(task.row, reason=reason)

    def _start(self) -> ProcessPoolExecutor:
        executor = ProcessPoolExecutor(
            self._workers, mp_context=self._context, initializer=_prepare_worker
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


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    torch.set_num_threads(1)
    _die_with_parent()


def _die_with_parent() -> None:
    """End this worker when the process that wanted its frames is gone, even by kill -9."""
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


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
