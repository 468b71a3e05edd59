"""What stage one can be asked for, and its defaults: those of `msq extract` and of Python.

It imports nothing heavy: the command line takes its defaults from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from msq.errors import UsageError
from msq.protocol import Protocol

EMBEDDED = "embedded"
BY_PROTOCOL: Any = None  # until `ExtractRequest` has put the protocol's own value in its place
PATHS = ("manifest", "root", "out", "classes")
# The least that a number may be.
LEAST = {
    "frames": 1, "size": 1, "short_side": 1, "limit": 1, "batch": 1, "shard": 1, "workers": 0,
    "views": 0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """What to extract, with what, to where. See `msq extract --help` for each field.

    A setting that is None is the protocol's own, where it has one; `task` and `policy` are the
    dataset's own then, `multilabel` and `skip` for a manifest.
    """

    protocol: Protocol = "paper"
    manifest: Path | None = None
    dataset: str | None = None
    root: Path | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    out: Path | None = None
    classes: Path | None = None
    task: Literal["multilabel", "singlelabel"] | None = None
    policy: Literal["skip", "error", "keep"] | None = None
    limit: int | None = None
    video_encoder: str = EMBEDDED
    image_encoder: str = EMBEDDED
    text_encoder: str | None = None
    text_pooling: Literal["pooler", "mean", "cls"] | None = None
    prompts: Sequence[str] = BY_PROTOCOL
    frames: int | None = None
    size: int | None = None
    short_side: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    pooling: Literal["frame", "band", "patch"] = BY_PROTOCOL
    clip_output: Literal["projected", "pooler"] = BY_PROTOCOL
    sampling: Literal["uniform", "official"] = BY_PROTOCOL
    resize: Literal["torch", "pil"] = "torch"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    kernels: Literal["auto", "triton", "reference"] = "auto"
    store_dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    device: str = "auto"
    shard: int = 64
    batch: int = 8
    workers: int | None = None
    retry_failed: bool = False
    on_degraded: Literal["keep", "skip", "fail"] = "keep"
    views: int = 0
    test_views: str | None = None
    devices: str | None = None
    scheduler: str | None = None
    join: bool = False
    image_frames: bool = False


def require_least(options: ExtractOptions) -> None:
    """Refuse numbers that no extraction can have.

    Raises:
        UsageError: one is below its `LEAST`; the message names it.
    """
    for name, least in LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(
                f"--{name.replace('_', '-')}: expected at least {least}, found {value}"
            )
