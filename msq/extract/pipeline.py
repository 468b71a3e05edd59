"""Stage one: decode beside encode beside write, shard by shard, resumable at any moment.

Decode worker processes run ahead of the encoders, across shard borders; batches are formed inside
a shard at fixed places, so that a shard comes out the same whenever it is made. The same machine
type, number of threads and precision give the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from msq.errors import UsageError
from msq.extract import store_schema as schema
from msq.extract.claims import claim_store
from msq.extract.datasets.dataset import Dataset
from msq.extract.decode_pool import (
    Decoded,
    DecodeTask,
    Picture,
    cores,
    decode_in_order,
    intra_op_threads,
)
from msq.extract.encoders import ImageEncoder, TextEncoder, VideoEncoder
from msq.extract.shard_builder import FrameEncoder, OnDegraded, ShardBuilder
from msq.extract.store import open_store
from msq.extract.store_writer import StoreWriter

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class ExtractResult:
    """What a run of `extract` came to; earlier runs on the same store are included in the counts.

    Attributes:
        store: path of the store.
        clips: rows, `done + failed`.
        done: rows that can be read for every encoder of the request (status 1 or 3).
        failed: rows with status 2 for at least one of them.
        skipped: items that the dataset left out.
        seconds: duration of this run.
        clips_per_second: rows made in this run per second.
        stages: frames per second of `decode`, of `encode` by encoder, of `write` (None where a
            stage had nothing to do), and `bottleneck`, the stage that took longest.
        failures: the failed rows: `row, clip, status, reason, message, encoders`.
        degraded: likewise, rows that decoded only in part and were kept.
        skipped_items: `item, reason` of each skipped item.
        unknown_words: class -> words that the text encoder does not know.
        warnings: what else the user should know, one line each.
    """

    store: str
    clips: int
    done: int
    failed: int
    skipped: int
    seconds: float
    clips_per_second: float
    stages: dict[str, Any]
    failures: list[dict[str, Any]]
    degraded: list[dict[str, Any]]
    skipped_items: list[dict[str, str]]
    unknown_words: dict[str, list[str]]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return asdict(self)


@dataclass
class _Stages:
    """Frames and seconds of each stage."""

    workers: int
    frames: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, frames: int, seconds: float) -> None:
        self.frames[stage] = self.frames.get(stage, 0) + frames
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def rate(self, stage: str) -> float | None:
        seconds = self._wall(stage)
        return self.frames[stage] / seconds if seconds > 0 else None

    def rates(self) -> dict[str, float | str | None]:
        """Frames per second of each stage so far, and the `bottleneck`."""
        known = [stage for stage in self.seconds if self._wall(stage) > 0]
        slowest = max(known, key=self._wall) if known else None
        return {**{stage: self.rate(stage) for stage in known}, "bottleneck": slowest}

    def summary(self, encoders: Sequence[str]) -> dict[str, Any]:
        """The same as `ExtractResult.stages` holds it."""
        rates = self.rates()
        return {
            "decode": rates.get("decode"),
            "encode": {slug: rates.get(f"encode {slug}") for slug in encoders},
            "write": rates.get("write"),
            "bottleneck": rates["bottleneck"],
        }

    def _wall(self, stage: str) -> float:
        seconds = self.seconds.get(stage, 0.0)
        return seconds / max(1, self.workers) if stage == "decode" else seconds


def extract(
    dataset: Dataset,
    out: Path,
    *,
    video: VideoEncoder | None,
    image: ImageEncoder | None,
    text: TextEncoder | None = None,
    prompts: Mapping[str, str] | None = None,
    store_dtype: schema.StoreDtype = "float16",
    shard: int = 64,
    batch: int = 8,
    workers: int | None = None,
    retry_failed: bool = False,
    on_degraded: OnDegraded = "keep",
    progress: Progress | None = None,
    label_known: NDArray[np.bool_] | None = None,
) -> ExtractResult:
    """Fill a feature store with the features of a dataset; what is there already is kept.

    Args:
        dataset: clips and classes.
        out: the store; created, or resumed where it was left.
        video: encoder of tokens, or None.
        image: encoder of frames, or None; its features are averaged over frames.
        text: encoder of class names, or None.
        prompts: name -> template with `{}` for the class name; `{"plain": "{}"}` by default.
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
            writer.add_encoder(encoder.spec)
        unknown = {} if text is None else _add_text(writer, text, prompts or {"plain": "{}"})
        run = _Run(writer, encoders, batch, workers, on_degraded, progress)
        made = run.fill(retry_failed)
        seconds = time.perf_counter() - started
        return _result(writer, run, made, seconds, unknown)


