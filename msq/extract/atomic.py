"""Files that are either absent or whole, whatever moment the process is killed.

A file is written under a temporary name in its own directory, flushed to the disk, renamed over
its final name, and the directory is flushed too. What a killed writer leaves behind carries the
temporary name only, and `remove_temporaries` clears it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from msq.extract.location import is_local, put
from msq.whole_file import TEMPORARY_SUFFIX, flush_directory, write_whole

__all__ = [
    "TEMPORARY_SUFFIX", "flush_directory", "make_directory", "remove_file", "remove_temporaries",
    "write_file",
]  # fmt: skip


def make_directory(path: Path) -> None:
    """Create `path` and its parents, each made durable in the directory that holds it."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    flush_directory(path.parent)


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> int:
    """`write_whole`, into a directory that is made where there is none.

    A remote object is put in one call instead: object stores have no rename.

    Returns:
        The number of bytes written.

    Raises:
        OSError: naming `path`: the disk is full or the directory cannot be written; nothing is
            left under the final name that was not there before.
    """
    if not is_local(path):
        return put(path, b"".join(pieces))
    try:
        make_directory(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return write_whole(path, pieces)


def remove_file(path: Path) -> int:
    """Delete `path` where it exists, durably; writes 0 bytes, which is what it returns."""
    if path.exists():
        path.unlink(missing_ok=True)
        if is_local(path):
            flush_directory(path.parent)
    return 0


def remove_temporaries(root: Path) -> int:
    """Delete what killed writers left under `root`; call it only while holding the store's claim.

    Returns:
        How many files were removed.
    """
    if not is_local(root):
        return 0  # objects have no temporary names
    removed = 0
    for folder, _, names in os.walk(root):
        for name in names:
            if name.startswith(".") and name.endswith(TEMPORARY_SUFFIX):
                (Path(folder) / name).unlink(missing_ok=True)
                removed += 1
    return removed
