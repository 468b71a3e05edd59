"""The bird: in the air with wings out, or on its legs."""

from __future__ import annotations

import numpy as np

from msq.world.actors import props
from msq.world.actors.pose import Actor, Curve, dials, gait, swing
from msq.world.sketch import Points, Sketch, hanging, shade, vec

AIRBORNE = ("flying", "gliding", "rising", "sinking", "chasing", "fleeing")
BEAK = (250, 150, 30)


def draw_bird(a: Actor, u: Curve) -> Sketch:
    """A bird about 1.3 units long, looking right; feet on y = 0, or centred on y = 0 in the air."""
    s, d = Sketch(len(u)), dials(a, 12)
    flies = a.does(*AIRBORNE)
    girth = 0.24 + 0.06 * d[3]
    if flies:
        height = 0 * u
    elif a.does("nesting", "sleeping"):
        height = 0.3 + 0.015 * np.sin(4 * np.pi * u)
    else:
        height = 0.52 + 0 * u
    body = vec(0, height)
    if not flies and not a.does("nesting", "sleeping"):
        _legs(s, a, u, d, body)
    beat = swing(u, d[0], d[1], a.does("flying", "chasing", "fleeing"))
    if flies:
        _wing(s, body, beat, shade(a.second, 0.6), 0.12)
    s.polygon(
        body[..., None, :] + np.array([[-0.3, 0.08], [-0.78, 0.2], [-0.82, -0.06], [-0.3, -0.1]]),
        shade(a.colour, 0.75),
    )
    s.ellipse(body, 0.44, girth, a.colour, 0.15)
    s.ellipse(body + vec(0.12, -0.4 * girth), 0.26, 0.55 * girth, shade(a.colour, 1.35), 0.15)
    _head(s, a, u, d, body, flies)
    if flies:
        _wing(s, body, beat, a.second, -0.02)
    else:
        s.ellipse(body + vec(-0.12, 0.03), 0.34, 0.15, a.second, 0.25)
    if a.does("nesting"):
        props.nest(s, vec(0 * u, -0.08), 0.62)
    return s


def _wing(s: Sketch, body: Points, beat: Curve, colour: tuple[int, int, int], shift: float) -> None:
    """A long wing whose tip goes up and down with `beat`."""
    tip = body + vec(-0.18 + shift, 0.12 + 0.72 * beat)
    back = body + vec(-0.32 + shift, 0.06 + 0.35 * beat)
    root = body + vec(0.2 + shift, 0.1)
    rear = body + vec(-0.22 + shift, 0.04)
    s.polygon(np.stack(np.broadcast_arrays(root, tip, back, rear), axis=-2), colour)
    s.capsule(root, tip, 0.09, 0.06, colour)


def _legs(s: Sketch, a: Actor, u: Curve, d: Curve, body: Points) -> None:
    """Two thin legs; they step when the bird walks."""
    f = gait(a, u, d[0], d[1])
    for offset, tone in ((np.pi, 0.7), (0.0, 1.0)):
        angle = 0.5 * np.sin(f + offset) if a.does("walking") else 0.12 * np.cos(offset)
        foot = body + hanging(angle, 0.48)
        s.capsule(body, foot, 0.055, 0.045, shade(BEAK, tone))
        s.capsule(foot, foot + vec(0.12, 0), 0.045, 0.03, shade(BEAK, tone))


def _head(s: Sketch, a: Actor, u: Curve, d: Curve, body: Points, flies: bool) -> None:
    """Head on a neck whose angle is the peck; beak, eye, and what belongs to the head."""
    if a.does("eating"):
        nod = 0.85 + 0.1 * np.sin(6 * np.pi * u)
    elif flies or a.does("sleeping", "nesting", "singing"):
        nod = -0.05 + 0 * u
    else:
        nod = 0.35 + 0.6 * swing(u, d[4], d[5], a.does("pecking"))
    neck = hanging(np.pi / 2 + 0.65 - 1.1 * nod, 0.42)
    head = body + vec(0.2, 0.06) + neck
    pitch = 0.9 * nod if not a.does("singing") else nod - 0.35
    s.capsule(body + vec(0.2, 0.06), head, 0.18, 0.15, a.colour)
    s.disc(head, 0.2, a.colour)
    tip = head + hanging(np.pi / 2 - pitch, 0.44)
    side = hanging(-np.asarray(pitch), 0.09)
    root = head + hanging(np.pi / 2 - pitch, 0.15)
    s.polygon(np.stack(np.broadcast_arrays(root - side, tip, root + side), -2), BEAK)
    if a.does("singing"):
        low = head + hanging(np.pi / 2 - pitch - 0.7, 0.36)
        s.polygon(np.stack(np.broadcast_arrays(root, low, root + 1.6 * side), -2), BEAK)
        props.notes(s, tip + vec(0.0, 0.0), 0.22, u)
    eye = head + vec(0.06, 0.06)
    if a.does("sleeping"):
        s.capsule(eye - vec(0.06, 0), eye + vec(0.06, 0), 0.025, 0.025, props.BLACK)
        props.sleep_marks(s, head + vec(0.05, 0.42), 0.19, u)
    else:
        s.disc(eye, 0.06, props.WHITE)
        s.disc(eye + vec(0.01, 0), 0.04, props.BLACK)
    if a.does("wearing hat"):
        props.hat(s, head + vec(-0.03, 0.15), 0.2, a.second, 0.0)
    if a.does("eating"):
        props.bowl(s, vec(0.78 + 0 * u, 0.0), 0.32, shade(a.second, 0.8))
