"""One writer per store: a claim beside it that the operating system releases when its owner dies.

The claim is an advisory lock (`flock`) on `NAME.zarr.claims/writer`, so a claim of a killed process
is free at once, without guessing whether its process id is still the same process.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msq.errors import StoreError
from msq.extract.atomic import make_directory


@contextmanager
def claim_store(store: Path) -> Iterator[None]:
    """Hold the only right to write `store`; the claim's folder is gone afterwards.

    Raises:
        StoreError: another process that is alive holds the claim; the message names it.
    """
    store = store.resolve()  # a link to the store is the same store
    folder = store.with_name(store.name + ".claims")
    path = folder / "writer"
    descriptor = _acquire(store, path)
    try:
        owner = json.dumps({"pid": os.getpid()}).encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner, 0)
        yield
    finally:
        # Unlinked while still locked: whoever waits finds another file under the name, or none.
        path.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()
        os.close(descriptor)


def _acquire(store: Path, path: Path) -> int:
    """Open and lock `path`; the file that is locked is the one the name stands for."""
    while True:
        make_directory(path.parent)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # its owner just finished and removed the folder
            continue
        if not _lock(descriptor):
            owner = _owner(descriptor)
            os.close(descriptor)
            raise StoreError(
                f"{store}: {owner} is writing this store; wait for it to end, "
                "or choose another store"
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(descriptor: int) -> str:
    text = os.pread(descriptor, 1000, 0)
    try:
        return f"process {int(json.loads(text)['pid'])}"
    except (ValueError, KeyError, TypeError):
        return "another process"
