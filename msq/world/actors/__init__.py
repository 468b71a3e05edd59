"""One drawing function per kind: (Actor, times in [0, 1]) to a Sketch in the actor's own units."""

from __future__ import annotations

from collections.abc import Callable

from msq.world.actors.bird import AIRBORNE, draw_bird
from msq.world.actors.human import draw_human
from msq.world.actors.pose import Actor, Curve, hop, smooth, yaw
from msq.world.actors.quadruped import draw_quadruped
from msq.world.actors.swimmer import draw_fish, draw_snake
from msq.world.sketch import Sketch

DRAW: dict[str, Callable[[Actor, Curve], Sketch]] = {
    "human": draw_human,
    "dog": draw_quadruped,
    "horse": draw_quadruped,
    "bird": draw_bird,
    "fish": draw_fish,
    "snake": draw_snake,
}

__all__ = ["AIRBORNE", "DRAW", "Actor", "Curve", "hop", "smooth", "yaw"]
