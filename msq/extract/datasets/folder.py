"""A folder per class: `ROOT/<class>/<video>`, or `ROOT/{train,val,test}/<class>/<video>`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from msq.errors import DatasetError
from msq.extract.datasets.dataset import SPLITS, Clip, Dataset, Split

SUFFIXES = {
    *(".3gp", ".avi", ".flv", ".h264", ".m4v", ".mkv", ".mov"),
    *(".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"),
}
TEST_SHARE = 0.2


def read_folder(root: Path, *, name: str | None = None) -> Dataset:
    """Read a tree with one folder per class. Classes are the sorted folder names.

    Without split folders a clip is `test` when the hash of its id falls in the lowest fifth, so
    the split of a clip never changes when others are added. Files that are not videos by their
    suffix are listed in `skipped`.

    Raises:
        DatasetError: `root` is no folder, or holds no `<class>/<video>`.
    """
    root = Path(root)
    if not root.is_dir():
        raise DatasetError(f"{root}: expected a folder with one folder per class")
    splits = [s for s in SPLITS if (root / s).is_dir()]
    tops: list[tuple[Path, Split | None]] = [(root / s, s) for s in splits] or [(root, None)]
    found: list[tuple[Path, str, Split]] = []
    skipped: list[tuple[str, str]] = []
    for top, fixed in tops:
        for file in sorted(p for p in top.rglob("*") if p.is_file()):
            parts = file.relative_to(top).parts
            item = file.relative_to(root).as_posix()
            if any(part.startswith(".") for part in parts):
                continue
            if len(parts) != 2:
                skipped.append((item, f"expected <class>/<video> below {top.name}"))
            elif file.suffix.lower() not in SUFFIXES:
                skipped.append((item, f"not a video by its suffix {file.suffix!r}"))
            else:
                found.append((file, parts[0], fixed or _split_of(item)))
    if not found:
        raise DatasetError(f"{root}: expected videos as <class>/<video>, found none")
    classes = tuple(sorted({label for _, label, _ in found}))
    index = {label: k for k, label in enumerate(classes)}
    clips, twice = _distinct(
        Clip(
            id=file.relative_to(root).with_suffix("").as_posix(),
            path=file,
            start=None,
            end=None,
            labels=(index[label],),
            split=split,
        )
        for file, label, split in found
    )
    return Dataset(
        name or root.resolve().name, classes, "singlelabel", clips, "top1", tuple(skipped + twice)
    )


def _split_of(item: str) -> Split:
    share = int.from_bytes(hashlib.sha256(item.encode()).digest()[:8], "big") / 2**64
    return "test" if share < TEST_SHARE else "train"


def _distinct(clips: Iterable[Clip]) -> tuple[tuple[Clip, ...], list[tuple[str, str]]]:
    """Clips with distinct ids; `a.mp4` beside `a.avi` leaves the second out, with the reason."""
    kept: dict[str, Clip] = {}
    twice: list[tuple[str, str]] = []
    for clip in clips:
        if clip.id in kept:
            first = kept[clip.id].path.name
            twice.append((clip.path.name, f"duplicate id {clip.id!r}, first used by {first}"))
        else:
            kept[clip.id] = clip
    return tuple(kept.values()), twice
