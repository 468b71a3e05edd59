"""mmaction2 lists of videos and of rawframes.

Videos: `path.mp4 3`, `path.mp4 1 3 5`. Rawframes: `dir total label …`, with offsets `dir start
total label …`.

Lines are taken apart from the right. A rawframes row with an offset is a cut: picture `start`
(0-based, in natural order) and the `total - 1` after it. Without an offset the whole folder is
taken. Several labels make the set multi-label.

Oddities: `malformed`, `repeated` (lines left out), `frame_count_mismatch` (folders with fewer
frames than the list says), `zero_frames` (rawframes rows of length 0, left out). Optical flow
beside the frames (`flow_x_00001.jpg`), as mmaction2's extraction writes it, is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

from msq.errors import DatasetError
from msq.extract.datasets.annotation_text import positive, read_lines
from msq.extract.datasets.dataset import Dataset, Split, Task
from msq.extract.datasets.folder import SUFFIXES
from msq.extract.datasets.list_clips import list_reading
from msq.extract.datasets.list_files import (
    LIST_OPTIONS,
    ListRow,
    Rows,
    find_classes,
    find_lists,
)
from msq.extract.datasets.media_index import MediaIndex
from msq.extract.datasets.options import choice
from msq.extract.datasets.reading import Reading, make_adapter

NAME = "mmaction2"
Kind = Literal["videos", "rawframes", "rawframes_offset"]
KINDS: tuple[Kind, ...] = ("videos", "rawframes", "rawframes_offset")
FPS = 30.0
OPTIONS = {
    **LIST_OPTIONS,
    "kind": "videos, rawframes, rawframes_offset (dir start total label), or auto (videos where "
    "paths end as videos do, else rawframes); auto",
    "delimiter": "what stands between the fields, as one character; runs of blanks",
    "task": "singlelabel, multilabel, or auto (multi-label where a line has two labels); auto",
    "fps": f"frame rate of frame folders, for their times only; {FPS:g}",
}
_VIDEOS = (
    *("", "videos", "rawframes", "videos_train", "videos_val", "videos_test"),
    *("rawframes_train", "rawframes_val", "rawframes_test"),
)
_NUMBERS = {"videos": 0, "rawframes": 1, "rawframes_offset": 2}
_FORMS = {
    "videos": "path.mp4 label …",
    "rawframes": "folder total label …",
    "rawframes_offset": "folder start total label …",
}


def read_mmaction2(root: Path, **options: str) -> Dataset:
    """Read the lists of a folder; the arguments are those of `OPTIONS`.

    Raises:
        DatasetError: no list is there, or one is in another format, or has labels that the class
            file does not have.
        UsageError: an unknown option or value; several files could be a list.
    """
    return ADAPTER.read(Path(root), options)


def _load(root: Path, options: Mapping[str, str]) -> Reading:
    kind = choice(NAME, options, "kind", ("auto", *KINDS), "auto")
    task = choice(NAME, options, "task", ("auto", "singlelabel", "multilabel"), "auto")
    fps = positive(NAME, options, "fps") or FPS
    wanted = {"videos": "video", "rawframes": "rawframe", "rawframes_offset": "rawframe"}.get(kind)
    files = find_lists(
        NAME,
        root,
        options,
        lambda f: f.suffix in (".txt", ".list") and (wanted is None or wanted in f.name),
        "lists such as hmdb51_train_split_1_videos.txt",
    )
    found = Rows()
    lengths: dict[str, int] = {}
    for split, file in files.items():
        _read_list(file, split, kind, options.get("delimiter") or None, task, found, lengths)
    top = [options["videos"]] if options.get("videos") else _VIDEOS
    media = MediaIndex(root, top)
    _check_folders(found, media, lengths)
    return list_reading(
        NAME,
        found,
        media,
        find_classes(root, options),
        None if task == "auto" else cast(Task, task),
        fps,
        lambda row: (row.path,),
        keep=options.get("policy") == "keep",
    )


def _read_list(
    file: Path,
    split: Split,
    kind: str,
    delimiter: str | None,
    task: str,
    found: Rows,
    lengths: dict[str, int],
) -> None:
    """Add the lines of one list.

    Raises:
        DatasetError: no line has the form of its kind.
    """
    before = len(found.rows)
    lines = read_lines(file, found.skipped)
    if kind == "auto":
        videos = sum(_video_path(text) for _, text in lines)
        kind = "videos" if 2 * videos > len(lines) else "rawframes"
    for number, text in lines:
        where = f"{file.name} line {number}"
        fields = _fields(text, delimiter, _NUMBERS[kind], task)
        if fields is None:
            found.oddities["malformed"] += 1
            found.skipped.append((where, f"expected `{_FORMS[kind]}`, found {text[-80:]!r}"))
            continue
        path, numbers = fields[0], [int(x) for x in fields[1 : 1 + _NUMBERS[kind]]]
        labels = tuple(fields[1 + _NUMBERS[kind] :])
        if numbers and numbers[-1] == 0:
            found.oddities["zero_frames"] += 1
            found.skipped.append((where, f"{path} has 0 frames"))
            continue
        if numbers:
            lengths[path] = max(lengths.get(path, 0), sum(numbers))
        part = (numbers[0], numbers[1]) if kind == "rawframes_offset" else None
        found.rows.append(ListRow(where, path, labels, split, part))
    if len(found.rows) == before:
        raise DatasetError(
            f"{file}, line {lines[0].number}: expected `{_FORMS[kind]}`, found "
            f"{lines[0].text[:80]!r}; give --option delimiter=, or kind={'|'.join(KINDS)}"
        )


def _video_path(text: str) -> bool:
    """Whether a line names a file of a video type."""
    return any(f"{suffix}{end}" in f"{text.lower()} " for suffix in SUFFIXES for end in " ,;\t")


def _fields(text: str, delimiter: str | None, numbers: int, task: str) -> list[str] | None:
    """Path, then the numbers and labels at the end of a line; None where it has another form."""
    if task == "singlelabel":
        parts = [part.strip() for part in text.rsplit(delimiter, numbers + 1)]
        if len(parts) != numbers + 2 or not all(part.isdecimal() for part in parts[1:]):
            return None
        return parts if parts[0] else None
    parts = [part.strip() for part in text.split(delimiter)]
    first = len(parts)
    while first > 1 and parts[first - 1].isdecimal():
        first -= 1
    if len(parts) - first < numbers + 1:
        return None
    # What stands before the numbers is the path, with the blanks that it has in the line.
    rest = parts[first:]
    mark = r"\s+" if delimiter is None else rf"\s*{re.escape(delimiter)}\s*"
    tail = re.search(mark + mark.join(rest) + r"\s*$", text)
    path = text[: tail.start()].strip() if tail else ""
    return [path, *rest] if path else None


def _check_folders(found: Rows, media: MediaIndex, lengths: Mapping[str, int]) -> None:
    """Count frame folders with fewer frames than the list says."""
    # The decoder and PIL are no part of naming the format.
    from msq.extract.frame_folder import frame_files
    from msq.extract.packets import UndecodableVideo

    for path, length in lengths.items():
        place = media.find(path)
        if place.kind != "frames":
            continue
        try:
            frames = len(frame_files(place.path))
        except UndecodableVideo:
            frames = 0
        found.oddities["frame_count_mismatch"] += frames < length


ADAPTER = make_adapter(
    NAME,
    "mmaction2 video and rawframes lists",
    "*train*.txt, *val*.txt and/or *test*.txt lists, label_map.txt, and the videos or rawframes",
    "that of the data they list",
    OPTIONS,
    _load,
    keeps=True,
)
