"""HMDB51: 51 classes, three official splits; a row per clip, single-label.

The split files give each of the 6,766 clips a tag: 1 train, 2 test, 0 unused in that split. Names
hold brackets, blanks' neighbours and quotes (469 of the 5,100 used ones in split 1), which only
shells and globs mind: msq matches names as they are. Ids are `class/name` in every split, so rows
of stores of different splits can be put side by side.

With `split=all` the dataset has the clips that any split uses, and the splits as partitions.

Oddities: `unsafe_names` (used clips with one of `# ( ) ! ; & ' [ ] ,`), `unused` (tag 0; left out
unless `unused=val`), `malformed` and `repeated` (lines left out).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from msq.errors import DatasetError, UsageError
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

NAME = "hmdb51"
CLASSES = (
    *("brush_hair", "cartwheel", "catch", "chew", "clap", "climb", "climb_stairs", "dive"),
    *("draw_sword", "dribble", "drink", "eat", "fall_floor", "fencing", "flic_flac", "golf"),
    *("handstand", "hit", "hug", "jump", "kick", "kick_ball", "kiss", "laugh", "pick", "pour"),
    *("pullup", "punch", "push", "pushup", "ride_bike", "ride_horse", "run", "shake_hands"),
    *("shoot_ball", "shoot_bow", "shoot_gun", "sit", "situp", "smile", "smoke", "somersault"),
    *("stand", "swing_baseball", "sword", "sword_exercise", "talk", "throw", "turn", "walk"),
    "wave",
)
TAGS: dict[str, Split | None] = {"1": "train", "2": "test", "0": None}
UNSAFE = frozenset("#()!;&'[],")
PUBLISHED = {
    f"split{k}/{part}": count
    for k in (1, 2, 3)
    for part, count in (("train", 3570), ("test", 1530), ("unused", 1666))
}
OPTIONS = {
    "split": "1, 2, 3, or all: one store for the three, told apart by train-head --partition; 1",
    "unused": "skip the clips that the split leaves unused, or keep them as val; skip",
    "names": "official (brush_hair) or readable (brush hair); official",
}
_FOLDERS = (
    *("", "testTrainMulti_7030_splits", "test_train_splits/testTrainMulti_7030_splits"),
    *("test_train_splits", "splits", "annotations"),
)
_VIDEOS = ("", "videos", "hmdb51_org", "rawframes", "frames")


class _Row(NamedTuple):
    label: int
    file: str
    tag: str

    @property
    def id(self) -> str:
        return f"{CLASSES[self.label]}/{without_suffix(self.file)}"


def read_hmdb51(
    root: Path, *, split: int | str = 1, unused: str = "skip", names: str = "official"
) -> Dataset:
    """Read one of the three splits, or `all`; the arguments are those of `OPTIONS`.

    Raises:
        DatasetError: split files are missing, of another dataset or in another format.
        UsageError: an unknown value.
    """
    return ADAPTER.read(Path(root), {"split": str(split), "unused": unused, "names": names})


def hmdb51_tags(root: Path, split: int) -> dict[str, Split | None]:
    """Clip id -> `train`, `test` or None (unused) in an official split, to re-split a store.

    Raises:
        DatasetError: as `read_hmdb51`.
    """
    return {row.id: TAGS[row.tag] for row in _rows(Path(root), split, [], Counter())}


def _load(root: Path, options: Mapping[str, str]) -> Reading:
    wanted = choice(NAME, options, "split", ("1", "2", "3", "all"), "1")
    unused = choice(NAME, options, "unused", ("skip", "val"), "skip")
    style = choice(NAME, options, "names", ("official", "readable"), "official")
    if wanted == "all" and unused == "val":
        raise UsageError(
            f"dataset {NAME}, --option unused=val: goes with one split; with split=all a clip that "
            "a split leaves unused is marked so in its partition"
        )
    numbers = (1, 2, 3) if wanted == "all" else (int(wanted),)
    skipped: Skipped = []
    regular: Skipped = []
    oddities: Counter[str] = Counter()
    media = MediaIndex(root, _VIDEOS)
    rows: dict[str, dict[int, _Row]] = {}
    for k in numbers:
        for row in _rows(root, k, skipped, oddities):
            rows.setdefault(row.id, {})[k] = row
    partitions: dict[int, list[str]] = {k: [] for k in numbers}
    clips = []
    for name, found in rows.items():
        row = next(iter(found.values()))
        tags = {k: TAGS[found[k].tag] if k in found else None for k in numbers}
        used = any(tags.values())
        oddities["unused"] += not used
        oddities["unsafe_names"] += used and not UNSAFE.isdisjoint(row.file)
        if not used and unused == "skip":
            where = "every split" if wanted == "all" else f"split {wanted}"
            regular.append((name, f"unused in {where} (tag 0)"))
            continue
        path = media.find(f"{CLASSES[row.label]}/{row.file}").path
        clips.append(Clip(name, path, None, None, (row.label,), tags[numbers[0]] or "val"))
        for k, tag in tags.items():
            partitions[k].append(tag or "")
    return Reading(
        Dataset(
            NAME,
            class_names(CLASSES, style),
            "singlelabel",
            tuple(clips),
            "top1",
            (*regular, *skipped),
            partitions={f"split{k}": tuple(v) for k, v in partitions.items() if wanted == "all"},
            variant="all splits" if wanted == "all" else f"split {wanted}",
        ),
        _all_splits(root),
        media.missing,
        oddities,
        PUBLISHED,
        (
            f"split {wanted}; the field reports the mean top-1 over the three splits "
            "(--option split=all, then train-head --partition all)",
            "clips of the test part of one split are in the training part of others: never mix",
        ),
        frozenset(regular),
    )


def _rows(root: Path, split: int, skipped: Skipped, oddities: Counter[str]) -> Iterator[_Row]:
    """Lines of the 51 files of a split, class by class.

    Raises:
        DatasetError: there are none, some are missing, or one is of another dataset or format.
    """
    suffix = f"_test_split{split}.txt"
    folder = first_folder(root, _FOLDERS, f".+{suffix}")
    if folder is None:
        raise absent(
            root,
            f"51 files <class>{suffix}",
            "unpack test_train_splits.rar here, or choose another split with --option split=1",
        )
    # Whole names: `climb` is no prefix search, which would also find `climb_stairs`.
    there = {file.name.removesuffix(suffix) for file in folder.glob(f"*{suffix}")}
    if strange := sorted(there - set(CLASSES)):
        raise DatasetError(
            f"{folder / (strange[0] + suffix)}: expected a class of HMDB51 ({CLASSES[0]}, …), "
            f"found {strange[0]!r}: is it the class file of another dataset? move it away"
        )
    if gone := [name for name in CLASSES if name not in there]:
        raise DatasetError(
            f"{folder}: expected 51 files <class>{suffix}, found {len(there)}; "
            f"{gone[0]}{suffix} is not there: unpack test_train_splits.rar again"
        )
    for label, name in enumerate(CLASSES):
        yield from _class_rows(folder / f"{name}{suffix}", label, skipped, oddities)


def _class_rows(file: Path, label: int, skipped: Skipped, oddities: Counter[str]) -> Iterator[_Row]:
    """Lines `name tag`, split from the right; lines end in a blank, names may hold some."""
    seen: set[str] = set()
    lines = read_lines(file, skipped)
    for line in lines:
        number, text = line
        name, _, tag = text.replace("\t", " ").rpartition(" ")
        row = _Row(label, name.strip(), tag)
        where = f"{file.name} line {number}"
        if row.file == without_suffix(row.file) or tag not in TAGS:
            refuse_cut_off(file, line, lines, "a name and a tag 0, 1 or 2")
            oddities["malformed"] += 1
            skipped.append((where, f"expected a name and a tag 0, 1 or 2, found {text[-60:]!r}"))
        elif row.id in seen:
            oddities["repeated"] += 1
            skipped.append((where, f"{row.file} stands twice in this file"))
        else:
            seen.add(row.id)
            yield row
    if not seen:
        raise DatasetError(
            f"{file}, line {lines[0].number}: expected a name, a blank and a tag 0, 1 or 2, "
            f"found {lines[0].text[-60:]!r}; take the file as published"
        )


def _all_splits(root: Path) -> dict[str, SplitCount]:
    """Counts of every split whose files are there."""
    counts: dict[str, SplitCount] = {}
    for split in (1, 2, 3):
        if first_folder(root, _FOLDERS, f".+_test_split{split}.txt") is None:
            continue
        tags = Counter(row.tag for row in _rows(root, split, [], Counter()))
        for name, tag in (("train", "1"), ("test", "2"), ("unused", "0")):
            counts[f"split{split}/{name}"] = SplitCount(tags[tag])
    return counts


ADAPTER = make_adapter(
    NAME,
    "HMDB51, 51 human motions (Kuehne et al. 2011)",
    "testTrainMulti_7030_splits/<class>_test_split{1,2,3}.txt, and videos/<class>/<name>.avi "
    "(or flat, or folders of frames)",
    "direct download (unrar needed); CC BY 4.0 as stated by the authors' site",
    OPTIONS,
    _load,
)
