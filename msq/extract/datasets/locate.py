"""Finding a dataset's annotation files below `--root`, however its archives were unpacked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from msq.errors import DatasetError
from msq.extract.datasets.archives import is_archive, packed


def require_root(root: Path, needs: str) -> Path:
    """The root as a Path.

    Raises:
        DatasetError: it is no folder; the message says what belongs there.
    """
    root = Path(root)
    if not root.is_dir():
        found = "a file" if root.is_file() else "nothing there"
        remedy = "unpack it" if root.is_file() and is_archive(root.name) else "check the path"
        raise DatasetError(
            f"{root}: expected a folder with {needs}, found {found}; {remedy} and name the folder "
            "as --root"
        )
    return root


def find_file(root: Path, name: str, folders: Sequence[str]) -> Path | None:
    """The first of `root/FOLDER/name` that is a file; `""` stands for the root."""
    return next((p for f in folders if (p := root / f / name).is_file()), None)


def require_file(root: Path, name: str, folders: Sequence[str], remedy: str) -> Path:
    """As `find_file`.

    Raises:
        DatasetError: it is nowhere; the message lists where it was looked for, what is there
            instead, and `remedy`.
    """
    file = find_file(root, name, folders)
    if file is None:
        places = ", ".join(f or "the root itself" for f in folders if not f or (root / f).is_dir())
        raise DatasetError(
            f"{root}: expected {name} (looked in {places}), found {_listing(root)}{packed(root)}; "
            f"{remedy}"
        )
    return file


def absent(root: Path, needs: str, remedy: str) -> DatasetError:
    """The error for annotations that are nowhere below the root: it says what is there instead.

    Where an archive lies there still packed, it is named.
    """
    there = f"there: {_listing(root)}{packed(root)}"
    return DatasetError(f"{root}: expected {needs}, found none; {remedy} ({there})")


def _listing(root: Path, shown: int = 6) -> str:
    names = sorted(p.name for p in islice(root.iterdir(), 1000) if not p.name.startswith("."))
    if not names:
        return "an empty folder"
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
