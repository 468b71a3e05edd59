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

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from msq.errors import DatasetError
from msq.extract.datasets.adapter import Adapter, Survey
from msq.extract.datasets.animal_kingdom_annotation import (
    BASES,
    CLASSES,
    FOLDERS,
    FORMS,
    NAME,
    REMEDY,
    Annotation,
    read_annotation,
    read_class_names,
)
from msq.extract.datasets.animal_kingdom_sheets import read_segments_sheet
from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.datasets.locate import find_file, require_file, require_root
from msq.extract.datasets.media_index import Kind, MediaIndex
from msq.extract.datasets.options import check_options, choice
from msq.extract.datasets.survey import survey_media

ACTIONS = "df_action.xlsx"
NEEDS = (
    "AR_metadata.xlsx, or annotation/train.csv and val.csv with it or a file of class names; "
    "df_action.xlsx for head, middle and tail; dataset/video/ID.mp4, video/ID.mp4, ID.mp4 or "
    "dataset/image/ID/ID_t000001.jpg"
)
PUBLISHED = {
    **{"classes": CLASSES, "train": 24004, "test": 6096, "classes_empty_in_test": 13},
    **{"label_error_cells": 1, "animal_actions_disagree": 2298},
    **{"animal_actions_unreadable": 411, "segment_index_disagrees": 6},
}
OPTIONS = {
    "annotation": "metadata (AR_metadata.xlsx), light, frames or auto (default: the first there)",
    "classes": "file of the 140 class names, one per line (default: from AR_metadata.xlsx)",
    "media": "auto (default: videos before frame folders), video or frames",
    "policy": "error (default) or skip: what becomes of a row that cannot be used",
}


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
    return _dataset(root, read_annotation(root, options), options)


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
    return read_segments_sheet(file, read_class_names(root, classes)[0])[0]


def _media(root: Path, media: str) -> MediaIndex:
    def places(names: tuple[str, ...], kind: Kind) -> tuple[tuple[str, Kind], ...]:
        return tuple((f"{base}/{name}".strip("/"), kind) for base in BASES for name in names)

    videos = (*places(("dataset/video", "video"), "video"), ("", "video"))
    frames = (*places(("dataset/image", "image"), "frames"), ("", "frames"))
    return MediaIndex(root, {"video": videos, "frames": frames}.get(media, videos + frames))


def _dataset(root: Path, found: Annotation, options: Mapping[str, str]) -> Dataset:
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
    found = read_annotation(root, options)
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
