"""Some rows of a store extracted again, and compared with what is stored.

A clip's features depend in their last bits on the clips of its batch, so the whole batch is made
again: the same places in the same shard. On the same machine type, threads and precision the rows
then come out bit by bit; elsewhere within `tolerance`.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from msq.errors import SpecMismatch
from msq.extract import store_schema as schema
from msq.extract.datasets.dataset import Dataset
from msq.extract.encoders import ImageEncoder, VideoEncoder
from msq.extract.encoders.spec import IMPORTED, EncoderSpec
from msq.extract.pipeline import extract
from msq.extract.store import FeatureStore, open_store
from msq.extract.store_difference import root_difference
from msq.extract.store_problems import Problem, Verification
from msq.extract.store_records import read_batches
from msq.extract.views import View

_EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_FORWARD = {"fp32": 2.0**-13, "fp16": 2.0**-7, "bf16": 2.0**-5}
Encoders = Mapping[str, VideoEncoder | ImageEncoder]


def tolerance(spec: EncoderSpec, store_dtype: str) -> float:
    """Largest difference that is taken for another machine's, as a part of the row's largest value.

    Two steps of the stored number type, and what another order of sums makes of the forward pass
    in its precision.
    """
    return 2 * _EPSILON[store_dtype] + _FORWARD[spec.precision]


def check_sample(
    store: FeatureStore,
    dataset: Dataset,
    encoders: Encoders,
    count: int,
    found: Verification,
    *,
    batch: int = 8,
    seed: int = 0,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Extract `count` rows again, chosen by `seed` over all encoders and views.

    Args:
        store: where they are.
        dataset: the clips with their files; the same as the store's.
        encoders: name -> encoder, of those that can be loaded; of the others nothing is drawn.
        count: how many; all rows where there are fewer.
        found: gets the problems, notes and counts.
        batch: clips of one forward pass when the store was made; where less is recorded of a
            shard, that is taken.
        seed: of the choice.
        progress: called with `stage, done, total, failed`.

    Raises:
        SpecMismatch: the dataset is another one.
    """
    lines = root_difference(schema.root_attributes(dataset), store.attributes)
    if lines:
        raise SpecMismatch(f"{store.path}: is not of this dataset:\n  " + "\n  ".join(lines))
    drawn = [
        (slug, view, row)
        for slug in encoders
        for view in store.views(slug)
        for row in store.ok_rows([slug], view).tolist()
    ]
    chosen = sorted(random.Random(seed).sample(range(len(drawn)), min(count, len(drawn))))
    for place, number in enumerate(chosen):
        slug, view, row = drawn[number]
        _check_row(store, dataset, encoders[slug], slug, view, row, batch, found)
        found.sampled += 1
        if progress is not None:
            progress({"stage": "sample", "done": place + 1, "total": len(chosen), "failed": 0})
    if found.sampled > found.equal:
        within = found.sampled - found.equal - sum(p.kind == "sample" for p in found.problems)
        found.notes.append(
            f"{found.sampled} rows extracted again: {found.equal} bit by bit the same, {within} "
            "within the tolerance for another machine, thread count or batch size"
        )


def imported(store: FeatureStore, slug: str, kind: str) -> bool:
    """Whether features were computed elsewhere, so that nothing here makes them again."""
    return store.spec(slug, kind).weights.startswith(IMPORTED)


def _check_row(
    store: FeatureStore,
    dataset: Dataset,
    encoder: VideoEncoder | ImageEncoder,
    slug: str,
    view: View,
    row: int,
    batch: int,
    found: Verification,
) -> None:
    size, kind = store.shard(slug), encoder.spec.kind
    begin = row - row % size
    record = store.path / schema.FAILURES / f"{row // size:05d}.json"
    recorded = read_batches(record.read_bytes()) if record.exists() else []
    smaller = [b.batch for b in recorded if b.encoder == slug and b.view == str(view)]
    batch = min([batch, *smaller])
    first = begin + (row - begin) // batch * batch
    stop = min(first + batch, begin + size, len(dataset.clips))
    partitions = {name: splits[first:stop] for name, splits in dataset.partitions.items()}
    window = replace(dataset, clips=dataset.clips[first:stop], partitions=partitions)
    dtype: Any = store.store_dtype(slug)
    frames = store.has_image_frames(slug)
    with tempfile.TemporaryDirectory(prefix="msq-verify-") as folder:
        out = Path(folder) / "again.zarr"
        extract(
            window,
            out,
            video=encoder if kind == "video" else None,  # type: ignore[arg-type]
            image=encoder if kind == "image" else None,  # type: ignore[arg-type]
            store_dtype=dtype,
            shard=batch,
            batch=batch,
            workers=0,
            views=[view],
            image_frames=frames,
        )
        again = open_store(out)
        made = encoder.spec.slug
        reasons = {f["row"]: f["reason"] for f in again.failures()}
        here = int(again.status(made, view)[row - first])
        values = None
        if here in (schema.OK, schema.DEGRADED):
            values = _values(again, kind, frames, row - first, made, view)
    equal = True
    number = list(store.views(slug)).index(view)
    for group, stored in _values(store, kind, frames, row, slug, view).items():
        file = store.path / group / slug
        said = f"{file}: clip {store.clips[row]!r}, view {view}"
        if values is None:
            message = f"{said}: cannot be extracted again: {reasons.get(row - first, 'no reason')}"
        elif values[group].equal(stored):
            continue
        else:
            message = _difference(said, stored, values[group], tolerance(encoder.spec, dtype))
        equal = False
        if message:
            clips = (store.clips[row],)
            inside = str(file.relative_to(store.path))
            found.problems.append(
                Problem("sample", inside, message, clips, slug, number, row // size)
            )
            break
    found.equal += equal


def _values(
    store: FeatureStore, kind: str, frames: bool, row: int, slug: str, view: View
) -> dict[str, torch.Tensor]:
    """Group -> features of one row: those of the encoder, and of each frame where they are."""
    values = {
        schema.FEATURE_GROUP[kind]: (store.tokens if kind == "video" else store.image)(
            [row], slug, view
        )
    }
    return values | ({schema.IMAGE_FRAMES: store.image_frames([row], slug, view)} if frames else {})


def _difference(said: str, stored: torch.Tensor, again: torch.Tensor, allowed: float) -> str:
    """Why a row is not what it should be; nothing where another machine may have made it."""
    scale = float(stored.to(torch.float64).abs().max())
    off = float((again.to(torch.float64) - stored.to(torch.float64)).abs().max())
    if off <= allowed * scale:
        return ""
    if not scale:
        return f"{said}: stored as zeros, extracted again it is not"
    return (
        f"{said}: extracted again it differs by {off:.4g}, which is {off / scale:.2g} of its "
        f"largest value; expected at most {allowed:.2g}"
    )
