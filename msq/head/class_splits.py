"""Which classes are trained and which are not: drawn, read from lists, or in class order.

A split *leaks* where a seen and an unseen class have the same clips (THUMOS14's CliffDiving lies
within Diving): what is called unseen was shown in training, under another name.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from msq.errors import UsageError
from msq.head.features import Features
from msq.head.stream import with_next

LEAK_SHARE = 0.95
LEAK_CLIPS = 10  # fewer shared clips than that may well be chance
_LIST = re.compile(r"split_(\d+)\.list")


@dataclass(frozen=True)
class ClassSplit:
    """Which classes are trained.

    Attributes:
        seen: names of the trained classes, in the dataset's order.
        unseen: names of the others, in the dataset's order.
        seed: of the draw; None where nothing was drawn.
        source: how it was made, for people: `seed 3`, `class order`, `train_50/split_3`.
    """

    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    seed: int | None = None
    source: str = field(default="", compare=False)

    @property
    def hash(self) -> str:
        """SHA-256 over both lists."""
        return hashlib.sha256(json.dumps([self.seen, self.unseen]).encode()).hexdigest()


class Leak(NamedTuple):
    """A seen and an unseen class with the same clips.

    Attributes:
        seen: name of the trained class.
        unseen: name of the other.
        share: of the smaller one's clips that both have.
        clips: that both have.
    """

    seen: str
    unseen: str
    share: float
    clips: int


def class_split(classes: Sequence[str], seen_share: float, seed: int) -> ClassSplit:
    """Draw the seen classes at random.

    Args:
        classes: all names; their order matters to the draw.
        seen_share: share of the seen ones, rounded down (117 of Charades' 157 for 0.75).
        seed: of the draw.

    Raises:
        UsageError: a share that leaves one side empty.
    """
    count = _seen_count(classes, seen_share)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed)).tolist()
    seen = {classes[k] for k in order[:count]}
    return _ordered(classes, seen, set(classes) - seen, seed, f"seed {seed}")


def drawn_splits(classes: Sequence[str], seen_share: float, count: int) -> list[ClassSplit]:
    """Different splits of one share, by the seeds from 0 on.

    A seed whose split was there already is passed over: with few classes there are few splits.
    The first n of more splits are the n splits.

    Raises:
        UsageError: a share that leaves one side empty, or fewer different splits than asked for.
    """
    there = math.comb(len(classes), _seen_count(classes, seen_share))
    if count > there:
        raise UsageError(f"seen share {seen_share}: expected at most {there} splits, for so many "
                         f"are there of {len(classes)} classes; found {count}")  # fmt: skip
    found: dict[tuple[str, ...], ClassSplit] = {}
    seed = 0
    while len(found) < count:
        split = class_split(classes, seen_share, seed)
        found.setdefault(split.seen, split)
        seed += 1
    return list(found.values())


def class_order_split(classes: Sequence[str], seen_share: float) -> ClassSplit:
    """The first classes are seen, the others unseen, as the authors' code has it for Charades.

    With 157 classes 0.75 gives c000 to c116 seen (117) and c117 to c156 unseen (40), and 0.5 gives
    78 and 79. Classes in an order that means something (Charades' verbs on one object stand
    together) make this another task than random splits.

    Raises:
        UsageError: a share that leaves one side empty.
    """
    count = _seen_count(classes, seen_share)
    return ClassSplit(tuple(classes[:count]), tuple(classes[count:]), None, "class order")


def _seen_count(classes: Sequence[str], share: float) -> int:
    count = int(len(classes) * share + 1e-9) if math.isfinite(share) else 0
    if not 0 < count < len(classes):
        raise UsageError(
            f"seen share {share}: expected one that leaves some of the {len(classes)} classes "
            f"on either side, found {count} seen"
        )
    return count


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
    return _ordered(classes, set(lists[seen]), set(lists[unseen]), None, source)


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
    return _ordered(classes, named, set(classes) - named, None, seen.name)


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


def _ordered(
    classes: Sequence[str], seen: set[str], unseen: set[str], seed: int | None, source: str
) -> ClassSplit:
    return ClassSplit(
        tuple(name for name in classes if name in seen),
        tuple(name for name in classes if name in unseen),
        seed,
        source,
    )


def coinciding_classes(
    labels: Tensor, classes: Sequence[str], share: float = LEAK_SHARE, clips: int = LEAK_CLIPS
) -> list[Leak]:
    """Pairs of classes of which the smaller one's clips are also the other's.

    Args:
        labels: [N, K], positive where not zero; a row for each clip, whatever its split.
        classes: K names.
        share: of the smaller class's clips, at least.
        clips: that both have, at least.

    Returns:
        One `Leak` for each pair, `seen` being the class with the lower index.
    """
    positive = (labels != 0).double()
    together = positive.T @ positive
    count = together.diagonal()
    smaller = torch.minimum(count[:, None], count[None])
    held = ((together >= share * smaller) & (together >= clips)).triu(1)
    return [
        Leak(classes[a], classes[b], float(together[a, b] / smaller[a, b]), int(together[a, b]))
        for a, b in held.nonzero().tolist()
    ]


def clip_labels(features: Features) -> Tensor:
    """Labels [M, K] of the M different clips.

    In a single-label set a clip of two classes is two rows (THUMOS14's official view). They are
    taken for one where their ids differ in the class at their end only (`ID/CliffDiving`), or where
    their tokens are the same.
    """
    labels = features.labels.cpu()
    if features.task == "multilabel":
        return labels
    names = [features.classes[k] for k in labels.argmax(1).tolist()]
    first: dict[str, int] = {}
    clips: dict[bytes, int] = {}
    place, hashes = [], _token_hashes(features)
    for row, (clip, name) in enumerate(zip(features.ids, names, strict=True)):
        shown = hashes[first.setdefault(clip.removesuffix(f"/{name}"), row)]
        place.append(clips.setdefault(shown, len(clips)))
    merged = torch.zeros(len(clips), labels.shape[1], dtype=torch.int64)
    return merged.index_add_(0, torch.tensor(place, dtype=torch.long), labels.long())


def _token_hashes(features: Features) -> list[bytes]:
    """A hash of each clip's tokens."""
    rows = torch.arange(len(features.ids), device=features.tokens.device)
    return [
        hashlib.blake2b(row.tobytes()).digest()
        for _, part in with_next(features.tokens, torch.split(rows, 256))
        for row in part.detach().cpu().contiguous().view(torch.uint8).flatten(1).numpy()
    ]


def leaks(split: ClassSplit, coinciding: Sequence[Leak]) -> list[Leak]:
    """The coinciding pairs that a split puts on opposite sides, seen one first."""
    seen, unseen = set(split.seen), set(split.unseen)
    turned = (pair._replace(seen=pair.unseen, unseen=pair.seen) for pair in coinciding)
    return [pair for pair in (*coinciding, *turned) if pair.seen in seen and pair.unseen in unseen]
