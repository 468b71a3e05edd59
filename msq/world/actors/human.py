"""The human: a skeleton of angles, set by the base action and overridden by what hands do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from msq.world.actors import props
from msq.world.actors.pose import Actor, Curve, dials, gait, hop, swing
from msq.world.sketch import Colour, Points, Sketch, hanging, shade, vec

SKIN: tuple[Colour, ...] = ((242, 200, 165), (205, 150, 110), (150, 100, 70), (105, 68, 48))


@dataclass
class _Pose:
    """Angles in radians, numbers or [F]: limbs from straight down, the torso from straight up."""

    hip: Points
    torso: Any = 0.0
    head: Any = 0.0
    thighs: tuple[Any, Any] = (0.0, 0.0)
    knees: tuple[Any, Any] = (0.05, 0.05)
    arms: tuple[Any, Any] = (0.1, -0.1)
    elbows: tuple[Any, Any] = (0.15, 0.15)


def _body(a: Actor, u: Curve, d: Curve) -> _Pose:
    """The pose of legs, torso and resting arms."""
    if a.does("sleeping"):
        breath = 0.02 * np.sin(4 * np.pi * u)
        return _Pose(
            hip=vec(0.1, 0.17 + breath), torso=-1.5, head=-1.5, thighs=(1.35, 1.5),
            knees=(0.3 * d[3], 0.1), arms=(1.2, 1.5), elbows=(0.5, 0.2),
        )  # fmt: skip
    if a.does("sitting"):
        return _Pose(
            hip=vec(-0.2, 0.52 + 0.0 * u), torso=0.08, thighs=(1.45, 1.35), knees=(1.4, 1.3),
            arms=(0.5, 0.4), elbows=(0.6, 0.6),
        )  # fmt: skip
    if a.does("crawling"):
        f = 2 * np.pi * (d[0] + (0.8 + 0.5 * d[1]) * u)
        return _Pose(
            hip=vec(-0.45, 0.5 + 0.03 * np.sin(2 * f)), torso=1.35, head=0.5,
            thighs=(0.3 + 0.35 * np.sin(f), 0.3 - 0.35 * np.sin(f)), knees=(1.7, 1.7),
            arms=(-0.0 + 0.35 * np.sin(f + np.pi), 0.0 + 0.35 * np.sin(f)), elbows=(0.1, 0.1),
        )  # fmt: skip
    if a.does("dancing", "posing"):
        moving = a.does("dancing")
        w = swing(u, d[0], d[1], moving)
        v = swing(u, d[0] + 0.25, d[1], moving)
        return _Pose(
            hip=vec(0.16 * w, 0.86), torso=0.3 * w, head=-0.15 * w,
            thighs=(0.3 - 0.25 * w, -0.3 - 0.25 * w), knees=(0.25 + 0.2 * v, 0.25 - 0.2 * v),
            arms=(1.9 + 0.8 * w, -1.9 + 0.8 * w), elbows=(0.6 + 0.5 * v, -0.6 + 0.5 * v),
        )  # fmt: skip
    if a.does("jumping", "bouncing"):
        crouch = 1 - hop(a, u, d[0])
        bend = 0.25 + 0.25 * crouch
        return _Pose(
            hip=vec(0, 0.9 - 0.1 * crouch), thighs=(bend, bend - 0.2),
            knees=(2 * bend, 2 * bend - 0.3),
            arms=(0.4, -0.4), elbows=(0.5, 0.5),
        )  # fmt: skip
    if a.does("walking", "running", "backing", "chasing", "fleeing"):
        f = gait(a, u, d[0], d[1])
        size = 0.55 + 0.15 * d[2]
        legs = (size * np.sin(f), size * np.sin(f + np.pi))
        knees = (0.1 + 0.9 * np.clip(np.cos(f), 0, 1), 0.1 + 0.9 * np.clip(-np.cos(f), 0, 1))
        return _Pose(
            hip=vec(0, 0.88 + 0.03 * np.cos(2 * f)), torso=0.12, thighs=legs, knees=knees,
            arms=(-0.8 * legs[0], -0.8 * legs[1]), elbows=(0.6, 0.6),
        )  # fmt: skip
    return _Pose(hip=vec(0, 0.9 + 0 * u), thighs=(0.12, -0.12))


def _raised(a: Actor, u: Curve, d: Curve) -> tuple[Any, Any]:
    """Shoulder and elbow of the waving or pointing arm."""
    wave = swing(u, d[4], d[5], a.does("waving"))
    return 2.0 + 0.5 * wave, 0.25 + 0.3 * wave


def _hands(a: Actor, u: Curve, d: Curve, pose: _Pose) -> None:
    """Arms that hold, wave or point replace those of the body."""
    if a.does("waving", "pointing"):
        shoulder, elbow = _raised(a, u, d)
        pose.arms, pose.elbows = (shoulder, pose.arms[1]), (elbow, pose.elbows[1])
    elif a.does("drinking"):
        pose.arms, pose.elbows = (0.75, pose.arms[1]), (1.95, pose.elbows[1])
    elif a.does("eating"):
        lift = 0.15 * np.sin(4 * np.pi * u)
        pose.arms, pose.elbows = (0.8 + lift, 0.7), (1.2, 1.1)
    elif a.does("reading"):
        pose.arms, pose.elbows = (0.75, 0.7), (1.0, 1.0)
    elif a.does("holding umbrella"):
        pose.arms, pose.elbows = (0.6, pose.arms[1]), (1.9, pose.elbows[1])


def draw_human(a: Actor, u: Curve) -> Sketch:
    """A human of 1.9 units, feet on y = 0, looking to the right."""
    s, d = Sketch(len(u)), dials(a, 12)
    pose = _body(a, u, d)
    _hands(a, u, d, pose)
    skin, girth = SKIN[int(d[6] * len(SKIN))], 0.13 + 0.06 * d[7]
    shirt, trousers = a.colour, a.second
    hair: Colour = [(45, 30, 20), (120, 75, 30), (215, 180, 90), (25, 25, 30)][int(d[8] * 4)]
    up = -hanging(-np.asarray(pose.torso), 0.56)
    neck = pose.hip + up
    head = neck - hanging(-np.asarray(pose.torso) - pose.head, 0.24)

    def arm(side: int, tone: float) -> Points:
        shoulder = neck - 0.12 * up
        elbow = shoulder + hanging(pose.arms[side], 0.31)
        hand = elbow + hanging(np.asarray(pose.arms[side]) + pose.elbows[side], 0.29)
        s.capsule(shoulder, elbow, 0.085, 0.07, shade(shirt, tone))
        s.capsule(elbow, hand, 0.065, 0.075, shade(skin, tone))
        return hand

    def leg(side: int, tone: float) -> None:
        knee = pose.hip + hanging(pose.thighs[side], 0.43)
        foot = knee + hanging(np.asarray(pose.thighs[side]) - pose.knees[side], 0.42)
        s.capsule(pose.hip, knee, 0.11, 0.085, shade(trousers, tone))
        s.capsule(knee, foot, 0.08, 0.06, shade(trousers, tone))
        s.capsule(foot, foot + vec(0.13, -0.01), 0.06, 0.05, shade(hair, tone))

    if a.does("sitting"):
        s.polygon(np.array([[-0.5, 0], [0.05, 0], [0.05, 0.42], [-0.5, 0.42]]), (130, 88, 50))
        s.polygon(np.array([[-0.56, 0], [-0.44, 0], [-0.44, 1.1], [-0.56, 1.1]]), (96, 62, 34))
    arm(1, 0.6)
    leg(1, 0.55)
    s.capsule(pose.hip, neck - 0.1 * up, girth, girth + 0.03, shirt)
    leg(0, 1.0)
    _head(s, a, u, head, pose, skin, hair)
    hand = arm(0, 1.12)
    _things(s, a, u, hand, head)
    return s


def _head(
    s: Sketch, a: Actor, u: Curve, head: Points, pose: _Pose, skin: Colour, hair: Colour
) -> None:
    """Head with hair behind, a nose before, an eye, and perhaps a hat."""
    tilt = np.asarray(pose.torso + 0.7 * np.asarray(pose.head))
    front = np.stack(np.broadcast_arrays(np.cos(tilt), -np.sin(tilt)), -1)
    top = np.stack(np.broadcast_arrays(np.sin(tilt), np.cos(tilt)), -1)
    s.disc(head - 0.06 * front + 0.04 * top, 0.215, hair)
    s.disc(head + 0.03 * front - 0.02 * top, 0.185, skin)
    s.disc(head + 0.22 * front - 0.02 * top, 0.055, shade(skin, 0.85))
    eye = head + 0.1 * front + 0.04 * top
    if a.does("sleeping"):
        s.capsule(eye - 0.06 * front, eye + 0.06 * front, 0.02, 0.02, props.BLACK)
        props.sleep_marks(s, head + vec(0.15, 0.42), 0.2, u)
    else:
        s.disc(eye, 0.05, props.BLACK)
    if a.does("wearing hat"):
        props.hat(s, head + 0.13 * top, 0.24, a.second, tilt)


def _things(s: Sketch, a: Actor, u: Curve, hand: Points, head: Points) -> None:
    """What the hands hold."""
    if a.does("drinking"):
        props.cup(s, head + vec(0.27, -0.18), 0.17)
    elif a.does("eating"):
        props.bowl(s, hand + vec(0.12, 0.0), 0.24, a.second)
    elif a.does("reading"):
        props.book(s, hand + vec(0.08, 0.08), 0.27, a.second)
    elif a.does("holding umbrella"):
        props.umbrella(s, hand, 0.62, a.second)
