"""Charades (Sigurdsson et al. 2016): official CSV files, or SlowFast's frame lists.

What is odd in the files, and what becomes of it (counted by `msq datasets check`):

- `end_past_length`: an interval ends after the video's length. Kept as written.
- `reversed`: an interval ends before it starts. Its class counts for the video (the official
  labels ignore times); no frame lies in it.
- `start_past_length`: an interval starts at the video's end or later. Likewise.
- `repeated_class`: intervals whose class another interval of the video has already; one label.
- unlabelled videos (no actions) stay, as rows of zeros; `--option unlabelled=skip` leaves them out,
  as the authors' loader does. The official scorer ranks them last whatever their scores are.
- `subjects_in_both`: people in train and test (none in the official files).
- `empty_frame_folders`: clips whose frame folder holds nothing.
- `labels_vary` (frame lists): videos whose labels differ between frames; the label is the union.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from msq.errors import DatasetError
from msq.extract.datasets.adapter import Adapter, Survey
from msq.extract.datasets.annotation_text import positive
from msq.extract.datasets.dataset import Clip, Dataset, Split
from msq.extract.datasets.frame_list import read_frame_list
from msq.extract.datasets.locate import Kind, Media, find_file, require_file, require_root
from msq.extract.datasets.options import check_options, choice
from msq.extract.datasets.survey import survey_media

FOLDERS = (
    "",
    "Charades",
    "Charades/Charades",
    "annotations",
    "frame_lists",
    "Charades/frame_lists",
)
NEEDS = (
    "Charades_v1_train.csv, Charades_v1_test.csv and Charades_v1_classes.txt (Charades.zip); "
    "Charades_v1/ID.mp4, Charades_v1_480/ID.mp4, ID.mp4 or Charades_v1_rgb/ID/ID-000001.jpg"
)
CLASSES_FILE = "Charades_v1_classes.txt"
REMEDY = "unpack Charades.zip there, or name its folder as --root"
COLUMNS = ("id", "actions", "length")
PUBLISHED = {
    **{"classes": 157, "train": 7985, "train/unlabelled": 174, "test": 1863},
    **{"test/unlabelled": 49, "end_past_length": 19623},
    **{"end_past_length_train": 14596, "end_past_length_test": 5027, "reversed": 7},
    **{"start_past_length": 5, "subjects_in_both": 0},
}
OPTIONS = {
    "annotation": "csv (official), frames (SlowFast's train.csv, val.csv) or auto (default)",
    "media": "auto (default: videos before frame folders), video or frames",
    "unlabelled": "keep (default: rows of zeros) or skip",
    "policy": "error (default) or skip: what becomes of a row that cannot be used",
    "fps": "frames per second of frame folders (Charades_v1_rgb: 24), to give frames their times",
}

Interval = tuple[int, float, float]


class _Row(NamedTuple):
    """One usable row."""

    id: str
    split: Split
    labels: tuple[int, ...]
    intervals: tuple[Interval, ...] = ()
    length: float | None = None
    subject: str = ""


@dataclass
class _Annotation:
    """Everything the annotation files say."""

    classes: tuple[str, ...]
    rows: dict[str, _Row] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    oddities: Counter[str] = field(default_factory=Counter)

    def take(self, file: Path, where: str, row: _Row, policy: str) -> None:
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


def read_charades(
    root: Path,
    *,
    annotation: str = "auto",
    media: str = "auto",
    unlabelled: str = "keep",
    policy: str = "error",
    fps: float | str | None = None,
) -> Dataset:
    """Read Charades; labels are those of the whole video, `intervals` are as written.

    Args:
        root: folder with the official files, see `NEEDS`.
        annotation: `csv`, `frames` or `auto`.
        media: `auto`, `video` or `frames`.
        unlabelled: `keep` or `skip`.
        policy: `error` or `skip`, for rows that cannot be used.
        fps: frames per second of frame folders; without it their frames have no times.

    Raises:
        DatasetError: a file is missing, cut off, of another format or of another dataset.
        UsageError: an option has another value.
    """
    options = {"annotation": annotation, "media": media, "policy": policy}
    root = require_root(root, NEEDS)
    found = _annotation(root, options)
    options["unlabelled"] = unlabelled
    return _dataset(root, found, options if fps is None else {**options, "fps": str(fps)})[0]


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


def read_charades_lengths(root: Path) -> dict[str, float]:
    """Official duration in seconds of every video: frame rate of a frame folder = files / it.

    Raises:
        DatasetError: as `read_charades`.
    """
    root = require_root(root, NEEDS)
    rows = _annotation(root, {"annotation": "csv"}).rows
    return {row.id: row.length for row in rows.values() if row.length is not None}


def media_of(root: Path, media: str) -> Media:
    """Where videos and frame folders may be."""
    named: tuple[tuple[str, Kind], ...] = tuple(
        (f"{base}{folder}", "video")
        for folder in ("Charades_v1", "Charades_v1_480", "videos")
        for base in ("", "Charades/")
    )
    videos = (*named, ("", "video"))
    frames: tuple[tuple[str, Kind], ...] = (
        ("Charades_v1_rgb", "frames"),
        ("Charades/Charades_v1_rgb", "frames"),
        ("", "frames"),
    )
    return Media(root, {"video": videos, "frames": frames}.get(media, videos + frames))


def _annotation(root: Path, options: Mapping[str, str]) -> _Annotation:
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
    found = _Annotation(read_charades_classes(root))
    splits: tuple[Split, ...] = ("train", "test")
    for file, split in zip(files, splits, strict=True):
        if kind == "csv":
            _read_csv(file, split, found, policy)
        else:
            _read_frames(file, split, found, policy)
    _count_subjects(found)
    return found


def _read_frames(file: Path, split: Split, found: _Annotation, policy: str) -> None:
    listed = read_frame_list(file, classes=len(found.classes), policy=policy)
    found.skipped += listed.skipped
    for video in listed.videos.values():
        found.oddities["labels_vary"] += video.varies
        found.take(file, video.where, _Row(video.id, split, video.labels), policy)


def _read_csv(file: Path, split: Split, found: _Annotation, policy: str) -> None:
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


def _row(record: Mapping[str | None, str | list[str] | None], split: Split, classes: int) -> _Row:
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
    return _Row(name, split, labels, intervals, length, str(record.get("subject") or ""))


def _interval(text: str, classes: int) -> Interval:
    match = re.fullmatch(r"c(\d{3})\s+([\d.]+)\s+([\d.]+)", text.strip())
    if match is None:
        raise ValueError(f"expected actions like 'c092 11.90 21.20', found {text.strip()!r}")
    if int(match[1]) >= classes:
        raise ValueError(
            f"action c{match[1]} is not among the {classes} classes of {CLASSES_FILE}: is that "
            "the class file of another dataset, or half of it?"
        )
    return int(match[1]), float(match[2]), float(match[3])


def _count(row: _Row, oddities: Counter[str]) -> None:
    length = row.length if row.length is not None else float("inf")
    past = sum(1 for _, _, end in row.intervals if end > length)
    oddities["end_past_length"] += past
    oddities[f"end_past_length_{row.split}"] += past
    oddities["reversed"] += sum(1 for _, start, end in row.intervals if end < start)
    oddities["start_past_length"] += sum(1 for _, start, _ in row.intervals if start >= length)
    oddities["repeated_class"] += len(row.intervals) - len(row.labels)


def _count_subjects(found: _Annotation) -> None:
    people = {
        s: {row.subject for row in found.rows.values() if row.split == s and row.subject}
        for s in ("train", "test")
    }
    if people["train"] or people["test"]:
        found.oddities["subjects_in_both"] = len(people["train"] & people["test"])


def _dataset(root: Path, found: _Annotation, options: Mapping[str, str]) -> tuple[Dataset, Media]:
    """The clips, with the paths they have or should have."""
    unlabelled = choice("charades", options, "unlabelled", ("keep", "skip"), "keep")
    media = media_of(
        root, choice("charades", options, "media", ("auto", "video", "frames"), "auto")
    )
    fps = positive("charades", options, "fps")
    clips: list[Clip] = []
    skipped = list(found.skipped)
    for row in found.rows.values():
        if not row.labels and unlabelled == "skip":
            skipped.append((row.id, "no actions, and --option unlabelled=skip"))
            continue
        path = media.path(row.id)
        clips.append(Clip(row.id, path, None, None, row.labels, row.split, row.intervals, fps))
    data = Dataset("charades", found.classes, "multilabel", tuple(clips), "map", tuple(skipped))
    return data, media


def _read(root: Path, options: Mapping[str, str]) -> Dataset:
    check_options("charades", options, OPTIONS)
    return read_charades(root, **options)


def _survey(root: Path, options: Mapping[str, str]) -> Survey:
    check_options("charades", options, OPTIONS)
    root = require_root(root, NEEDS)
    found = _annotation(root, options)
    data, media = _dataset(root, found, options)
    return survey_media(
        "charades",
        data,
        media,
        oddities=found.oddities,
        published=PUBLISHED,
        notes=(
            f"{sum(len(c.intervals) for c in data.clips)} intervals (published: 66500)",
            "headline metric: macro mAP over 157 classes, unlabelled videos ranked last "
            "(`map`; `map_charades` with the official scorer's stable ties)",
            "there is no separate validation set; papers test on `test`",
        ),
    )  # fmt: skip


ADAPTER = Adapter(
    name="charades",
    title="Charades, 157 household actions (Sigurdsson et al. 2016)",
    needs=NEEDS,
    access=(
        "direct download from prior.allenai.org/projects/charades; the licence in license.txt "
        "ships with the data (non-commercial)"
    ),
    options=OPTIONS,
    read=_read,
    survey=_survey,
)
