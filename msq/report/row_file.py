"""A file that grows by whole rows, each written before the next: a full disk cuts none in two."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from msq.errors import UsageError


class Rows(Protocol):
    """What takes rows; a text file open for writing does, too."""

    def write(self, text: str, /) -> int:
        """Take a row, its line end included."""
        ...


class RowFile:
    """An open file or device; what it held before is there until `begin`.

    Args:
        descriptor: open for writing at its end.
        name: for messages.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self._name = descriptor, name
        self._is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._size = os.fstat(descriptor).st_size

    def begin(self) -> None:
        """Take out what was there before; a device or a pipe goes on."""
        if self._is_file:
            os.ftruncate(self._descriptor, 0)
            self._size = 0

    def write(self, text: str) -> int:
        """One row, at once.

        Raises:
            OSError: naming the file: the disk is full; all rows before are in it, and no part of
                this one.
        """
        row = memoryview(text.encode())
        done = 0
        try:
            while done < len(row):
                done += os.write(self._descriptor, row[done:])
        except OSError as error:  # the system's message names no file
            if self._is_file:
                with suppress(OSError):
                    os.ftruncate(self._descriptor, self._size)
            raise OSError(error.errno, error.strerror, self._name) from error
        self._size += done
        return len(text)


class Shown:
    """Rows on stdout."""

    def write(self, text: str) -> int:
        """One row, at once.

        Raises:
            OSError: what stdout leads to is full; it is led nowhere then, since a program that ends
                tries again to write what is left of it.
        """
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError as error:
            if error.errno == errno.EPIPE:  # nobody reads any more
                raise
            _let_go_of_stdout()
            raise OSError(error.errno, error.strerror, "stdout") from error
        return len(text)


def _let_go_of_stdout() -> None:
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextmanager
def rows_into(out: Path | None) -> Iterator[RowFile | Shown]:
    """The file, with all that is in it, or stdout.

    Raises:
        UsageError: it cannot be written.
    """
    if out is None:
        yield Shown()
        return
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(out, flags, 0o666)
    except OSError as error:
        raise UsageError(f"--out {out}: expected a file that can be written: "
                         f"{error.strerror}") from None  # fmt: skip
    try:
        yield RowFile(descriptor, str(out))
    finally:
        os.close(descriptor)
