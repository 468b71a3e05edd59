"""The world as files: real H.264 videos and ordinary manifests, like anyone's data."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from msq.errors import DatasetError
from msq.world.classes import ACTION_TOLD_BY, ACTIONS, CLASSES
from msq.world.render import frame_times, render
from msq.world.scene import Scene, sample_scene

VERSION = 1  # raised whenever the same seed gives other scenes or frames
_SIZES = (
    *((96, 96), (112, 112), (128, 128), (128, 96), (144, 112), (160, 120), (96, 128)),
    *((160, 96), (176, 144), (192, 108), (112, 144), (144, 144)),
)
_RATES = (
    *(Fraction(12), Fraction(15), Fraction(24000, 1001), Fraction(24), Fraction(25)),
    *(Fraction(30000, 1001), Fraction(30)),
)
_CONTAINERS = ("mp4",) * 14 + ("mkv", "avi")


@dataclass(frozen=True, slots=True)
class World:
    """Where a generated world lies.

    Attributes:
        root: its folder.
        manifest: actor-action pairs, the main label set; actions_manifest: plain actions.
        classes_file: names of the pairs, one per line; actions_file: of the actions.
        classes: the pairs; actions: the plain actions, both ascending.
        told_by: `looks` or `motion` for every name of both label sets.
        videos: number of videos.
    """

    root: Path
    manifest: Path
    actions_manifest: Path
    classes_file: Path
    actions_file: Path
    classes: tuple[str, ...]
    actions: tuple[str, ...]
    told_by: dict[str, str]
    videos: int


@dataclass(frozen=True, slots=True)
class Film:
    """One video of the world: a scene and how it is filmed.

    Attributes:
        id: name without suffix; path: relative to the world's folder, POSIX.
        split: train, val or test.
        scene: what is to be seen.
        width, height: pixels, even; rate: frames per second; length: frames.
    """

    id: str
    path: str
    split: str
    scene: Scene
    width: int
    height: int
    rate: Fraction
    length: int


def plan_world(*, train: int, val: int = 0, test: int, seed: int) -> list[Film]:
    """All films of a world, in manifest order; draws nothing.

    Every film is made for the class that has the fewest positives in its split so far, so that
    no class stays without. The films of a split depend on the seed and on their number before it
    alone, never on the machine.
    """
    films = []
    for number, (split, count) in enumerate((("train", train), ("val", val), ("test", test))):
        rng = np.random.default_rng([VERSION, seed, number])
        seen: Counter[str] = Counter()
        ties = rng.permutation(len(CLASSES))
        for index in range(count):
            rarest = min(range(len(CLASSES)), key=lambda k: (seen[CLASSES[k].name], ties[k]))
            row = CLASSES[rarest]
            scene = sample_scene(rng, target=(row.kind, row.action))
            seen.update(scene.pairs)
            width, height = _SIZES[int(rng.integers(len(_SIZES)))]
            rate = _RATES[int(rng.integers(len(_RATES)))]
            length = round(float(rng.uniform(1.5, 4.0)) * float(rate))
            suffix = _CONTAINERS[int(rng.integers(len(_CONTAINERS)))]
            name = f"{split}-{index:05d}"
            films.append(
                Film(name, f"videos/{name}.{suffix}", split, scene, width, height, rate, length)
            )
    return films


def film_frames(film: Film) -> NDArray[np.uint8]:
    """All frames of a film before encoding, uint8 [n, height, width, 3]."""
    return render(film.scene, frame_times(range(film.length), film.length), film.width, film.height)


def write_video(path: Path, frames: NDArray[np.uint8], rate: Fraction) -> None:
    """Encode frames as H.264 (yuv420p, one thread, so that the bytes do not depend on the cores).

    The file appears under its name only when it is complete.

    Args:
        path: target; the suffix chooses the container (mp4, mkv, avi).
        frames: uint8 [n, height, width, 3], even sizes.
        rate: frames per second.
    """
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    # cpu-independent: without it libx264's AVX-512 code gave other bytes from run to run.
    options = {"crf": "20", "preset": "veryfast", "threads": "1"}
    options["x264-params"] = "cpu-independent=1"
    if path.suffix == ".avi":
        # AVI has no presentation times, so frames must stay in order.
        options["x264-params"] += ":bframes=0"
    with av.open(str(part), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    os.replace(part, path)


def _write_film(root: Path, film: Film) -> str:
    path = root / film.path
    if not path.exists():
        write_video(path, film_frames(film), film.rate)
    return film.id


def _write_text(path: Path, text: str) -> None:
    """Write a text file in one step, so that a killed run leaves the old one or the new one."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)


