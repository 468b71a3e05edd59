"""Pools of rendered clips that the embedded encoders are trained on.

A pool is rendered once: larger than needed, part of it through JPEG (its block noise stands in for
that of H.264), then reduced with the same bicubic filter that real videos go through.
Scene i of pool p is drawn from `default_rng([7001, seed, p, i])`; worlds (`msq.world.plan_world`)
use `[VERSION, seed, split]`, so no scene of any world is ever in a pool.
"""

from __future__ import annotations

import io
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msq.world import ACTIONS, CLASSES, KINDS, render, sample_scene

STREAM = 7001
POOLS = {"clips": 1, "frames": 2, "validation": 3, "validation-frames": 4}
PAIRS = [row.name for row in CLASSES]
# Difficulty over the pool's index: (share of the pool, clutter, probability of a second actor).
CURRICULUM = ((0.12, 0.2, 0.0), (0.3, 1.0, 0.0), (1.0, 1.0, 0.45))
AS_TESTED = ((1.0, 1.0, 0.35),)
# Pool: (clips, frames of each, pixels).
SCRATCH_FRAMES = {
    "clips": (15_000, 8, 48),
    "frames": (15_000, 3, 96),
    "validation": (1_500, 8, 48),
    "validation-frames": (1_000, 4, 96),
}


@dataclass
class Pool:
    """Rendered clips and what they show.

    Attributes:
        frames: uint8 [N, T, size, size, 3], memory-mapped.
        pairs: [N, 83]; actions: [N, 42]; kinds: [N, 6], each float32 of 0 and 1.
        cast: for each clip, (kind, actions) of its actors.
    """

    frames: NDArray[np.uint8]
    pairs: NDArray[np.float32]
    actions: NDArray[np.float32]
    kinds: NDArray[np.float32]
    cast: list[list[tuple[str, tuple[str, ...]]]]


def shrink(frames: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Bicubic with antialiasing, as the extraction does it."""
    return np.stack(
        [
            np.asarray(Image.fromarray(f).resize((size, size), Image.Resampling.BICUBIC))
            for f in frames
        ]
    )


def _jpeg(frames: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    out = []
    for f in frames:
        file = io.BytesIO()
        Image.fromarray(f).save(file, "JPEG", quality=quality)
        out.append(np.asarray(Image.open(file)))
    return np.stack(out)


def _clip(
    pool: int, seed: int, index: int, total: int, shape: tuple[int, int], curriculum: Any
) -> tuple[NDArray[np.uint8], list[Any]]:
    frames, size = shape
    rng = np.random.default_rng([STREAM, seed, pool, index])
    row = CLASSES[int(rng.integers(len(CLASSES)))]
    place = index / total
    _, clutter, two = next(stage for stage in curriculum if place < stage[0])
    scene = sample_scene(rng, target=(row.kind, row.action), clutter=clutter, two=two)
    times = (np.arange(frames) + 0.5 + rng.uniform(-0.35, 0.35)) / frames
    large = int(rng.choice((96, 96, 112, 128, 144)))
    images = render(scene, times, large, large, supersample=2 if rng.random() < 0.2 else 1)
    if rng.random() < 0.4:
        images = _jpeg(images, int(rng.integers(55, 95)))
    if large != size:
        images = shrink(images, size)
    return images, [[actor.kind, list(actor.actions)] for actor in scene.actors]


def _part(job: tuple[Path, int, int, int, int, int, tuple[int, int], Any]) -> list[Any]:
    path, pool, seed, first, last, total, shape, curriculum = job
    array = np.load(path, mmap_mode="r+")
    casts = []
    for index in range(first, last):
        array[index], cast = _clip(pool, seed, index, total, shape, curriculum)
        casts.append(cast)
    array.flush()
    return casts


def make_pool(
    folder: Path, name: str, *, clips: int, frames: int, size: int, seed: int, workers: int = 2
) -> Pool:
    """Render a pool into `folder`, or take it from there where it is complete."""
    path, cast_file = folder / f"{name}.npy", folder / f"{name}.json"
    if not cast_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shape = (clips, frames, size, size, 3)
        np.lib.format.open_memmap(path, "w+", np.uint8, shape).flush()
        curriculum = AS_TESTED if name.startswith("validation") else CURRICULUM
        edges = np.linspace(0, clips, 8 * workers + 1).astype(int)
        jobs = [
            (path, POOLS[name], seed, int(a), int(b), clips, (frames, size), curriculum)
            for a, b in pairwise(edges)
        ]
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            casts = [cast for part in pool.map(_part, jobs) for cast in part]
        cast_file.write_text(json.dumps(casts))
    casts = [[(k, tuple(a)) for k, a in c] for c in json.loads(cast_file.read_text())]
    pairs = np.zeros((len(casts), len(PAIRS)), np.float32)
    actions = np.zeros((len(casts), len(ACTIONS)), np.float32)
    kinds = np.zeros((len(casts), len(KINDS)), np.float32)
    for i, cast in enumerate(casts):
        for kind, done in cast:
            kinds[i, KINDS.index(kind)] = 1
            for action in done:
                pairs[i, PAIRS.index(f"{kind} {action}")] = 1
                actions[i, ACTIONS.index(action)] = 1
    return Pool(np.load(path, mmap_mode="r"), pairs, actions, kinds, casts)


def average_precision(scores: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float64]:
    """Per column; NaN without positives. Ties are broken by order: for curves, not for reports."""
    out = np.full(labels.shape[1], np.nan)
    for k in range(labels.shape[1]):
        hit = labels[np.argsort(-scores[:, k], kind="stable"), k] > 0
        if hit.any():
            out[k] = (np.cumsum(hit) / np.arange(1, len(hit) + 1))[hit].mean()
    return out
