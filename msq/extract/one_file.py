"""Bytes of one file, whole or in parts, though another may take its name meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from msq.errors import StoreError
from msq.extract.location import is_local, read_part

# A file where a folder belongs, or the other way round: there is no such chunk either.
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

Bytes: TypeAlias = NDArray[np.uint8]
Part: TypeAlias = Callable[[int, int], Bytes]  # first byte and the one past the last -> the bytes


@contextmanager
def opened(path: Path, *, whole: bool) -> Iterator[tuple[Part, int]]:
    """What reads parts of a file that is opened once, and how many bytes it has.

    A remote object has no descriptor: unless it is read whole, each part is asked for by its name.

    Args:
        path: local or remote.
        whole: read all of it at once.

    Raises:
        StoreError: it is missing.
    """
    if whole:
        data = read_file(path)
        yield (lambda start, stop: data[start:stop]), len(data)
    elif is_local(path):
        with _open(path) as file:
            yield through(file.fileno())
    else:
        try:
            total = path.stat().st_size
        except FileNotFoundError:
            raise _missing(path) from None
        yield partial(read_object, path), total


def through(descriptor: int) -> tuple[Part, int]:
    """What reads parts of an open file, and how many bytes it has."""

    def part(start: int, stop: int) -> Bytes:
        return np.frombuffer(os.pread(descriptor, stop - start, start), dtype=np.uint8)

    return part, os.fstat(descriptor).st_size


def read_file(path: Path) -> Bytes:
    """All bytes of a file.

    Raises:
        StoreError: it is missing.
    """
    try:
        return np.fromfile(path, dtype=np.uint8) if is_local(path) else read_part(path, None, None)
    except _ABSENT:
        raise _missing(path) from None


def read_object(path: Path, start: int, stop: int | None) -> Bytes:
    """Some bytes of a remote object; a negative start counts from its end.

    Raises:
        StoreError: it is missing.
    """
    try:
        return read_part(path, start, stop)
    except FileNotFoundError:
        raise _missing(path) from None


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except _ABSENT:
        raise _missing(path) from None


def _missing(path: Path) -> StoreError:
    return StoreError(
        f"{path}: missing although its rows are recorded as done "
        "(Zarr libraries would read zeros); run msq extract again"
    )