def _manifest(films: list[Film], pairs: bool) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("id", "path", "labels", "split"))
    for film in films:
        labels = film.scene.pairs if pairs else film.scene.actions
        rows.writerow((film.id, film.path, ";".join(labels), film.split))
    return text.getvalue()


def _claim(out: Path, description: dict[str, object]) -> None:
    """Make sure that the folder is this world's, or nobody's."""
    file = out / "world.json"
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        for key in ("version", "seed"):
            if found.get(key) != description[key]:
                raise DatasetError(
                    f"{file}: expected {key} {description[key]}, found {found.get(key)}; "
                    "choose another folder, or delete this one to generate it anew"
                )
    elif (out / "videos").exists():
        raise DatasetError(
            f"{out}: expected an empty folder or a world with its world.json, found a folder "
            "'videos' of unknown making; choose another folder"
        )
    _write_text(file, json.dumps(description, indent=1, sort_keys=True) + "\n")


def generate_world(
    out: Path,
    *,
    train: int,
    val: int = 0,
    test: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> World:
    """Write a world: videos, two manifests, class lists and a description.

    Finished videos of an earlier run with the same seed and version are kept; a video never stands
    half written under its final name. The frames depend on the seed alone.

    Args:
        out: folder, made where it does not exist.
        train: number of training videos.
        val: number of validation videos.
        test: number of test videos.
        seed: of everything.
        progress: called as `progress(done, total)` after every video.
        workers: processes; by default the cores this process may use, at most 8. 1 stays in this
            process.

    Raises:
        DatasetError: when the folder holds a world of another seed or version.
    """
    out = Path(out)
    films = plan_world(train=train, val=val, test=test, seed=seed)
    told_by = {**{row.name: row.told_by for row in CLASSES}, **ACTION_TOLD_BY}
    out.mkdir(parents=True, exist_ok=True)
    _claim(
        out,
        {
            "version": VERSION, "seed": seed, "train": train, "val": val, "test": test,
            "told_by": told_by,
        },
    )  # fmt: skip
    (out / "videos").mkdir(exist_ok=True)
    for stale in (out / "videos").glob(".*.part.*"):
        stale.unlink()
    _write_films(out, films, progress, workers)
    names, actions = tuple(row.name for row in CLASSES), ACTIONS
    _write_text(out / "classes.txt", "".join(f"{name}\n" for name in names))
    _write_text(out / "classes-actions.txt", "".join(f"{name}\n" for name in actions))
    _write_text(out / "manifest-actions.csv", _manifest(films, pairs=False))
    _write_text(out / "manifest.csv", _manifest(films, pairs=True))
    return World(
        root=out, manifest=out / "manifest.csv", actions_manifest=out / "manifest-actions.csv",
        classes_file=out / "classes.txt", actions_file=out / "classes-actions.txt",
        classes=names, actions=actions, told_by={k: str(v) for k, v in told_by.items()},
        videos=len(films),
    )  # fmt: skip


def _write_films(
    out: Path,
    films: list[Film],
    progress: Callable[[int, int], None] | None,
    workers: int | None,
) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = workers if workers is not None else min(8, cores or 1)
    write = partial(_write_film, out)
    if count <= 1 or len(films) < 2 * count:
        for done, film in enumerate(films, 1):
            write(film)
            if progress is not None:
                progress(done, len(films))
        return
    # Spawned, not forked: the caller may hold threads (torch) that a fork would break.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        for done, _ in enumerate(pool.map(write, films, chunksize=4), 1):
            if progress is not None:
                progress(done, len(films))
