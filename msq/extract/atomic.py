"""Files that are either absent or whole, whatever moment the process is killed.

A file is written under a temporary name in its own directory, flushed to the disk, renamed over
its final name, and the directory is flushed too. What a killed writer leaves behind carries the
temporary name only, and `remove_temporaries` clears it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from msq.extract.location import is_local, put

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

    A remote object is put in one call instead: object stores have no rename.

    Returns:
        The number of bytes written.

    Raises:
        OSError: naming `path`: the disk is full or the directory cannot be written; nothing is
            left under the final name that was not there before.
    """
    if not is_local(path):
        return put(path, b"".join(pieces))
    # Workers on two machines may have one process id, and for a moment both believe in a shard.
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}.{unique}{TEMPORARY_SUFFIX}")
    try:
        make_directory(path.parent)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            written = sum(_write_all(descriptor, memoryview(piece)) for piece in pieces)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except OSError as error:
        # The system's message names no file, or the temporary one.
        _discard(temporary)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        # An interrupt or a full disk leaves nothing behind; only kill -9 does.
        _discard(temporary)
        raise
    flush_directory(path.parent)
    return written


def _write_all(descriptor: int, piece: memoryview) -> int:
    """Every byte of a piece; a disk that takes only some of them is asked again."""
    done = 0
    while done < len(piece):
        done += os.write(descriptor, piece[done:])
    return done


def _discard(temporary: Path) -> None:
    with suppress(OSError):  # what went wrong before is what there is to say
        temporary.unlink(missing_ok=True)


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
