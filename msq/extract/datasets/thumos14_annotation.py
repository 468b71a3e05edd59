"""The annotation of THUMOS14: 20 class files of each part, the Ambiguous file, or one table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from msq.errors import DatasetError
from msq.extract.datasets.annotation_text import (
    Skipped,
    first_folder,
    read_lines,
    refuse_cut_off,
    to_seconds,
)
from msq.extract.datasets.dataset import Split
from msq.extract.datasets.segments import Segment, segment_id

CLASSES = (
    *("BaseballPitch", "BasketballDunk", "Billiards", "CleanAndJerk", "CliffDiving"),
    *("CricketBowling", "CricketShot", "Diving", "FrisbeeCatch", "GolfSwing", "HammerThrow"),
    *("HighJump", "JavelinThrow", "LongJump", "PoleVault", "Shotput", "SoccerPenalty"),
    *("TennisSwing", "ThrowDiscus", "VolleyballSpiking"),
)
AMBIGUOUS = "Ambiguous"
_PARTS = {"test": "test", "validation": "val"}
_FOLDERS = {
    part: (
        "",
        *("annotation", "annotations", f"annotations/{short}", f"annotations_{short}"),
        *(f"annotation_{short}", f"annotation/{short}"),
        *(f"TH14_Temporal_annotations_{part}", f"TH14_Temporal_annotations_{part}/annotation"),
        f"TH14_Temporal_Annotations_{part.capitalize()}/annotations/annotation",
    )
    for part, short in _PARTS.items()
}


@dataclass
class Part:
    """The segments of the test or the validation set."""

    segments: list[Segment] = field(default_factory=list)
    skipped: Skipped = field(default_factory=list)
    regular: Skipped = field(default_factory=list)
    oddities: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)


def read_part(root: Path, part: str, split: Split) -> Part | None:
    """Segments of the 20 class files of a part, in the order of the classes; None where none is.

    Args:
        root: of the dataset; the folder of the class files is looked for below it.
        part: `test` or `validation`.
        split: of its clips.

    Raises:
        DatasetError: some class files are there and others not, or one is of another dataset.
    """
    suffix = f"_{_PARTS[part]}.txt"
    known = "|".join((*CLASSES, AMBIGUOUS))
    folder = first_folder(root, _FOLDERS[part], f"({known}){suffix}")
    if folder is None:
        return None
    there = {p.name.removesuffix(suffix) for p in folder.glob(f"*{suffix}")}
    if strange := sorted(there - {*CLASSES, AMBIGUOUS}):
        raise DatasetError(
            f"{folder / (strange[0] + suffix)}: expected a class of THUMOS14 ({CLASSES[0]}, …), "
            f"found {strange[0]!r}: is it the class file of another dataset? move it away"
        )
    if gone := [name for name in CLASSES if name not in there]:
        raise DatasetError(
            f"{folder}: expected {len(CLASSES)} class files <Class>{suffix}, found "
            f"{len(CLASSES) - len(gone)}; {gone[0]}{suffix} is not there: unpack the archive again"
        )
    _check_class_list(folder / "detclasslist.txt")
    found = Part()
    for label, name in enumerate(CLASSES):
        _read_class_file(folder / f"{name}{suffix}", label, split, found)
    if AMBIGUOUS in there:
        _read_ambiguous(folder / f"{AMBIGUOUS}{suffix}", found)
    return found


def read_validation(root: Path, *, required: bool) -> Part | None:
    """The validation set: its class files, or the table `val_Annotation.csv`; None without both.

    Raises:
        DatasetError: neither is there and the set is required; or as `read_part`.
    """
    part = read_part(root, "validation", "train")
    if part is None:
        folder = first_folder(root, _FOLDERS["validation"], "val_Annotation.csv")
        part = None if folder is None else _read_table(folder / "val_Annotation.csv")
    if part is None and required:
        raise DatasetError(
            f"{root}: expected the validation annotations ({CLASSES[0]}_val.txt … in annotation/, "
            "or val_Annotation.csv) for --option train=validation, found none"
        )
    return part


def _check_class_list(file: Path) -> None:
    """Refuse the class list of another dataset."""
    if not file.is_file():
        return
    names = tuple(line.text.split()[-1] for line in read_lines(file))
    if names != CLASSES:
        wrong = next((name for name in names if name not in CLASSES), f"{len(names)} names")
        raise DatasetError(
            f"{file}: expected the 20 classes of THUMOS14, found {wrong}: is it the class file of "
            "another dataset?"
        )


def _read_class_file(file: Path, label: int, split: Split, part: Part) -> None:
    before = len(part.segments)
    lines = read_lines(file, part.skipped)
    for line in lines:
        number, text = line
        where = f"{file.name} line {number}"
        try:
            video, start, end = text.split()
            segment = Segment(video, to_seconds(start), to_seconds(end), label, split, where)
        except ValueError:
            refuse_cut_off(file, line, lines, "a video, start and end")
            part.oddities["malformed"] += 1
            part.skipped.append((where, f"expected a video, start and end, found {text[:60]!r}"))
            continue
        part.segments.append(segment)
        part.seen.add(segment.video)
    if len(part.segments) == before:
        raise DatasetError(
            f"{file}, line {lines[0].number}: expected a video, start and end separated by blanks "
            f"(`video_test_0000324  49.2 53.5`), found {lines[0].text[:60]!r}; take the file as "
            "published"
        )


def _read_ambiguous(file: Path, part: Part) -> None:
    """Lines that the annotators could not decide on: left out, one by one."""
    videos = set()
    for number, text in read_lines(file, part.skipped):
        fields = text.split()
        videos.add(fields[0])
        try:
            item = segment_id(fields[0], float(fields[1]), float(fields[2]))
        except (IndexError, ValueError):
            item = f"{file.name} line {number}"
        part.oddities["ambiguous"] += 1
        part.regular.append((item, f"{file.name} line {number}: ambiguous, in no class"))
    part.oddities["videos_without_class"] = len(videos - part.seen)


def _read_table(file: Path) -> Part:
    """Segments of a `video,type,type_idx,start,end,…` table, which names classes, not UCF ids."""
    part = Part()
    ambiguous: list[tuple[str, str]] = []
    header, *rows = read_lines(file, part.skipped)
    columns = [cell.strip() for cell in header.text.split(",")]
    if missing := [c for c in ("video", "type", "start", "end") if c not in columns]:
        raise DatasetError(
            f"{file}: expected comma-separated columns video, type, start and end, found no "
            f"{missing[0]} in {header.text[:60]!r}; take the file as published"
        )
    for line in rows:
        number, text = line
        where = f"{file.name} line {number}"
        row = dict(zip(columns, (cell.strip() for cell in text.split(",")), strict=False))
        try:
            times = to_seconds(row["start"]), to_seconds(row["end"])
            if row["type"] == AMBIGUOUS:
                ambiguous.append((row["video"], where))
                item = segment_id(row["video"], *times)
                part.regular.append((item, f"{where}: ambiguous, in no class"))
                continue
            label = CLASSES.index(row["type"])
        except (KeyError, ValueError):
            refuse_cut_off(file, line, rows, "a class of THUMOS14 and times")
            part.oddities["malformed"] += 1
            part.skipped.append((where, f"expected a class of THUMOS14 and times: {text[:60]!r}"))
            continue
        part.segments.append(Segment(row["video"], *times, label, "train", where))
        part.seen.add(row["video"])
    part.oddities["ambiguous"] = len(ambiguous)
    part.oddities["videos_without_class"] = len({v for v, _ in ambiguous} - part.seen)
    if not part.segments:
        raise DatasetError(
            f"{file}: expected segments of THUMOS14 classes ({CLASSES[0]}, …), found none: is it "
            "the table of another dataset? take the file as published"
        )
    return part
