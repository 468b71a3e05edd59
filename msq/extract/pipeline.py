"""Stage one: decode beside encode beside write, shard by shard, resumable at any moment.

Decode worker processes run ahead of the encoders, across shard borders; batches are formed inside
a shard at fixed places, so that a shard comes out the same whenever it is made. The same machine
type, number of threads and precision give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msq.extract import store_schema as schema
from msq.extract.crew import Team
from msq.extract.datasets.dataset import Dataset
from msq.extract.encoders import ImageEncoder, TextEncoder, VideoEncoder
from msq.extract.encoders.prompts import Prompt
from msq.extract.extract_result import ExtractResult
from msq.extract.extraction import Extraction
from msq.extract.shard_builder import OnDegraded
from msq.extract.shard_run import Progress
from msq.extract.views import CLEAN, View

__all__ = ["ExtractResult", "Progress", "Team", "extract"]


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
    team: Team | None = None,
    image_frames: bool = False,
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
        workers: decode processes; None for as many as there are cores, 0 to decode in this
            process. They run at a lower priority, so that the encoders have the cores they can
            use.
        retry_failed: decode failed clips again and redo the shards where that changes anything.
        on_degraded: `keep` (status 3), `skip` (status 2) or `fail` for clips that decode in part.
        progress: called every few clips with `stage, done, total, failed, clips_per_second,
            stages, seconds_left, smaller_batch` (None unless memory was short); `stages` maps each
            stage to its frames per second, `bottleneck` to its name.
        label_known: `[clips, classes]`, False where a label is unknown.
        views: which looks at each clip; the clean one is always among them. Views that the store
            has and that are not asked for stay as they are.
        team: this worker's place among others that fill the store; None refuses others.
        image_frames: store the image encoder's features of each frame beside their mean. A store
            that has them goes on with them whether they are asked for or not; one that has rows
            of the encoder without them is refused.

    Raises:
        SpecMismatch: the store was made in another way; the message lists the difference.
        StoreError: another process writes the store, or `out` is not a store. With a `team`:
            another process writes it for another request.
        UsageError: an option that cannot be.
        VideoError: a degraded clip under `on_degraded="fail"`.
        KeyboardInterrupt: after the shard under way was dropped; the store is consistent.
    """
    job = Extraction(
        dataset,
        out,
        video=video,
        image=image,
        text=text,
        prompts=prompts,
        store_dtype=store_dtype,
        shard=shard,
        batch=batch,
        workers=workers,
        retry_failed=retry_failed,
        on_degraded=on_degraded,
        progress=progress,
        label_known=label_known,
        views=views,
        team=team,
        image_frames=image_frames,
    )
    with job.joined() as member:
        job.fill(member)
        return job.result(member)
