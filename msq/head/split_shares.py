"""Which share of the classes a split shows to training: what rows of a table are told apart by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from msq.errors import UsageError
from msq.head.class_splits import ClassSplit


def seen_percent(split: ClassSplit) -> float:
    """Percent of its classes that a split trains, to one decimal; 50 rather than 50.0."""
    return whole(round(100 * len(split.seen) / (len(split.seen) + len(split.unseen)), 1))


def whole(x: float) -> float:
    """The same number, an int where it is one."""
    return int(x) if x == int(x) else x


def numbered_by_share(
    splits: Sequence[ClassSplit], wanted: Sequence[float] | None, source: str
) -> list[tuple[float, int, ClassSplit]]:
    """Splits with their share of seen classes, numbered from 0 within each.

    Args:
        splits: in their order.
        wanted: percentages to keep, of which a split has the one that it misses by less than one
            class (26 of 51 classes are 50 %); None keeps all, by the share that they come to.
        source: what asks for these, for messages.

    Raises:
        UsageError: no split has one of the shares that are wanted.
    """
    found, numbers = [], Counter[float]()
    for split in splits:
        share = seen_percent(split) if wanted is None else _nearest(split, wanted)
        if share is not None:
            found.append((share, numbers[share], split))
            numbers[share] += 1
    if not found:
        there = sorted({seen_percent(split) for split in splits})
        raise UsageError(
            f"{source}: zero_shot.seen: expected a share that the lists of zero_shot.split_dir "
            f"have, {', '.join(map(str, there))} %; found {', '.join(map(str, wanted or ()))}"
        )
    return found


def _nearest(split: ClassSplit, wanted: Sequence[float]) -> float | None:
    """The wanted percentage that a split has, to less than one class; None where it has none."""
    count = len(split.seen) + len(split.unseen)
    share = min(wanted, key=lambda x: abs(x * count / 100 - len(split.seen)))
    return whole(share) if abs(share * count / 100 - len(split.seen)) < 1 else None
