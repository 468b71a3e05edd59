"""How two lists of classes differ, in one line: names in hundreds are no message."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 5  # names of each kind


def class_difference(expected: Sequence[str], found: Sequence[str]) -> str | None:
    """What is said of two lists of classes that are not the same; None where they are.

    Args:
        expected: names, in order.
        found: likewise.
    """
    if list(expected) == list(found):
        return None
    missing = [name for name in expected if name not in set(found)]
    others = [name for name in found if name not in set(expected)]
    counts = f"classes: expected {len(expected)}, found {len(found)}; "
    if not missing and not others and len(expected) == len(found):
        place = next(k for k, pair in enumerate(zip(expected, found, strict=True))
                     if pair[0] != pair[1])  # fmt: skip
        return (f"{counts}the same in another order, class {place} is {expected[place]!r} "
                f"and {found[place]!r}")  # fmt: skip
    return f"{counts}missing {_named(missing)}, unknown {_named(others)}"


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:SHOWN]) or "none"
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
