"""Counting what a dataset holds, for `msq datasets check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from msq.errors import VideoError
from msq.extract.datasets.adapter import SplitCount, Survey
from msq.extract.datasets.archives import packed
from msq.extract.datasets.dataset import SPLITS, Clip, Dataset

EXAMPLES = 5


def survey_dataset(
    name: str,
    data: Dataset,
    root: Path,
    *,
    oddities: Mapping[str, int] | None = None,
    published: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
    splits: Mapping[str, SplitCount] | None = None,
) -> Survey:
    """A survey of a dataset that was read: its splits, and which files are not there.

    Args:
        name: of the adapter.
        data: as its adapter reads it.
        root: missing files are named relative to it.
        oddities: counts of the traps found.
        published: what the field reports, under the names of `Survey`.
        notes: one line each.
        splits: counts under the dataset's own names; those of the clips if None.
    """
    missing = [clip.path for clip in data.clips if not clip.path.exists()]
    counted = dict(oddities or {})
    if data.skipped:
        counted["skipped"] = len(data.skipped)
    return Survey(
        dataset=name,
        classes=len(data.classes),
        splits=dict(splits) if splits is not None else count_splits(data.clips),
        missing=len(missing),
        oddities=counted,
        published=dict(published or {}),
        notes=tuple(notes),
        missing_examples=tuple(_relative(path, root) for path in missing[:EXAMPLES]),
        kept_items=kept_items(data),
        skipped_items=skipped_items(data),
    )


def skipped_items(data: Dataset) -> tuple[dict[str, str], ...]:
    """What cannot be used, as results list it: `item` and `reason` of each."""
    return tuple({"item": item, "reason": reason} for item, reason in data.unusable)


def kept_items(data: Dataset) -> tuple[dict[str, str], ...]:
    """What the policy `keep` did, as results list it: `item` and `change` of each."""
    return tuple({"item": item, "change": change} for item, change in data.kept)


def survey_media(
    name: str,
    data: Dataset,
    root: Path,
    *,
    oddities: Mapping[str, int],
    published: Mapping[str, int],
    notes: tuple[str, ...],
) -> Survey:
    """A survey that also says which folders the clips come from."""
    sources: Counter[str] = Counter()
    empty = 0
    for path in (clip.path for clip in data.clips if clip.path.exists()):
        kind = "frames" if path.is_dir() else "video"
        folder = "the root" if path.parent == root else _relative(path.parent, root)
        sources[f"{folder} ({kind})"] += 1
        empty += kind == "frames" and not any(path.iterdir())
    return survey_dataset(
        name,
        data,
        root,
        oddities={**oddities, "empty_frame_folders": empty},
        published=published,
        notes=(*(f"{n} clips from {where}" for where, n in sources.items()), *notes),
    )


def missing_media(data: Dataset, root: Path) -> str:
    """How many clips have no file, the first of them, and what lies there packed; or nothing."""
    missing = [clip.path for clip in data.clips if not clip.path.exists()]
    if not missing:
        return ""
    return (
        f"{len(missing)} of {len(data.clips)} clips have no file below {root.name}, the first: "
        f"{_relative(missing[0], root)}{packed(root)}"
    )


def require_media(data: Dataset, root: Path) -> None:
    """Refuse to begin where not a single clip has its file.

    Raises:
        VideoError: so it is; the message names the first file, and archives still packed.
    """
    if data.clips and not any(clip.path.exists() for clip in data.clips):
        raise VideoError(
            f"{root}: expected videos or frame folders such as "
            f"{_relative(data.clips[0].path, root)}, found none of {len(data.clips)} clips"
            f"{packed(root)}; unpack the videos there (msq datasets check {data.name} says where "
            "they are looked for)"
        )


def count_splits(clips: Sequence[Clip]) -> dict[str, SplitCount]:
    """Clips of each split that has any, by the clips' own split names."""
    found: dict[str, SplitCount] = {}
    for split in SPLITS:
        labels = [clip.labels for clip in clips if clip.split == split]
        if labels:
            found[split] = SplitCount(len(labels), sum(1 for x in labels if not x))
    return found


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
