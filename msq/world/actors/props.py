"""Things that actors use; the same things lie around as distractors."""

from __future__ import annotations

import numpy as np

from msq.world.actors.pose import Curve
from msq.world.sketch import Colour, Points, Sketch, hanging, shade, vec

WHITE: Colour = (250, 250, 245)
BLACK: Colour = (18, 18, 22)
FOOD: Colour = (245, 205, 60)
WATER: Colour = (60, 150, 245)


def bowl(s: Sketch, at: Points, size: float, colour: Colour, filling: Colour = FOOD) -> None:
    """A bowl with food standing on `at` (middle of its bottom)."""
    s.ellipse(at + vec(0, size * 0.62), size * 0.85, size * 0.42, filling)
    rim = np.array([[-1, 0.6], [1, 0.6], [0.6, 0], [-0.6, 0]]) * size
    s.polygon(np.asarray(at)[..., None, :] + rim, colour)


def cup(s: Sketch, at: Points, size: float) -> None:
    """A tall blue cup with a white rim, centred on `at`."""
    s.capsule(at, at + vec(0, size), size * 0.5, size * 0.62, WATER)
    s.ellipse(at + vec(0, 1.45 * size), 0.62 * size, 0.25 * size, WHITE)


def trough(s: Sketch, at: Points, size: float) -> None:
    """A pool of water on the ground at `at`."""
    s.ellipse(at, size * 1.25, size * 0.42, shade(WATER, 0.65))
    s.ellipse(at + vec(0, size * 0.08), size, size * 0.28, WATER)


def ball(s: Sketch, at: Points, radius: float, colour: Colour, turn: Curve | float = 0.0) -> None:
    """A ball with a stripe that shows its rolling."""
    s.disc(at, radius, colour)
    s.ellipse(at, radius * 0.95, radius * 0.33, WHITE, turn)


def hat(s: Sketch, at: Points, size: float, colour: Colour, tilt: Curve | float = 0.0) -> None:
    """A tall hat with a band; `at` is the middle of the brim."""
    up = -hanging(-np.asarray(tilt), size)
    s.capsule(at + 0.25 * up, at + 1.25 * up, size * 0.55, size * 0.5, colour)
    s.capsule(at + 0.3 * up, at + 0.45 * up, size * 0.56, size * 0.56, WHITE)
    side = np.stack([up[..., 1], -up[..., 0]], axis=-1)
    s.capsule(at - 1.05 * side, at + 1.05 * side, size * 0.17, size * 0.17, colour)


def umbrella(s: Sketch, hand: Points, size: float, colour: Colour) -> None:
    """An open umbrella over `hand`, which holds its stick."""
    top = hand + vec(0, 1.5 * size)
    s.capsule(hand - vec(0, 0.2 * size), top, 0.05 * size, 0.05 * size, BLACK)
    arc = np.linspace(0, np.pi, 12)
    dome = np.stack([np.cos(arc), 0.75 * np.sin(arc)], -1) * size
    base = (top - vec(0, 0.55 * size))[..., None, :]
    s.polygon(base + dome, colour)
    s.polygon(base + dome * [0.4, 1.0], shade(colour, 1.5))


def book(s: Sketch, at: Points, size: float, colour: Colour) -> None:
    """An open book, white pages in a coloured cover, centred on `at`."""
    for side in (-1, 1):
        cover = np.array([[0, -0.6], [side * 1.1, -0.35], [side * 1.1, 0.75], [0, 0.5]]) * size
        page = np.array([[0, -0.4], [side * 0.9, -0.2], [side * 0.9, 0.62], [0, 0.4]]) * size
        s.polygon(np.asarray(at)[..., None, :] + cover, colour)
        s.polygon(np.asarray(at)[..., None, :] + page, WHITE)


