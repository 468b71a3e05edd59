"""Class splits from lists, one class per line, as STALE and Efficient-Prompt publish them."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from msq.errors import UsageError
from msq.head.class_splits import ClassSplit

_LIST = re.compile(r"split_(\d+)\.list")


def read_class_list(path: Path) -> list[str]:
    """Names in a `.list` file, one per line; blank lines and blanks at the ends are passed over.

    Raises:
        UsageError: missing, or not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"{path}: no such class list") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: expected UTF-8, one class per line; {error}") from None
    return [line.strip() for line in lines if line.strip()]


def class_split_from_files(
    classes: Sequence[str], seen: Path, unseen: Path, source: str = ""
) -> ClassSplit:
    """A split from two `.list` files; classes in neither are left out.

    A name is found also where the store writes it with other blanks, underscores or capitals
    (`CliffDiving`, `Cliff Diving`).

    Args:
        classes: those of the store.
        seen: file of the trained ones.
        unseen: file of the others.
        source: what to call it.

    Raises:
        UsageError: an empty list, a name that is no class (names the nearest) or stands there
            twice, or that is in both lists.
    """
    lists = {path: _known(path, classes) for path in (seen, unseen)}
    both = sorted(set(lists[seen]) & set(lists[unseen]))
    if both:
        raise UsageError(f"{seen} and {unseen}: expected no class in both, found {both}")
    return ClassSplit.of(classes, set(lists[seen]), set(lists[unseen]), None, source)


def class_split_from_list(classes: Sequence[str], seen: Path) -> ClassSplit:
    """The classes that a `.list` file names are seen, all others are unseen.

    Raises:
        UsageError: as `class_split_from_files`, or every class is named, so that none is unseen.
    """
    named = set(_known(seen, classes))
    if len(named) == len(classes):
        raise UsageError(
            f"{seen}: expected a list that leaves some classes unseen, found all {len(classes)} "
            "classes of the store in it"
        )
    return ClassSplit.of(classes, named, set(classes) - named, None, seen.name)


def _known(path: Path, classes: Sequence[str]) -> list[str]:
    """The classes that a list names."""
    plain = defaultdict(list)
    for name in classes:
        plain[_plain(name)].append(name)
    names = []
    for name in read_class_list(path):
        alike = plain[_plain(name)]
        if name in classes:
            names.append(name)
        elif len(alike) == 1:
            names.append(alike[0])
        else:
            near = difflib.get_close_matches(name, classes, n=3)
            raise UsageError(
                f"{path}: {name!r} is no class of the store; nearest: {near}. Is it the split of "
                f"another dataset? The store has {len(classes)} classes: {', '.join(classes[:3])}…"
            )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise UsageError(f"{path}: expected one class per line, each once, found "
                         f"{f'{twice} twice' if twice else 'none'}")  # fmt: skip
    return names


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower()


def class_splits_from_folder(classes: Sequence[str], folder: Path) -> list[ClassSplit]:
    """Every split in a folder of lists, as STALE and Efficient-Prompt publish them.

    Such a folder holds `train/split_I.list` (seen) and `test/split_I.list` (unseen) for each I, or
    folders that do, at any depth (`train_75_test_25/THUMOS14/train/split_0.list`). They come by
    folder name, then by number.

    Raises:
        UsageError: no such folder or no lists in it, a list without its other half, or as
            `class_split_from_files`.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of class splits")
    parents = sorted({path.parents[1] for path in folder.rglob("split_*.list")
                      if path.parent.name in ("train", "test")
                      and path.parent != folder})  # fmt: skip
    if not parents:
        raise UsageError(
            f"{folder}: expected train/split_0.list and test/split_0.list in it or in folders "
            "below, found no such lists"
        )
    splits = []
    for parent in parents:
        sides = {side: _numbered(parent / side) for side in ("train", "test")}
        halves = sorted(sides["train"].keys() ^ sides["test"].keys())
        if halves:
            side = "test" if halves[0] in sides["train"] else "train"
            raise UsageError(
                f"{parent / side}: expected split_{halves[0]}.list as in the folder beside it, "
                "found none; is the download complete?"
            )
        for number in sorted(sides["train"]):
            source = "/".join([*parent.relative_to(folder).parts, f"split_{number}"])
            splits.append(
                class_split_from_files(
                    classes, sides["train"][number], sides["test"][number], source
                )
            )
    return splits


def _numbered(folder: Path) -> dict[int, Path]:
    found = ((_LIST.fullmatch(path.name), path) for path in folder.glob("split_*.list"))
    return {int(match[1]): path for match, path in found if match}
