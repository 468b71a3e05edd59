"""Labelled segments of untrimmed videos -> clips, and what to do when one has several labels."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from msq.errors import DatasetError, UsageError
from msq.extract.datasets.annotation_text import Skipped, read_lines
from msq.extract.datasets.dataset import Clip, Split
from msq.extract.datasets.media_index import Place

View = Literal["official", "dedup"]


class Segment(NamedTuple):
    """One line of an annotation: a class between two times of a video."""

    video: str
    start: float
    end: float
    label: int
    split: Split
    where: str

    @property
    def id(self) -> str:
        """`video#start-end`, in seconds."""
        return segment_id(self.video, self.start, self.end)


class Film(NamedTuple):
    """What is known of a video: seconds it lasts (inf where unknown) and its frame rate."""

    duration: float = math.inf
    fps: float | None = None


@dataclass(frozen=True, slots=True)
class Cuts:
    """Clips made of segments.

    Attributes:
        clips: in the order of the annotation.
        skipped: what was left out, with the reason.
        oddities: `reversed`, `repeated`, `double_labelled` (distinct segments of several classes).
        kept: repeated ones under the policy `keep`, and what was done.
    """

    clips: tuple[Clip, ...]
    skipped: Skipped
    oddities: Counter[str]
    kept: Skipped = field(default_factory=list)


def segment_id(video: str, start: float, end: float) -> str:
    """`video#start-end`, in seconds."""
    return f"{video}#{start:.10g}-{end:.10g}"


def cut_segments(
    segments: Sequence[Segment],
    classes: Sequence[str],
    view: View,
    place: Callable[[str], tuple[Place, float | None]],
    *,
    keep: bool = False,
) -> Cuts:
    """One clip per (segment, class) in the `official` view, per distinct segment in `dedup`.

    A segment of several classes is several rows of one label each in the official view, with the
    class at the end of their ids; in `dedup` it is one row with all its labels.

    Args:
        segments: in order.
        classes: class names.
        view: see above.
        place: video -> where it lies, and the frame rate of a frame folder.
        keep: join a segment that stands twice under one class with the first, and list it in
            `kept`; else it is skipped.
    """
    skipped: Skipped = []
    joined: Skipped = []
    oddities: Counter[str] = Counter()
    labels: dict[str, dict[int, Segment]] = defaultdict(dict)
    kept: list[Segment] = []
    for segment in segments:
        if segment.start >= segment.end:
            oddities["reversed"] += 1
            skipped.append((segment.id, f"{segment.where}: the start is not before the end"))
        elif segment.label in labels[segment.id]:
            oddities["repeated"] += 1
            first = labels[segment.id][segment.label].where
            reason = f"{segment.where}: the same segment as {first}"
            if keep:
                joined.append((segment.id, f"{reason}; joined, adds nothing"))
            else:
                skipped.append((segment.id, reason))
        else:
            labels[segment.id][segment.label] = segment
            kept.append(segment)
    oddities["double_labelled"] = sum(len(found) > 1 for found in labels.values())
    clips = []
    for segment in kept:
        all_labels = tuple(sorted(labels[segment.id]))
        identity, chosen = segment.id, all_labels
        if view == "official":
            chosen = (segment.label,)
            if len(all_labels) > 1:
                identity += f"/{classes[segment.label]}"
        elif labels[segment.id][segment.label] is not next(iter(labels[segment.id].values())):
            continue
        found, fps = place(segment.video)
        clips.append(
            Clip(
                id=identity,
                path=found.path,
                start=segment.start,
                end=segment.end,
                labels=chosen,
                split=segment.split,
                intervals=tuple((k, segment.start, segment.end) for k in chosen),
                fps=fps,
            )
        )
    return Cuts(tuple(clips), skipped, oddities, joined)


def film_fps(
    dataset: str, video: str, place: Place, film: Film, option: float | None
) -> float | None:
    """Frame rate with which to cut a frame folder; None for video files, which have a clock.

    Raises:
        UsageError: a frame folder whose rate is neither known nor given.
    """
    if place.kind != "frames":
        return None
    fps = option if option is not None else film.fps
    if fps is None:
        raise UsageError(
            f"dataset {dataset}: {video} is a folder of frames, and segments are in seconds: "
            "expected its frame rate, found none; give `--option fps=…` with the rate at which the "
            "frames were extracted, or the video files"
        )
    return fps


def read_video_info(files: Iterable[Path], skipped: Skipped) -> dict[str, Film]:
    """Durations and frame rates from `video,fps,…,count,…` tables (AFSD's `*_video_info.csv`)."""
    films: dict[str, Film] = {}
    for file in files:
        header, *rows = read_lines(file, skipped)
        names = [cell.strip() for cell in header.text.split(",")]
        if missing := [name for name in ("video", "fps", "count") if name not in names]:
            raise DatasetError(
                f"{file}: expected comma-separated columns video, fps and count, found no "
                f"{missing[0]} in {header.text[:60]!r}; take the file as published, or move it away"
            )
        for row in rows:
            record = dict(zip(names, row.text.split(","), strict=False))
            try:
                fps, count = float(record["fps"]), float(record["count"])
                films[record["video"]] = Film(count / fps, fps)
            except (KeyError, ValueError, ZeroDivisionError):
                skipped.append((f"{file.name} line {row.number}", "expected video, fps and count"))
    return films


def past_the_end(segments: Iterable[Segment], films: Mapping[str, Film]) -> Iterable[Segment]:
    """Segments whose end lies after that of their video, where its length is known."""
    return (s for s in segments if s.end > films.get(s.video, Film()).duration)
