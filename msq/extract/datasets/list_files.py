"""What list formats share: which file is which split, its lines, class names for integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from msq.errors import DatasetError, UsageError
from msq.extract.datasets.annotation_text import Skipped
from msq.extract.datasets.dataset import SPLIT_WORDS, SPLITS, Split
from msq.extract.datasets.locate import absent
from msq.extract.datasets.manifest import read_classes

LIST_OPTIONS = {
    "train": "the training list, below the root or absolute; found by its name",
    "val": "the validation list; found by its name",
    "test": "the test list; found by its name",
    "classes": "file of class names in index order (one per line, or CSV id,name); found by name",
    "videos": "folder that the paths of the lists are relative to; the root and usual folders",
}
CLASS_FILES = (
    *("label_map.txt", "classes.txt", "labels.csv", "labels.txt", "annotations/label_map.txt"),
    *("annotations/classes.txt",),
)


class ListRow(NamedTuple):
    """One usable line: where it stands, the path it names, its labels as written.

    `frames` is the part (first, length) of a folder of frames, None for the whole.
    """

    where: str
    path: str
    labels: tuple[str, ...]
    split: Split
    frames: tuple[int, int] | None = None


@dataclass
class Rows:
    """The usable lines of all lists, and what was wrong with the others."""

    rows: list[ListRow] = field(default_factory=list)
    skipped: Skipped = field(default_factory=list)
    oddities: Counter[str] = field(default_factory=Counter)


def resolve(root: Path, given: str) -> Path:
    """A path from an option: absolute, or below the root."""
    return root / Path(given).expanduser()


def find_lists(
    dataset: str,
    root: Path,
    options: Mapping[str, str],
    fits: Callable[[Path], bool],
    needs: str,
) -> dict[Split, Path]:
    """The list of each split: from the options, else the one file whose name has the split in it.

    Raises:
        DatasetError: a named file is missing, or no list is found.
        UsageError: several files could be the list of a split.
    """
    found: dict[Split, Path] = {}
    for split in SPLITS:
        if options.get(split):
            found[split] = resolve(root, options[split])
            if not found[split].is_file():
                raise DatasetError(
                    f"{found[split]}: expected the list of --option {split}=…, found no file there"
                )
    if found:
        return found
    for split in SPLITS:
        files = [
            file
            for folder in (root, root / "annotations")
            if folder.is_dir()
            for file in sorted(folder.iterdir())
            if file.is_file() and _split_in(file.stem) == split and fits(file)
        ]
        if len(files) > 1:
            raise UsageError(
                f"dataset {dataset}: expected one {split} list below {root}, found "
                f"{', '.join(f.name for f in files)}; name one with --option {split}=FILE"
            )
        if files:
            found[split] = files[0]
    if not found:
        raise absent(root, needs, "name the lists with --option train=FILE and test=FILE")
    return found


def _split_in(stem: str) -> Split | None:
    """The split that a file's name speaks of: the first such word in it."""
    for word in stem.lower().replace("-", "_").replace(".", "_").split("_"):
        if word in SPLIT_WORDS:
            return SPLIT_WORDS[word]
    lower = stem.lower()
    return next((split for split in SPLITS if lower.startswith(split)), None)


def find_classes(root: Path, options: Mapping[str, str]) -> tuple[Path, tuple[str, ...]] | None:
    """The file of class names and the names; None where there is no such file.

    Raises:
        DatasetError: the named file is missing or unreadable.
    """
    if options.get("classes"):
        file = resolve(root, options["classes"])
    else:
        there = [p for name in CLASS_FILES if (p := root / name).is_file()]
        there += sorted([*root.glob("label_map*.txt"), *root.glob("*_labels.csv")])
        if not there:
            return None
        file = there[0]
    return file, read_classes(file)


def number_labels(
    rows: Sequence[ListRow], named: tuple[Path, tuple[str, ...]] | None
) -> tuple[tuple[str, ...], Callable[[str], int]]:
    """Class names, and the index of a label as written: an integer, or a name.

    Without a file of names, integers give `class 0` …, and names their sorted order.

    Raises:
        DatasetError: a label that the file of names does not have.
    """
    written = {label for row in rows for label in row.labels}
    if named is None and all(label.isdecimal() for label in written):
        count = 1 + max((int(label) for label in written), default=-1)
        return tuple(f"class {k}" for k in range(count)), int
    names = tuple(sorted(written)) if named is None else named[1]
    index = {name: k for k, name in enumerate(names)}

    def number(label: str) -> int:
        return index[label] if label in index else int(label)

    for row in rows if named is not None else ():
        for label in row.labels:
            if label not in index and not (label.isdecimal() and int(label) < len(names)):
                raise DatasetError(
                    f"{row.where}: label {label} is none of the {len(names)} classes of "
                    f"{named[0] if named else ''}: is it the class file of another dataset? name "
                    "the right one with --option classes=FILE"
                )
    return names, number
