"""The annotation files of Animal Kingdom, in their three forms; see `animal_kingdom`."""

from __future__ import annotations

import csv
import importlib.util
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from msq.errors import DatasetError
from msq.extract.datasets.animal_kingdom_sheets import (
    judge_pairs,
    read_classes_sheet,
    read_metadata_sheet,
)
from msq.extract.datasets.dataset import Split
from msq.extract.datasets.frame_list import parse_labels, read_frame_list
from msq.extract.datasets.locate import find_file, require_file
from msq.extract.datasets.manifest import read_classes
from msq.extract.datasets.options import choice

NAME = "animal-kingdom"
BASES = ("", "action_recognition", "AnimalKingdom/action_recognition",
         "Animal_Kingdom/action_recognition")  # fmt: skip
FOLDERS = tuple(
    f"{base}/{folder}".strip("/") for base in BASES for folder in ("", "annotation", "dataset")
)
METADATA = "AR_metadata.xlsx"
CLASSES = 140
REMEDY = "put the annotation files of action_recognition there, or name their folder as --root"
FORMS = {
    "metadata": (METADATA,),
    "light": ("train_light.csv", "val_light.csv"),
    "frames": ("train.csv", "val.csv"),
}
SPLITS_OF_FILES: tuple[Split, ...] = ("train", "test")
KINDS: Mapping[str, Split] = {"train": "train", "test": "test", "val": "test"}


@dataclass
class Annotation:
    """Everything the annotation files say."""

    classes: tuple[str, ...]
    form: str = ""
    clips: dict[str, tuple[Split, tuple[int, ...]]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    oddities: Counter[str] = field(default_factory=Counter)

    def take(
        self, file: Path, where: str, name: str, split: Split, text: str, policy: str
    ) -> tuple[int, ...] | None:
        """Add one clip; its labels, or None where the row is skipped."""
        try:
            labels = parse_labels(text, len(self.classes))
            if not name:
                raise ValueError("expected a video id, found none")
            if name in self.clips:
                raise ValueError(f"duplicate id {name!r}")
        except ValueError as bad:
            if policy == "error":
                raise DatasetError(
                    f"{file}, {where}: {bad}; if the file was cut off, download it again "
                    "(--option policy=skip goes on without the row)"
                ) from None
            self.skipped.append((f"{file.name}, {where}", str(bad)))
            return None
        self.clips[name] = (split, labels)
        self.oddities["repeated_labels"] += len(list(filter(None, text.split(",")))) - len(labels)
        return labels


def read_annotation(root: Path, options: Mapping[str, str]) -> Annotation:
    """Read the annotation of a folder in the form that the options name, or the first there.

    Raises:
        DatasetError: a file or openpyxl is missing, or a file is cut off, of another format or of
            another dataset.
        UsageError: an option has another value.
    """
    form = choice(NAME, options, "annotation", ("auto", *FORMS), "auto")
    policy = choice(NAME, options, "policy", ("error", "skip"), "error")
    if form == "auto":
        there = [f for f, names in FORMS.items() if any(find_file(root, n, FOLDERS) for n in names)]
        if len(there) > 1 and importlib.util.find_spec("openpyxl") is None:
            there = [f for f in there if f != "metadata"]
        form = there[0] if there else "metadata"
    files = [require_file(root, name, FOLDERS, REMEDY) for name in FORMS[form]]
    classes, errors = read_class_names(root, options.get("classes"))
    found = Annotation(classes, form)
    found.oddities["label_error_cells"] = errors
    if form == "metadata":
        _read_metadata(files[0], found, policy)
    else:
        read = _read_light if form == "light" else _read_frames
        for file, split in zip(files, SPLITS_OF_FILES, strict=True):
            read(file, split, found, policy)
    return found


def read_class_names(root: Path, classes: Path | str | None) -> tuple[tuple[str, ...], int]:
    """Class names, and how many of their numbers are error cells."""
    if classes is not None:
        names = read_classes(Path(classes))
        _check_names(Path(classes), names, find_file(root, METADATA, FOLDERS))
        return names, 0
    remedy = f"{REMEDY}; or give the class names with --option classes=FILE"
    found = read_classes_sheet(require_file(root, METADATA, FOLDERS, remedy))
    return found.names, found.error_cells


def _check_names(file: Path, names: tuple[str, ...], workbook: Path | None) -> None:
    """Refuse the class file of another dataset, as far as it can be told.

    Raises:
        DatasetError: it has numbers as those of Charades and UCF101 have, or not as many names as
            the workbook beside it.
    """
    remedy = f"is it the class file of another dataset? Give the {CLASSES} names of "
    remedy += "Animal Kingdom, one a line, in the order of their numbers"
    if all(re.match(r"c?\d+[\s,]", name) for name in names):
        raise DatasetError(f"{file}: expected a class name per line, found {names[0]!r}: {remedy}")
    if workbook is None or importlib.util.find_spec("openpyxl") is None:
        return
    expected = len(read_classes_sheet(workbook).names)
    if len(names) != expected:
        raise DatasetError(
            f"{file}: expected {expected} class names, as {workbook.name} has, found {len(names)}: "
            f"{remedy}"
        )


def _read_metadata(file: Path, found: Annotation, policy: str) -> None:
    number = {name.casefold(): k for k, name in enumerate(found.classes)}
    for row in read_metadata_sheet(file):
        split = KINDS.get(row.kind.lower())
        if split is None:
            raise DatasetError(
                f"{file}, {row.where}: expected type train or test, found {row.kind!r}"
            )
        labels = found.take(file, row.where, row.id, split, row.labels, policy)
        if labels is not None:
            verdict = judge_pairs(row, labels, number)
            found.oddities["animal_actions_disagree"] += verdict == "disagree"
            found.oddities["animal_actions_unreadable"] += verdict == "unreadable"
    if not found.clips:
        raise DatasetError(f"{file}, sheet AR: expected one row per clip, found none")


def _read_light(file: Path, split: Split, found: Annotation, policy: str) -> None:
    before = len(found.clips)
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as handle:
        reader = csv.reader(handle, delimiter=";")
        header = [cell.strip() for cell in next(reader, [])]
        if header != ["video_id", "labels"]:
            raise DatasetError(
                f"{file}: expected the header 'video_id;labels', found {';'.join(header)[:80]!r}; "
                "make the file again from train.csv and val.csv"
            )
        for cells in reader:
            where = f"line {reader.line_num}"
            if not any(cells):
                continue
            # A row without its separator has no labels column: let it be refused as such.
            name, text = (*cells, "no labels")[:2]
            found.take(file, where, name.strip(), split, text, policy)
    if len(found.clips) == before:
        raise DatasetError(f"{file}: expected one row per clip, found none")


def _read_frames(file: Path, split: Split, found: Annotation, policy: str) -> None:
    listed = read_frame_list(file, classes=len(found.classes), policy=policy)
    found.skipped += listed.skipped
    for video in listed.videos.values():
        found.oddities["labels_vary"] += video.varies
        if video.kind is not None:
            found.oddities["type_disagrees"] += KINDS.get(video.kind.lower()) != split
        text = ",".join(str(k) for k in video.labels)
        found.take(file, video.where, video.id, split, text, policy)
