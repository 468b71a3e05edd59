"""Which classes are trained and which are not: drawn, or in class order.

Splits are read from lists in `msq.head.class_split_files`; whether one leaks is said by
`msq.head.class_leaks`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from msq.errors import UsageError


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

    @classmethod
    def of(
        cls,
        classes: Sequence[str],
        seen: Collection[str],
        unseen: Collection[str],
        seed: int | None,
        source: str,
    ) -> ClassSplit:
        """A split of `classes`, in their order; those on neither side are left out."""
        return cls(
            tuple(name for name in classes if name in seen),
            tuple(name for name in classes if name in unseen),
            seed,
            source,
        )

    @property
    def hash(self) -> str:
        """SHA-256 over both lists."""
        return hashlib.sha256(json.dumps([self.seen, self.unseen]).encode()).hexdigest()


def class_split(classes: Sequence[str], seen_share: float, seed: int) -> ClassSplit:
    """Draw the seen classes at random.

    Args:
        classes: all names; their order matters to the draw.
        seen_share: share of the seen ones, rounded down (117 of Charades' 157 for 0.75).
        seed: of the draw.

    Raises:
        UsageError: a share that leaves one side empty.
    """
    import torch  # whose generator draws; what only reads splits does without

    count = _seen_count(classes, seen_share)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed)).tolist()
    seen = {classes[k] for k in order[:count]}
    return ClassSplit.of(classes, seen, set(classes) - seen, seed, f"seed {seed}")


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
