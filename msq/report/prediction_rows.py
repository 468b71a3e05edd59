"""Predictions of new videos as rows of CSV or JSONL, written while the videos are read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.errors import UsageError, VideoError
from msq.report import terminal
from msq.report.predictions import (
    check_merging,
    exit_code,
    loaded_head,
    say_troubles,
    say_unknown,
)
from msq.report.row_file import RowFile, Rows, rows_into

if TYPE_CHECKING:
    from msq.head.predict import Head

COLUMNS = ("clip", "start", "end", "label", "score", "degraded", "error")
FORMATS = ("csv", "jsonl")


@dataclass(frozen=True)
class Wanted:
    """Which rows.

    Attributes:
        labels: other words than the run's classes; None for these.
        top: labels of a window, the best ones; None for all.
        every: seconds, see `Head.predict`; None for a row of the whole video.
        window: seconds.
        fps: of folders of pictures.
        threshold: least score of a row.
        merge: windows of a label that meet are one row.
    """

    labels: Sequence[str] | None = None
    top: int | None = None
    every: float | None = None
    window: float | None = None
    fps: float | None = None
    threshold: float | None = None
    merge: bool = False


@dataclass
class _Count:
    """What was read and written: whether each window failed, its damage, and how many rows."""

    failed: list[bool] = field(default_factory=list)
    rows: int = 0


def write_predictions(
    run: Path,
    videos: Sequence[Path],
    wanted: Wanted,
    *,
    weights: Mapping[str, str | None],
    out: Path | None,
    kind: str | None,
    device: str = "auto",
    quiet: bool = False,
) -> int:
    """Score videos and write a row for each label of each window, as soon as it is known.

    Args:
        run: of the head.
        videos: files or folders of frames.
        wanted: which rows.
        weights: of the encoders, where they moved.
        out: a file, which is begun anew once something was scored; None for stdout.
        kind: `csv` or `jsonl`; None for what `out` ends in.
        device: where to compute.
        quiet: say nothing but what went wrong.

    Returns:
        The command's exit code.

    Raises:
        UsageError: an unknown format, or windows and thresholds that cannot be.
        OSError: the disk is full; rows before stay, and none is there in part.
    """
    from msq.head.predict_videos import clip_names
    from msq.head.predict_windows import Windows

    kind = _kind(out, kind)
    Windows.asked(wanted.every, wanted.window)
    check_merging(wanted.every, wanted.threshold, wanted.merge)
    head = loaded_head(run, weights, device)
    others = [label for label in wanted.labels or () if label not in head.classes]
    say_unknown(head.unknown_words(others) if others else ())
    count = _Count()
    with (
        rows_into(out) as file,
        terminal.progress("windows", quiet=quiet or wanted.every is None) as update,
    ):
        sheet = _Sheet(file, kind)
        for path, clip in zip(videos, clip_names(videos), strict=True):
            parts = sheet.begun_by(_parts(head, path, clip, wanted, update, count))
            for row in _rows(parts, wanted):
                sheet.write({"clip": clip, **row})
                count.rows += 1
    if out is not None and not quiet:
        units = "videos" if wanted.every is None else "windows"
        terminal.say(f"{out}: {count.rows} rows of {len(count.failed)} {units}")
    return exit_code(count.failed)


def _parts(
    head: Head, path: Path, clip: str, wanted: Wanted, update: Any, count: _Count
) -> Iterator[dict[str, Any]]:
    """The windows of a video, or all of it as one; what went wrong is said when it is met."""
    if wanted.every is None:
        (item,) = head.predict(
            path, wanted.labels, fps=wanted.fps, top=wanted.top, threshold=wanted.threshold
        )
        say_troubles({**item, "clip": clip})
        parts = iter([{"start": None, "end": None, **item}])
    else:
        parts = _windows(head, path, clip, wanted, update)
    for part in parts:
        count.failed.append("error" in part)
        yield part


def _windows(
    head: Head, path: Path, clip: str, wanted: Wanted, update: Any
) -> Iterator[dict[str, Any]]:
    """The windows of a video, and troubles on stderr; windows damaged alike are one line."""
    alike: list[dict[str, Any]] = []
    assert wanted.every is not None
    try:
        for part in head.segments(
            path,
            wanted.labels,
            every=wanted.every,
            window=wanted.window,
            fps=wanted.fps,
            top=wanted.top,
            threshold=wanted.threshold,
            progress=update,
        ):
            if alike and part.get("degraded") != alike[-1]["degraded"]:
                say_troubles({"clip": clip, "segments": alike})
                alike = []
            if "degraded" in part:
                alike.append({k: part[k] for k in ("start", "end", "degraded")})
            if "error" in part:
                say_troubles({"clip": clip, "segments": [part]})
            yield part
        say_troubles({"clip": clip, "segments": alike})
    except VideoError as error:
        terminal.say(f"failed: {clip}: {error}")
        yield {"start": None, "end": None, "predictions": [], "error": str(error)}


def _rows(segments: Iterable[dict[str, Any]], wanted: Wanted) -> Iterator[dict[str, Any]]:
    """What is written of the windows of a video, in order, without the clip."""
    from msq.head.intervals import merged

    if wanted.merge and wanted.threshold is not None:
        failed: list[dict[str, Any]] = []

        def good() -> Iterator[dict[str, Any]]:
            for segment in segments:
                if "error" in segment:
                    failed.append(segment)
                yield segment

        for interval in merged(good(), wanted.threshold):
            yield from (_failure(failed.pop(0)) for _ in range(len(failed)))
            yield {k: interval[k] for k in COLUMNS if k in interval}
        yield from map(_failure, failed)
        return
    for segment in segments:
        if "error" in segment:
            yield _failure(segment)
        place = {k: segment[k] for k in ("start", "end")}
        damage = {k: segment[k] for k in ("degraded",) if k in segment}
        for found in segment["predictions"]:
            yield {**place, "label": found["label"], "score": found["score"], **damage}


def _failure(segment: Mapping[str, Any]) -> dict[str, Any]:
    return {k: segment[k] for k in ("start", "end", "error")}


def _kind(out: Path | None, kind: str | None) -> str:
    """The format that is asked for, or that the file's name says.

    Raises:
        UsageError: neither says a known one, or they differ.
    """
    ending = "" if out is None else out.suffix.removeprefix(".").lower()
    if kind is None and ending not in FORMATS:
        raise UsageError(f"--out {out}: expected a file that ends in .csv or .jsonl, or --format")
    if kind is not None and ending in FORMATS and ending != kind:
        raise UsageError(f"--out {out}: expected a file that ends in .{kind}, as --format says")
    return kind or ending


class _Sheet:
    """Rows in a file; what it held before is there until the first window is done."""

    def __init__(self, file: Rows, kind: str) -> None:
        self._file, self._begun = file, False
        self._table = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        self._csv = kind == "csv"

    def begun_by(self, parts: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same parts; the file is begun at the first."""
        for part in parts:
            self._begin()
            yield part

    def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        if isinstance(self._file, RowFile):
            self._file.begin()
        if self._csv:
            self._table.writeheader()

    def write(self, row: Mapping[str, Any]) -> None:
        """One row, at once."""
        if self._csv:
            self._table.writerow(row)
        else:
            known = {k: None if x != x else x for k, x in row.items()}  # NaN, as in --json
            self._file.write(json.dumps(known, ensure_ascii=False, allow_nan=False) + "\n")
