"""One worker's part in filling a store: prepare it, make shards, say what came of it all."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from msq.errors import UsageError
from msq.extract import store_schema as schema
from msq.extract.class_text import add_text, cut_names
from msq.extract.crew import Team
from msq.extract.datasets.dataset import Dataset
from msq.extract.datasets.survey import kept_items
from msq.extract.decode_pool import cores, intra_op_threads
from msq.extract.encoders import ImageEncoder, TextEncoder, VideoEncoder
from msq.extract.encoders.prompts import Prompt, described
from msq.extract.extract_result import ExtractResult, add_stages
from msq.extract.location import is_local, locate
from msq.extract.shard_builder import FrameEncoder, OnDegraded
from msq.extract.shard_claims import Member, join_store
from msq.extract.shard_plan import failed_rows
from msq.extract.shard_run import Progress, ShardRun
from msq.extract.store import open_store
from msq.extract.store_views import joined
from msq.extract.store_writer import StoreWriter
from msq.extract.views import View

GOODBYE = 30.0  # seconds that the first worker waits for the others to leave


class Extraction:
    """One worker at a store; see `pipeline.extract` for the arguments and what they raise.

    Use: `with job.joined() as member: job.fill(member)`, as often as there is something to fill,
    and `job.result(member)` within the last of them.
    """

    def __init__(
        self,
        dataset: Dataset,
        out: Path,
        *,
        video: VideoEncoder | None,
        image: ImageEncoder | None,
        text: TextEncoder | None,
        prompts: Mapping[str, Prompt] | None,
        store_dtype: schema.StoreDtype,
        shard: int,
        batch: int,
        workers: int | None,
        retry_failed: bool,
        on_degraded: OnDegraded,
        progress: Progress | None,
        label_known: NDArray[np.bool_] | None = None,
        views: Sequence[View],
        team: Team | None,
        image_frames: bool = False,
    ) -> None:
        _check_options(video, image, text, batch, workers, on_degraded)
        if image_frames and image is None:
            raise UsageError("image frames: expected an image encoder, found none")
        self._image_frames = image_frames
        self.out = locate(out)
        self.dataset = dataset
        self._encoders: dict[str, FrameEncoder] = {
            encoder.spec.slug: encoder for encoder in (video, image) if encoder is not None
        }
        if video is not None and image is not None and len(self._encoders) == 1:
            raise UsageError(f"the video and the image encoder are both named {video.spec.slug!r}")
        self._text = text
        self._prompts: Mapping[str, Prompt] = prompts or {"plain": "{}"}
        self._store_dtype = store_dtype
        self.shard = shard
        self._batch = batch
        self._team = team
        self._cores = max(1, cores() // (1 if team is None else team.local))
        self._workers = self._cores if workers is None else workers
        self._retry_failed = retry_failed
        self._on_degraded: OnDegraded = on_degraded
        self._progress = progress
        self._label_known = label_known
        self._views = joined((), views)
        self._started = time.perf_counter()
        self._run: ShardRun | None = None
        self._unknown: dict[str, list[str]] = {}
        self._made = 0

    def making(self) -> dict[str, Any]:
        """What all workers of a store must agree on, beside what its metadata says."""
        specs = [encoder.spec for encoder in self._encoders.values()]
        return {
            "clips": len(self.dataset.clips),
            "encoders": [spec.line(self.dataset.name) for spec in specs],
            "text encoder": None if self._text is None else self._text.spec.slug,
            "prompts": {name: described(prompt) for name, prompt in self._prompts.items()},
            "views": [str(view) for view in self._views],
            "image frames": self._image_frames,
            "store dtype": self._store_dtype,
            "shard": self.shard,
            "batch": self._batch,
            "on degraded": self._on_degraded,
            "retry failed": self._retry_failed,
        }

    @contextmanager
    def joined(self) -> Iterator[Member | None]:
        """Be one of the store's workers; the store is prepared when the first has come so far.

        Yields:
            This worker; None for a store behind a URL, which has one writer and no claims.

        Raises:
            UsageError: several workers for a store behind a URL.
        """
        if not is_local(self.out):
            if self._team is not None:
                raise UsageError(
                    f"{self.out}: expected a folder that all workers share, found a URL, where "
                    "they cannot tell each other who makes what; extract to a folder and "
                    "msq store convert it"
                )
            with self._threads():
                self._prepare(None, first=True)
                yield None
            return
        with (
            join_store(self.out, self.making(), alone=self._team is None) as member,
            self._threads(),
        ):
            with member.preparing() as first:
                self._prepare(member, first)
            yield member

    def _threads(self) -> Any:
        # Decode processes give way to these threads, so that neither keeps a core from the other.
        return intra_op_threads(self._cores)

    def _prepare(self, member: Member | None, first: bool) -> None:
        if self._run is not None:
            return
        writer = StoreWriter(
            self.out,
            self.dataset,
            store_dtype=self._store_dtype,
            shard=self.shard,
            label_known=self._label_known,
            sweep=first,
        )
        for encoder in self._encoders.values():
            frames = self._image_frames and encoder.spec.kind == "image"
            writer.add_encoder(encoder.spec, self._views, frames)
        cut = []
        if self._text is not None:
            self._unknown = add_text(writer, self._text, self._prompts)
            cut = cut_names(self.dataset.classes, self._text, self._prompts)
        run = ShardRun(
            writer,
            self._encoders,
            self._batch,
            self._workers,
            self._on_degraded,
            self._progress,
            self._views,
        )
        run.warnings += cut
        if not self._image_frames:
            run.warnings += [
                f"{slug}: the store holds its features of each frame, so they are made as well "
                "(as with --image-frames)"
                for slug in sorted(writer.image_frames)
            ]
        run.plan(self._retry_failed, member, first)
        self._run = run

    def missing(self) -> list[int]:
        """The shards that are to be made."""
        return self._prepared().missing()

    def fill(self, member: Member | None, only: Collection[int] | None = None) -> int:
        """Make what is missing; see `ShardRun.fill`."""
        start = 0.0 if self._team is None else self._team.start
        self._made = self._prepared().fill(member, only, start)
        return self._made

    def told(self) -> dict[str, Any]:
        """What this worker tells of what it has done: `failed, stages, warnings`."""
        return self._prepared().told()

    def stages(self) -> dict[str, Any]:
        """Rates of this worker's stages so far, as in the result."""
        return self._prepared().stages.summary(list(self._encoders))

    def result(self, member: Member | None) -> ExtractResult:
        """What the whole store has come to, and what all workers did; this one leaves the crew."""
        run = self._prepared()
        if member is not None and self._team is not None and self._team.rank == 0:
            _wait_for_others(member)
        shares = run.shares()
        made = self._made + sum(share["clips"] for share in shares)
        seconds = time.perf_counter() - self._started
        stages = self.stages()
        for share in shares:
            stages = add_stages(stages, share["stages"])
            run.warnings += [w for w in share["warnings"] if w not in run.warnings]
        result = _result(run, made, seconds, stages, self._unknown, shares)
        if member is not None:
            member.leave()
        return result

    def _prepared(self) -> ShardRun:
        assert self._run is not None, "joined() comes first"
        return self._run


