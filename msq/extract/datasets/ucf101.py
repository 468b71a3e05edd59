"""UCF101: 101 classes, three official splits; a row per clip, single-label.

Test lists hold no label: the class is the folder. Train lists carry a label, 1-based, which must
agree with `classInd.txt`; where that file is absent the train list gives the order of the classes.
One class is written in two ways, `HandstandPushups` (folder) and `v_HandStandPushups_…` (files);
videos are found under either, in any case.

With `split=all` the dataset has the clips that any split uses, and the splits as partitions.

Oddities: `name_case` (clips whose folder and file name write the class differently), `malformed`,
`repeated` and `unknown_class` (lines left out), `in_train_and_test` (left out of test).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from msq.errors import DatasetError
from msq.extract.datasets.adapter import SplitCount
from msq.extract.datasets.annotation_text import (
    Skipped,
    class_names,
    first_folder,
    read_lines,
    refuse_cut_off,
)
from msq.extract.datasets.dataset import Clip, Dataset, Split
from msq.extract.datasets.locate import absent
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
    "split": "1, 2, 3, or all: one store for the three, told apart by train-head --partition; 1",
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


def read_ucf101(root: Path, *, split: int | str = 1, names: str = "official") -> Dataset:
    """Read one of the three splits, or `all`; the arguments are those of `OPTIONS`.

    Raises:
        DatasetError: lists are missing, of another dataset or in another format.
        UsageError: an unknown value.
    """
    return ADAPTER.read(Path(root), {"split": str(split), "names": names})


def _load(root: Path, options: Mapping[str, str]) -> Reading:
    wanted = choice(NAME, options, "split", ("1", "2", "3", "all"), "1")
    numbers = ("1", "2", "3") if wanted == "all" else (wanted,)
    style = choice(NAME, options, "names", ("official", "readable"), "official")
    skipped: Skipped = []
    oddities: Counter[str] = Counter()
    folder = first_folder(root, _FOLDERS, f"trainlist0{numbers[0]}.txt")
    if folder is None:
        raise absent(
            root,
            f"trainlist0{numbers[0]}.txt and testlist0{numbers[0]}.txt",
            "unpack UCF101TrainTestSplits-RecognitionTask.zip here",
        )
    lists = {
        k: {p: _read_list(folder / f"{p}list0{k}.txt", skipped, oddities) for p in _PARTS}
        for k in numbers
    }
    classes = _classes(folder, [row for parts in lists.values() for row in parts["train"]])
    media = MediaIndex(root, _VIDEOS)
    found = {k: _clips(parts, classes, media, skipped, oddities) for k, parts in lists.items()}
    clips = _union(found)
    oddities["name_case"] = sum(_written_otherwise(clip.id) for clip in clips)
    notes = [
        f"split {wanted}; the field reports the mean top-1 over the three splits (--option "
        "split=all, then train-head --partition all)"
    ]
    if not (folder / "classInd.txt").is_file():
        notes.append("no classInd.txt: the class order is that of the labels in the train list")
    return Reading(
        Dataset(
            NAME,
            class_names(classes, style),
            "singlelabel",
            clips,
            "top1",
            tuple(skipped),
            partitions=_partitions(clips, found) if wanted == "all" else {},
            variant="all splits" if wanted == "all" else f"split {wanted}",
        ),
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
    for line in lines:
        number, text = line
        where = f"{file.name} line {number}"
        found = re.fullmatch(r"([^,/\\]+/[^/\\]+?)(?:[ \t]+(\d+))?", text)
        if found is None or found[1] == without_suffix(found[1]):
            refuse_cut_off(file, line, lines, "Class/video.avi and maybe a label")
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
                f"{file}, line {number}: expected `1 ApplyEyeMakeup`, found {text[:60]!r}; take "
                "classInd.txt as published"
            )
        named[int(key)] = name.strip()
    return named


def _clips(
    lists: Mapping[Split, list[_Row]],
    classes: tuple[str, ...],
    media: MediaIndex,
    skipped: Skipped,
    oddities: Counter[str],
) -> dict[str, Clip]:
    """The clips of one split, by id."""
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
                path = media.find(row.path).path
                clips[identity] = Clip(identity, path, None, None, (index[row.folder],), part)
    if not clips:
        raise DatasetError(
            f"no line of the lists has a class of classInd.txt ({classes[0]}, …); the first: "
            f"{lists['train'][0].path}: is it the class file of another dataset?"
        )
    return clips


def _union(found: Mapping[str, Mapping[str, Clip]]) -> tuple[Clip, ...]:
    """The clips of all splits; those that the first does not have are its `val`."""
    first = next(iter(found.values()))
    rest: dict[str, Clip] = {}
    for clips in found.values():
        for name, clip in clips.items():
            if name not in first:
                rest.setdefault(name, replace(clip, split="val"))
    return (*first.values(), *rest.values())


def _partitions(
    clips: Sequence[Clip], found: Mapping[str, Mapping[str, Clip]]
) -> dict[str, tuple[str, ...]]:
    return {
        f"split{k}": tuple(part[c.id].split if c.id in part else "" for c in clips)
        for k, part in found.items()
    }


def _written_otherwise(identity: str) -> bool:
    """Whether folder and file name write the class differently."""
    path = PurePosixPath(identity)
    return path.name.split("_")[1:2] != [path.parent.name]


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
