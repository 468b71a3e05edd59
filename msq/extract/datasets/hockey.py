"""Hockey (`ets_dataset_concordia1_v1`): 12 activities labelled frame by frame, 36 grey videos.

A row is a clip of 30 frames, every 10 frames of a training video and every 45 of a test video; its
labels are the OR over its frames (or over the T frames that the authors' sampling would show, with
`target=T`). Frames past the last whole clip are in no clip, as in the authors' code. Videos whose
name ends in the test part (`period*-6-gray`) are test, all others train; the authors' loader
always tests on part 6, so that another `--test_part` puts test videos in its training set. Not
here.

Cuts are seconds on the clock of the AVI file (frame k at k / its own rate), moved forward by half
a frame so that rounding cannot lose one. A folder of frames has no clock and is given `fps`, which
changes times only, never which frames are taken.

Oddities: `label_frame_mismatch` (videos with another number of frames than label lines; the
shorter counts), `frame_number_gaps` (frame folders that lack numbers; left out, since labels would
shift), `videos_without_labels` (left out), `absent_videos` (of the 36, neither video nor labels),
`unreadable_videos` (the clock cannot be read; the clips stay and fail in stage one),
`too_short` (fewer than 30 frames; left out).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msq.errors import DatasetError, UsageError, VideoError
from msq.extract.datasets.annotation_text import Skipped, positive, read_lines
from msq.extract.datasets.dataset import Clip, Dataset, Split
from msq.extract.datasets.locate import absent
from msq.extract.datasets.media_index import MediaIndex, Place
from msq.extract.datasets.options import choice
from msq.extract.datasets.reading import Reading, make_adapter
from msq.extract.datasets.survey import count_splits
from msq.extract.sampling import sample_indices

NAME = "hockey"
CLASSES = (
    *("Celebration", "Checking", "Corner Action", "End of Period", "Face-Off", "Fight", "Goal"),
    *("Line Change", "Penalty", "Shot", "Save", "Play"),
)
LENGTH = 30
STRIDES: dict[Split, int] = {"train": 10, "test": 45}
FPS = 30.0
VIDEOS = tuple(
    f"period{period}-{group}-{part}-gray"
    for period in (1, 2, 3)
    for group in (1, 2)
    for part in range(1, 7)
)
OPTIONS = {
    "test_part": "1 to 6: the videos period*-N-gray are test; 6",
    "target": "clip (labels of all 30 frames) or T (those of the T frames sampled by the authors' "
    "rule); clip",
    "fps": f"frame rate of frame folders, for their times only; {FPS:g}",
}
_FOLDERS = ("", "Hockey", "ets_dataset_concordia1_v1", "labels", "annotations")
_VIDEOS = ("", "Hockey", "ets_dataset_concordia1_v1", "videos", "frames", "rawframes")


@dataclass
class _Findings:
    skipped: Skipped = field(default_factory=list)
    oddities: Counter[str] = field(default_factory=Counter)


def read_hockey(
    root: Path, *, test_part: int = 6, target: str = "clip", fps: float = FPS
) -> Dataset:
    """Cut the videos into clips; the arguments are those of `OPTIONS`.

    Raises:
        DatasetError: no label file is there, or one has lines of another form.
        UsageError: an unknown value.
    """
    options = {"test_part": str(test_part), "target": target, "fps": str(fps)}
    return ADAPTER.read(Path(root), options)


def _load(root: Path, options: Mapping[str, str]) -> Reading:
    part = choice(NAME, options, "test_part", tuple("123456"), "6")
    fps = positive(NAME, options, "fps") or FPS
    chosen = _chosen(options.get("target", "clip"))
    media = MediaIndex(root, _VIDEOS)
    found = _Findings()
    clips: list[Clip] = []
    for name in VIDEOS:
        file = next((p for f in _FOLDERS if (p := root / f / f"{name}-label.txt").is_file()), None)
        if file is None:
            if media.find(f"{name}.avi").kind == "missing":
                found.oddities["absent_videos"] += 1
            else:
                found.oddities["videos_without_labels"] += 1
                found.skipped.append((name, f"no {name}-label.txt: unpack the archive again"))
            continue
        place = media.find(f"{name}.avi")
        split: Split = "test" if name.endswith(f"-{part}-gray") else "train"
        clips += _cut(name, place, _labels(file), split, chosen, fps, found)
    if not clips:
        raise absent(
            root,
            f"label files such as {VIDEOS[0]}-label.txt (36, one line per frame) with at least "
            f"{LENGTH} lines",
            "unpack ets_dataset_concordia1_v1 here",
        )
    there = len(VIDEOS) - found.oddities["absent_videos"]
    return Reading(
        Dataset(NAME, CLASSES, "multilabel", tuple(clips), "map", tuple(found.skipped)),
        count_splits(clips),
        tuple(m for m in media.missing if (root / m).stem in {c.path.stem for c in clips}),
        found.oddities,
        {"videos": len(VIDEOS)},
        (
            f"test videos are period*-{part}-gray; {there} of {len(VIDEOS)} videos",
            "the order of the 12 label columns is assumed to be that of the authors' code",
            "the paper's metric is element-wise accuracy at 0.5, where predicting nothing is "
            "already right for most labels; look at mAP and F1 beside it",
        ),
    )


def _chosen(target: str) -> NDArray[np.int64]:
    """Frames of a clip whose labels count."""
    if target == "clip":
        return np.arange(LENGTH)
    if not re.fullmatch(r"[1-9]\d{0,3}", target):
        raise UsageError(
            f"dataset {NAME}, --option target={target}: expected clip or a number of frames"
        )
    return sample_indices(LENGTH, int(target), "official")


def _labels(file: Path) -> NDArray[np.bool_]:
    """Labels [n, 12] of every frame.

    Raises:
        DatasetError: a line is not 12 comma-separated 0 or 1, or is empty before the last.
    """
    rows: list[list[bool]] = []
    for number, text in read_lines(file):
        cells = [cell.strip() for cell in text.rstrip(",").split(",")]
        if number != len(rows) + 1:
            raise DatasetError(
                f"{file}, line {len(rows) + 1}: expected a line for every frame, found an empty "
                "one, which would shift all labels after it; take the file as published"
            )
        if len(cells) != len(CLASSES) or not set(cells) <= {"0", "1"}:
            raise DatasetError(
                f"{file}, line {number}: expected {len(CLASSES)} comma-separated 0 or 1, found "
                f"{text[:60]!r}; take the file as published"
            )
        rows.append([cell == "1" for cell in cells])
    return np.array(rows, dtype=np.bool_)


def _cut(
    name: str,
    place: Place,
    labels: NDArray[np.bool_],
    split: Split,
    chosen: NDArray[np.int64],
    fps: float,
    found: _Findings,
) -> list[Clip]:
    """Clips of one video."""
    try:
        frames, rate = _clock(place, len(labels), fps)
    except VideoError:
        found.oddities["unreadable_videos"] += 1
        place, frames, rate = Place(place.path, "missing"), len(labels), fps
    if place.kind == "frames" and _gaps(place.path):
        found.oddities["frame_number_gaps"] += 1
        found.skipped.append((name, "frame numbers have gaps: extract the frames again"))
        return []
    if frames != len(labels):
        found.oddities["label_frame_mismatch"] += 1
    length = min(frames, len(labels))
    if length < LENGTH:
        found.oddities["too_short"] += 1
        found.skipped.append((name, f"{length} frames with labels, a clip has {LENGTH}"))
    return [
        Clip(
            id=f"{name}#f{first}-{first + LENGTH}",
            path=place.path,
            start=max(0.0, (first - 0.5) / rate),
            end=(first + LENGTH - 0.5) / rate,
            labels=_any(labels[first + chosen]),
            split=split,
            fps=rate if place.kind == "frames" else None,
        )
        for first in range(0, length - LENGTH + 1, STRIDES[split])
    ]


def _any(labels: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(k) for k in np.flatnonzero(labels.any(axis=0)))


def _clock(place: Place, expected: int, fps: float) -> tuple[int, float]:
    """Number of frames (as expected where unknown) and frames per second."""
    if place.kind == "missing":
        return expected, fps
    # Here and below: the decoder and PIL are no part of naming the dataset.
    from msq.extract.frame_folder import frame_files
    from msq.extract.packets import open_stream

    if place.kind == "frames":
        return len(frame_files(place.path)), fps
    with open_stream(place.path) as (_, stream):
        rate = stream.average_rate
        return stream.frames or expected, fps if rate is None else float(rate)


def _gaps(folder: Path) -> bool:
    """Whether the pictures' numbers are not consecutive."""
    from msq.extract.frame_folder import frame_files

    numbers = [_last_number(file.stem) for file in frame_files(folder)]
    return _not_consecutive([n for n in numbers if n is not None])


def _last_number(stem: str) -> int | None:
    digits = re.findall(r"\d+", stem)
    return int(digits[-1]) if digits else None


def _not_consecutive(numbers: Sequence[int]) -> bool:
    return bool(numbers) and numbers != list(range(numbers[0], numbers[0] + len(numbers)))


ADAPTER = make_adapter(
    NAME,
    "Hockey, 12 activities (Sozykin et al. 2018; ets_dataset_concordia1_v1)",
    "period{1-3}-{1-2}-{1-6}-gray-label.txt (36), and the AVI files or folders of frames",
    "on request from its authors (ETS Montreal); licence unknown",
    OPTIONS,
    _load,
)
