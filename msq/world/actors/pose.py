"""An actor of a scene, and the time functions that its pose is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msq.world.sketch import Colour

Curve = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Actor:
    """One actor: what it is, what it does, and where it goes.

    Attributes:
        kind: one of `msq.world.classes.KINDS`.
        actions: its plain actions, ascending; all of them are labels.
        seed: of the pose, the proportions and the tempo.
        colour: main colour; second: the other colour.
        start: position at the middle of the clip (x, y), in half short sides of the picture.
        drift: displacement over the clip (x, y), same unit.
        scale: size of the actor's unit in half short sides.
        facing: +1 looks to the right, -1 to the left (at the start, where it turns).
    """

    kind: str
    actions: tuple[str, ...]
    seed: int
    colour: Colour
    second: Colour
    start: tuple[float, float]
    drift: tuple[float, float]
    scale: float
    facing: int

    def does(self, *actions: str) -> bool:
        """Whether the actor does one of these."""
        return any(action in self.actions for action in actions)


def dials(actor: Actor, count: int) -> Curve:
    """`count` numbers in [0, 1) that stay with this actor; a drawer spends them in fixed order."""
    return np.random.default_rng(actor.seed).random(count)


def smooth(u: Curve, start: float = 0.12, end: float = 0.88) -> Curve:
    """0 before `start`, 1 after `end`, a half cosine between; symmetric under time reversal."""
    return np.asarray(0.5 - 0.5 * np.cos(np.pi * np.clip((u - start) / (end - start), 0, 1)))


def gait(actor: Actor, u: Curve, phase: float, tempo: float) -> Curve:
    """Phase of the leg cycle in radians: slow, fast, backwards, or frozen.

    Cycles per clip stay under half the usual eight frames, so that uniform sampling can tell them.
    """
    if actor.does("running", "chasing", "fleeing"):
        cycles = 2.1 + 0.7 * tempo
    elif actor.does("walking"):
        cycles = 0.7 + 0.4 * tempo
    elif actor.does("backing"):
        cycles = -(0.7 + 0.4 * tempo)
    else:
        cycles = 0.0
    return np.asarray(2 * np.pi * (phase + cycles * u))


def swing(u: Curve, phase: float, tempo: float, moving: bool) -> Curve:
    """A sine of 1.6 to 2.6 cycles per clip, or one value of the same distribution, frozen.

    A frozen pose is one moment of the moving one, so single frames look alike.
    """
    cycles = 1.6 + 1.0 * tempo if moving else 0.0
    return np.asarray(np.sin(2 * np.pi * (phase + cycles * u)))


def hop(actor: Actor, u: Curve, phase: float) -> Curve:
    """Height in [0, 1] of parabolic hops: one per clip (jumping) or three (bouncing), else 0."""
    if actor.does("jumping"):
        hops = 1.0
    elif actor.does("bouncing"):
        hops = 3.0
    else:
        return np.zeros_like(u)
    p = (phase + hops * u) % 1.0
    return np.asarray(4 * p * (1 - p))


def yaw(actor: Actor, u: Curve) -> Curve:
    """Cosine of the body's yaw times facing: +1 right, -1 left, through 0 when it turns."""
    if actor.does("turning left"):
        return np.asarray(np.cos(np.pi * smooth(u)))
    if actor.does("turning right"):
        return np.asarray(-np.cos(np.pi * smooth(u)))
    return np.full_like(u, float(actor.facing))
