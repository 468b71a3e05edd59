"""Where the videos or frame folders of a dataset lie: flat in the root, or in the usual folders."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from msq.extract.datasets.folder import SUFFIXES

Kind = Literal["video", "frames"]
KINDS: tuple[Kind, ...] = ("video", "frames")  # a video is taken before a folder of its frames


class Place(NamedTuple):
    """A video file, a folder of frames, or where one of them was expected."""

    path: Path
    kind: Literal["video", "frames", "missing"]


@dataclass(slots=True)
class _Listing:
    """One folder's entries: by their names, and of each kind by names without suffix."""

    names: dict[str, Kind] = field(default_factory=dict)
    stems: dict[tuple[Kind, str], str] = field(default_factory=dict)


class MediaIndex:
    """Finds clips by the names that annotations give them. Every folder is listed at most once.

    A name is looked for as written, then without its suffix as another video type or as a folder
    of frames, each also in another case (UCF101 writes one class both ways). In each of the
    `folders` that is done with the name's own folders, then flat.

    Args:
        root: the dataset's folder.
        folders: where to look below it, the usual place first; `""` is the root itself. A pair
            (folder, kind) is looked through for videos or frame folders alone.
        flat: also look for the last part of the name alone.
    """

    def __init__(
        self, root: Path, folders: Sequence[str | tuple[str, Kind]], *, flat: bool = True
    ) -> None:
        pairs = [(f, KINDS) if isinstance(f, str) else (f[0], (f[1],)) for f in folders]
        self._tops = [(root / folder, kinds) for folder, kinds in pairs]
        self._flat = flat
        self._listings: dict[Path, _Listing] = {}
        self._missing: dict[str, None] = {}
        there = [top for top, (folder, _) in zip(self._tops, pairs, strict=True)
                 if folder and top[0].is_dir()]  # fmt: skip
        self._expected = (there or self._tops)[0]

    @property
    def missing(self) -> tuple[str, ...]:
        """Names that were looked for in vain, in that order."""
        return tuple(self._missing)

    def find(self, name: str, *others: str) -> Place:
        """The place of `name` (or of one of its `others`), POSIX paths below a folder.

        What is missing is expected in the first folder that is there.
        """
        for wanted in (name, *others):
            relative = PurePosixPath(wanted)
            for top, kinds in self._tops:
                folders = [top / relative.parent]
                if self._flat and relative.parent.parts:
                    folders.append(top)
                for folder in folders:
                    if (place := self._in(folder, relative.name, kinds)) is not None:
                        return place
        self._missing[name] = None
        top, kinds = self._expected
        return Place(top / (name if "video" in kinds else without_suffix(name)), "missing")

    def _in(self, folder: Path, name: str, kinds: Collection[Kind]) -> Place | None:
        listing = self._list(folder)
        written = listing.names.get(name)
        if written is not None and written in kinds:
            return Place(folder / name, written)
        stem = without_suffix(name)
        for kind in kinds:
            for key in ((kind, stem), (kind, stem.lower())):
                if key in listing.stems:
                    return Place(folder / listing.stems[key], kind)
        return None

    def _list(self, folder: Path) -> _Listing:
        if folder in self._listings:
            return self._listings[folder]
        listing = self._listings[folder] = _Listing()
        for entry in _entries(folder):
            if entry.is_dir():
                listing.names[entry.name] = "frames"
            elif entry.name != without_suffix(entry.name):
                listing.names[entry.name] = "video"
        for spelled in (str, str.lower):  # the first in order of names, as written before others
            for name, kind in listing.names.items():
                stem = name if kind == "frames" else without_suffix(name)
                listing.stems.setdefault((kind, spelled(stem)), name)
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
