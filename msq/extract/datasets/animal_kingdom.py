"""Animal Kingdom, action recognition (Ng et al. 2022).

Three forms of the annotation say the same: `AR_metadata.xlsx` (sheet AR, one row per clip), the
frame lists `train.csv` and `val.csv` (one row per frame, 5 or 6 columns between blanks), and the
`train_light.csv`, `val_light.csv` that the authors of MSQNet derive. `val.csv` is the test split;
there is no other. Class names come from sheet Action of the workbook, or `--option classes=FILE`.

What is odd in the files, and what becomes of it (counted by `msq datasets check`):

- `classes_empty_in_test`: classes without a clip in test; macro mAP is over the others.
- `label_error_cells`: a class whose number is an error cell (Yawning); it gets the free number.
- `animal_actions_disagree`, `animal_actions_unreadable`: rows whose (animal, action) pairs do not
  say what their labels say, or cannot be read. The labels count.
- `segment_index_disagrees`: classes whose number in df_action.xlsx is not that of their label;
  head, middle and tail are joined by name.
- `type_disagrees` (frame lists): clips whose column `type` is not the split of their file.
- `labels_vary` (frame lists): clips whose labels differ between frames; the label is the union.
- `repeated_labels`: labels that a row has twice (none in the official file).
- `empty_frame_folders`: clips whose frame folder holds nothing.
"""

from __future__ import annotations

import csv
import importlib.util
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from msq.errors import DatasetError
from msq.extract.datasets.adapter import Adapter, Survey
from msq.extract.datasets.animal_kingdom_sheets import (
    judge_pairs,
    read_classes_sheet,
    read_metadata_sheet,
    read_segments_sheet,
)
from msq.extract.datasets.dataset import Clip, Dataset, Split
from msq.extract.datasets.frame_list import parse_labels, read_frame_list
from msq.extract.datasets.locate import find_file, require_file, require_root
from msq.extract.datasets.manifest import read_classes
from msq.extract.datasets.media_index import Kind, MediaIndex
from msq.extract.datasets.options import check_options, choice
from msq.extract.datasets.survey import survey_media

NAME = "animal-kingdom"
BASES = ("", "action_recognition", "AnimalKingdom/action_recognition",
         "Animal_Kingdom/action_recognition")  # fmt: skip
FOLDERS = tuple(
    f"{base}/{folder}".strip("/") for base in BASES for folder in ("", "annotation", "dataset")
)
METADATA, ACTIONS = "AR_metadata.xlsx", "df_action.xlsx"
NEEDS = (
    "AR_metadata.xlsx, or annotation/train.csv and val.csv with it or a file of class names; "
    "df_action.xlsx for head, middle and tail; dataset/video/ID.mp4, video/ID.mp4, ID.mp4 or "
    "dataset/image/ID/ID_t000001.jpg"
)
REMEDY = "put the annotation files of action_recognition there, or name their folder as --root"
FORMS = {
    "metadata": (METADATA,),
    "light": ("train_light.csv", "val_light.csv"),
    "frames": ("train.csv", "val.csv"),
}
SPLITS_OF_FILES: tuple[Split, ...] = ("train", "test")
KINDS: Mapping[str, Split] = {"train": "train", "test": "test", "val": "test"}
PUBLISHED = {
    **{"classes": 140, "train": 24004, "test": 6096, "classes_empty_in_test": 13},
    **{"label_error_cells": 1, "animal_actions_disagree": 2298},
    **{"animal_actions_unreadable": 411, "segment_index_disagrees": 6},
}
OPTIONS = {
    "annotation": "metadata (AR_metadata.xlsx), light, frames or auto (default: the first there)",
    "classes": "file of the 140 class names, one per line (default: from AR_metadata.xlsx)",
    "media": "auto (default: videos before frame folders), video or frames",
    "policy": "error (default) or skip: what becomes of a row that cannot be used",
}


@dataclass
class _Annotation:
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


def read_animal_kingdom(
    root: Path,
    *,
    annotation: str = "auto",
    classes: Path | str | None = None,
    media: str = "auto",
    policy: str = "error",
) -> Dataset:
    """Read Animal Kingdom; clips in the order of the annotation, `test` is its `val.csv`.

    Args:
        root: folder with the annotation and the clips, see `NEEDS`.
        annotation: `metadata`, `light`, `frames` or `auto`.
        classes: file of class names; from `AR_metadata.xlsx` if None.
        media: `auto`, `video` or `frames`.
        policy: `error` or `skip`, for rows that cannot be used.

    Raises:
        DatasetError: a file or openpyxl is missing, or a file is cut off, of another format or of
            another dataset.
        UsageError: an option has another value.
    """
    options = {"annotation": annotation, "media": media, "policy": policy}
    if classes is not None:
        options["classes"] = str(classes)
    root = require_root(root, NEEDS)
    return _dataset(root, _annotation(root, options), options)


def read_animal_kingdom_segments(
    root: Path, *, classes: Path | str | None = None
) -> dict[str, tuple[int, ...]]:
    """Label numbers of the head, middle and tail classes: 17, 29 and 94 in the official file.

    From the column `segment` of `df_action.xlsx`, joined by class name. `msq.head.segments` scores
    with them.

    Raises:
        DatasetError: a workbook or openpyxl is missing, or the names do not fit.
    """
    root = require_root(root, NEEDS)
    file = require_file(root, ACTIONS, FOLDERS, REMEDY)
    return read_segments_sheet(file, _classes(root, classes)[0])[0]


