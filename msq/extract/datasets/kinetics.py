"""Kinetics lists, told apart by the files themselves.

`path label` without a header (SlowFast, TimeSformer), `path,label` (Open-VCLIP), and the official
CSV (`label,youtube_id,time_start,time_end,split`).

Lines are split from the right, so that paths may hold blanks and commas; labels are integers, or
names of the class file. Videos of the official CSV are `<id>_%06d_%06d.mp4` (start and end second
in YouTube's video; the file itself is not cut again), flat or in a folder of the class with blanks
or underscores, below folders of the split. Without a class file, the official CSV's classes are the
sorted names.

Oddities: `malformed`, `repeated` (lines left out), `unlabelled` (rows of the official test CSV).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from msq.errors import DatasetError
from msq.extract.datasets.annotation_text import Line, read_lines
from msq.extract.datasets.dataset import SPLIT_WORDS, Dataset, Split
from msq.extract.datasets.list_clips import list_reading
from msq.extract.datasets.list_files import (
    LIST_OPTIONS,
    ListRow,
    Rows,
    find_classes,
    find_lists,
)
from msq.extract.datasets.media_index import MediaIndex
from msq.extract.datasets.options import choice
from msq.extract.datasets.reading import Reading, make_adapter

NAME = "kinetics"
OFFICIAL = ("youtube_id", "time_start", "time_end", "split")
OPTIONS = {
    **LIST_OPTIONS,
    "delimiter": "blank or comma, between path and label; told from the file",
}
_VIDEOS = ("", "videos", "train", "val", "test", "videos_train", "videos_val", "compress")
_FORMS = "`path label`, `path,label` or the official CSV with youtube_id, time_start, time_end"


def read_kinetics(root: Path, **options: str) -> Dataset:
    """Read the lists of a folder; the arguments are those of `OPTIONS`.

    Raises:
        DatasetError: no list is there, or one is in another format, or has labels that the class
            file does not have.
        UsageError: an unknown option or value; several files could be a list.
    """
    return ADAPTER.read(Path(root), options)


def _load(root: Path, options: Mapping[str, str]) -> Reading:
    delimiter = choice(NAME, options, "delimiter", ("auto", "blank", "comma"), "auto")
    files = find_lists(
        NAME, root, options, lambda f: f.suffix in (".csv", ".txt", ".list"), "train.csv or val.csv"
    )
    found = Rows()
    named = find_classes(root, options)
    known = frozenset(() if named is None else named[1])
    for split, file in files.items():
        lines = read_lines(file, found.skipped)
        before = len(found.rows)
        if "youtube_id" in lines[0].text:
            _official(file, lines, split, found)
        else:
            _plain(file, lines, split, delimiter, known, found)
        if len(found.rows) == before:
            raise DatasetError(
                f"{file}, line {lines[0].number}: expected {_FORMS}; found {lines[0].text[:80]!r}; "
                "give --option delimiter=blank or comma if it is another one"
            )
    media = MediaIndex(root, [options["videos"]] if options.get("videos") else _VIDEOS)
    keep = options.get("policy") == "keep"
    return list_reading(NAME, found, media, named, "singlelabel", 30.0, _places, keep=keep)


def _places(row: ListRow) -> tuple[str, ...]:
    """Names under which a row's video may lie; official rows have a class folder or none."""
    if not row.labels or "/" in row.path or row.labels[0].isdecimal():
        return (row.path,)
    label = row.labels[0]
    spelled = (label, label.replace(" ", "_"))
    return (row.path, *(f"{name}/{row.path}" for name in dict.fromkeys(spelled)))


def _plain(
    file: Path,
    lines: list[Line],
    split: Split,
    delimiter: str,
    known: frozenset[str],
    found: Rows,
) -> None:
    """Lines `path label`, split from the right; a label is an integer or a known class name."""
    if lines[0].text.startswith("original_vido_id"):
        raise DatasetError(
            f"{file}: expected {_FORMS}; found a list with a line for every frame: take --dataset "
            "charades or animal-kingdom"
        )
    if delimiter == "auto":
        # A line of the other form has no integer (or no path) at its end.
        blanks = sum(len(p := t.rsplit(None, 1)) == 2 and p[1].isdecimal() for _, t in lines)
        commas = sum(len(p := t.rsplit(",", 1)) == 2 and p[1].isdecimal() for _, t in lines)
        delimiter = "comma" if commas > blanks else "blank"
    mark = "," if delimiter == "comma" else None
    for number, text in lines:
        where = f"{file.name} line {number}"
        parts = [part.strip() for part in text.rsplit(mark, 1)]
        label = parts[-1]
        if len(parts) != 2 or not parts[0] or not (label.isdecimal() or label in known):
            found.oddities["malformed"] += 1
            found.skipped.append((where, f"expected a path, a {delimiter} and a label: {text!r}"))
            continue
        found.rows.append(ListRow(where, parts[0], (label,), split))


def _official(file: Path, lines: list[Line], split: Split, found: Rows) -> None:
    """The official CSV, by header name; its split column decides where it has one."""
    reader = csv.reader(line.text for line in lines)
    header = [cell.strip() for cell in next(reader)]
    if missing := [name for name in OFFICIAL[:3] if name not in header]:
        raise DatasetError(
            f"{file}: expected comma-separated columns label, {', '.join(OFFICIAL)}, found no "
            f"{missing[0]} in {lines[0].text[:80]!r}"
        )
    for line, cells in zip(lines[1:], reader, strict=False):
        where = f"{file.name} line {line.number}"
        record = dict(zip(header, (cell.strip() for cell in cells), strict=False))
        named = SPLIT_WORDS.get(record.get("split", "").lower(), split)
        try:
            start, end = (int(float(record[key])) for key in OFFICIAL[1:3])
            path = f"{record['youtube_id']}_{start:06d}_{end:06d}.mp4"
        except (KeyError, ValueError, OverflowError):
            found.oddities["malformed"] += 1
            found.skipped.append((where, f"expected an id and two times: {line.text[:80]!r}"))
            continue
        label = record.get("label", "")
        found.oddities["unlabelled"] += not label
        found.rows.append(ListRow(where, path, (label,) if label else (), named))


ADAPTER = make_adapter(
    NAME,
    "Kinetics, and any list in the form of SlowFast, TimeSformer or Open-VCLIP",
    "train.csv, val.csv and/or test.csv (path and label, or the official CSV), and the videos",
    "the lists are public; the videos are from YouTube",
    OPTIONS,
    _load,
    keeps=True,
)
