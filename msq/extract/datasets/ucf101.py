"""UCF101: 101 classes, three official splits; a row per clip, single-label.

Test lists hold no label: the class is the folder. Train lists carry a label, 1-based, which must
agree with `classInd.txt`; where that file is absent the train list gives the order of the classes.
One class is written in two ways, `HandstandPushups` (folder) and `v_HandStandPushups_…` (files);
videos are found under either, in any case.

Oddities: `name_case` (rows whose folder and file name write the class differently), `malformed`,
`repeated` and `unknown_class` (lines left out), `in_train_and_test` (left out of test).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from msq.errors import DatasetError
from msq.extract.datasets.adapter import SplitCount
from msq.extract.datasets.annotation_text import Skipped, class_names, first_folder, read_lines
from msq.extract.datasets.dataset import Clip, Dataset, Split
from msq.extract.datasets.media_index import MediaIndex, without_suffix
from msq.extract.datasets.options import choice
from msq.extract.datasets.reading import Reading, make_adapter

NAME = "ucf101"
COUNT = 101
PUBLISHED = {
    **{"split1/train": 9537, "split1/test": 3783, "split2/train": 9586, "split2/test": 3734},
    **{"split3/train": 9624, "split3/test": 3696},
}
OPTIONS = {
    "split": "1, 2 or 3; 1",
    "names": "official (ApplyEyeMakeup) or readable (Apply Eye Makeup); official",
}
_FOLDERS = (
    *("", "ucfTrainTestlist", "UCF101TrainTestSplits-RecognitionTask/ucfTrainTestlist"),
    *("UCF101TrainTestSplits-RecognitionTask", "splits", "annotations"),
)
_VIDEOS = ("UCF-101", "UCF101", "UCF101/UCF-101", "videos", "", "rawframes", "frames")
_PARTS: tuple[Split, ...] = ("train", "test")


class _Row(NamedTuple):
    """A line of a list: `Class/v_Class_gNN_cNN.avi`, and its 1-based label where there is one."""

    where: str
    path: str
    label: int | None

    @property
    def folder(self) -> str:
        return PurePosixPath(self.path).parent.name


def read_ucf101(root: Path, *, split: int = 1, names: str = "official") -> Dataset:
    """Read one of the three splits; the arguments are those of `OPTIONS`.

    Raises:
        DatasetError: lists are missing, of another dataset or in another format.
        UsageError: an unknown value.
    """
    return ADAPTER.read(Path(root), {"split": str(split), "names": names})


def _load(root: Path, options: Mapping[str, str]) -> Reading:
    wanted = choice(NAME, options, "split", ("1", "2", "3"), "1")
    style = choice(NAME, options, "names", ("official", "readable"), "official")
    skipped: Skipped = []
    oddities: Counter[str] = Counter()
    folder = first_folder(root, _FOLDERS, f"trainlist0{wanted}.txt")
    if folder is None:
        raise DatasetError(
            f"{root}: expected trainlist0{wanted}.txt and testlist0{wanted}.txt, found none; "
            "unpack UCF101TrainTestSplits-RecognitionTask.zip here"
        )
    lists = {
        part: _read_list(folder / f"{part}list0{wanted}.txt", skipped, oddities) for part in _PARTS
    }
    classes = _classes(folder, lists["train"])
    clips = _clips(lists, classes, media := MediaIndex(root, _VIDEOS), skipped, oddities)
    notes = [f"split {wanted}; the field reports the mean top-1 over the three splits"]
    if not (folder / "classInd.txt").is_file():
        notes.append("no classInd.txt: the class order is that of the labels in the train list")
    return Reading(
        Dataset(NAME, class_names(classes, style), "singlelabel", clips, "top1", tuple(skipped)),
        _all_splits(folder),
        media.missing,
        oddities,
        PUBLISHED,
        tuple(notes),
    )


def _read_list(file: Path, skipped: Skipped, oddities: Counter[str]) -> list[_Row]:
    """Lines `Class/file.avi` with or without a label at the end.

    Raises:
        DatasetError: the file is missing or no line has this form.
    """
    rows = []
    lines = read_lines(file, skipped)
    for number, text in lines:
        where = f"{file.name} line {number}"
        found = re.fullmatch(r"([^,/\\]+/[^/\\]+?)(?:[ \t]+(\d+))?", text)
        if found is None or found[1] == without_suffix(found[1]):
            oddities["malformed"] += 1
            skipped.append((where, f"expected Class/video.avi and maybe a label: {text[:60]!r}"))
            continue
        rows.append(_Row(where, found[1], None if found[2] is None else int(found[2])))
    if not rows:
        raise DatasetError(
            f"{file}, line {lines[0].number}: expected `ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi"
            f" 1`, found {lines[0].text[:60]!r}; take the list as published"
        )
    return rows


def _classes(folder: Path, train: list[_Row]) -> tuple[str, ...]:
    """Class names in the order of their 1-based ids.

    Raises:
        DatasetError: `classInd.txt` is of another form or dataset, or there is none and the train
            list's labels are not 1 … K.
    """
    labels: dict[int, str] = {}
    for row in train:
        if row.label is not None and labels.setdefault(row.label, row.folder) != row.folder:
            raise DatasetError(
                f"{folder}: {row.where}: label {row.label} stands for {row.folder} here and for "
                f"{labels[row.label]} above; take the list as published"
            )
    file = folder / "classInd.txt"
    named = _read_class_file(file) if file.is_file() else labels
    if sorted(named) != list(range(1, len(named) + 1)):
        raise DatasetError(
            f"{folder}: expected labels 1 to {COUNT} (classInd.txt, or those of the train list), "
            f"found {len(named)} between {min(named, default=0)} and {max(named, default=0)}; put "
            "classInd.txt beside the lists"
        )
    wrong = [k for k, name in labels.items() if named.get(k) != name]
    if wrong:
        raise DatasetError(
            f"{file}: expected class {wrong[0]} to be {labels[wrong[0]]}, as in the train list, "
            f"found {named.get(wrong[0], 'no such class')}: is it the class file of another "
            "dataset?"
        )
    return tuple(named[k] for k in sorted(named))


def _read_class_file(file: Path) -> dict[int, str]:
    named: dict[int, str] = {}
    for number, text in read_lines(file):
        key, _, name = text.partition(" ")
        if not key.isdecimal() or not name.strip() or int(key) in named:
            raise DatasetError(
                f"{file}, line {number}: expected `1 ApplyEyeMakeup`, found {text[:60]!r}"
            )
        named[int(key)] = name.strip()
    return named


def _clips(
    lists: Mapping[Split, list[_Row]],
    classes: tuple[str, ...],
    media: MediaIndex,
    skipped: Skipped,
    oddities: Counter[str],
) -> tuple[Clip, ...]:
    index = {name: k for k, name in enumerate(classes)}
    clips: dict[str, Clip] = {}
    for part, rows in lists.items():
        for row in rows:
            identity = without_suffix(row.path)
            if row.folder not in index:
                oddities["unknown_class"] += 1
                skipped.append((row.where, f"{row.folder!r} is no class of classInd.txt"))
            elif identity in clips:
                same = clips[identity].split == part
                oddities["repeated" if same else "in_train_and_test"] += 1
                skipped.append((row.where, f"{row.path} is in {clips[identity].split} already"))
            else:
                written = PurePosixPath(row.path).name.split("_")[1:2]
                oddities["name_case"] += written != [row.folder]
                path = media.find(row.path).path
                clips[identity] = Clip(identity, path, None, None, (index[row.folder],), part)
    if not clips:
        raise DatasetError(
            f"no line of the lists has a class of classInd.txt ({classes[0]}, …); the first: "
            f"{lists['train'][0].path}: is it the class file of another dataset?"
        )
    return tuple(clips.values())


def _all_splits(folder: Path) -> dict[str, SplitCount]:
    """Counts of every split whose lists are there."""
    counts: dict[str, SplitCount] = {}
    for split in (1, 2, 3):
        for part in _PARTS:
            file = folder / f"{part}list0{split}.txt"
            if file.is_file():
                rows = {row.path for row in _read_list(file, [], Counter())}
                counts[f"split{split}/{part}"] = SplitCount(len(rows))
    return counts


ADAPTER = make_adapter(
    NAME,
    "UCF101, 101 action classes (Soomro et al. 2012)",
    "trainlist0{1,2,3}.txt, testlist0{1,2,3}.txt and classInd.txt, and UCF-101/<Class>/<video>.avi "
    "(or flat, or folders of frames)",
    "direct download; research use",
    OPTIONS,
    _load,
)
