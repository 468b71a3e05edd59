"""Files that are either absent or whole, whatever moment the process is killed.

A file is written under a temporary name in its own directory, flushed to the disk, renamed over
its final name, and the directory is flushed too. What a killed writer leaves behind carries the
temporary name only, and `remove_temporaries` clears it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def flush_directory(path: Path) -> None:
    """Make renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create `path` and its parents, each made durable in the directory that holds it."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    flush_directory(path.parent)


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> int:
    """Write `pieces` to `path` so that the name appears only once the whole content is safe.

    Returns:
        The number of bytes written.

    Raises:
        OSError: the disk is full or the directory cannot be written; nothing is left under the
            final name that was not there before.
    """
    make_directory(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    written = 0
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                written += file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        # An interrupt or a full disk leaves nothing behind; only kill -9 does.
        temporary.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)
    return written


def remove_file(path: Path) -> int:
    """Delete `path` where it exists, durably; writes 0 bytes, which is what it returns."""
    if path.exists():
        path.unlink()
        flush_directory(path.parent)
    return 0


def remove_temporaries(root: Path) -> int:
    """Delete what killed writers left under `root`; call it only while holding the store's claim.

    Returns:
        How many files were removed.
    """
    removed = 0
    for folder, _, names in os.walk(root):
        for name in names:
            if name.startswith(".") and name.endswith(TEMPORARY_SUFFIX):
                (Path(folder) / name).unlink()
                removed += 1
    return removed
