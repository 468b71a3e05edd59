"""Where the videos or frame folders of a dataset lie: flat in the root, or in the usual folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from msq.extract.datasets.folder import SUFFIXES

Kind = Literal["video", "frames", "missing"]


class Place(NamedTuple):
    """A video file, a folder of frames, or where one of them was expected."""

    path: Path
    kind: Kind


@dataclass(slots=True)
class _Listing:
    """One folder's entries: by exact name, and by name without suffix in lower case."""

    names: dict[str, Kind] = field(default_factory=dict)
    stems: dict[str, str] = field(default_factory=dict)


class MediaIndex:
    """Finds clips by the names that annotations give them. Every folder is listed at most once.

    A name is looked for as written, then without its suffix as another video type or as a folder
    of frames, each also in another case (UCF101 writes one class both ways). In each of the
    `folders` that is done with the name's own folders, then flat.

    Args:
        root: the dataset's folder.
        folders: where to look below it, the usual place first; `""` is the root itself.
        flat: also look for the last part of the name alone.
    """

    def __init__(self, root: Path, folders: Sequence[str], *, flat: bool = True) -> None:
        self._root = root
        self._tops = [root / folder for folder in folders]
        self._flat = flat
        self._listings: dict[Path, _Listing] = {}
        self._missing: dict[str, None] = {}

    @property
    def missing(self) -> tuple[str, ...]:
        """Names that were looked for in vain, in that order."""
        return tuple(self._missing)

    def find(self, name: str, *others: str) -> Place:
        """The place of `name` (or of one of its `others`), POSIX paths below a folder."""
        for wanted in (name, *others):
            relative = PurePosixPath(wanted)
            for top in self._tops:
                folders = [top / relative.parent]
                if self._flat and relative.parent.parts:
                    folders.append(top)
                for folder in folders:
                    if (place := self._in(folder, relative.name)) is not None:
                        return place
        self._missing[name] = None
        return Place(self._tops[0] / name, "missing")

    def _in(self, folder: Path, name: str) -> Place | None:
        listing = self._list(folder)
        if name in listing.names:
            return Place(folder / name, listing.names[name])
        found = listing.stems.get(without_suffix(name).lower())
        return None if found is None else Place(folder / found, listing.names[found])

    def _list(self, folder: Path) -> _Listing:
        if folder in self._listings:
            return self._listings[folder]
        listing = self._listings[folder] = _Listing()
        for entry in _entries(folder):
            stem = entry.name
            if entry.is_dir():
                listing.names[entry.name] = "frames"
            elif entry.name != (stem := without_suffix(entry.name)):
                listing.names[entry.name] = "video"
            else:
                continue
            first = listing.stems.get(stem.lower())
            # A video is taken before a folder of its frames, then the first in order of names.
            if first is None or (listing.names[first] == "frames" and not entry.is_dir()):
                listing.stems[stem.lower()] = entry.name
        return listing


def without_suffix(name: str) -> str:
    """`name` without the suffix of a video type; other dots belong to the name."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES else name


def _entries(folder: Path) -> Iterable[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return ()
