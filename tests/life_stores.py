"""Small stores with everything in them that a store can have, written without any video.

Load it by its path, e.g. `runpy.run_path(str(Path(__file__).with_name("life_stores.py")))`: tests
are no package.
"""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.store_seal import KEY, RECORD_KEY
from msq.extract.store_writer import Failure, ShardRows, StoreWriter
from msq.extract.views import CLEAN, View, augmented_views

fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))
VIDEO, IMAGE, TEXT = fakes.SPEC, fakes.image_spec(), fakes.text_spec()
PATCH = replace(fakes.SPEC, slug="fake-patch", pooling="patch", tokens=3)
FAILED, DEGRADED = 2, 5  # rows
VIEWS = (CLEAN, *augmented_views(1))


def dataset(count: int = 7, first: int = 0, **changes: Any) -> Dataset:
    """Clips with partitions, groups and an unknown label."""
    rows = range(first, first + count)
    clips = tuple(
        Clip(
            f"ü/{row} x", Path(f"{row}.mp4"), None, None, (row % 3,),
            ("train", "val", "test")[row % 3], unknown=((row + 1) % 3,) if row == 3 else (),
        )
        for row in rows
    )  # fmt: skip
    parts = {"split1": tuple(("train", "", "test")[row % 3] for row in rows)}
    names = ("run", "jump", "swim")
    made = Dataset(
        "toy", names, "multilabel", clips, "map", partitions=parts, groups={"fast": (0, 1)}
    )
    return replace(made, **changes)


def rows_of(spec: Any, ids: list[int], dtype: str, seed: int = 0) -> ShardRows:
    """Rows that depend on the clip's number and the view's alone."""
    shape = (spec.tokens, spec.channels) if spec.kind == "video" else (spec.channels,)
    values = np.stack([np.random.default_rng([seed, k]).normal(size=shape) for k in ids])
    disk = {"bfloat16": "float32"}.get(dtype, dtype)
    values = values.astype(disk)
    if dtype == "bfloat16":
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    times = np.stack([np.arange(spec.frames) + k for k in ids]).astype(np.float32)
    return ShardRows(values, times, np.ones(len(ids), dtype=np.uint8))


def add(writer: StoreWriter, data: Dataset, spec: Any, views: tuple[View, ...], dtype: str) -> None:
    """All shards of an encoder, with a failed and a degraded row where the store has them."""
    writer.add_encoder(spec, views)
    for number, view in enumerate(views):
        for shard in range(writer.shards):
            if writer.is_done(spec.slug, shard, view):
                continue
            rows = writer.rows(shard)
            ids = [int(data.clips[row].id.split("/")[1].split()[0]) for row in rows]
            made = rows_of(spec, ids, dtype, number)
            failures = []
            for place, (row, clip) in enumerate(zip(rows, ids, strict=True)):
                code = {FAILED: 2, DEGRADED: 3}.get(clip, 1)
                made.status[place] = code
                if code != 1:
                    reason = "moov atom not found" if code == 2 else "3 frames lost"
                    name = data.clips[row].id
                    failures.append(Failure(row, name, code, reason, "", spec.slug, str(view)))
            writer.commit(shard, {spec.slug: made}, failures, view)


def fill(
    path: Any,
    data: Dataset | None = None,
    *,
    specs: tuple[Any, ...] = (VIDEO, IMAGE, PATCH),
    views: tuple[View, ...] = VIEWS,
    dtype: Any = "float16",
    shard: int = 3,
) -> Any:
    """A whole store; done shards of one that is there stay."""
    data = data or dataset()
    writer = StoreWriter(path, data, store_dtype=dtype, shard=shard)
    for spec in specs:
        add(writer, data, spec, views, dtype)
    values = np.random.default_rng(3).normal(size=(3, TEXT.channels)).astype(np.float32)
    for prompt, template in (("plain", "{}"), ("photo", "a photo of {}")):
        if not writer.has_text(TEXT, prompt, template):
            writer.add_text(TEXT, prompt, template, {"run": ["run"]}, values)
    return path


def unsealed(path: Path) -> Path:
    """The store as msq wrote them before there were digests of metadata."""
    for file in path.rglob("*.json"):
        document = json.loads(file.read_bytes())
        if file.name == "zarr.json":
            own = document["attributes"].get("msq", {})
            own.pop(KEY, None)
            if not own:
                document["attributes"].pop("msq", None)
            file.write_bytes(json.dumps(document, indent=2).encode())
        else:
            document.pop(RECORD_KEY)
            text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False)
            file.write_text(text + "\n")
    return path


def content(store: Any) -> dict[str, Any]:
    """Everything that a store says through its reader, as plain values."""
    said: dict[str, Any] = {
        "name": store.name, "task": store.task, "metric": store.metric,
        "classes": store.classes, "clips": store.clips, "splits": store.splits,
        "partitions": store.partitions, "groups": store.groups,
        "labels": store.labels().tolist(),
        "known": None if store.label_known() is None else store.label_known().tolist(),
        "failures": store.failures(),
    }  # fmt: skip
    for kind in ("video", "image"):
        for slug in store.encoders(kind):
            for view in store.views(slug):
                rows = store.ok_rows([slug], view)
                read = store.tokens if kind == "video" else store.image
                said[f"{slug} {view}"] = (
                    store.status(slug, view).tolist(),
                    read(rows, slug, view).float().numpy().tobytes(),
                    store.time(rows, slug, view).numpy().tobytes(),
                    store.spec(slug, kind).line(store.name),
                )
    for slug in store.encoders("text"):
        for prompt in store.prompts(slug):
            said[f"{slug} {prompt}"] = (
                store.text(slug, prompt).numpy().tobytes(),
                store.templates(slug, prompt),
                store.unknown_words(slug, prompt),
            )
    return said