def _wait_for_others(member: Member) -> None:
    """All is done; the last one out clears away the claims, and that should be the first."""
    end = time.monotonic() + GOODBYE
    while member.others() and time.monotonic() < end:
        time.sleep(0.05)


def _check_options(
    video: object,
    image: object,
    text: object,
    batch: int,
    workers: int | None,
    on_degraded: str,
) -> None:
    if video is None and image is None and text is None:
        raise UsageError(
            "nothing to extract: expected a video, an image or a text encoder, found none"
        )
    if batch < 1:
        raise UsageError(f"batch: expected at least 1 clip, found {batch}")
    if workers is not None and workers < 0:
        raise UsageError(f"workers: expected 0 or more processes, found {workers}")
    if on_degraded not in get_args(OnDegraded):
        raise UsageError(f"on degraded: expected keep, skip or fail, found {on_degraded!r}")


def _result(
    run: ShardRun,
    made: int,
    seconds: float,
    stages: dict[str, Any],
    unknown: dict[str, list[str]],
    shares: list[dict[str, Any]],
) -> ExtractResult:
    writer = run.writer
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
        stages=stages,
        failures=[entry for entry in recorded if entry["status"] == schema.UNDECODABLE],
        degraded=[entry for entry in recorded if entry["status"] == schema.DEGRADED],
        skipped_items=skipped,
        unknown_words=unknown,
        warnings=run.warnings,
        left_out=len(left_out),
        left_out_items=left_out,
        kept=len(data.kept),
        kept_items=[*kept_items(data)],
        views=views,
        shares=shares,
        smaller_batches={
            str(shard): min(found)
            for shard in range(writer.shards)
            if (found := [b.batch for b in writer.batches(shard) if b.encoder in run.encoders])
        },
    )
