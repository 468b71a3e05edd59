"""Dog and horse: one body plan with other proportions."""

from __future__ import annotations

import numpy as np

from msq.world.actors import props
from msq.world.actors.pose import Actor, Curve, dials, gait, hop, swing
from msq.world.sketch import Points, Sketch, hanging, shade, vec


def _legs(
    s: Sketch, a: Actor, u: Curve, d: Curve, roots: tuple[Points, Points], near: bool
) -> None:
    """One side's front and hind leg, hanging from the two roots (hind, front)."""
    length = 0.52 if a.kind == "dog" else 0.8
    thick = 0.085 if a.kind == "dog" else 0.08
    moves = a.does("walking", "running", "backing", "chasing", "fleeing")
    f = gait(a, u, d[0], d[1])
    for index, root in enumerate(roots):
        offset = (0.0 if near else np.pi) + (0.6 * np.pi if index else 0.0)
        reach = 0.55 + 0.15 * d[2] if moves else 0.0
        tuck = hop(a, u, d[0]) if a.does("jumping", "bouncing") else 0 * u
        upper = reach * np.sin(f + offset) + (0.1 if near else -0.12)
        lower = upper - (0.7 * np.clip(np.cos(f + offset), 0, 1) if moves else 0.05)
        upper = upper + tuck * (0.7 if index else -0.7)
        lower = lower - tuck * (0.9 if index else 0.2)
        knee = root + hanging(upper, 0.5 * length)
        foot = knee + hanging(lower, 0.5 * length)
        tone = 0.95 if near else 0.55
        s.capsule(root, knee, thick * 1.3, thick, shade(a.colour, tone))
        s.capsule(knee, foot, thick, thick * 0.9, shade(a.colour, tone * 0.9))


def draw_quadruped(a: Actor, u: Curve) -> Sketch:
    """A dog of about 1.4 by 1 units or a horse of 1.6 by 1.5, feet on y = 0, looking right."""
    s, d = Sketch(len(u)), dials(a, 12)
    dog = a.kind == "dog"
    height, half = (0.58, 0.42) if dog else (0.88, 0.5)
    girth = (0.2 if dog else 0.25) + 0.05 * d[3]
    lying, sitting = a.does("sleeping"), a.does("sitting")
    if lying:
        height = girth * 0.95 + 0.0
    bob = 0.02 * np.sin(2 * gait(a, u, d[0], d[1])) + (0.02 * np.sin(4 * np.pi * u) if lying else 0)
    hind, front = vec(-half, height + bob), vec(half, height + bob)
    if sitting:
        hind, front = vec(-0.25 + 0 * u, 0.26), vec(0.2, 0.74)
    _tail(s, a, u, d, hind)
    if not lying and not sitting:
        _legs(s, a, u, d, (hind, front), near=False)
    if sitting:
        s.capsule(front - vec(0.02, 0.1), vec(0.28, 0.06), 0.09, 0.08, shade(a.colour, 0.7))
    s.capsule(hind, front, girth, girth * 1.05, a.colour)
    s.ellipse(0.5 * (hind + front) - vec(0, 0.45 * girth), 0.7 * half, 0.4 * girth, a.second)
    if lying:
        for x in (-half + 0.2, half + 0.15):
            s.capsule(vec(x - 0.2, 0.09), vec(x + 0.2, 0.07), 0.09, 0.08, shade(a.colour, 0.8))
    elif sitting:
        s.capsule(vec(-0.3, 0.12), vec(0.08, 0.07), 0.16, 0.08, shade(a.colour, 0.85))
        s.capsule(front - vec(0.08, 0.1), vec(0.14, 0.06), 0.1, 0.08, shade(a.colour, 0.95))
    else:
        _legs(s, a, u, d, (hind, front), near=True)
    _head(s, a, u, d, front)
    return s


