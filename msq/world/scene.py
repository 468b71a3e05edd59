"""A scene: who does what, where, before which camera. Sampled from a seed, drawn elsewhere.

Lengths are in half short sides of the picture, so that the same scene can be drawn at any size and
any shape; what matters happens in the central square.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from msq.world.actors import AIRBORNE, Actor
from msq.world.classes import KINDS
from msq.world.combos import CHASERS, FLEERS, combos_with
from msq.world.sketch import Colour

# Size of the actor's unit for one actor alone and for one of two: (least, most).
_SCALE = {
    "human": ((0.58, 0.78), (0.46, 0.58)),
    "dog": ((0.72, 0.95), (0.52, 0.64)),
    "horse": ((0.6, 0.76), (0.44, 0.54)),
    "bird": ((0.78, 1.0), (0.54, 0.66)),
    "fish": ((0.75, 1.0), (0.5, 0.62)),
    "snake": ((0.64, 0.8), (0.42, 0.5)),
}
_SPEED = {
    "walking": 0.6, "backing": -0.6, "running": 1.3, "flying": 0.9, "gliding": 0.9,
    "swimming": 0.8, "slithering": 0.6, "crawling": 0.5,
}  # fmt: skip
# How far an actor's middle lies before its origin, and what reaches further to the front.
_AHEAD = {"dog": 0.12, "horse": 0.22, "bird": 0.03, "fish": -0.05}
_IN_FRONT = ("eating", "drinking", "barking", "playing ball", "singing", "hissing")
PROPS = ("ball", "bowl", "hat", "box", "umbrella", "bush", "cup", "nest")
PAN_MOST = 1.5  # displacement of the background over a clip


@dataclass(frozen=True, slots=True)
class Thing:
    """A thing that nobody uses: its name in `PROPS`, place, size and colour."""

    name: str
    at: tuple[float, float]
    size: float
    colour: Colour


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that a picture at any time of the clip depends on.

    Attributes:
        seed: of the background's shapes and texture.
        actors: one or two, drawn in this order.
        things: distractors, which stand still in the background.
        pan: displacement of the background over the clip (x, y).
        base: main colour of the background.
        clutter: 0 (plain) to 1.
        pole: x of a foreground pole at mid-clip, or None.
    """

    seed: int
    actors: tuple[Actor, ...]
    things: tuple[Thing, ...]
    pan: tuple[float, float]
    base: Colour
    clutter: float
    pole: float | None

    @property
    def pairs(self) -> tuple[str, ...]:
        """Actor-action labels, ascending."""
        return tuple(sorted({f"{a.kind} {action}" for a in self.actors for action in a.actions}))

    @property
    def actions(self) -> tuple[str, ...]:
        """Plain action labels, ascending."""
        return tuple(sorted({action for a in self.actors for action in a.actions}))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of actors in the scene, ascending."""
        return tuple(sorted({a.kind for a in self.actors}))


def _colour(rng: Generator, away: Colour, distance: float = 120.0) -> Colour:
    """A saturated colour that stands out against `away`."""
    best: tuple[float, Colour] = (-1.0, (0, 0, 0))
    for _ in range(8):
        hue, saturation, value = rng.random(), rng.uniform(0.45, 1.0), rng.uniform(0.45, 1.0)
        red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))
        gap = float(np.linalg.norm(np.subtract((red, green, blue), away)))
        best = max(best, (gap, (red, green, blue)))
        if gap >= distance:
            break
    return best[1]


def _pick(rng: Generator, sets: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """One of the sets; hats go with nearly everything, so sets with a hat are drawn less often."""
    weights = np.array([0.3 if "wearing hat" in s else 1.0 for s in sets])
    return sets[int(rng.choice(len(sets), p=weights / weights.sum()))]


def _cast(
    rng: Generator, target: tuple[str, str] | None, two: float, banned: frozenset[str]
) -> tuple[list[tuple[str, tuple[str, ...]]], bool]:
    """Kinds with their actions, and whether it is a chase."""
    kind, action = target if target is not None else (KINDS[int(rng.integers(len(KINDS)))], "")
    if action in ("chasing", "fleeing"):
        other = sorted(FLEERS if action == "chasing" else CHASERS)
        second = other[int(rng.integers(len(other)))]
        chaser, fleer = (kind, second) if action == "chasing" else (second, kind)
        return [
            (chaser, tuple(sorted((*CHASERS[chaser], "chasing")))),
            (fleer, tuple(sorted((*FLEERS[fleer], "fleeing")))),
        ], True
    first = _pick(rng, combos_with(kind, action, banned))
    players = [(kind, first)]
    if rng.random() < two:
        kind = KINDS[int(rng.integers(len(KINDS)))]
        fast = {"running", "flying", "swimming"}
        sets = tuple(
            s
            for s in combos_with(kind, "", banned)
            if len(s) + len(first) <= 4 and not (fast & set(s) and fast & set(first))
        )
        players.append((kind, _pick(rng, sets)))
    return players, False


def _speed(actions: tuple[str, ...]) -> float:
    return next((_SPEED[a] for a in actions if a in _SPEED), 0.0)


def _height(rng: Generator, kind: str, actions: tuple[str, ...], scale: float) -> float:
    """The y of the actor's origin: its feet on some ground, or its middle in air or water."""
    if any(a in actions for a in ("rising", "sinking")):
        return float(rng.uniform(-0.1, 0.1))
    if kind in ("fish", "snake") or (kind == "bird" and any(a in actions for a in AIRBORNE)):
        return float(rng.uniform(-0.25, 0.25)) - (0.2 if "sleeping" in actions else 0.0)
    room = {"human": 1.9, "dog": 1.25, "horse": 1.65, "bird": 1.1}[kind] * scale
    if any(a in actions for a in ("holding umbrella", "wearing hat", "sleeping")):
        room += 0.3 * scale
    if any(a in actions for a in ("jumping", "bouncing")):
        room += 0.4
    low, high = -0.9, max(-0.88, min(-0.3, 0.92 - room))
    return float(rng.uniform(low, high))


