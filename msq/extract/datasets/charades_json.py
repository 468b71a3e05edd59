"""Charades as pytorch-i3d writes it: one JSON object, videos by id.

    {"46GP8": {"subset": "training", "duration": 24.83, "actions": [[92, 11.9, 21.2], …]}, …}

Subsets are `training` and `testing` (`train`, `test` and `validation` are taken as well). Times
may be numbers or text. The loader of that project leaves out videos with fewer than 66 frames:
`--option min_frames=66` does so for frame folders. Oddities: as in `msq.extract.datasets.charades`,
and `short` for frame folders with fewer than 66 frames, where `min_frames` is given.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msq.errors import DatasetError, UsageError
from msq.extract.datasets.adapter import Adapter, Survey
from msq.extract.datasets.charades import media_of
from msq.extract.datasets.charades_annotation import FOLDERS, read_charades_classes
from msq.extract.datasets.dataset import Clip, Dataset, Split
from msq.extract.datasets.locate import require_file, require_root
from msq.extract.datasets.manifest import read_classes
from msq.extract.datasets.options import check_options, choice
from msq.extract.datasets.survey import survey_media

FILE = "charades.json"
NEEDS = (
    f"{FILE} and Charades_v1_classes.txt (or --option classes=FILE); videos or frame folders as "
    "for charades"
)
SUBSETS: Mapping[str, Split] = {
    **{"training": "train", "train": "train", "validation": "val", "val": "val"},
    **{"testing": "test", "test": "test"},
}
OPTIONS = {
    "file": f"the JSON file, below the root (default {FILE})",
    "classes": "class names, one per line (default Charades_v1_classes.txt)",
    "media": "auto (default: videos before frame folders), video or frames",
    "min_frames": "leave out frame folders with fewer pictures (default 0; pytorch-i3d: 66)",
    "policy": "error (default) or skip: what becomes of a video that cannot be used",
}

Interval = tuple[int, float, float]


def read_charades_json(
    root: Path,
    *,
    file: str = FILE,
    classes: Path | str | None = None,
    media: str = "auto",
    min_frames: int | str = 0,
    policy: str = "error",
) -> Dataset:
    """Read the JSON form; labels are those of the whole video.

    Args:
        root: folder with the file and the videos.
        file: the JSON file, relative to the root.
        classes: file of class names; `Charades_v1_classes.txt` if None.
        media: `auto`, `video` or `frames`.
        min_frames: clips whose frame folder holds fewer pictures go to `skipped`.
        policy: `error` or `skip`, for videos that cannot be used.

    Raises:
        DatasetError: a file is missing, not JSON or of another form.
        UsageError: an option has another value.
    """
    return _load(root, file, classes, media, min_frames, policy)[0]


def _load(
    root: Path,
    file: str = FILE,
    classes: Path | str | None = None,
    media: str = "auto",
    min_frames: int | str = 0,
    policy: str = "error",
) -> tuple[Dataset, Counter[str]]:
    root = require_root(root, NEEDS)
    options = {"media": media, "policy": policy}
    policy = choice("charades-json", options, "policy", ("error", "skip"), "error")
    places = media_of(
        root, choice("charades-json", options, "media", ("auto", "video", "frames"), "auto")
    )
    fewest = _count(min_frames)
    path = require_file(root, file, FOLDERS, "put it there, or give --option file=NAME")
    names = read_classes(Path(classes)) if classes is not None else read_charades_classes(root)
    oddities: Counter[str] = Counter(end_past_length=0, reversed=0, start_past_length=0)
    clips: list[Clip] = []
    skipped: list[tuple[str, str]] = []
    for video, entry in _database(path).items():
        try:
            clip = _clip(video, entry, len(names), places.find(f"{video}.mp4").path, oddities)
        except (ValueError, TypeError) as bad:
            if policy == "error":
                raise DatasetError(
                    f"{path}, {video}: {bad} (--option policy=skip goes on without it)"
                ) from None
            skipped.append((video, str(bad)))
            continue
        if fewest and clip.path.is_dir():
            frames = sum(1 for _ in clip.path.iterdir())
            if frames < fewest:
                oddities["short"] += 1
                skipped.append((video, f"{frames} frames, fewer than min_frames={fewest}"))
                continue
        clips.append(clip)
    if not clips:
        raise DatasetError(f"{path}: expected videos by id, found none that can be used")
    data = Dataset("charades", names, "multilabel", tuple(clips), "map", tuple(skipped))
    return data, oddities


def _count(text: int | str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise UsageError(f"dataset charades-json, min_frames={text}: expected a whole number")
    return number


def _database(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, ValueError) as bad:
        raise DatasetError(f"{path}: not JSON ({bad}); if it was cut off, copy it again") from None
    if isinstance(document, dict) and isinstance(document.get("database"), dict):
        raise DatasetError(
            f"{path}: this is ActivityNet's form (a `database` of annotations); read it with "
            "--dataset activitynet"
        )
    if not isinstance(document, dict):
        raise DatasetError(f"{path}: expected an object of videos by id, found a {type(document)}")
    return document


def _clip(video: str, entry: Any, classes: int, path: Path, oddities: Counter[str]) -> Clip:
    """One video; ValueError or TypeError with the reason when it cannot be used."""
    if not isinstance(entry, dict) or not {"subset", "duration", "actions"} <= entry.keys():
        raise ValueError(f"expected subset, duration and actions, found {str(entry)[:60]}")
    split = SUBSETS.get(str(entry["subset"]).strip().lower())
    if split is None:
        raise ValueError(f"expected subset training or testing, found {entry['subset']!r}")
    intervals = tuple(_interval(action, classes) for action in entry["actions"])
    length = float(entry["duration"])
    for _, start, end in intervals:
        oddities["end_past_length"] += end > length
        oddities["reversed"] += end < start
        oddities["start_past_length"] += start >= length
    labels = tuple(sorted({c for c, _, _ in intervals}))
    return Clip(video, path, None, None, labels, split, intervals)


def _interval(action: Any, classes: int) -> Interval:
    if not isinstance(action, list) or len(action) != 3:
        raise ValueError(f"expected actions like [92, 11.9, 21.2], found {str(action)[:40]}")
    label, start, end = int(action[0]), float(action[1]), float(action[2])
    if not 0 <= label < classes:
        raise ValueError(
            f"expected classes 0 to {classes - 1}, found {label}: are the names those of another "
            "dataset?"
        )
    return label, start, end


def _read(root: Path, options: Mapping[str, str]) -> Dataset:
    check_options("charades-json", options, OPTIONS)
    return read_charades_json(root, **options)


def _survey(root: Path, options: Mapping[str, str]) -> Survey:
    check_options("charades-json", options, OPTIONS)
    data, oddities = _load(root, **options)
    return survey_media(
        "charades-json", data, root, oddities=oddities, published={"classes": 157}, notes=()
    )


ADAPTER = Adapter(
    name="charades-json",
    title="Charades in the JSON form of pytorch-i3d",
    needs=NEEDS,
    access="charades.json comes with the code of pytorch-i3d; the videos as for charades",
    options=OPTIONS,
    read=_read,
    survey=_survey,
)
