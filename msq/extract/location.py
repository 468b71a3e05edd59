"""Where a store lies: a folder, a URL that fsspec opens, or a zip file of a whole store.

Everything outside the file system is reached through universal-pathlib, whose paths are used like
`pathlib`'s. An object store has no rename and no lock: each object is put whole, in one call, and
there must be one writer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote
from zipfile import BadZipFile, is_zipfile

import numpy as np
from numpy.typing import NDArray

from msq.errors import StoreError, UsageError

if TYPE_CHECKING:
    from upath import UPath

# `pathlib` takes one of the two slashes away, and the command line hands out paths.
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.DOTALL)


def locate(store: str | Path | UPath) -> Path:
    """A store's place: a plain path for a folder or `file://`, else one that fsspec reads.

    Args:
        store: a folder, a zip file of a store (`NAME.zarr.zip`, read-only), or a URL such as
            `s3://bucket/NAME.zarr`, also one that went through `pathlib`.

    Raises:
        UsageError: fsspec has no such protocol, or the package that it needs is missing.
    """
    if not isinstance(store, str | Path):
        return cast("Path", store)  # located before
    match = _URL.fullmatch(str(store))
    if match is None or Path(str(store)).exists():
        path = Path(store)
        return _zip(path) if path.suffix == ".zip" and path.is_file() else path
    protocol, rest = match.groups()
    if protocol in ("file", "local"):
        return locate(Path("/" + unquote(rest)))
    from upath import UPath

    try:
        found = UPath(f"{protocol}://{rest}")
        _ = found.fs
    except (ImportError, ValueError) as error:
        raise UsageError(f"{protocol}://{rest}: cannot be opened by fsspec ({error})") from None
    return cast("Path", found)


def _zip(path: Path) -> Path:
    from upath import UPath

    if not is_zipfile(path):
        raise StoreError(f"{path}: not a zip file (cut short, or damaged); copy or export it again")
    return cast("Path", UPath(f"zip://::{path.resolve()}", mode="r"))


def is_local(path: Path) -> bool:
    """Whether a path is of the file system: it has descriptors, renames and locks."""
    return isinstance(path, Path)


def absolute(path: Path) -> Path:
    """A path that means the same from any folder."""
    return path.absolute() if is_local(path) else path


def is_archive(path: Path) -> bool:
    """Whether a path is inside a zip file, which is only read."""
    return not is_local(path) and _remote(path).protocol == "zip"


def read_part(path: Path, start: int | None, stop: int | None) -> NDArray[np.uint8]:
    """Some bytes of a remote object; a negative start counts from its end.

    Raises:
        FileNotFoundError: there is no such object.
        StoreError: it is damaged in a zip file.
    """
    remote = _remote(path)
    try:
        content = remote.fs.cat_file(remote.path, start=start, end=stop)
    except BadZipFile as error:
        raise StoreError(f"{path}: damaged in the zip file ({error})") from None
    return np.frombuffer(content, dtype=np.uint8)


def put(path: Path, content: bytes) -> int:
    """Write a remote object in one call; it is there whole, or not at all.

    Raises:
        UsageError: it is in a zip file.
    """
    if is_archive(path):
        raise UsageError(f"{path}: a zip file is only read; msq store convert writes a folder")
    remote = _remote(path)
    remote.fs.pipe_file(remote.path, content)
    return len(content)


def upload(file: Path, target: Path) -> None:
    """Copy a finished local file to a remote object."""
    remote = _remote(target)
    remote.fs.put_file(str(file), remote.path)


def zarr_store(path: Path) -> Any:
    """What zarr-python opens a path by."""
    if is_local(path):
        return path
    from zarr.storage import FsspecStore

    remote = _remote(path)
    known: Any = remote.fs
    if known.async_impl:
        options = {**known.storage_options, "asynchronous": True}
        known = type(known)(*known.storage_args, **options)
    else:
        from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

        known = AsyncFileSystemWrapper(known, asynchronous=True)
    return FsspecStore(known, path=remote.path.rstrip("/"), read_only=True)


def _remote(path: Path) -> UPath:
    return cast("UPath", path)
