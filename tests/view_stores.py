"""Stores of made-up features with several views.

Load it by its path, e.g. `runpy.run_path(str(Path(__file__).with_name("view_stores.py")))`: tests
are no package.
"""

from __future__ import annotations

import runpy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.store_writer import ShardRows, StoreWriter
from msq.extract.views import CLEAN, View

fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))
WIDTH, TOKENS = 16, 4
VIDEO = replace(fakes.SPEC, tokens=TOKENS, channels=WIDTH)
IMAGE = fakes.image_spec(channels=WIDTH, output="projected")
TEXT = fakes.text_spec(channels=WIDTH, output="projected")


def make_store(
    path: Path,
    views: Sequence[View],
    *,
    clips: int = 60,
    classes: int = 5,
    task: Any = "multilabel",
    image_views: Sequence[View] | None = None,
    status: Mapping[tuple[str | int, ...], int] | None = None,
    noise: float = 1.0,
    val: bool = False,
) -> Path:
    """A store in which a class leaves its mark on tokens and image, and each view its own noise.

    Args:
        path: where.
        views: of the video encoder, clean first.
        clips: rows; every third is a test clip.
        classes: K.
        task: `multilabel` or `singlelabel`.
        image_views: of the image encoder; those of the video encoder by default.
        status: (view, row), or (encoder, view, row), -> status, where it is not 1.
        noise: of a view, 0 makes all views equal the clean one.
        val: every third clip is a validation clip.
    """
    rng = np.random.default_rng(5)
    labels = rng.random((clips, classes)) < 0.3
    if task == "singlelabel":
        labels = np.eye(classes, dtype=bool)[rng.integers(0, classes, clips)]
    rows = tuple(
        Clip(
            f"clip {row} é", Path(f"{row}.mp4"), None, None,
            tuple(int(k) for k in np.flatnonzero(labels[row])),
            ("val" if val else "train", "train", "test")[row % 3],
        )
        for row in range(clips)
    )  # fmt: skip
    names = tuple(f"class {k}" for k in range(classes))
    writer = StoreWriter(path, Dataset("toy", names, task, rows, "map"), shard=64)
    marks = rng.normal(size=(classes, WIDTH))
    tokens = labels[:, None, :] @ marks + rng.normal(size=(clips, TOKENS, WIDTH))
    image = labels @ marks + rng.normal(size=(clips, WIDTH))
    writer.add_text(TEXT, "plain", "{}", {}, rng.normal(size=(classes, WIDTH)).astype(np.float32))
    given = (
        (VIDEO, tokens, tuple(views)),
        (IMAGE, image, tuple(views if image_views is None else image_views)),
    )
    for spec, clean, own in given:
        writer.add_encoder(spec, own)
        for view in own:
            drawn = np.random.default_rng([len(spec.slug), *str(view).encode()])
            moved = 0.0 if view == CLEAN else noise
            values = (clean + moved * drawn.normal(size=clean.shape)).astype(np.float16)
            keys = [(str(view), row) for row in range(clips)]
            given_codes = [(status or {}).get((spec.slug, *key)) for key in keys]
            codes = np.array(
                [
                    (status or {}).get(key, 1) if code is None else code
                    for key, code in zip(keys, given_codes, strict=True)
                ]
            )
            for shard in range(writer.shards):
                part = slice(writer.rows(shard).start, writer.rows(shard).stop)
                times = np.zeros((len(writer.rows(shard)), spec.frames), dtype=np.float32)
                data = ShardRows(values[part], times, codes[part].astype(np.uint8))
                writer.commit(shard, {spec.slug: data}, [], view)
    return path
