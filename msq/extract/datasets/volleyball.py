"""Volleyball (Ibrahim et al. 2016): key frames of 55 videos with players' boxes and actions.

A row is one annotated key frame with its folder of 41 pictures (20 before, 20 after), taken whole.
`annotations.txt` has the action *last* in each player's five fields, unlike its README. Labels are
the set of the 9 individual actions in the key frame, or the one of 8 group activities. Splits go by
video. Pictures are numbered without padding, and stage one sorts them as numbers, so that windows
across 9999 and 10000 stay in order.

Oddities: `malformed` and `repeated` (lines left out), `unknown_action` and `unknown_group` (lines
left out), `under_12_players`, `under_7_players`, `box_past_picture` (boxes that leave the picture),
`absent_videos` (of the 55, no folder), `short_folders` (frame folders of fewer than 41 pictures;
kept).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from msq.errors import DatasetError
from msq.extract.datasets.annotation_text import Skipped, read_lines, refuse_cut_off
from msq.extract.datasets.dataset import Clip, Dataset, Split, Task
from msq.extract.datasets.locate import absent
from msq.extract.datasets.media_index import MediaIndex
from msq.extract.datasets.options import choice
from msq.extract.datasets.reading import Reading, make_adapter
from msq.extract.datasets.survey import count_splits

NAME = "volleyball"
ACTIONS = (
    *("Blocking", "Digging", "Falling", "Jumping", "Moving", "Setting", "Spiking", "Standing"),
    "Waiting",
)
GROUPS = (
    *("r_set", "r_spike", "r-pass", "r_winpoint", "l_winpoint", "l-pass", "l-spike", "l_set"),
)
VIDEOS = 55
PICTURES = 41
WINDOWS: dict[Split, tuple[int, ...]] = {
    "train": (
        *(1, 3, 6, 7, 10, 13, 15, 16, 18, 22, 23, 31, 32, 36, 38, 39, 40, 41, 42, 48, 50, 52),
        *(53, 54),
    ),
    "val": (0, 2, 8, 12, 17, 19, 24, 26, 27, 28, 30, 33, 46, 49, 51),
    "test": (4, 5, 9, 11, 14, 20, 21, 25, 29, 34, 35, 37, 43, 44, 45, 47),
}
SPLIT_OF = {video: split for split, videos in WINDOWS.items() for video in videos}
LARGE = frozenset({2, 37, 38, 39, 40, 41, 44, 45})
OPTIONS = {"labels": "actions (9, multi-label) or group (8, single-label); actions"}
_FOLDERS = ("", "volleyball", "videos", "Volleyball", "volleyball/videos")


class _Row(NamedTuple):
    """A line of annotations.txt: frame number, group, and per player x, y, w, h and action."""

    frame: str
    group: str
    boxes: tuple[tuple[int, int, int, int], ...]
    actions: tuple[str, ...]


@dataclass
class _Findings:
    skipped: Skipped = field(default_factory=list)
    oddities: Counter[str] = field(default_factory=Counter)


class _BadLine(ValueError):
    """A line that cannot be used; the message is the reason given to the user."""


def read_volleyball(root: Path, *, labels: str = "actions") -> Dataset:
    """Read the annotations of all videos that are there; the argument is that of `OPTIONS`.

    Raises:
        DatasetError: no annotations.txt, one is missing beside its frames, or in another format.
        UsageError: an unknown value.
    """
    return ADAPTER.read(Path(root), {"labels": labels})


def video_size(video: int) -> tuple[int, int]:
    """Width and height of a video's pictures, in which its boxes are given."""
    return (1920, 1080) if video in LARGE else (1280, 720)


def _load(root: Path, options: Mapping[str, str]) -> Reading:
    labels = choice(NAME, options, "labels", ("actions", "group"), "actions")
    top = next((root / f for f in _FOLDERS if any((root / f).glob("*/annotations.txt"))), None)
    if top is None:
        raise absent(
            root,
            f"folders 0 to {VIDEOS - 1} with annotations.txt in each",
            "unpack volleyball.zip here",
        )
    found = _Findings()
    media = MediaIndex(top, [""], flat=False)
    clips: list[Clip] = []
    for video in range(VIDEOS):
        folder = top / str(video)
        if not folder.is_dir():
            found.oddities["absent_videos"] += 1
            continue
        if not (folder / "annotations.txt").is_file():
            raise DatasetError(
                f"{folder}: expected annotations.txt beside the frame folders, found none: "
                "unpack volleyball.zip again"
            )
        clips += _read_video(folder, video, labels, media, found)
    if not clips:
        first = found.skipped[0] if found.skipped else ("0 to 54", "no such folders")
        raise DatasetError(
            f"{top}: expected annotations.txt with the {labels} of Volleyball, found no line that "
            f"can be used ({first[0]}: {first[1]}): is it the annotation of another dataset?"
        )
    task: Task = "multilabel" if labels == "actions" else "singlelabel"
    there = VIDEOS - found.oddities["absent_videos"]
    return Reading(
        Dataset(
            NAME,
            ACTIONS if labels == "actions" else GROUPS,
            task,
            tuple(clips),
            "map" if labels == "actions" else "top1",
            tuple(found.skipped),
        ),
        count_splits(clips),
        media.missing,
        found.oddities,
        {"train+val": 3493, "test": 1337, "videos": VIDEOS},
        (
            f"{there} of {VIDEOS} videos are there",
            "the paper's metric is element-wise accuracy; the literature reports group activity "
            "top-1 (--option labels=group)",
        ),
    )


