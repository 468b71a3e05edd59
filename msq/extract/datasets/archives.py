"""Archives that lie below a dataset's root still packed: the usual reason for missing files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

SUFFIXES = (".zip", ".rar", ".7z", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
DEPTH = 3  # `action_recognition/dataset/video.tar.gz`
_FOLDERS, _ENTRIES = 200, 2000  # looked at, at most: frame folders come by the ten thousand


def is_archive(name: str) -> bool:
    """Whether a file is an archive by its name."""
    return name.lower().endswith(SUFFIXES)


def archives_in(root: Path) -> tuple[str, ...]:
    """Archives in the root and in the folders below, relative to it, those of the root first."""
    found: list[str] = []
    for folder in islice(_folders(root), _FOLDERS):
        found += sorted(
            Path(entry.path).relative_to(root).as_posix()
            for entry in _entries(folder)
            if is_archive(entry.name) and entry.is_file()
        )
    return tuple(found)


def packed(root: Path) -> str:
    """` (A.zip lies there still packed: unpack it)` for a message, or nothing."""
    found = archives_in(root)
    if not found:
        return ""
    if len(found) == 1:
        return f" ({found[0]} lies there still packed: unpack it)"
    shown = ", ".join(found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f" ({shown}{more} lie there still packed: unpack them)"


def _folders(root: Path) -> Iterator[Path]:
    """The root, the folders in it, then those in them."""
    level = [root]
    for depth in range(DEPTH + 1):
        yield from level
        if depth < DEPTH:
            level = [Path(e.path) for folder in level[:_FOLDERS] for e in _entries(folder)
                     if e.is_dir()]  # fmt: skip


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(islice(entries, _ENTRIES), key=lambda entry: entry.name)
    except OSError:
        return []
