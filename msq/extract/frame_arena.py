"""Frames from decode processes through shared memory instead of a pipe.

A pipe copies every byte six times on its way; here a worker writes frames where the parent reads
them. The memory has no name in any file system: it cannot be left behind by a killed process, and
a small `/dev/shm`, as containers have, is no limit. Where the system has no such memory, or there
is no room in it, frames go through the pipe as before.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ALIGNED = 64  # bytes; a cache line


@dataclass(frozen=True, slots=True)
class Address:
    """Where a worker finds the arena of its parent: process, file descriptor and bytes."""

    process: int
    descriptor: int
    size: int


class FrameArena:
    """Memory of the parent that its workers write to, handed out piece by piece.

    Args:
        size: bytes; pages that nobody has written to take no memory.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken: list[tuple[int, int]] = []  # (first, last + 1), in order
        self._map: mmap.mmap | None = None
        self._descriptor = -1
        if hasattr(os, "memfd_create"):
            self._descriptor = os.memfd_create("msq-frames", os.MFD_CLOEXEC)
            os.ftruncate(self._descriptor, size)
            self._map = mmap.mmap(self._descriptor, size)

    @property
    def address(self) -> Address | None:
        """For `attach` in a worker; None where there is no such memory."""
        return None if self._map is None else Address(os.getpid(), self._descriptor, self._size)

    def take(self, count: int) -> int | None:
        """The place of `count` bytes, the lowest there is; None where there is no room."""
        if self._map is None or count == 0:
            return None
        first = 0
        for start, end in self._taken:
            if start - first >= count:
                break
            first = -(-end // _ALIGNED) * _ALIGNED
        if first + count > self._size:
            return None
        insort(self._taken, (first, first + count))
        return first

    def give(self, place: int) -> None:
        """The piece at a place may be handed out again; what it holds is lost then."""
        del self._taken[bisect_left(self._taken, (place,))]

    def read(self, place: int, shapes: Sequence[tuple[int, ...]]) -> list[NDArray[np.uint8]]:
        """The arrays at a place, one behind the other, without a copy."""
        assert self._map is not None
        return _arrays(self._map, place, shapes)

    def close(self) -> None:
        """No worker can attach any more; the memory goes with the last array on it."""
        if self._map is not None:
            os.close(self._descriptor)
            self._map = None


def attach(address: Address) -> mmap.mmap | None:
    """The parent's arena in a worker; None where the system does not let it look there."""
    try:
        descriptor = os.open(f"/proc/{address.process}/fd/{address.descriptor}", os.O_RDWR)
    except OSError:
        return None
    try:
        return mmap.mmap(descriptor, address.size)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def write(memory: mmap.mmap, place: int, frames: Sequence[NDArray[np.uint8]]) -> None:
    """Put arrays at a place, one behind the other."""
    targets = _arrays(memory, place, [array.shape for array in frames])
    for target, array in zip(targets, frames, strict=True):
        np.copyto(target, array)


def _arrays(
    memory: mmap.mmap, place: int, shapes: Sequence[tuple[int, ...]]
) -> list[NDArray[np.uint8]]:
    out = []
    for shape in shapes:
        count = int(np.prod(shape))
        out.append(np.frombuffer(memory, np.uint8, count, place).reshape(shape))
        place += count
    return out
