"""A world to learn from: articulated actors on cluttered, panning backgrounds, made on the spot."""

from __future__ import annotations

from msq.world.captions import caption
from msq.world.classes import ACTION_TOLD_BY, ACTIONS, CLASSES, GROUPS, KINDS, WorldClass, told_by
from msq.world.generate import (
    VERSION,
    Film,
    World,
    film_frames,
    generate_world,
    plan_world,
    write_video,
)
from msq.world.render import frame_times, render
from msq.world.scene import Scene, sample_scene
from msq.world.split import compositional_split

__all__ = [
    "ACTIONS",
    "ACTION_TOLD_BY",
    "CLASSES",
    "GROUPS",
    "KINDS",
    "VERSION",
    "Film",
    "Scene",
    "World",
    "WorldClass",
    "caption",
    "compositional_split",
    "film_frames",
    "frame_times",
    "generate_world",
    "plan_world",
    "render",
    "sample_scene",
    "told_by",
    "write_video",
]
