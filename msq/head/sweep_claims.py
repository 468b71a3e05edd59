"""Who trains what: locks that the operating system releases when their owner dies.

A claim is an advisory lock (`flock`) on a file in `SWEEP/claims`, so that a claim of a killed
process is free at once. Workers on several machines need a file system that hands `flock` on
(NFS 4 and the usual cluster file systems do).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msq.errors import MsqError


@contextmanager
def claim(folder: Path, name: str) -> Iterator[bool]:
    """Hold the only right to something; yields False at once where another process has it.

    The file stays: a name that vanished under a waiting process would be locked twice.
    """
    with _opened(folder, name) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield True


def claimed(folder: Path, name: str) -> bool:
    """Whether a process, this one included, holds a claim; nothing is changed."""
    with _opened(folder, name) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def owner(folder: Path, name: str) -> int | None:
    """Process id of who holds a claim, or held it last; None where nobody ever did."""
    try:
        text = (folder / "claims" / name).read_text(encoding="ascii")
        return int(text) if text else None
    except (FileNotFoundError, ValueError):
        return None


@contextmanager
def at_work(folder: Path, *, alone: bool = False) -> Iterator[None]:
    """Say that this process works on a sweep; `alone` asks that no other does.

    Raises:
        MsqError: others are at work, and their plan would be changed under them.
    """
    with _opened(folder, "work") as descriptor:
        kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MsqError(
                f"{folder}: another process is at work on this sweep, with another plan; wait for "
                "it to end, or choose another folder"
            ) from None
        yield


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[int]:
    path = folder / "claims" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
