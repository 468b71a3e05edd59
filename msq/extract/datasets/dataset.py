"""What every adapter produces: a Dataset of Clips."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "val", "test"]
Task = Literal["multilabel", "singlelabel"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SPLIT_WORDS: dict[str, Split] = {  # what lists, folders and annotations call them, in lower case
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validate": "val", "validation": "val"},
    **{"test": "test", "testing": "test"},
}


@dataclass(frozen=True, slots=True)
class Clip:
    """One row of a dataset: a video file (or frame folder), whole or cut.

    Attributes:
        id: unique name within the dataset.
        path: video file, or a folder of frames.
        start: first second of the cut, or None for the beginning.
        end: last second of the cut, or None for the end.
        labels: indices into `Dataset.classes`, ascending, no repeats; may be empty.
        split: `train`, `val` or `test`.
        intervals: (class, start, end) in seconds where the annotation has them.
        fps: frames per second of a frame folder, which has no times of its own: picture k is shown
            at k / fps. Needed to cut one; video files have their own clock and ignore it.
        unknown: indices of classes of which nobody knows whether the clip has them, ascending and
            none of `labels`; the loss and the metrics leave these (clip, class) pairs out.
        keep: open intervals in seconds, ascending: only frames inside one of them may be shown.
            Empty shows all.
    """

    id: str
    path: Path
    start: float | None
    end: float | None
    labels: tuple[int, ...]
    split: Split
    intervals: tuple[tuple[int, float, float], ...] = ()
    fps: float | None = None
    unknown: tuple[int, ...] = ()
    keep: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Dataset:
    """Clips with their classes.

    Attributes:
        name: short name, used in specs and file names.
        classes: class names in index order.
        task: `multilabel` or `singlelabel`.
        clips: rows in the order of the annotation file.
        metric: the metric that the field reports for this dataset.
        skipped: (item, reason) for everything the adapter left out.
        regular: those of `skipped` that are left out by the dataset's own rules (unused in a
            split, ambiguous) and not because they cannot be used.
        kept: (line, what was done) for everything that the policy `keep` changed or joined.
        partitions: name -> `train`, `val`, `test` or "" (unused) for each of `clips`, where the
            field has several official splits; `Clip.split` then says nothing by itself. The first
            one counts where none is chosen.
        groups: name -> indices into `classes`, where the field reports groups of classes.
        notes: what the user should know of how labels were made, one line each.
        variant: which reading of the dataset this is, where there are several: `split 1`,
            `official view`; every result names it.
    """

    name: str
    classes: tuple[str, ...]
    task: Task
    clips: tuple[Clip, ...]
    metric: str
    skipped: tuple[tuple[str, str], ...] = ()
    regular: frozenset[tuple[str, str]] = frozenset()
    kept: tuple[tuple[str, str], ...] = ()
    partitions: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = ()
    variant: str = ""

    def __post_init__(self) -> None:
        """Refuse partitions and groups that do not fit the clips and classes.

        Raises:
            ValueError: an adapter made a mistake.
        """
        for name, splits in self.partitions.items():
            if len(splits) != len(self.clips) or not {*splits} <= {*SPLITS, ""}:
                raise ValueError(f"partition {name}: expected a split or '' for each clip")
        for name, members in self.groups.items():
            if len({*members} & {*range(len(self.classes))}) != len(members):
                raise ValueError(f"group {name}: expected distinct class indices")

    @property
    def left_out(self) -> tuple[tuple[str, str], ...]:
        """The regular ones of `skipped`."""
        return tuple(item for item in self.skipped if item in self.regular)

    @property
    def unusable(self) -> tuple[tuple[str, str], ...]:
        """The others of `skipped`."""
        return tuple(item for item in self.skipped if item not in self.regular)

    def limited(self, clips: int) -> Dataset:
        """The same dataset with its first `clips` rows."""
        partitions = {name: splits[:clips] for name, splits in self.partitions.items()}
        return replace(self, clips=self.clips[:clips], partitions=partitions)

    def clip_list_hash(self) -> str:
        """SHA-256 over ids, cuts, labels, splits, frame rates, unknowns, in order; not paths."""
        rows: list[list[Any]] = [
            [c.id, c.start, c.end, list(c.labels), c.split, *([] if c.fps is None else [c.fps])]
            for c in self.clips
        ]
        for row, clip in zip(rows, self.clips, strict=True):
            row += [{"unknown": list(clip.unknown)}] if clip.unknown else []
            row += [{"keep": [list(pair) for pair in clip.keep]}] if clip.keep else []
        return hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode()).hexdigest()
