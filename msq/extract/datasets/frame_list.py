"""SlowFast's frame lists: one row per frame, blanks between columns, labels as class numbers.

    original_vido_id video_id frame_id path labels
    46GP8 0 0 46GP8/46GP8-000001.jpg "147,92"

The misspelt header is theirs. Animal Kingdom adds a sixth column `type` and its README uses other
names; columns are found by name, in any order, and the labels may stand in quotes or not.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from msq.errors import DatasetError

ID = ("original_vido_id", "original_video_id", "clip_id")
PATH = ("path", "clip_path")
LABELS = ("labels", "action_labels")
_HEADER = "original_vido_id video_id frame_id path labels [type]"


@dataclass(slots=True)
class FrameVideo:
    """The rows of one video.

    Attributes:
        id: from the id column.
        where: its first line.
        folder: folder of its first frame, as written.
        labels: union over its frames, ascending.
        frames: its rows.
        varies: whether the labels differ between frames.
        kind: the `type` column of its first row, or None.
    """

    id: str
    where: str
    folder: str
    labels: tuple[int, ...]
    frames: int = 1
    varies: bool = False
    kind: str | None = None


@dataclass(slots=True)
class FrameList:
    """A frame list that was read.

    Attributes:
        videos: in the order of their first rows.
        rows: frames.
        skipped: (line, reason) where the policy is `skip`.
    """

    videos: dict[str, FrameVideo] = field(default_factory=dict)
    rows: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


class _Columns(NamedTuple):
    id: int
    path: int
    labels: int
    kind: int | None
    width: int


def read_frame_list(file: Path, *, classes: int, policy: str = "error") -> FrameList:
    """Read one list; a video's labels are the union over its frames, as SlowFast tests.

    Args:
        file: the list.
        classes: K; labels are 0 … K-1.
        policy: `error` raises at a row that cannot be used, `skip` lists it.

    Raises:
        DatasetError: another delimiter or header, no row, or an unusable row.
    """
    found = FrameList()
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as handle:
        columns = _columns(file, handle.readline())
        # One parse per distinct text: a list repeats each video's labels on every frame.
        parsed: dict[str, tuple[int, ...]] = {}
        for where, cells in _rows(handle, file):
            try:
                _add(found, where, cells, columns, parsed, classes)
            except ValueError as bad:
                if policy == "error":
                    raise DatasetError(
                        f"{file}, {where}: {bad}; if the file was cut off while it was copied or "
                        "extracted, extract it again (--option policy=skip goes on without the row)"
                    ) from None
                found.skipped.append((f"{file.name}, {where}", str(bad)))
    if not found.videos:
        raise DatasetError(f"{file}: expected one row per frame, found none; extract it again")
    return found


def _rows(handle: Iterator[str], file: Path) -> Iterator[tuple[str, list[str]]]:
    reader = csv.reader(handle, delimiter=" ", skipinitialspace=True)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as bad:
            raise DatasetError(f"{file}, line {reader.line_num + 1}: {bad}") from None
        while cells and not cells[-1] and len(cells) > 5:
            cells.pop()  # a trailing blank
        if any(cells):
            yield f"line {reader.line_num + 1}", cells


def _columns(file: Path, line: str) -> _Columns:
    """Where the columns stand, from the header line."""
    header = [name.strip('"').lower() for name in line.split()]

    def place(names: Sequence[str]) -> int | None:
        return next((header.index(name) for name in names if name in header), None)

    name, path, labels = place(ID), place(PATH), place(LABELS)
    other = next((c for c in ",;\t" if c in line), None)
    if name is None or path is None or labels is None or other is not None:
        why = "" if other is None else f" (its columns are split by {other!r})"
        raise DatasetError(
            f"{file}: expected blanks between the columns and the header {_HEADER!r}, found "
            f"{line.strip()[:80]!r}{why}; take the file as it comes from the archive, not as a "
            "spreadsheet saves it"
        )
    return _Columns(name, path, labels, place(("type",)), len(header))


def _add(
    found: FrameList,
    where: str,
    cells: list[str],
    columns: _Columns,
    parsed: dict[str, tuple[int, ...]],
    classes: int,
) -> None:
    """Take one row up; ValueError with the reason when it cannot be used."""
    if len(cells) != columns.width:
        raise ValueError(f"expected {columns.width} columns, found {len(cells)}")
    text = cells[columns.labels]
    labels = parsed.get(text)
    if labels is None:
        labels = parsed[text] = parse_labels(text, classes)
    found.rows += 1
    name = cells[columns.id]
    video = found.videos.get(name)
    if video is None:
        folder = PurePosixPath(cells[columns.path]).parent.as_posix()
        kind = None if columns.kind is None else cells[columns.kind]
        found.videos[name] = FrameVideo(name, where, folder, labels, kind=kind)
        return
    video.frames += 1
    if labels != video.labels:
        video.varies = True
        video.labels = tuple(sorted({*video.labels, *labels}))


def parse_labels(text: str, classes: int) -> tuple[int, ...]:
    """`"2,40"` -> (2, 40), ascending and distinct; the empty text has none.

    Raises:
        ValueError: not whole numbers, or one that no class has.
    """
    try:
        labels = sorted({int(x) for x in text.strip('" ').split(",") if x.strip()})
    except ValueError:
        raise ValueError(f"expected class numbers like 2,40, found {text!r}") from None
    if labels and not 0 <= labels[0] <= labels[-1] < classes:
        wrong = labels[-1] if labels[-1] >= classes else labels[0]
        raise ValueError(
            f"expected classes 0 to {classes - 1}, found {wrong}: are the class names those of "
            "another dataset?"
        )
    return tuple(labels)