def box(s: Sketch, at: Points, size: float, colour: Colour) -> None:
    """A parcel with a cross of tape; `at` is the middle of its bottom."""
    base = np.asarray(at)[..., None, :]
    s.polygon(base + np.array([[-1, 0], [1, 0], [1, 1.5], [-1, 1.5]]) * size, colour)
    tape = shade(colour, 0.45)
    s.polygon(base + np.array([[-0.2, 0], [0.2, 0], [0.2, 1.5], [-0.2, 1.5]]) * size, tape)
    s.polygon(base + np.array([[-1, 0.6], [1, 0.6], [1, 0.95], [-1, 0.95]]) * size, tape)


def nest(s: Sketch, at: Points, size: float) -> None:
    """A nest of sticks; `at` is the middle of its bottom."""
    s.ellipse(at + vec(0, size * 0.4), size, size * 0.5, (120, 78, 36))
    for k in range(-3, 4):
        foot = at + vec(0.3 * k * size, 0.1 * size)
        tip = foot + vec((0.25 if k % 2 else -0.3) * size, 0.75 * size)
        s.capsule(foot, tip, 0.06 * size, 0.06 * size, (176, 126, 62))


def bush(s: Sketch, at: Points, size: float, tone: float) -> None:
    """A round bush standing on `at`."""
    green = (int(30 + 40 * tone), int(110 + 50 * tone), int(40 + 20 * tone))
    for k, (x, y, r) in enumerate(
        [(-0.7, 0.35, 0.5), (0.7, 0.35, 0.5), (0, 0.6, 0.62), (-0.3, 0.25, 0.45), (0.35, 0.3, 0.4)]
    ):
        s.disc(at + size * vec(x, y), size * r, shade(green, 0.8 + 0.12 * k))


def sleep_marks(s: Sketch, at: Points, size: float, u: Curve) -> None:
    """Three white Z on dark discs rising from `at`; they breathe slowly."""
    for k in range(3):
        r = size * (0.55 + 0.25 * k)
        centre = at + size * vec(-0.35 * k, 1.2 * k + 0.1 * np.sin(2 * np.pi * u))
        s.disc(centre, r, (40, 40, 90))
        z = np.array(
            [
                *([-0.6, 0.6], [0.6, 0.6], [0.6, 0.32], [-0.1, -0.3], [0.6, -0.3]),
                *([0.6, -0.6], [-0.6, -0.6], [-0.6, -0.32], [0.1, 0.3], [-0.6, 0.3]),
            ]
        )
        s.polygon(centre[..., None, :] + z * r, WHITE)


def sound_lines(s: Sketch, mouth: Points, size: float, angle: Curve | float = 0.0) -> None:
    """Three rays before a mouth."""
    for spread in (-0.55, 0.0, 0.55):
        ray = hanging(np.pi / 2 + np.asarray(angle) + spread, size)
        s.capsule(mouth + 0.45 * ray, mouth + 1.2 * ray, 0.1 * size, 0.15 * size, WHITE)


def notes(s: Sketch, at: Points, size: float, u: Curve) -> None:
    """Two notes of music that float before a beak."""
    for k in range(2):
        foot = at + size * vec(0.4 + 1.3 * k, 0.4 + 0.9 * k + 0.15 * np.sin(2 * np.pi * u + k))
        s.disc(foot, 0.38 * size, BLACK)
        s.capsule(
            foot + vec(0.3 * size, 0), foot + size * vec(0.3, 1.3), 0.1 * size, 0.1 * size, BLACK
        )
        s.capsule(
            *(foot + size * vec(0.3, 1.3), foot + size * vec(0.85, 1.0)),
            0.14 * size,
            0.1 * size,
            BLACK,
        )


def bubbles(s: Sketch, at: Points, size: float, u: Curve) -> None:
    """Bubbles that rise from a mouth."""
    for k in range(4):
        p = (u + k / 4) % 1.0
        centre = at + size * vec(0.35 * np.sin(7 * k + 4 * u), 0.2 + 2.6 * p)
        r = size * (0.28 + 0.25 * p)
        s.disc(centre, r, (190, 235, 255))
        s.disc(centre, 0.6 * r, (120, 190, 240))
