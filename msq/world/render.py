"""Scene to pictures, at any size and any times. One renderer serves files and training alike.

Vertices of all frames are computed at once; filling is done by Pillow at twice the size and
averaged down, which smooths the edges.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from msq.world.actors import DRAW, Actor, Curve, hop, yaw
from msq.world.actors import props as prop
from msq.world.scene import PAN_MOST, Scene, Thing
from msq.world.sketch import Part, Sketch, shade, vec

_REACH = 1.85 + PAN_MOST / 2  # half extent of the background, enough for 16:9 and any pan


def frame_times(indices: NDArray[np.int64] | range, length: int) -> Curve:
    """Times in [0, 1] of the frames `indices` of a clip of `length` frames (middle of each)."""
    return (np.asarray(indices, float) + 0.5) / length


def render(
    scene: Scene, times: Curve, width: int, height: int, *, supersample: int = 2
) -> NDArray[np.uint8]:
    """Draw the scene.

    Args:
        scene: what to draw.
        times: [F] in [0, 1], the clip's beginning and end.
        width: of the picture in pixels.
        height: of the picture in pixels.
        supersample: the picture is drawn this many times larger and averaged.

    Returns:
        uint8 [F, height, width, 3].
    """
    unit = supersample * min(width, height) / 2
    wide, high = supersample * width, supersample * height
    canvas, centre = _background(scene, unit)
    sketches = [_actor_sketch(actor, times) for actor in scene.actors]
    pan = np.outer(times - 0.5, scene.pan)
    if scene.pole is not None:
        sketches.append(_pole(scene, times, pan))
    middle = np.array([wide / 2, high / 2])
    drawn = [_pixels(sketch, unit, middle) for sketch in sketches]
    out = np.empty((len(times), height, width, 3), np.uint8)
    for f in range(len(times)):
        left = round(centre - unit * pan[f, 0] - wide / 2)
        top = round(centre + unit * pan[f, 1] - high / 2)
        image = canvas.crop((left, top, left + wide, top + high))
        draw = ImageDraw.Draw(image)
        for vertices, offsets, colours in drawn:
            flat = vertices[f].ravel().tolist()
            for k, colour in enumerate(colours):
                draw.polygon(flat[offsets[k] : offsets[k + 1]], fill=colour)
        out[f] = np.asarray(image.reduce(supersample) if supersample > 1 else image)
    return out


def _pixels(
    sketch: Sketch, unit: float, middle: NDArray[np.float64]
) -> tuple[NDArray[np.float64], list[int], list[tuple[int, int, int]]]:
    """All vertices of a sketch in pixels [F, V, 2], where each part's numbers start, colours."""
    vertices = np.concatenate([part.points for part in sketch.parts], axis=1)
    vertices = vertices * [unit, -unit] + middle
    sizes = [2 * part.points.shape[1] for part in sketch.parts]
    return vertices, [0, *np.cumsum(sizes).tolist()], [part.colour for part in sketch.parts]


def _actor_sketch(actor: Actor, times: Curve) -> Sketch:
    """The actor in the scene's coordinates."""
    sketch = DRAW[actor.kind](actor, times)
    face = yaw(actor, times)
    face = np.where(face < 0, -1, 1) * np.maximum(np.abs(face), 0.3)
    offset = np.array(actor.start) + np.outer(times - 0.5, actor.drift)
    phase = float(np.random.default_rng(actor.seed).random())
    offset[:, 1] += 0.42 * hop(actor, times, phase)
    sketch.place(actor.scale, face, 0.0, offset)
    return sketch


def _pole(scene: Scene, times: Curve, pan: NDArray[np.float64]) -> Sketch:
    """A post that stands before the actors and moves with the background."""
    sketch = Sketch(len(times))
    x = (scene.pole or 0.0) + 1.15 * pan[:, 0]
    colour = shade(scene.base, 0.6)
    sketch.capsule(vec(x, -2.0), vec(x, 2.0), 0.09, 0.09, colour)
    return sketch


def _background(scene: Scene, unit: float) -> tuple[Image.Image, float]:
    """A canvas of the whole background and the pixel of its middle."""
    rng = np.random.default_rng(scene.seed)
    side = 2 * round(_REACH * unit)
    middle = side / 2
    base = np.array(scene.base, float)
    swing = 12 + 20 * scene.clutter
    coarse = base + rng.normal(0, swing, (6, 6, 3)) + rng.normal(0, swing / 2, (6, 6, 1))
    image = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(image)
    if scene.clutter > 0:
        sketch = Sketch(1)
        for _ in range(int(rng.integers(8, 10 + round(26 * scene.clutter)))):
            _blob(sketch, rng, base, scene.clutter)
        _paint(draw, sketch, unit, middle)
        fine = rng.normal(0, 14 * scene.clutter, (40, 40, 1)).repeat(3, axis=2)
        grain = Image.fromarray(np.clip(128 + fine, 0, 255).astype(np.uint8)).resize(
            (side, side), Image.Resampling.BILINEAR
        )
        mixed = np.asarray(image, np.int16) + np.asarray(grain, np.int16) - 128
        image = Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
    sketch = Sketch(1)
    for thing in scene.things:
        _thing(sketch, thing)
    _paint(draw, sketch, unit, middle)
    return image, middle


def _paint(draw: ImageDraw.ImageDraw, sketch: Sketch, unit: float, middle: float) -> None:
    part: Part
    for part in sketch.parts:
        points = part.points[0] * [unit, -unit] + middle
        draw.polygon(points.ravel().tolist(), fill=part.colour)


def _blob(sketch: Sketch, rng: np.random.Generator, base: NDArray[np.float64], much: float) -> None:
    """One shape of the clutter: an ellipse, a bar or a triangle in a colour near the base."""
    red, green, blue = np.clip(base + rng.uniform(-75, 75, 3) * much, 0, 255).astype(int)
    colour = (int(red), int(green), int(blue))
    at = rng.uniform(-_REACH, _REACH, 2) * [1.0, 0.6]
    size, form = rng.uniform(0.12, 0.6), rng.random()
    if form < 0.4:
        sketch.ellipse(at, size, size * rng.uniform(0.3, 1), colour, rng.uniform(0, np.pi))
    elif form < 0.75:
        along = rng.uniform(0, np.pi)
        reach = size * np.array([np.cos(along), np.sin(along)])
        sketch.capsule(at - reach, at + reach, 0.16 * size, 0.16 * size, colour)
    else:
        sketch.polygon(at + size * rng.uniform(-1, 1, (3, 2)), colour)


def _thing(sketch: Sketch, thing: Thing) -> None:
    """A distractor: the same thing that an actor would use."""
    at, size, colour = vec(*thing.at), thing.size, thing.colour
    if thing.name == "ball":
        prop.ball(sketch, at, size, colour, 0.7)
    elif thing.name == "bowl":
        prop.bowl(sketch, at, 1.1 * size, colour)
    elif thing.name == "hat":
        prop.hat(sketch, at, size, colour)
    elif thing.name == "box":
        prop.box(sketch, at, 1.1 * size, (205, 150, 85))
    elif thing.name == "umbrella":
        prop.umbrella(sketch, at, 1.8 * size, colour)
    elif thing.name == "bush":
        prop.bush(sketch, at, 2 * size, 0.5)
    elif thing.name == "cup":
        prop.cup(sketch, at, size)
    else:
        prop.nest(sketch, at, 1.6 * size)
