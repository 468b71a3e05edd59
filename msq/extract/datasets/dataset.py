"""What every adapter produces: a Dataset of Clips."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

Split = Literal["train", "val", "test"]
Task = Literal["multilabel", "singlelabel"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


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
    """

    id: str
    path: Path
    start: float | None
    end: float | None
    labels: tuple[int, ...]
    split: Split
    intervals: tuple[tuple[int, float, float], ...] = ()
    fps: float | None = None


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
    """

    name: str
    classes: tuple[str, ...]
    task: Task
    clips: tuple[Clip, ...]
    metric: str
    skipped: tuple[tuple[str, str], ...] = ()

    def limited(self, clips: int) -> Dataset:
        """The same dataset with its first `clips` rows."""
        return replace(self, clips=self.clips[:clips])

    def clip_list_hash(self) -> str:
        """SHA-256 over ids, cuts, labels, splits and frame rates, in order; paths are left out."""
        rows = [
            [c.id, c.start, c.end, list(c.labels), c.split, *([] if c.fps is None else [c.fps])]
            for c in self.clips
        ]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode()).hexdigest()