def _tail(s: Sketch, a: Actor, u: Curve, d: Curve, hind: Points) -> None:
    """A thick raised tail (dog), wagging or still; a hanging mane-coloured one (horse)."""
    if a.kind == "horse":
        root = hind + vec(-0.24, 0.12)
        tip = root + hanging(-0.35 + 0.1 * np.sin(2 * np.pi * (u + d[4])), 0.55)
        s.capsule(root, tip, 0.07, 0.13, a.second)
        return
    angle = -2.2 + 0.75 * swing(u, d[4], d[5], a.does("wagging"))
    root = hind + vec(-0.15, 0.08)
    middle = root + hanging(angle, 0.26)
    s.capsule(root, middle, 0.1, 0.09, shade(a.colour, 0.85))
    s.capsule(middle, middle + hanging(angle - 0.2, 0.2), 0.09, 0.07, a.second)


def _head(s: Sketch, a: Actor, u: Curve, d: Curve, front: Points) -> None:
    """Neck, head, ears, eye and what is at the mouth."""
    dog = a.kind == "dog"
    low, lying = a.does("eating", "drinking"), a.does("sleeping")
    if lying:
        rise, pitch = vec(0.34, 0.03), 0.0
    elif low:
        rise, pitch = (vec(0.34, -0.12), 0.9) if dog else (vec(0.55, -0.2), 0.95)
    else:
        rise, pitch = (vec(0.28, 0.36), 0.08 + 0.2 * d[6]) if dog else (vec(0.4, 0.58), 0.55)
    nibble = 0.03 * np.sin(6 * np.pi * u) if low else 0 * u
    head = front + rise + vec(0, nibble)
    neck, size = (0.15, 0.21) if dog else (0.15, 0.16)
    s.capsule(front + vec(0.02, 0.05), head, neck + 0.05, neck, a.colour)
    nose = head + hanging(np.pi / 2 - pitch, 0.3 if dog else 0.42)
    if not dog:
        for k in range(4):
            s.disc(front + (0.15 + 0.27 * k) * rise + vec(-0.16, 0.12), 0.11, a.second)
    if a.does("barking"):
        jaw = head + hanging(np.pi / 2 - pitch - 0.75, 0.3)
        s.polygon(np.stack(np.broadcast_arrays(head, nose, jaw), -2), (200, 40, 50))
        s.capsule(head, jaw, 0.09, 0.06, shade(a.colour, 0.8))
        nose = head + hanging(np.pi / 2 - pitch + 0.25, 0.32)
    s.disc(head, size, a.colour)
    s.capsule(head, nose, size * 0.75, 0.1, shade(a.colour, 1.12))
    s.disc(nose + vec(0.04, 0.02), 0.07, props.BLACK)
    if dog:
        s.capsule(head + vec(-0.08, 0.14), head + vec(-0.22, -0.14), 0.08, 0.1, a.second)
    else:
        s.polygon(
            (head + vec(-0.08, 0.1))[..., None, :] + [[-0.07, 0], [0.08, 0], [-0.02, 0.26]],
            a.colour,
        )
    eye = head + vec(0.07, 0.08)
    if lying:
        s.capsule(eye - vec(0.06, 0), eye + vec(0.06, 0), 0.025, 0.025, props.BLACK)
        props.sleep_marks(s, head + vec(0.1, 0.45), 0.2, u)
    else:
        s.disc(eye, 0.055, props.WHITE)
        s.disc(eye + vec(0.015, 0), 0.04, props.BLACK)
    _things(s, a, u, d, head, nose)


def _things(s: Sketch, a: Actor, u: Curve, d: Curve, head: Points, nose: Points) -> None:
    """Bowl, water, ball, box, sound, hat."""
    if a.does("eating"):
        props.bowl(s, vec(nose[..., 0] + 0.05, 0.0), 0.34, shade(a.second, 0.8))
    if a.does("drinking"):
        props.trough(s, vec(nose[..., 0] + 0.1, 0.08), 0.42)
    if a.does("barking"):
        props.sound_lines(s, nose + vec(0.05, -0.05), 0.34)
    if a.does("playing ball"):
        roll = 0.12 * np.sin(2 * np.pi * (d[7] + u))
        props.ball(s, vec(0.98 + roll, 0.26), 0.26, a.second, -roll / 0.26)
    if a.does("carrying box"):
        props.box(s, vec(-0.12 + 0 * u, 1.12), 0.3, (205, 150, 85))
    if a.does("wearing hat"):
        props.hat(s, head + vec(-0.02, 0.16), 0.22, a.second, -0.1)