def _classes(root: Path, classes: Path | str | None) -> tuple[tuple[str, ...], int]:
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
    remedy = f"is it the class file of another dataset? Give the {PUBLISHED['classes']} names of "
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


def _annotation(root: Path, options: Mapping[str, str]) -> _Annotation:
    form = choice(NAME, options, "annotation", ("auto", *FORMS), "auto")
    policy = choice(NAME, options, "policy", ("error", "skip"), "error")
    if form == "auto":
        there = [f for f, names in FORMS.items() if any(find_file(root, n, FOLDERS) for n in names)]
        if len(there) > 1 and importlib.util.find_spec("openpyxl") is None:
            there = [f for f in there if f != "metadata"]
        form = there[0] if there else "metadata"
    files = [require_file(root, name, FOLDERS, REMEDY) for name in FORMS[form]]
    classes, errors = _classes(root, options.get("classes"))
    found = _Annotation(classes, form)
    found.oddities["label_error_cells"] = errors
    if form == "metadata":
        _read_metadata(files[0], found, policy)
    else:
        read = _read_light if form == "light" else _read_frames
        for file, split in zip(files, SPLITS_OF_FILES, strict=True):
            read(file, split, found, policy)
    return found


def _read_metadata(file: Path, found: _Annotation, policy: str) -> None:
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


def _read_light(file: Path, split: Split, found: _Annotation, policy: str) -> None:
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


def _read_frames(file: Path, split: Split, found: _Annotation, policy: str) -> None:
    listed = read_frame_list(file, classes=len(found.classes), policy=policy)
    found.skipped += listed.skipped
    for video in listed.videos.values():
        found.oddities["labels_vary"] += video.varies
        if video.kind is not None:
            found.oddities["type_disagrees"] += KINDS.get(video.kind.lower()) != split
        text = ",".join(str(k) for k in video.labels)
        found.take(file, video.where, video.id, split, text, policy)


def _media(root: Path, media: str) -> MediaIndex:
    def places(names: tuple[str, ...], kind: Kind) -> tuple[tuple[str, Kind], ...]:
        return tuple((f"{base}/{name}".strip("/"), kind) for base in BASES for name in names)

    videos = (*places(("dataset/video", "video"), "video"), ("", "video"))
    frames = (*places(("dataset/image", "image"), "frames"), ("", "frames"))
    return MediaIndex(root, {"video": videos, "frames": frames}.get(media, videos + frames))


def _dataset(root: Path, found: _Annotation, options: Mapping[str, str]) -> Dataset:
    """The clips, with the paths they have or should have."""
    media = _media(root, choice(NAME, options, "media", ("auto", "video", "frames"), "auto"))
    clips = tuple(
        Clip(name, media.find(f"{name}.mp4").path, None, None, labels, split)
        for name, (split, labels) in found.clips.items()
    )
    groups = _groups(root, found.classes, own_names="classes" in options)
    return Dataset(
        NAME, found.classes, "multilabel", clips, "map", tuple(found.skipped), groups=groups
    )


def _groups(root: Path, classes: tuple[str, ...], *, own_names: bool) -> dict[str, tuple[int, ...]]:
    """Head, middle and tail; none where the workbook cannot be read or has other class names."""
    actions = find_file(root, ACTIONS, FOLDERS)
    if actions is None or importlib.util.find_spec("openpyxl") is None:
        return {}
    try:
        return read_segments_sheet(actions, classes)[0]
    except DatasetError:
        if own_names:  # names of one's own choice need not be those of the workbook
            return {}
        raise


def _read(root: Path, options: Mapping[str, str]) -> Dataset:
    check_options(NAME, options, OPTIONS)
    return read_animal_kingdom(root, **options)


def _survey(root: Path, options: Mapping[str, str]) -> Survey:
    check_options(NAME, options, OPTIONS)
    root = require_root(root, NEEDS)
    found = _annotation(root, options)
    data = _dataset(root, found, options)
    tested = {k for clip in data.clips if clip.split == "test" for k in clip.labels}
    found.oddities["classes_empty_in_test"] = len(data.classes) - len(tested)
    notes = [
        f"read from {' and '.join(FORMS[found.form])}",
        f"headline metric: macro mAP over the {len(tested)} classes that test has (`map`)",
    ]
    actions = find_file(root, ACTIONS, FOLDERS)
    if actions is None:
        notes.append("df_action.xlsx is not there: no head, middle and tail")
    else:
        segments, disagree = read_segments_sheet(actions, found.classes)
        found.oddities["segment_index_disagrees"] = disagree
        sizes = ", ".join(f"{segment} {len(labels)}" for segment, labels in segments.items())
        scored = ", ".join(str(len(tested & set(labels))) for labels in segments.values())
        notes.append(f"segments: {sizes} classes; with clips in test: {scored}")
    return survey_media(
        NAME, data, root, oddities=found.oddities, published=PUBLISHED, notes=tuple(notes)
    )


ADAPTER = Adapter(
    name=NAME,
    title="Animal Kingdom, 140 actions of 850 species (Ng et al. 2022)",
    needs=NEEDS,
    access="registration form of its authors (sutdcv/Animal-Kingdom); read its terms",
    options=OPTIONS,
    read=_read,
    survey=_survey,
)
