"""The annotation files of ActivityNet's kind, in their three forms; see `activitynet`."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msq.errors import DatasetError, UsageError
from msq.extract.datasets.annotation_text import Skipped, read_lines, read_text, to_seconds
from msq.extract.datasets.dataset import SPLIT_WORDS, Split
from msq.extract.datasets.segments import Film, segment_id

NAME = "activitynet"
AMBIGUOUS = "Ambiguous"


@dataclass
class Video:
    """One video of an annotation: the split, the file, its film, its (label, start, end)."""

    split: Split
    file: Path
    film: Film
    segments: list[tuple[str, float, float]] = field(default_factory=list)


@dataclass
class Annotation:
    """What the files say, and what of it was left out, on purpose (`regular`) or not."""

    videos: dict[str, Video] = field(default_factory=dict)
    entries: int = 0  # of videos, those that were left out again included
    ids: dict[str, int] = field(default_factory=dict)
    skipped: Skipped = field(default_factory=list)
    regular: Skipped = field(default_factory=list)
    kept: Skipped = field(default_factory=list)
    oddities: Counter[str] = field(default_factory=Counter)

    def video(self, name: str, split: Split, file: Path, film: Film, item: str) -> Video | None:
        """The video of an entry or line; None where it is in another split, which `item` says."""
        self.entries += 1
        first = self.videos.setdefault(name, Video(split, file, film))
        if first.split == split:
            return first
        there = "" if first.file == file else f"in {first.file.name} "
        self.oddities["in_two_splits"] += 1
        self.skipped.append(
            (item, f"{file.name}: video {name} is in split {split} here and {there}in "
             f"{first.split}; it can be in one of them")
        )  # fmt: skip
        return None


def read_annotation(files: Iterable[Path], subset: str) -> Annotation:
    """Read annotation files, JSON or CSV, as one.

    Args:
        files: the files.
        subset: split of those that do not say, `train`, `val` or `test`; empty where they say.

    Raises:
        DatasetError: a file has another form, or no video.
        UsageError: a file does not say which split it is.
    """
    found = Annotation()
    for file in files:
        before = found.entries
        if file.suffix.lower() == ".json":
            _read_json(file, subset, found)
        else:
            _read_csv(file, subset, found)
        if found.entries == before:
            raise DatasetError(f"{file}: expected videos with annotations, found none")
    return found


def _read_json(file: Path, subset: str, found: Annotation) -> None:
    """Both JSON forms."""
    try:
        data = json.loads(read_text(file))
    except ValueError as bad:
        raise DatasetError(f"{file}: expected JSON, found something else: {bad}") from None
    videos = data.get("database", data) if isinstance(data, dict) else None
    if not isinstance(videos, dict) or not any(
        isinstance(entry, dict) and "annotations" in entry for entry in videos.values()
    ):
        kind = type(data).__name__
        keys = ", ".join(list(data)[:5]) if isinstance(data, dict) else f"a {kind}"
        raise DatasetError(
            f'{file}: expected {{"database": {{VIDEO: {{"subset", "annotations"}}}}}} or '
            f'mmaction2\'s {{VIDEO: {{"duration_second", "annotations"}}}}, found {keys}; a '
            "Charades JSON is read by --dataset charades"
        )
    for name, entry in videos.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("annotations", []), list):
            found.oddities["malformed"] += 1
            found.skipped.append((name, f"{file.name}: expected an object with annotations"))
            continue
        split = _split(str(entry.get("subset", "")), subset, file, name)
        if split is None:
            found.skipped.append((name, f"{file.name}: unknown subset {entry.get('subset')!r}"))
            continue
        film = Film(
            _number(entry, "duration", "duration_second") or math.inf,
            _number(entry, "rfps", "fps"),
        )
        video = found.video(name, split, file, film, name)
        if video is None:
            continue
        for annotation in entry.get("annotations", []):
            _add(annotation, name, video, file, found)


def _split(written: str, subset: str, file: Path, video: str) -> Split | None:
    """The split a file or video says it is in; `subset` where neither does."""
    if written:
        return SPLIT_WORDS.get(written.strip().lower())
    if subset:
        return SPLIT_WORDS[subset]
    for text in (video, file.stem):
        for word in text.lower().replace("-", "_").split("_"):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    raise UsageError(
        f"dataset {NAME}: {file} does not say which split it is; give --option subset=train, val "
        "or test"
    )


def _number(entry: Mapping[str, Any], *keys: str) -> float | None:
    """The first of `keys` that is a number above 0."""
    for key in keys:
        try:
            value = float(entry[key])
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(value) and value > 0:
            return value
    return None


def _add(annotation: Any, name: str, video: Video, file: Path, found: Annotation) -> None:
    """One annotation of a JSON file."""
    try:
        start, end = annotation["segment"]
        found.oddities["string_times"] += isinstance(start, str) or isinstance(end, str)
        times = to_seconds(str(start)), to_seconds(str(end))
        label = str(annotation["label"]).strip()
    except (KeyError, TypeError, ValueError):
        found.oddities["malformed"] += 1
        found.skipped.append((name, f"{file.name}: expected segment and label: {annotation!r:.80}"))
        return
    if label == AMBIGUOUS:
        found.oddities["ambiguous"] += 1
        found.regular.append((segment_id(name, *times), "ambiguous, in no class"))
        return
    if isinstance(annotation.get("label_id"), int):
        found.ids.setdefault(label, annotation["label_id"])
    video.segments.append((label, *times))


def _read_csv(file: Path, subset: str, found: Annotation) -> None:
    """The `video,type,type_idx,start,end,…` form, by header name."""
    header, *rows = read_lines(file, found.skipped)
    columns = [cell.strip() for cell in header.text.split(",")]
    if missing := [c for c in ("video", "type", "start", "end") if c not in columns]:
        raise DatasetError(
            f"{file}: expected comma-separated columns video, type, start and end, found no "
            f"{missing[0]} in {header.text[:80]!r}"
        )
    for number, text in rows:
        row = dict(zip(columns, (cell.strip() for cell in text.split(",")), strict=False))
        name = row.get("video", "")
        split = _split("", subset, file, name)
        assert split is not None
        video = found.video(name, split, file, Film(), f"{file.name} line {number}")
        if video is None:
            continue
        try:
            annotation = {"segment": (float(row["start"]), float(row["end"])), "label": row["type"]}
        except (KeyError, ValueError):
            found.oddities["malformed"] += 1
            found.skipped.append((f"{file.name} line {number}", f"expected times: {text[:80]!r}"))
            continue
        _add(annotation, name, video, file, found)