def _read_video(
    folder: Path, video: int, labels: str, media: MediaIndex, found: _Findings
) -> list[Clip]:
    """Rows of one video, in the order of its file."""
    file = folder / "annotations.txt"
    clips: dict[str, Clip] = {}
    lines = read_lines(file, found.skipped)
    rows = 0
    for line in lines:
        number, text = line
        item = f"{video}/annotations.txt line {number}"
        try:
            row = _parse(text)
        except _BadLine as bad:
            refuse_cut_off(file, line, lines, "five fields for each player (X Y W H action)")
            found.oddities["malformed"] += 1
            found.skipped.append((item, str(bad)))
            continue
        rows += 1
        identity = f"{video}/{row.frame}"
        chosen = _indices(row, labels, item, found)
        if chosen is None:
            continue
        if identity in clips:
            found.oddities["repeated"] += 1
            found.skipped.append((item, f"key frame {identity} stands twice"))
            continue
        _look(row, video, found.oddities)
        place = media.find(identity)
        if place.kind == "frames" and _pictures(place.path) < PICTURES:
            found.oddities["short_folders"] += 1
        clips[identity] = Clip(identity, place.path, None, None, chosen, SPLIT_OF[video])
    if not rows:
        raise DatasetError(
            f"{file}, line {lines[0].number}: expected `29885.jpg r_spike 430 575 82 170 waiting "
            f"…` (blanks, the action after its box), found {lines[0].text[:60]!r}; take the file "
            "as published"
        )
    return list(clips.values())


def _parse(text: str) -> _Row:
    fields = text.split()
    if len(fields) < 7 or (len(fields) - 2) % 5:
        raise _BadLine(
            "expected a frame, a group and five fields for each player (X Y W H action), found "
            f"{len(fields)} fields"
        )
    players = [fields[i : i + 5] for i in range(2, len(fields), 5)]
    try:
        boxes = [(int(x), int(y), int(w), int(h)) for x, y, w, h, _ in players]
    except ValueError:
        raise _BadLine(f"expected X Y W H action for each player, found {players[0]}") from None
    frame = fields[0].removesuffix(".jpg")
    if not frame.isdecimal():
        raise _BadLine(f"expected <frame number>.jpg first, found {fields[0]!r}")
    return _Row(frame, fields[1], tuple(boxes), tuple(player[4] for player in players))


def _indices(row: _Row, labels: str, item: str, found: _Findings) -> tuple[int, ...] | None:
    """Class indices of a row; None, with the reason noted, where a name is unknown."""
    if labels == "group":
        plain = [group.replace("-", "_") for group in GROUPS]
        name = row.group.replace("-", "_")
        if name not in plain:
            found.oddities["unknown_group"] += 1
            found.skipped.append((item, f"unknown group {row.group!r}"))
            return None
        return (plain.index(name),)
    unknown = [name for name in row.actions if name.capitalize() not in ACTIONS]
    if unknown:
        found.oddities["unknown_action"] += 1
        found.skipped.append((item, f"unknown action {unknown[0]!r}"))
        return None
    return tuple(sorted({ACTIONS.index(name.capitalize()) for name in row.actions}))


def _look(row: _Row, video: int, oddities: Counter[str]) -> None:
    """Count what is unusual in a row."""
    width, height = video_size(video)
    oddities["under_12_players"] += len(row.boxes) < 12
    oddities["under_7_players"] += len(row.boxes) < 7
    oddities["box_past_picture"] += sum(
        x < 0 or y < 0 or x + w > width or y + h > height for x, y, w, h in row.boxes
    )


def _pictures(folder: Path) -> int:
    # The decoder and PIL are no part of naming the dataset.
    from msq.extract.frame_folder import frame_files
    from msq.extract.packets import UndecodableVideo

    try:
        return len(frame_files(folder))
    except UndecodableVideo:
        return 0


ADAPTER = make_adapter(
    NAME,
    "Volleyball, 9 individual actions or 8 group activities (Ibrahim et al. 2016)",
    "volleyball/<0..54>/annotations.txt and volleyball/<0..54>/<frame>/<picture>.jpg",
    "open download (~60 GB), cite the two papers; videos are from YouTube, rights unknown",
    OPTIONS,
    _load,
)