class _Run:
    """One run over the pending shards of a store."""

    def __init__(
        self,
        writer: StoreWriter,
        encoders: Mapping[str, FrameEncoder],
        batch: int,
        workers: int,
        on_degraded: OnDegraded,
        progress: Progress | None,
    ) -> None:
        self.writer = writer
        self.encoders = encoders
        self.warnings: list[str] = []
        self._batch = batch
        self._workers = workers
        self._on_degraded = on_degraded
        self._progress = progress
        self.stages = _Stages(workers)
        self._started = time.perf_counter()
        self._made = 0
        self._done = 0
        self._failed = 0

    def fill(self, retry_failed: bool) -> int:
        """Make what is missing; returns the number of rows that were made."""
        pending = self._pending()
        if retry_failed:
            pending |= self._recoverable(pending)
        rows = {shard: self.writer.rows(shard) for shard in sorted(pending)}
        made = sum(len(r) for r in rows.values())
        for shard in range(self.writer.shards):
            if shard not in pending:
                self._count(shard)
        self._report()
        if not made:
            return 0
        tasks = (
            task
            for shard, members in rows.items()
            for task in self._tasks(members, [self.encoders[slug] for slug in pending[shard]])
        )
        with closing(decode_in_order(tasks, min(self._workers, made))) as stream:
            for shard in rows:
                self._make(shard, pending[shard], stream)
        return made

    def _pending(self) -> dict[int, list[str]]:
        """Shard -> encoders for which it is not done."""
        pending = {}
        for shard in range(self.writer.shards):
            slugs = [slug for slug in self.encoders if not self.writer.is_done(slug, shard)]
            if slugs:
                pending[shard] = slugs
        return pending

    def _recoverable(self, pending: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
        """Done shards with failed rows that would come out otherwise today -> encoders."""
        failed: dict[int, dict[str, tuple[str, str]]] = {}
        shards: dict[int, list[str]] = {}
        for shard in range(self.writer.shards):
            for failure in self.writer.failures(shard):
                todo = failure.encoder in self.encoders and failure.status == schema.UNDECODABLE
                if todo and failure.encoder not in pending.get(shard, ()):
                    recorded = (failure.reason, failure.message)
                    failed.setdefault(failure.row, {})[failure.encoder] = recorded
        everything = list(self.encoders.values())
        tasks = [task for row in sorted(failed) for task in self._tasks([row], everything)]
        if not tasks:
            return {}
        with closing(decode_in_order(tasks, min(self._workers, len(tasks)))) as stream:
            for result in stream:
                shard = result.row // self.writer.shard
                for slug, recorded in failed[result.row].items():
                    if (result.reason, result.message) != recorded:
                        slugs = shards.setdefault(shard, list(pending.get(shard, ())))
                        slugs += [slug] if slug not in slugs else []
        return shards

    def _tasks(self, rows: Sequence[int], encoders: Sequence[FrameEncoder]) -> Iterator[DecodeTask]:
        pictures = tuple(dict.fromkeys(Picture.of(encoder.spec) for encoder in encoders))
        for row in rows:
            clip = self.writer.dataset.clips[row]
            yield DecodeTask(row, clip.path, clip.start, clip.end, pictures, clip.fps)

    def _make(self, shard: int, slugs: Sequence[str], stream: Iterator[Decoded]) -> None:
        """One shard: decode, encode, commit."""
        rows = self.writer.rows(shard)
        builder = ShardBuilder(
            self.writer.dataset.clips[rows.start : rows.stop],
            rows.start,
            {slug: self.encoders[slug] for slug in slugs},
            self.writer.store_dtype,
            self._on_degraded,
        )
        before = self._done, self._failed
        for first in range(rows.start, rows.stop, self._batch):
            window = [next(stream) for _ in range(first, min(first + self._batch, rows.stop))]
            for result in window:
                self.stages.add("decode", result.decoded, result.seconds)
            frames = sum(result.reason is None for result in window)
            for slug, seconds in builder.add(window).items():
                count = frames * self.encoders[slug].spec.frames
                self.stages.add(f"encode {slug}", count, seconds)
            self._done += frames
            self._failed += len(window) - frames
            self._made += len(window)
            self._report()
        self._commit(shard, builder)
        self._done, self._failed = before
        self._count(shard)
        self._report()

    def _commit(self, shard: int, builder: ShardBuilder) -> None:
        started = time.perf_counter()
        rows = dict(builder.rows)
        for slug in builder.rows:
            if lost := self._lost(slug, shard, rows[slug].status):
                del rows[slug]
                shown = ", ".join(repr(self.writer.dataset.clips[row].id) for row in lost[:5])
                self.warnings.append(
                    f"shard {shard} of {slug} keeps its earlier features: {len(lost)} clips that "
                    f"were extracted before cannot be now ({shown})"
                )
        failures = [failure for failure in builder.failures if failure.encoder in rows]
        self.writer.commit(shard, rows, failures)
        frames = sum(
            len(data.status) * self.encoders[slug].spec.frames for slug, data in rows.items()
        )
        self.stages.add("write", frames, time.perf_counter() - started)

    def _lost(self, slug: str, shard: int, status: NDArray[np.uint8]) -> list[int]:
        """Rows that are whole in the store now and would not be after the commit."""
        before = self.writer.status(slug, shard)
        if before is None or not self.writer.is_whole(slug, shard, before):
            return []
        readable = (schema.OK, schema.DEGRADED)
        lost = np.isin(before, readable) & ~np.isin(status, readable)
        return [self.writer.rows(shard)[int(place)] for place in np.flatnonzero(lost)]

    def _count(self, shard: int) -> None:
        failed = failed_rows(self.writer, self.encoders, shard)
        self._failed += int(failed.sum())
        self._done += int((~failed).sum())

    def _report(self) -> None:
        if self._progress is None:
            return
        seconds = time.perf_counter() - self._started
        self._progress(
            {
                "stage": "extract",
                "done": self._done + self._failed,
                "total": len(self.writer.dataset.clips),
                "failed": self._failed,
                "clips_per_second": self._made / seconds if seconds > 0 else 0.0,
                "stages": self.stages.rates(),
            }
        )


def failed_rows(writer: StoreWriter, encoders: Mapping[str, Any], shard: int) -> NDArray[np.bool_]:
    """Rows `[n]` of a shard that cannot be read for at least one of the encoders."""
    failed = np.zeros(len(writer.rows(shard)), dtype=np.bool_)
    for slug in encoders:
        status = writer.status(slug, shard)
        readable = (schema.OK, schema.DEGRADED)
        failed |= True if status is None else ~np.isin(status, readable)
    return failed


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


def _add_text(
    writer: StoreWriter, text: TextEncoder, prompts: Mapping[str, str]
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
    run: _Run,
    made: int,
    seconds: float,
    unknown: dict[str, list[str]],
) -> ExtractResult:
    failed = sum(
        int(failed_rows(writer, run.encoders, shard).sum()) for shard in range(writer.shards)
    )
    recorded = [
        entry
        for entry in open_store(writer.path).failures()
        if any(slug in run.encoders for slug in entry["encoders"])
    ]
    skipped = [{"item": item, "reason": reason} for item, reason in writer.dataset.skipped]
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
    )
