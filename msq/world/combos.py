"""Which actions one actor can do at the same time.

`combos(kind)` lists every set, once; a set is what the actor does for the whole clip, and all of it
is labelled. Chasing and fleeing need two actors and are put together by the scene.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import product

_TURNS = ("turning left", "turning right")
_MOST = 3  # actions of one actor; two actors together have at most four


def _human() -> Iterator[tuple[str, ...]]:
    upright = ("", "walking", "running", "backing", "jumping", "bouncing", "sitting", *_TURNS)
    hands = ("", "waving", "pointing", "drinking", "eating", "reading", "holding umbrella")
    yield from product(upright, hands, ("", "wearing hat"))
    yield from product(("dancing", "posing", "crawling"), ("", "wearing hat"))
    yield ("sleeping",)


def _dog() -> Iterator[tuple[str, ...]]:
    gaits = ("walking", "running", "backing", "jumping", "bouncing", *_TURNS)
    extras = (("", "wagging"), ("", "wearing hat"))
    yield from product(("", *gaits, "sitting"), ("", "barking"), *extras)
    yield from product(("",), ("eating", "playing ball"), *extras)
    yield from product(("walking", "sitting"), ("playing ball",), *extras)
    yield ("sleeping",)


def _horse() -> Iterator[tuple[str, ...]]:
    yield from product(("walking", "running", "backing", "jumping"), ("", "carrying box"))
    yield from product(("eating", "drinking"), ("", "carrying box"))
    yield ("carrying box",)
    yield ("sleeping",)


def _bird() -> Iterator[tuple[str, ...]]:
    courses = ("", "rising", "sinking", *_TURNS)
    hat = ("", "wearing hat")
    yield from product(("flying", "gliding"), courses, hat)
    yield from product(("walking", *_TURNS), ("", "singing"), hat)
    yield from product(("singing", "pecking", "eating"), hat)
    yield from product(("nesting",), ("", "singing", "sleeping"), hat)
    yield from product(("sleeping",), hat)


def _fish() -> Iterator[tuple[str, ...]]:
    moves, mouth = ("swimming", "drifting"), ("", "eating", "bubbling")
    yield from product(moves, ("", "rising", "sinking", *_TURNS), mouth)
    yield from product(moves, ("hiding",), mouth)
    yield from product(("sleeping",), ("", "bubbling"), ("", "hiding"))


def _snake() -> Iterator[tuple[str, ...]]:
    crawls = ("slithering", "resting", "backing")
    yield from product((*crawls, "coiling", "uncoiling", "rearing"), ("", "hissing"))
    yield from product(crawls, ("", "eating", "hissing"), ("", "hiding"))
    yield from product(("sleeping",), ("", "hiding"))


_LISTS = {
    "human": _human,
    "dog": _dog,
    "horse": _horse,
    "bird": _bird,
    "fish": _fish,
    "snake": _snake,
}
# What the two in a chase also do; a runner is running whether or not somebody is behind.
CHASERS: dict[str, tuple[str, ...]] = {
    "human": ("running",),
    "dog": ("running",),
    "bird": ("flying",),
    "fish": ("swimming",),
}
FLEERS: dict[str, tuple[str, ...]] = {**CHASERS, "horse": ("running",)}


def _sets(rows: Iterable[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    sets = {tuple(sorted(action for action in row if action)) for row in rows}
    return tuple(sorted(s for s in sets if 0 < len(s) <= _MOST))


@cache
def combos(kind: str) -> tuple[tuple[str, ...], ...]:
    """Every set of actions that one actor of this kind can do alone, ascending."""
    return _sets(_LISTS[kind]())


@cache
def combos_with(kind: str, action: str, banned: frozenset[str]) -> tuple[tuple[str, ...], ...]:
    """The sets that hold `action` (any set for an empty name) and nothing that is banned."""
    return tuple(s for s in combos(kind) if (not action or action in s) and banned.isdisjoint(s))
