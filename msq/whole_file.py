"""One way to write a file: after a crash or on a full disk there is the old one or the new one.

Needs the standard library alone: stores, runs and reports are all written by it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def write_whole(path: Path, pieces: Iterable[bytes | memoryview]) -> int:
    """Write `pieces` to `path` so that the name appears only once the whole content is safe.

    Written under a temporary name beside it, `.NAME.….tmp`, flushed to the disk and renamed; then
    the directory is flushed too.

    Returns:
        The number of bytes written.

    Raises:
        OSError: naming `path`: the disk is full or the directory cannot be written; what stood
            under that name stays, and nothing else is left.
    """
    # Workers on two machines may have one process id, and for a moment both believe in a shard.
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}.{unique}{TEMPORARY_SUFFIX}")
    try:
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


def write_text(path: Path, text: str) -> None:
    """`write_whole` of a text in UTF-8, line ends as they are; where a link leads.

    A pipe or a device, such as `/dev/stdout`, is written to as it is.

    Raises:
        OSError: likewise.
    """
    if path.exists() and not path.is_file():
        append_text(path, text)
    else:
        write_whole(path.resolve() if path.is_symlink() else path, [text.encode()])


def append_text(path: Path, text: str) -> None:
    """Add to the end of a file, in UTF-8.

    Raises:
        OSError: naming `path`.
    """
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError as error:  # the system's message of a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush_directory(path: Path) -> None:
    """Make renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, piece: memoryview) -> int:
    """Every byte of a piece; a disk that takes only some of them is asked again."""
    done = 0
    while done < len(piece):
        done += os.write(descriptor, piece[done:])
    return done


def _discard(temporary: Path) -> None:
    with suppress(OSError):  # what went wrong before is what there is to say
        temporary.unlink(missing_ok=True)
