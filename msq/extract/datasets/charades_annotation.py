"""The annotation files of Charades row by row: official CSV, SlowFast's frame lists, classes."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from msq.errors import DatasetError
from msq.extract.datasets.dataset import Split
from msq.extract.datasets.frame_list import read_frame_list
from msq.extract.datasets.locate import find_file, require_file
from msq.extract.datasets.options import choice

FOLDERS = (
    "",
    "Charades",
    "Charades/Charades",
    "annotations",
    "frame_lists",
    "Charades/frame_lists",
)
CLASSES_FILE = "Charades_v1_classes.txt"
REMEDY = "unpack Charades.zip there, or name its folder as --root"
COLUMNS = ("id", "actions", "length")

Interval = tuple[int, float, float]


class Row(NamedTuple):
    """One usable row."""

    id: str
    split: Split
    labels: tuple[int, ...]
    intervals: tuple[Interval, ...] = ()
    length: float | None = None
    subject: str = ""


@dataclass
class Annotation:
    """Everything the annotation files say."""

    classes: tuple[str, ...]
    rows: dict[str, Row] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    oddities: Counter[str] = field(default_factory=Counter)

    def take(self, file: Path, where: str, row: Row, policy: str) -> None:
        """Add a row; an id that is there already is an error, or skipped."""
        if row.id in self.rows:
            self.refuse(file, where, f"duplicate id {row.id!r}", policy)
        else:
            self.rows[row.id] = row

    def refuse(self, file: Path, where: str, reason: str, policy: str) -> None:
        """Raise, or list the row as skipped."""
        if policy == "error":
            raise DatasetError(
                f"{file}, {where}: {reason}; if the file was cut off, extract Charades.zip again "
                "(--option policy=skip goes on without the row)"
            )
        self.skipped.append((f"{file.name}, {where}", reason))


def read_charades_classes(root: Path) -> tuple[str, ...]:
    """The 157 names of `Charades_v1_classes.txt` (`c000 Holding some clothes`), in order.

    Raises:
        DatasetError: the file is missing, or its lines are of another form.
    """
    file = require_file(Path(root), CLASSES_FILE, FOLDERS, REMEDY)
    names: list[str] = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        match = re.fullmatch(r"c(\d{3})\s+(\S.*)", line.strip())
        if match is None or int(match[1]) != len(names):
            raise DatasetError(
                f"{file}, line {number}: expected 'c{len(names):03d} <name>', found "
                f"{line.strip()[:60]!r}: this is not the class file of Charades; {REMEDY}"
            )
        names.append(match[2])
    if not names:
        raise DatasetError(f"{file}: expected 157 class names, found none; {REMEDY}")
    return tuple(names)


def read_annotation(root: Path, options: Mapping[str, str]) -> Annotation:
    """Everything the annotation files below a root say.

    Raises:
        DatasetError: a file is missing, cut off, of another format or of another dataset.
        UsageError: `annotation` or `policy` of the options has a value that cannot be.
    """
    kind = choice("charades", options, "annotation", ("auto", "csv", "frames"), "auto")
    policy = choice("charades", options, "policy", ("error", "skip"), "error")
    if kind == "auto":
        official = any(find_file(root, f"Charades_v1_{s}.csv", FOLDERS) for s in ("train", "test"))
        lists = find_file(root, "val.csv", FOLDERS) is not None
        kind = "frames" if lists and not official else "csv"
    remedy = REMEDY if kind == "csv" else "take SlowFast's frame lists train.csv and val.csv"
    names = ("Charades_v1_train.csv", "Charades_v1_test.csv")
    names = names if kind == "csv" else ("train.csv", "val.csv")
    files = [require_file(root, name, FOLDERS, remedy) for name in names]
    found = Annotation(read_charades_classes(root))
    splits: tuple[Split, ...] = ("train", "test")
    for file, split in zip(files, splits, strict=True):
        if kind == "csv":
            _read_csv(file, split, found, policy)
        else:
            _read_frames(file, split, found, policy)
    _count_subjects(found)
    return found


def _read_frames(file: Path, split: Split, found: Annotation, policy: str) -> None:
    listed = read_frame_list(file, classes=len(found.classes), policy=policy)
    found.skipped += listed.skipped
    for video in listed.videos.values():
        found.oddities["labels_vary"] += video.varies
        found.take(file, video.where, Row(video.id, split, video.labels), policy)


def _read_csv(file: Path, split: Split, found: Annotation, policy: str) -> None:
    rows = 0
    for where, record in _records(file):
        rows += 1
        try:
            row = _row(record, split, len(found.classes))
        except ValueError as bad:
            found.refuse(file, where, str(bad), policy)
            continue
        found.take(file, where, row, policy)
        _count(row, found.oddities)
    if not rows:
        raise DatasetError(f"{file}: expected one row per video, found none; {REMEDY}")


def _records(file: Path) -> Iterator[tuple[str, dict[str | None, str | list[str] | None]]]:
    """(line, record) of an official CSV; its line ends may be CRLF or LF."""
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as handle:
        reader = csv.DictReader(handle, strict=True)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            shown = ",".join(reader.fieldnames or ())[:80] or "an empty file"
            raise DatasetError(
                f"{file}: expected a header with id, …, actions, length between commas, found "
                f"{shown!r}; take the file as it comes from Charades.zip"
            )
        start = reader.line_num + 1
        while True:
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as bad:
                raise DatasetError(
                    f"{file}, line {start}: {bad}: the file is cut off; extract Charades.zip again"
                ) from None
            yield f"line {start}", record
            start = reader.line_num + 1


def _row(record: Mapping[str | None, str | list[str] | None], split: Split, classes: int) -> Row:
    """One record; ValueError with the reason when it cannot be used."""
    if None in record or any(value is None for value in record.values()):
        extra = record.get(None) or ()
        expected = sum(1 for key in record if key is not None)
        count = sum(1 for k, v in record.items() if k is not None and v is not None) + len(extra)
        raise ValueError(f"expected {expected} columns, found {count}")
    name = str(record["id"]).strip()
    if not name:
        raise ValueError("expected an id, found none")
    try:
        length = float(str(record["length"]))
    except ValueError:
        raise ValueError(f"expected a length in seconds, found {record['length']!r}") from None
    intervals = tuple(
        _interval(text, classes) for text in str(record["actions"]).split(";") if text.strip()
    )
    labels = tuple(sorted({c for c, _, _ in intervals}))
    return Row(name, split, labels, intervals, length, str(record.get("subject") or ""))


def _interval(text: str, classes: int) -> Interval:
    match = re.fullmatch(r"c(\d{3})\s+([\d.]+)\s+([\d.]+)", text.strip())
    if match is None:
        raise ValueError(f"expected actions like 'c092 11.90 21.20', found {text.strip()!r}")
    if int(match[1]) >= classes:
        raise ValueError(
            f"expected an action of {CLASSES_FILE}, found c{match[1]}: c{match[1]} is not among "
            f"the {classes} classes there: is it the class file of another dataset, or half of it?"
        )
    return int(match[1]), float(match[2]), float(match[3])


def _count(row: Row, oddities: Counter[str]) -> None:
    length = row.length if row.length is not None else float("inf")
    past = sum(1 for _, _, end in row.intervals if end > length)
    oddities["end_past_length"] += past
    oddities[f"end_past_length_{row.split}"] += past
    oddities["reversed"] += sum(1 for _, start, end in row.intervals if end < start)
    oddities["start_past_length"] += sum(1 for _, start, _ in row.intervals if start >= length)
    oddities["repeated_class"] += len(row.intervals) - len(row.labels)


def _count_subjects(found: Annotation) -> None:
    people = {
        s: {row.subject for row in found.rows.values() if row.split == s and row.subject}
        for s in ("train", "test")
    }
    if people["train"] or people["test"]:
        found.oddities["subjects_in_both"] = len(people["train"] & people["test"])
