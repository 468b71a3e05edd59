"""Finding a dataset's files below `--root`, however its archives were unpacked."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal

from msq.errors import DatasetError
from msq.extract.datasets.folder import SUFFIXES

Kind = Literal["video", "frames"]


def require_root(root: Path, needs: str) -> Path:
    """The root as a Path.

    Raises:
        DatasetError: it is no folder; the message says what belongs there.
    """
    root = Path(root)
    if not root.is_dir():
        found = "a file" if root.is_file() else "nothing there"
        raise DatasetError(f"{root}: expected a folder with {needs}, found {found}")
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
            f"{root}: expected {name} (looked in {places}), found {_listing(root)}; {remedy}"
        )
    return file


def _listing(root: Path, shown: int = 6) -> str:
    names = sorted(p.name for p in islice(root.iterdir(), 1000) if not p.name.startswith("."))
    if not names:
        return "an empty folder"
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


@dataclass(frozen=True)
class Media:
    """Videos or frame folders named by clip id, in the first of some folders that has them.

    Attributes:
        root: the dataset's root.
        places: (folder below the root, `video` or `frames`) in the order of preference.
    """

    root: Path
    places: tuple[tuple[str, Kind], ...]

    @cached_property
    def _index(self) -> tuple[dict[str, Path], ...]:
        # One listing of each folder in place of a look at the disk for each clip and folder.
        return tuple(_entries(self.root / folder, kind) for folder, kind in self.places)

    @cached_property
    def _expected(self) -> tuple[Path, Kind]:
        present = [(f, k) for f, k in self.places if f and (self.root / f).is_dir()]
        folder, kind = (present or list(self.places))[0]
        return self.root / folder, kind

    def find(self, name: str) -> tuple[Path, str] | None:
        """(path, folder it is in), or None."""
        for (folder, kind), entries in zip(self.places, self._index, strict=True):
            if name in entries:
                return entries[name], f"{folder or 'the root'} ({kind})"
        return None

    def path(self, name: str) -> Path:
        """Where the clip is, or where it was expected."""
        found = self.find(name)
        if found is not None:
            return found[0]
        folder, kind = self._expected
        return folder / (f"{name}.mp4" if kind == "video" else name)

    def sources(self, names: Iterable[str]) -> Counter[str]:
        """How many of the clips each folder gives."""
        return Counter(found[1] for n in names if (found := self.find(n)) is not None)

    def empty_folders(self, names: Iterable[str]) -> int:
        """Clips whose frame folder holds nothing."""
        folders = (found[0] for n in names if (found := self.find(n)) is not None)
        return sum(1 for p in folders if p.is_dir() and not _any_entry(p))


def _entries(folder: Path, kind: Kind) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    found: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            stem, suffix = os.path.splitext(entry.name)
            if kind == "frames" and entry.is_dir():
                found[entry.name] = Path(entry.path)
            elif kind == "video" and suffix.lower() in SUFFIXES and entry.is_file():
                found.setdefault(stem, Path(entry.path))
    return found


def _any_entry(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return next(entries, None) is not None
