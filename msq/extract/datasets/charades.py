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

from collections.abc import Mapping
from pathlib import Path

from msq.errors import DatasetError, UsageError
from msq.extract.datasets.adapter import Adapter, Survey
from msq.extract.datasets.annotation_text import positive
from msq.extract.datasets.charades_annotation import (
    Annotation,
    read_annotation,
    read_charades_classes,
)
from msq.extract.datasets.charades_frames import OPTIONS as FRAME_OPTIONS
from msq.extract.datasets.charades_frames import FrameRule, Ruled, apply_rule
from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.datasets.locate import require_root
from msq.extract.datasets.media_index import Kind, MediaIndex
from msq.extract.datasets.options import check_options, choice
from msq.extract.datasets.survey import survey_media

__all__ = ["ADAPTER", "read_charades", "read_charades_classes", "read_charades_lengths"]

NEEDS = (
    "Charades_v1_train.csv, Charades_v1_test.csv and Charades_v1_classes.txt (Charades.zip); "
    "Charades_v1/ID.mp4, Charades_v1_480/ID.mp4, ID.mp4 or Charades_v1_rgb/ID/ID-000001.jpg"
)

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
    **FRAME_OPTIONS,
}


def read_charades(
    root: Path,
    *,
    annotation: str = "auto",
    media: str = "auto",
    unlabelled: str = "keep",
    policy: str = "error",
    fps: float | str | None = None,
    frames: str = "all",
    targets: str = "video",
) -> Dataset:
    """Read Charades; `intervals` are as written.

    Labels are those of the whole video unless `targets` says otherwise, see
    `msq.extract.datasets.charades_frames`; videos of which `frames=labelled` leaves nothing are
    left out. `Dataset.variant` says which of the two was asked for.

    Args:
        root: folder with the official files, see `NEEDS`.
        annotation: `csv`, `frames` or `auto`.
        media: `auto`, `video` or `frames`.
        unlabelled: `keep` or `skip`.
        policy: `error` or `skip`, for rows that cannot be used.
        fps: frames per second of frame folders; without it their frames have no times.
        frames: `all` or `labelled`.
        targets: `video`, or the number of sampled frames whose labels count.

    Raises:
        DatasetError: a file is missing, cut off, of another format or of another dataset, or a
            video whose frames had to be looked at is not there.
        UsageError: an option has another value.
    """
    options = {"annotation": annotation, "media": media, "policy": policy}
    root = require_root(root, NEEDS)
    found = read_annotation(root, options)
    options |= {"unlabelled": unlabelled, "frames": frames, "targets": targets}
    return _dataset(root, found, options if fps is None else {**options, "fps": str(fps)})


def read_charades_lengths(root: Path) -> dict[str, float]:
    """Official duration in seconds of every video: frame rate of a frame folder = files / it.

    Raises:
        DatasetError: as `read_charades`.
    """
    root = require_root(root, NEEDS)
    rows = read_annotation(root, {"annotation": "csv"}).rows
    return {row.id: row.length for row in rows.values() if row.length is not None}


def media_of(root: Path, media: str) -> MediaIndex:
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
    return MediaIndex(root, {"video": videos, "frames": frames}.get(media, videos + frames))


def _dataset(root: Path, found: Annotation, options: Mapping[str, str]) -> Dataset:
    """The clips, with the paths they have or should have."""
    unlabelled = choice("charades", options, "unlabelled", ("keep", "skip"), "keep")
    media = media_of(
        root, choice("charades", options, "media", ("auto", "video", "frames"), "auto")
    )
    fps = positive("charades", options, "fps")
    rule = FrameRule.of(options)
    if rule.active and any(row.length is None for row in found.rows.values()):
        raise UsageError(
            "dataset charades, --option frames=labelled, targets=T: expected the official CSV "
            "files, which have lengths and times; found frame lists (--option annotation=csv)"
        )
    clips: list[Clip] = []
    regular: list[tuple[str, str]] = []
    for row in found.rows.values():
        if not row.labels and unlabelled == "skip":
            regular.append((row.id, "no actions, and --option unlabelled=skip"))
            continue
        path = media.find(f"{row.id}.mp4").path
        clips.append(Clip(row.id, path, None, None, row.labels, row.split, row.intervals, fps))
    skipped, notes = list(found.skipped), []
    if rule.active:
        ruled = _ruled(root, found, clips, rule, options)
        clips, notes = ruled.clips, [ruled.note(rule)]
        regular += ruled.left_out
        skipped += [(clip.id, reason) for clip, reason in ruled.unusable]
    return Dataset(
        "charades",
        found.classes,
        "multilabel",
        tuple(clips),
        "map",
        (*skipped, *regular),
        frozenset(regular),
        notes=tuple(notes),
        variant=rule.variant,
    )


def _ruled(
    root: Path, found: Annotation, clips: list[Clip], rule: FrameRule, options: Mapping[str, str]
) -> Ruled:
    """The clips as the rule leaves them; videos that cannot be looked at are an error, or not.

    Raises:
        DatasetError: there are such videos, unless `policy=skip`.
    """
    lengths = {row.id: row.length for row in found.rows.values() if row.length is not None}
    ruled = apply_rule(clips, lengths, rule)
    policy = choice("charades", options, "policy", ("error", "skip"), "error")
    if ruled.unusable and policy == "error":
        clip, reason = ruled.unusable[0]
        raise DatasetError(
            f"{clip.path}: {reason} ({len(ruled.unusable)} such videos of {len(clips)} below "
            f"{root}): frames=labelled and targets=T need the videos; unpack them there, or leave "
            "these out with --option policy=skip"
        )
    return ruled


def _read(root: Path, options: Mapping[str, str]) -> Dataset:
    check_options("charades", options, OPTIONS)
    return read_charades(root, **options)


def _survey(root: Path, options: Mapping[str, str]) -> Survey:
    check_options("charades", options, OPTIONS)
    root = require_root(root, NEEDS)
    found = read_annotation(root, options)
    data = _dataset(root, found, options)
    return survey_media(
        "charades",
        data,
        root,
        oddities=found.oddities,
        published=PUBLISHED,
        notes=(
            *data.notes,
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
