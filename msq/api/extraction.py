"""`msq.extract_features`: stage one, a call."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, Unpack

from msq.errors import MsqWarning, UsageError
from msq.extract.cluster import leads
from msq.extract.extract_result import ExtractResult
from msq.extract.named_clips import named_clips
from msq.extract.request_values import request_of
from msq.protocol import Protocol
from msq.report import stage_one
from msq.run_settings import require_options

# True shows what the command shows on stderr; a function is called with each event instead.
Progress: TypeAlias = bool | Callable[[dict[str, Any]], None] | None
FilePath: TypeAlias = str | os.PathLike[str]


class ExtractKeywords(TypedDict, total=False):
    """The options of `msq extract`; fields of `msq.extract.extract_options.ExtractOptions`."""

    protocol: Protocol
    options: Mapping[str, object]
    classes: FilePath | None
    task: Literal["multilabel", "singlelabel"] | None
    policy: Literal["skip", "error", "keep"] | None
    limit: int | None
    video_encoder: str
    image_encoder: str
    text_encoder: str | None
    text_pooling: Literal["pooler", "mean", "cls"] | None
    prompts: str | Sequence[str] | None
    frames: int | None
    size: int | None
    short_side: int | None
    pooling: Literal["frame", "band", "patch"] | None
    clip_output: Literal["projected", "pooler"] | None
    sampling: Literal["uniform", "official"] | None
    resize: Literal["torch", "pil"]
    precision: Literal["fp32", "bf16", "fp16"]
    kernels: Literal["auto", "triton", "reference"]
    store_dtype: Literal["float16", "float32", "bfloat16"]
    device: str
    shard: int
    batch: int
    workers: int | None
    retry_failed: bool
    on_degraded: Literal["keep", "skip", "fail"]
    views: int
    test_views: str | None
    devices: str | None
    scheduler: str | None
    join: bool
    image_frames: bool


def extract_features(
    what: FilePath,
    out: FilePath | None = None,
    *,
    root: FilePath | None = None,
    progress: Progress = False,
    **settings: Unpack[ExtractKeywords],
) -> ExtractResult:
    """Run the encoders over the videos once and write a feature store: `msq extract`.

    A store that is there already is gone on with, and found again when it is done, as the command
    does. A script that is a file needs `if __name__ == "__main__":` around the call, since videos
    are decoded by processes of their own (`workers=0` decodes in this one); a notebook does not.

    Args:
        what: a manifest (CSV, JSONL), a folder with a folder per class, or, with `root`, the name
            of a dataset (`msq datasets list`).
        out: the store; `NAME.zarr` of the dataset's name where it is None.
        root: where the dataset lies.
        progress: True shows the bar of the command on stderr; a function is called with a dict
            after each shard (`done`, `total`, `failed` in clips, `stages` in frames per second, …)
            and nothing is shown.
        settings: the options of the command, by the same names and with the same defaults; what is
            None is not asked for.
            What: `options` (of the dataset), `classes`, `task`, `policy`, `limit` (clips).
            With what: `video_encoder`, `image_encoder`, `text_encoder`, `text_pooling`, `prompts`,
            `protocol`, `frames` (of a clip), `size` and `short_side` (pixels), `pooling`,
            `clip_output`, `sampling`, `resize`, `precision`, `kernels`, `views`, `test_views`,
            `image_frames`, `store_dtype`.
            How: `device`, `devices`, `scheduler`, `join`, `batch` and `shard` (clips), `workers`
            (processes), `retry_failed`, `on_degraded`.

    Returns:
        What `msq extract --json` prints (`to_dict()`): `store`, `clips`, `done`, `failed`,
        `failures` with their reasons, `seconds`, frames per second of each stage, … A video that
        cannot be decoded is no error: it is a failure, of which a `MsqWarning` tells; `done` is 0
        where none could.

    Raises:
        UsageError: an option or a path that cannot be used, or settings that contradict the
            protocol.
        DatasetError: annotations that cannot be read.
        WeightsError: weights of an encoder cannot be found, read or do not fit.
        SpecMismatch: a store of another making is in the way; the message holds the difference.
        MsqError: otherwise; decode processes cannot be started.
        KeyboardInterrupt: the store is consistent; the same call goes on.
    """
    refuse_worker_import("extract_features")
    require_options(settings, ExtractKeywords.__annotations__, "extract_features")
    place = None if root is None else Path(root)
    hint = "msq.train_head trains a head on it"
    clips = named_clips(os.fspath(what), place, settings.get("options") or {}, store_hint=hint)
    request = request_of({**settings, **clips, "out": out}, "extract_features")
    if progress is True:
        result = stage_one.run(request, quiet=not leads())
    else:
        result = request.run(progress or None)
    lines = stage_one.remarks(result.to_dict())
    if lines and leads():
        warnings.warn("\n".join((str(result.store), *lines)), MsqWarning, stacklevel=2)
    return result


def refuse_worker_import(caller: str) -> None:
    """Refuse a call by a worker process that imports the script of its parent.

    Raises:
        UsageError: it is one: the script has no main guard.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing asks
        raise UsageError(
            f"{caller}: called while a worker process imports this script; put the call under "
            "`if __name__ == '__main__':`, or do without processes (workers=0 of "
            "extract_features, workers=1 of zero_shot)"
        )
