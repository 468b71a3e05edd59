"""A folder per class: `ROOT/<class>/<video>`, or `ROOT/<split>/<class>/<video>`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from msq.errors import DatasetError
from msq.extract.datasets.dataset import SPLIT_WORDS, SPLITS, Clip, Dataset, Split
from msq.extract.datasets.kept_rows import keep_rows
from msq.extract.datasets.manifest_lines import printable
from msq.extract.datasets.manifest_row import Row

SUFFIXES = {
    *(".3gp", ".avi", ".flv", ".h264", ".m4v", ".mkv", ".mov"),
    *(".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"),
}
TEST_SHARE = 0.2

Skipped = list[tuple[str, str]]


def read_folder(
    root: Path, *, name: str | None = None, policy: Literal["skip", "keep"] = "skip"
) -> Dataset:
    """Read a tree with one folder per class. Classes are the sorted folder names.

    The folders of splits are called `train`, `val`, `test` or by another of `SPLIT_WORDS`, in any
    case. Without them a clip is `test` when the hash of its id falls in the lowest fifth, so the
    split of a clip never changes when others are added. What is no `<class>/<video>`, or lies
    beside the folders of splits, is listed in `skipped`; of the latter, what is no video by its
    suffix (a README, a list of classes) is left out by rule. Of `a.avi` and `a.mp4` in a folder the
    second is skipped; under the policy `keep` it is `a~2`, and listed in `kept`.

    Raises:
        DatasetError: `root` is no folder, or holds no `<class>/<video>`.
    """
    root = Path(root)
    if not root.is_dir():
        raise DatasetError(f"{root}: expected a folder with one folder per class")
    splits = split_folders(root)
    tops: dict[Path, Split | None] = {**splits} or {root: None}
    beside = _beside(root, splits)
    skipped: Skipped = []
    found: list[tuple[Path, str, Split]] = []
    for top, fixed in tops.items():
        for file in _files(root, top, skipped):
            parts = file.relative_to(top).parts
            item, unfit = _item(file, root)
            if unfit:
                skipped.append((item, unfit))
            elif len(parts) != 2:
                skipped.append((item, f"expected <class>/<video> below {top.name}"))
            elif file.suffix.lower() not in SUFFIXES:
                skipped.append((item, f"not a video by its suffix {file.suffix!r}"))
            elif not file.is_file():
                skipped.append((item, "not a file, or a link to none"))
            else:
                found.append((file, parts[0], fixed or _split_of(item)))
    if not found:
        raise DatasetError(f"{root}: expected videos as <class>/<video>, found none")
    classes = tuple(sorted({label for _, label, _ in found}))
    index = {label: k for k, label in enumerate(classes)}
    clips = [
        Clip(
            id=file.relative_to(root).with_suffix("").as_posix(),
            path=file,
            start=None,
            end=None,
            labels=(index[label],),
            split=split,
        )
        for file, label, split in found
    ]
    distinct, twice = _renamed(clips) if policy == "keep" else _distinct(clips)
    changes, lost = (twice, []) if policy == "keep" else ([], twice)
    texts = frozenset(one for one in beside if Path(one[0]).suffix.lower() not in SUFFIXES)
    return Dataset(
        name or printable(root.resolve().name), classes, "singlelabel", distinct, "top1",
        (*beside, *skipped, *lost), regular=texts, kept=tuple(changes),
    )  # fmt: skip


def split_folders(root: Path) -> dict[Path, Split]:
    """The folders of splits in a tree, the training one first; none where all are classes.

    A class may be called `train` too: its folder, beside those of other classes, holds videos and
    no folders of them.
    """
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    named = {p: SPLIT_WORDS[p.name.lower()] for p in folders if p.name.lower() in SPLIT_WORDS}
    classes = any(_holds_video(folder, "[!.]*") for folder in folders if folder not in named)
    if classes and not any(_holds_video(folder, "[!.]*/[!.]*") for folder in named):
        return {}
    return dict(sorted(named.items(), key=lambda pair: SPLITS.index(pair[1])))


def _holds_video(folder: Path, pattern: str) -> bool:
    return any(path.suffix.lower() in SUFFIXES for path in folder.glob(pattern))


def _beside(root: Path, splits: Iterable[Path]) -> Skipped:
    """The files of a tree that lie in none of its folders of splits."""
    names = [folder.name for folder in splits]
    if not names:
        return []
    reason = f"beside the split folders {', '.join(names)}: expected <class>/<video> in one of them"
    skipped: Skipped = []
    for entry in sorted(root.iterdir()):
        if entry.name in names or entry.name.startswith("."):
            continue
        files = _files(root, entry, skipped) if entry.is_dir() else [entry]
        skipped += [(_item(file, root)[0], reason) for file in files]
    return skipped


def _files(root: Path, top: Path, skipped: Skipped) -> list[Path]:
    """What lies below a folder, in order; links to folders are followed, hidden names are not.

    Folders that cannot be listed go to `skipped`.
    """

    def unread(error: OSError) -> None:
        item, _ = _item(Path(error.filename), root)
        skipped.append((item, f"this folder cannot be read ({error.strerror})"))

    found: list[Path] = []
    for folder, names, files in os.walk(top, onerror=unread, followlinks=True):
        here = Path(folder)
        names[:] = [n for n in names if not n.startswith(".") and not leads_back(here / n)]
        found += [here / name for name in files if not name.startswith(".")]
    return sorted(found)


def _item(file: Path, root: Path) -> tuple[str, str | None]:
    """A file below the root in words that UTF-8 has, and what keeps its name from being an id."""
    name = file.relative_to(root).as_posix()
    if printable(name) == name:
        return name, None
    shown = os.fsencode(name).decode("latin-1")
    return printable(name), f"the name is not UTF-8 (as Latin-1 it reads {shown!r}); rename it"


def leads_back(folder: Path) -> bool:
    """Whether a folder is a link to one that it lies in itself."""
    return folder.is_symlink() and folder.resolve() in {p.resolve() for p in folder.parents}


def _split_of(item: str) -> Split:
    share = int.from_bytes(hashlib.sha256(item.encode()).digest()[:8], "big") / 2**64
    return "test" if share < TEST_SHARE else "train"


def _distinct(clips: Iterable[Clip]) -> tuple[tuple[Clip, ...], Skipped]:
    """Clips with distinct ids; `a.mp4` beside `a.avi` leaves the second out, with the reason."""
    kept: dict[str, Clip] = {}
    twice: Skipped = []
    for clip in clips:
        if clip.id in kept:
            first = kept[clip.id].path.name
            twice.append((clip.path.name, f"duplicate id {clip.id!r}, first used by {first}"))
        else:
            kept[clip.id] = clip
    return tuple(kept.values()), twice


def _renamed(clips: Sequence[Clip]) -> tuple[tuple[Clip, ...], Skipped]:
    """Clips with distinct ids; `a.mp4` beside `a.avi` is `a~2`, which is said."""
    rows = [
        Row(f"{Path(clip.id).parent.as_posix()}/{clip.path.name}", clip.id, None, clip.path,
            None, None, (), clip.split)
        for clip in clips
    ]  # fmt: skip
    found = keep_rows(rows, None, "", "singlelabel")
    named = zip(clips, found.rows, strict=True)
    return tuple(replace(clip, id=row.id) for clip, row in named), found.changes
