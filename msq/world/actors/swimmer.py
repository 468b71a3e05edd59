"""Fish and snake: bodies along a bending spine."""

from __future__ import annotations

import numpy as np

from msq.world.actors import props
from msq.world.actors.pose import Actor, Curve, dials, smooth, swing
from msq.world.sketch import Points, Sketch, hanging, shade, vec


def draw_fish(a: Actor, u: Curve) -> Sketch:
    """A fish about 1.5 units long, centred on the origin, looking right."""
    s, d = Sketch(len(u)), dials(a, 12)
    moving = a.does("swimming", "chasing", "fleeing")
    girth = 0.26 + 0.1 * d[3]
    along = np.linspace(0.0, 1.0, 7)
    bend = np.stack([swing(u, d[0] - 0.45 * v, d[1], moving) * 0.26 * v**1.5 for v in along], -1)
    x = 0.45 - 1.0 * along
    radius = girth * np.sqrt(np.clip(1 - (1.55 * along - 0.55) ** 2, 0.04, 1))
    spine = [vec(x[k], bend[:, k]) for k in range(len(along))]
    tail = spine[-1] + vec(-0.02, 0)
    flick = swing(u, d[0] - 0.6, d[1], moving)
    fork = [vec(-0.36, 0.3 + 0.2 * flick), vec(-0.22, 0.12 * flick), vec(-0.36, -0.3 + 0.2 * flick)]
    s.polygon(
        np.stack(np.broadcast_arrays(tail, *(tail + f for f in fork)), -2), shade(a.second, 0.9)
    )
    fin = spine[2] + vec(0, radius[2] * 0.6)
    s.polygon(fin[..., None, :] + np.array([[0.2, 0], [-0.22, 0.28], [-0.26, 0]]), a.second)
    for k in range(len(along) - 1, 0, -1):
        s.capsule(spine[k], spine[k - 1], radius[k], radius[k - 1], a.colour)
    for k in (2, 4):
        s.ellipse(spine[k], 0.06, radius[k] * 0.85, a.second)
    s.polygon(
        (spine[2] - vec(0, 0.05))[..., None, :]
        + np.array([[0.08, 0], [-0.2, -0.2], [-0.16, 0.02]]),
        shade(a.second, 0.8),
    )
    head, mouth = spine[0], spine[0] + vec(0.22, -0.05)
    s.disc(mouth - vec(0.03, 0), 0.06, (190, 60, 70))
    eye = head + vec(0.02, 0.1)
    if a.does("sleeping"):
        s.capsule(eye - vec(0.08, 0), eye + vec(0.08, 0), 0.03, 0.03, props.BLACK)
        props.sleep_marks(s, head + vec(0.1, 0.45), 0.2, u)
    else:
        s.disc(eye, 0.1, props.WHITE)
        s.disc(eye + vec(0.02, 0), 0.06, props.BLACK)
    if a.does("eating"):
        props.bowl(s, mouth + vec(0.28, -0.22), 0.32, shade(a.second, 0.8))
    if a.does("bubbling"):
        props.bubbles(s, mouth + vec(0.12, 0.0), 0.3, u)
    if a.does("hiding"):
        props.bush(s, vec(-0.15 + 0 * u, -0.62), 0.68, d[6])
    return s


def _spine(a: Actor, u: Curve, d: Curve, count: int) -> Points:
    """The snake's axis [F, count, 2], head last, by integrating the heading along the body."""
    v = np.linspace(0, 1, count)
    if a.does("slithering"):
        travel = (1.0 + 0.5 * d[1]) * u
    elif a.does("backing"):
        travel = -(1.0 + 0.5 * d[1]) * u
    else:
        travel = 0 * u
    wave = 1.05 * np.sin(2 * np.pi * (1.35 * v + d[0] - travel[:, None]))
    if a.does("coiling"):
        coil = smooth(u)
    elif a.does("uncoiling"):
        coil = smooth(1 - u)
    else:
        coil = np.full_like(u, 1.0 if a.does("sleeping") else 0.0)
    curl = 2 * np.pi * 1.75 * v**0.8
    heading = (1 - coil[:, None]) * wave + coil[:, None] * curl
    if a.does("rearing"):
        lift = (
            np.clip((v - 0.55) / 0.12, 0, 1)
            * (1.45 + 0.1 * np.sin(2 * np.pi * (u + d[0])))[:, None]
        )
        heading = np.where(v > 0.55, lift, 0.45 * wave)
    step = 2.1 / count
    steps = step * np.stack([np.cos(heading), np.sin(heading)], -1)
    axis = np.cumsum(steps, axis=1)
    return np.asarray(axis - axis.mean(axis=1, keepdims=True))


def draw_snake(a: Actor, u: Curve) -> Sketch:
    """A snake 2.1 units long, centred on the origin, head to the right."""
    s, d = Sketch(len(u)), dials(a, 12)
    count = 18
    axis = _spine(a, u, d, count)
    thick = 0.1 + 0.035 * d[3]
    width = thick * np.clip(np.linspace(0.35, 3.0, count), 0, 1)
    for k in range(1, count):
        colour = a.second if (k // 2) % 2 else a.colour
        s.capsule(axis[:, k - 1], axis[:, k], width[k - 1], width[k], colour)
    head, ahead = axis[:, -1], axis[:, -1] - axis[:, -2]
    turn = np.arctan2(ahead[:, 1], ahead[:, 0])
    if a.does("rearing"):
        turn = 0 * turn
        s.ellipse(0.5 * (head + axis[:, -4]), 0.12, 0.36, a.colour)
        s.ellipse(0.5 * (head + axis[:, -4]), 0.06, 0.22, a.second)
    front = np.stack([np.cos(turn), np.sin(turn)], -1)
    nose = head + 0.2 * front
    if a.does("hissing"):
        side = np.stack([-front[:, 1], front[:, 0]], -1)
        fork = nose + 0.26 * front
        s.capsule(nose, fork, 0.055, 0.05, (230, 30, 50))
        for sign in (-1, 1):
            s.capsule(fork, fork + 0.16 * front + sign * 0.14 * side, 0.05, 0.04, (230, 30, 50))
    s.ellipse(head + 0.06 * front, 0.24, 0.17, shade(a.colour, 0.8), turn)
    eye = head + 0.08 * front + vec(0, 0.06)
    if a.does("sleeping"):
        s.capsule(eye - vec(0.05, 0), eye + vec(0.05, 0), 0.02, 0.02, props.BLACK)
        props.sleep_marks(s, head + vec(0.12, 0.4), 0.19, u)
    else:
        s.disc(eye, 0.07, props.WHITE)
        s.disc(eye, 0.045, props.BLACK)
    if a.does("eating"):
        props.bowl(s, nose + hanging(0.9, 0.22) - vec(-0.05, 0.05), 0.32, shade(a.second, 0.8))
    if a.does("hiding"):
        low = axis.min(axis=(0, 1))[1]
        props.bush(s, vec(-0.35 + 0 * u, low - 0.1), 0.62, d[6])
    return s
