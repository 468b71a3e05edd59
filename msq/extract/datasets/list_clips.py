"""The usable lines of lists -> clips, and what becomes of lines that name a clip again."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from msq.extract.datasets.annotation_text import Skipped
from msq.extract.datasets.dataset import Clip, Dataset, Split, Task
from msq.extract.datasets.kept_rows import keep_rows
from msq.extract.datasets.list_files import ListRow, Rows, number_labels
from msq.extract.datasets.manifest_row import Row
from msq.extract.datasets.media_index import MediaIndex, Place, without_suffix
from msq.extract.datasets.reading import Reading
from msq.extract.datasets.survey import count_splits


def list_reading(
    name: str,
    found: Rows,
    media: MediaIndex,
    named: tuple[Path, tuple[str, ...]] | None,
    task: Task | None,
    fps: float,
    places: Callable[[ListRow], tuple[str, ...]],
    notes: Sequence[str] = (),
    *,
    keep: bool = False,
) -> Reading:
    """Clips of all usable lines.

    Args:
        name: of the dataset.
        found: the lines.
        media: where to look for their paths.
        named: class file and names.
        task: None takes multi-label where any row has two labels.
        fps: with which parts of frame folders are cut.
        places: the names under which a row's video may lie, the first as written.
        notes: for the survey.
        keep: the policy `keep`, see `keep_rows`; else the first line of an id counts.
    """
    if keep:
        found.rows = _without_strange(found, named)
    classes, number = number_labels(found.rows, named)
    remedy = ""
    if task is None:
        remedy = "; --option task=multilabel joins them"
        task = "multilabel" if any(len(r.labels) > 1 for r in found.rows) else "singlelabel"
    shared = _shared_folder(found.rows)
    rows = [
        _row(row, shared, media.find(*places(row)), [classes[number(x)] for x in row.labels], fps)
        for row in found.rows
    ]
    found.oddities["repeated"] += len(rows) - len({row.id for row in rows})
    kept: Skipped = []
    if keep:
        made = keep_rows(rows, None, "", task, remedy)
        rows, kept = made.rows, made.changes
        found.skipped += made.skipped
    else:
        rows = _distinct(rows, found.skipped)
    clips = _clips(rows, classes, fps)
    if named is None and classes and classes[0] == "class 0":
        notes = (
            *notes,
            "no file of class names: classes are called `class 0` …, which no text "
            "encoder understands; name one with --option classes=FILE",
        )
    metric = "map" if task == "multilabel" else "top1"
    return Reading(
        Dataset(name, classes, task, clips, metric, tuple(found.skipped), kept=tuple(kept)),
        count_splits(clips),
        media.missing,
        found.oddities,
        {},
        tuple(notes),
    )


def _without_strange(found: Rows, named: tuple[Path, tuple[str, ...]] | None) -> list[ListRow]:
    """The lines without those whose label is no class of the file; all, where none has a class.

    A number past the last class stays: it says that the file is another dataset's.
    """
    if named is None:
        return found.rows
    known = {*named[1]}
    fit = [row for row in found.rows if all(x in known or x.isdecimal() for x in row.labels)]
    if not any(row.labels for row in fit):
        return found.rows
    found.skipped += [
        (row.where, f"unknown label {label!r}: not in {named[0]}")
        for row in found.rows
        for label in row.labels
        if not (label in known or label.isdecimal())
    ]
    return fit


def _shared_folder(rows: Sequence[ListRow]) -> str:
    """The folder that all absolute paths lie in: a place on some machine, and no part of ids."""
    folders = {os.path.dirname(row.path) for row in rows if os.path.isabs(row.path)}
    return os.path.commonpath(folders) if folders else ""


def _row(row: ListRow, shared: str, place: Place, labels: list[str], fps: float) -> Row:
    """A line with its id, its file and its labels as names of classes."""
    path = os.path.relpath(row.path, shared) if os.path.isabs(row.path) else row.path
    identity, start, end = without_suffix(path), None, None
    if row.frames is not None:
        first, length = row.frames
        identity += f"#f{first}-{first + length}"
        # Half a frame early at both ends, so that no rounding takes or loses a picture.
        start, end = max(0.0, (first - 0.5) / fps), (first + length - 0.5) / fps
    names = tuple(dict.fromkeys(labels))
    return Row(row.where, identity, None, place.path, start, end, names, row.split)


def _distinct(rows: Sequence[Row], skipped: Skipped) -> list[Row]:
    """The first line of each id; the others are skipped."""
    first: dict[str, Row] = {}
    for row in rows:
        if row.id in first:
            skipped.append((row.where, f"{row.id} is in {first[row.id].split} already"))
        else:
            first[row.id] = row
    return list(first.values())


def _clips(rows: Sequence[Row], classes: Sequence[str], fps: float) -> tuple[Clip, ...]:
    index = {name: k for k, name in enumerate(classes)}
    return tuple(
        Clip(
            row.id,
            row.path,
            row.start,
            row.end,
            tuple(sorted(index[label] for label in row.labels)),
            cast("Split", row.split),
            fps=None if row.start is None else fps,
        )
        for row in rows
    )