def sample_scene(
    rng: Generator,
    *,
    target: tuple[str, str] | None = None,
    clutter: float = 1.0,
    two: float = 0.35,
    banned: frozenset[str] = frozenset(),
) -> Scene:
    """Draw a scene.

    Args:
        rng: the only source of chance.
        target: (kind, action) that must be seen, or None for any.
        clutter: 0 for plain backgrounds without distractors, 1 for the world as it is tested.
        two: probability of a second actor (a chase always has two).
        banned: actions that must not be in the scene.
    """
    red, green, blue = rng.integers(30, 226, 3)
    base: Colour = (int(red), int(green), int(blue))
    players, chase = _cast(rng, target, two, banned)
    heading = int(rng.choice((-1, 1)))
    facings = [heading, heading if chase or rng.random() < 0.5 else -heading]
    speeds = [_speed(actions) * face for (_, actions), face in zip(players, facings, strict=False)]
    wander = float(rng.uniform(-0.3, 0.3))
    pan = float(np.clip(wander - np.mean(speeds), -PAN_MOST, PAN_MOST))
    side = -heading if chase else int(rng.choice((-1, 1)))
    actors = []
    for index, (kind, actions) in enumerate(players):
        alone = len(players) == 1
        least, most = _SCALE[kind][0 if alone else 1]
        scale = float(rng.uniform(least, most))
        place = 0.0 if alone else (side, -side)[index] * 0.48
        x = place + float(rng.uniform(-0.17, 0.17) if alone else rng.uniform(-0.07, 0.07))
        if "turning left" not in actions and "turning right" not in actions:
            ahead = _AHEAD.get(kind, 0.0) + (0.12 if set(_IN_FRONT) & set(actions) else 0.0)
            x -= facings[index] * scale * ahead
        drift = float(np.clip(speeds[index] + pan, -0.22, 0.22))
        if chase:
            # The gap closes over the clip: the chaser gains, the other loses.
            drift = 0.3 * wander + heading * (0.12 if index == 0 else -0.12)
        lift = float(rng.uniform(0.7, 1.0))
        lift *= ("rising" in actions) - ("sinking" in actions)
        actor = Actor(
            kind=kind,
            actions=actions,
            seed=int(rng.integers(2**31)),
            colour=_colour(rng, base),
            second=_colour(rng, base),
            start=(x, _height(rng, kind, actions, scale)),
            drift=(drift, lift),
            scale=scale,
            facing=facings[index],
        )
        actors.append(actor)
    return Scene(
        seed=int(rng.integers(2**31)),
        actors=tuple(actors),
        things=_things(rng, clutter, base),
        pan=(pan, float(rng.uniform(-0.12, 0.12))),
        base=base,
        clutter=clutter,
        pole=float(rng.uniform(-1, 1)) if rng.random() < 0.15 * clutter else None,
    )


def _things(rng: Generator, clutter: float, base: Colour) -> tuple[Thing, ...]:
    """Up to three distractors, near the border, where they are not in an actor's hands."""
    things = []
    for _ in range(int(rng.binomial(3, 0.35 * clutter))):
        x = float(rng.choice((-1, 1)) * rng.uniform(0.55, 1.3))
        y = float(rng.choice((-1, 1)) * rng.uniform(0.55, 0.9))
        name = PROPS[int(rng.integers(len(PROPS)))]
        things.append(Thing(name, (x, y), float(rng.uniform(0.13, 0.22)), _colour(rng, base)))
    return tuple(things)
