"""What can be seen in the world: kinds of actors, their actions, and how each is told.

A class is an actor-action pair (`bird flying`); plain actions (`flying`) are a second label set
over the same clips. `told_by` says what the evidence is: `looks`, an object or a posture that one
frame shows, or `motion`, which one frame cannot show, because the action shares its distribution
of single frames with the others of its group (`GROUPS`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ToldBy = Literal["looks", "motion"]

MOTION: dict[str, tuple[str, ...]] = {
    "human": (
        *("walking", "running", "backing", "jumping", "bouncing", "turning left"),
        *("turning right", "dancing", "posing", "waving", "pointing", "chasing", "fleeing"),
    ),
    "dog": (
        *("walking", "running", "backing", "jumping", "bouncing", "turning left"),
        *("turning right", "wagging", "chasing", "fleeing"),
    ),
    "horse": ("walking", "running", "backing", "jumping", "fleeing"),
    "bird": (
        *("flying", "gliding", "rising", "sinking", "turning left", "turning right"),
        *("walking", "pecking", "chasing", "fleeing"),
    ),
    "fish": (
        *("swimming", "drifting", "rising", "sinking", "turning left", "turning right"),
        *("chasing", "fleeing"),
    ),
    "snake": ("slithering", "resting", "backing", "coiling", "uncoiling"),
}
LOOKS: dict[str, tuple[str, ...]] = {
    "human": (
        *("sleeping", "sitting", "crawling", "eating", "drinking", "reading"),
        *("holding umbrella", "wearing hat"),
    ),
    "dog": ("sleeping", "sitting", "eating", "barking", "playing ball", "wearing hat"),
    "horse": ("sleeping", "eating", "drinking", "carrying box"),
    "bird": ("sleeping", "eating", "singing", "nesting", "wearing hat"),
    "fish": ("sleeping", "eating", "bubbling", "hiding"),
    "snake": ("sleeping", "eating", "hissing", "rearing", "hiding"),
}
KINDS: tuple[str, ...] = tuple(MOTION)

# Actions of one group draw their single frames from one distribution; what differs is how the
# frames follow each other. An empty name stands for an actor that does nothing of the group.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("walking", "running", "backing"),
    ("jumping", "bouncing"),
    ("turning left", "turning right"),
    ("dancing", "posing"),
    ("waving", "pointing"),
    ("wagging", ""),
    ("pecking", ""),
    ("flying", "gliding"),
    ("swimming", "drifting"),
    ("rising", "sinking"),
    ("slithering", "resting", "backing"),
    ("coiling", "uncoiling"),
    ("chasing", ""),
    ("fleeing", ""),
)


@dataclass(frozen=True, slots=True)
class WorldClass:
    """One actor-action pair.

    Attributes:
        name: `KIND ACTION`, the label text.
        kind: the actor's kind.
        action: the plain action.
        told_by: `looks` or `motion`.
    """

    name: str
    kind: str
    action: str
    told_by: ToldBy


def _table() -> tuple[WorldClass, ...]:
    rows = []
    for kind in KINDS:
        rows += [WorldClass(f"{kind} {a}", kind, a, "motion") for a in MOTION[kind]]
        rows += [WorldClass(f"{kind} {a}", kind, a, "looks") for a in LOOKS[kind]]
    return tuple(sorted(rows, key=lambda row: row.name))


CLASSES: tuple[WorldClass, ...] = _table()
ACTIONS: tuple[str, ...] = tuple(sorted({row.action for row in CLASSES}))
ACTION_TOLD_BY: dict[str, ToldBy] = {row.action: row.told_by for row in CLASSES}


def told_by(name: str) -> ToldBy:
    """Evidence for a pair (`bird flying`) or a plain action (`flying`).

    Raises:
        KeyError: for a name that is in neither label set.
    """
    if name in ACTION_TOLD_BY:
        return ACTION_TOLD_BY[name]
    for row in CLASSES:
        if row.name == name:
            return row.told_by
    raise KeyError(name)
