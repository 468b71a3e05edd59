"""Stage one: decode beside encode beside write, shard by shard, resumable at any moment.

Decode worker processes run ahead of the encoders, across shard borders; batches are formed inside
a shard at fixed places, so that a shard comes out the same whenever it is made. The same machine
type, number of threads and precision give the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from msq.errors import UsageError
from msq.extract import store_schema as schema
from msq.extract.claims import claim_store
from msq.extract.datasets.dataset import Dataset
from msq.extract.decode_pool import cores, intra_op_threads
from msq.extract.encoders import ImageEncoder, TextEncoder, VideoEncoder
from msq.extract.encoders.prompts import Prompt, described
from msq.extract.extract_result import ExtractResult
from msq.extract.shard_builder import FrameEncoder, OnDegraded
from msq.extract.shard_run import Progress, ShardRun, failed_rows
from msq.extract.store import open_store
from msq.extract.store_views import joined
from msq.extract.store_writer import StoreWriter
from msq.extract.views import CLEAN, View

__all__ = ["ExtractResult", "Progress", "extract"]


def extract(
    dataset: Dataset,
    out: Path,
    *,
    video: VideoEncoder | None,
    image: ImageEncoder | None,
    text: TextEncoder | None = None,
    prompts: Mapping[str, Prompt] | None = None,
    store_dtype: schema.StoreDtype = "float16",
    shard: int = 64,
    batch: int = 8,
    workers: int | None = None,
    retry_failed: bool = False,
    on_degraded: OnDegraded = "keep",
    progress: Progress | None = None,
    label_known: NDArray[np.bool_] | None = None,
    views: Sequence[View] = (CLEAN,),
) -> ExtractResult:
    """Fill a feature store with the features of a dataset; what is there already is kept.

    Args:
        dataset: clips and classes.
        out: the store; created, or resumed where it was left.
        video: encoder of tokens, or None.
        image: encoder of frames, or None; its features are averaged over frames.
        text: encoder of class names, or None.
        prompts: name -> template with `{}` for the class name, or several templates, whose
            vectors are averaged; `{"plain": "{}"}` by default.
        store_dtype: of the features; a clip whose features overflow it counts as failed.
        shard: rows of one unit of work and resume.
        batch: clips of one forward pass.
        workers: decode processes; None for one less than there are cores, 0 to decode in this
            process.
        retry_failed: decode failed clips again and redo the shards where that changes anything.
        on_degraded: `keep` (status 3), `skip` (status 2) or `fail` for clips that decode in part.
        progress: called every few clips with `stage, done, total, failed, clips_per_second,
            stages`; the last maps each stage to its frames per second, `bottleneck` to its name.
        label_known: `[clips, classes]`, False where a label is unknown.
        views: which looks at each clip; the clean one is always among them. Views that the store
            has and that are not asked for stay as they are.

    Raises:
        SpecMismatch: the store was made in another way; the message lists the difference.
        StoreError: another process writes the store, or `out` is not a store.
        UsageError: an option that cannot be.
        VideoError: a degraded clip under `on_degraded="fail"`.
        KeyboardInterrupt: after the shard under way was dropped; the store is consistent.
    """
    _check_options(video, image, batch, workers, on_degraded)
    out = Path(out)
    started = time.perf_counter()
    encoders: dict[str, FrameEncoder] = {
        encoder.spec.slug: encoder for encoder in (video, image) if encoder is not None
    }
    if video is not None and image is not None and len(encoders) == 1:
        raise UsageError(f"the video and the image encoder are both named {video.spec.slug!r}")
    if workers is None:
        workers = max(1, cores() - 1)
    with claim_store(out), intra_op_threads(max(1, cores() - workers)):
        writer = StoreWriter(
            out, dataset, store_dtype=store_dtype, shard=shard, label_known=label_known
        )
        for encoder in encoders.values():
            writer.add_encoder(encoder.spec, views)
        chosen = prompts or {"plain": "{}"}
        unknown = {} if text is None else _add_text(writer, text, chosen)
        run = ShardRun(writer, encoders, batch, workers, on_degraded, progress, joined((), views))
        run.warnings += [] if text is None else _cut_names(dataset.classes, text, chosen)
        made = run.fill(retry_failed)
        seconds = time.perf_counter() - started
        return _result(writer, run, made, seconds, unknown)


def _check_options(
    video: object, image: object, batch: int, workers: int | None, on_degraded: str
) -> None:
    if video is None and image is None:
        raise UsageError("nothing to extract: expected a video or an image encoder, found neither")
    if batch < 1:
        raise UsageError(f"batch: expected at least 1 clip, found {batch}")
    if workers is not None and workers < 0:
        raise UsageError(f"workers: expected 0 or more processes, found {workers}")
    if on_degraded not in get_args(OnDegraded):
        raise UsageError(f"on degraded: expected keep, skip or fail, found {on_degraded!r}")


def _cut_names(
    classes: Sequence[str], text: TextEncoder, prompts: Mapping[str, Prompt]
) -> list[str]:
    """A line for each prompt with which class names do not fit into the text encoder's context."""
    lines = []
    for name, prompt in prompts.items():
        if cut := text.too_long(classes, prompt):
            shown = ", ".join(repr(label[:60]) for label in cut[:3])
            lines.append(
                f"{len(cut)} of {len(classes)} class names with prompt {name!r} "
                f"({described(prompt)}) are longer than {text.spec.slug} can read, and their ends "
                f"play no part: {shown}{', …' if len(cut) > 3 else ''}"
            )
    return lines


def _add_text(
    writer: StoreWriter, text: TextEncoder, prompts: Mapping[str, Prompt]
) -> dict[str, list[str]]:
    """Class embeddings of each prompt where they are missing; returns unknown words by class."""
    classes = list(writer.dataset.classes)
    unknown = {name: words for name in classes if (words := text.unknown_words(name))}
    for prompt, template in prompts.items():
        if not writer.has_text(text.spec, prompt, template):
            values = text(classes, prompt=template).float().cpu().numpy()
            writer.add_text(text.spec, prompt, template, unknown, values)
    return unknown


def _result(
    writer: StoreWriter,
    run: ShardRun,
    made: int,
    seconds: float,
    unknown: dict[str, list[str]],
) -> ExtractResult:
    failed = sum(int(failed_rows(writer, run.parts, shard).sum()) for shard in range(writer.shards))
    views = [str(view) for view in run.views]
    recorded = [
        entry
        for entry in open_store(writer.path).failures()
        if any(slug in run.encoders for slug in entry["encoders"])
        and any(view in views for view in entry.get("views", ["clean"]))
    ]
    data = writer.dataset
    skipped = [{"item": item, "reason": reason} for item, reason in data.unusable]
    left_out = [{"item": item, "reason": reason} for item, reason in data.left_out]
    clips = len(writer.dataset.clips)
    return ExtractResult(
        store=str(writer.path),
        clips=clips,
        done=clips - failed,
        failed=failed,
        skipped=len(skipped),
        seconds=seconds,
        clips_per_second=made / seconds if seconds > 0 else 0.0,
        stages=run.stages.summary(list(run.encoders)),
        failures=[entry for entry in recorded if entry["status"] == schema.UNDECODABLE],
        degraded=[entry for entry in recorded if entry["status"] == schema.DEGRADED],
        skipped_items=skipped,
        unknown_words=unknown,
        warnings=run.warnings,
        left_out=len(left_out),
        left_out_items=left_out,
        views=views,
    )
