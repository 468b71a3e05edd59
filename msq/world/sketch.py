"""Shapes over time: every part of an actor is a polygon whose vertices are functions of time.

Shape legend: F frames, V vertices. Coordinates are x to the right and y upwards; lengths are in
the actor's own units until `place` puts the sketch into the scene.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Colour = tuple[int, int, int]
Points = NDArray[np.float64]

_HALF = np.linspace(-np.pi / 2, np.pi / 2, 6)
_ROUND = np.linspace(0, 2 * np.pi, 13)[:-1]


def vec(x: ArrayLike, y: ArrayLike) -> Points:
    """Stack two coordinates, each a number or [F], to [2] or [F, 2]."""
    return np.stack(np.broadcast_arrays(np.asarray(x, float), np.asarray(y, float)), axis=-1)


def hanging(angle: ArrayLike, length: float) -> Points:
    """A limb's vector: `angle` radians from straight down, positive forwards; [2] or [F, 2]."""
    return length * vec(np.sin(angle), -np.cos(angle))


def shade(colour: Colour, factor: float) -> Colour:
    """The colour made darker (factor < 1) or brighter."""
    red, green, blue = (int(min(255, max(0, round(c * factor)))) for c in colour)
    return red, green, blue


@dataclass(frozen=True, slots=True)
class Part:
    """One filled polygon: `points` [F, V, 2] and its colour."""

    points: Points
    colour: Colour


class Sketch:
    """An ordered list of parts, the last drawn on top.

    Attributes:
        frames: F.
        parts: what was drawn so far.
    """

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self.parts: list[Part] = []

    def polygon(self, points: ArrayLike, colour: Colour) -> None:
        """Add a polygon: [V, 2] for a still one or [F, V, 2]."""
        array = np.asarray(points, float)
        self.parts.append(Part(np.broadcast_to(array, (self.frames, *array.shape[-2:])), colour))

    def capsule(self, a: Points, b: Points, ra: float, rb: float, colour: Colour) -> None:
        """Add a limb from `a` to `b` ([2] or [F, 2]) with end radii `ra` and `rb`."""
        a, b = np.broadcast_arrays(a, b)
        along = np.arctan2(b[..., 1] - a[..., 1], b[..., 0] - a[..., 0])[..., None]
        tail = np.stack([np.cos(along + np.pi + _HALF), np.sin(along + np.pi + _HALF)], -1)
        head = np.stack([np.cos(along + _HALF), np.sin(along + _HALF)], -1)
        outline = np.concatenate(
            [a[..., None, :] + ra * tail, b[..., None, :] + rb * head], axis=-2
        )
        self.polygon(outline, colour)

    def ellipse(
        self, centre: Points, rx: ArrayLike, ry: ArrayLike, colour: Colour, angle: ArrayLike = 0.0
    ) -> None:
        """Add an ellipse with half axes `rx`, `ry`, turned by `angle` radians (each [F] or one)."""
        rx, ry, turn = (np.asarray(v, float)[..., None] for v in (rx, ry, angle))
        x, y = rx * np.cos(_ROUND), ry * np.sin(_ROUND)
        outline = np.stack(
            np.broadcast_arrays(
                x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)
            ),
            axis=-1,
        )
        self.polygon(np.asarray(centre)[..., None, :] + outline, colour)

    def disc(self, centre: Points, radius: ArrayLike, colour: Colour) -> None:
        """Add a disc around `centre` ([2] or [F, 2])."""
        self.ellipse(centre, radius, radius, colour)

    def place(self, scale: float, facing: ArrayLike, angle: ArrayLike, at: Points) -> None:
        """Squash x by `facing` (cosine of the yaw), turn by `angle`, scale, and move to `at`.

        `facing` and `angle` are numbers or [F]; `at` is [2] or [F, 2]. An angle turns the nose
        upwards whichever way the actor faces.
        """
        face = np.broadcast_to(np.asarray(facing, float), (self.frames,))[:, None]
        turn = np.broadcast_to(np.asarray(angle, float), (self.frames,))[:, None]
        offset = np.broadcast_to(at, (self.frames, 2))[:, None, :]
        placed = []
        for part in self.parts:
            x, y = part.points[..., 0], part.points[..., 1]
            turned_x = (x * np.cos(turn) - y * np.sin(turn)) * face
            turned_y = x * np.sin(turn) + y * np.cos(turn)
            points = scale * np.stack([turned_x, turned_y], axis=-1) + offset
            placed.append(Part(points, part.colour))
        self.parts = placed
