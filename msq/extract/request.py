"""One request of stage one, as typed on the command line: dataset + encoders -> feature store."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msq.errors import DatasetError, UsageError
from msq.extract.datasets import Dataset, read_folder, read_manifest
from msq.extract.datasets.registry import find_adapter, read_dataset

if TYPE_CHECKING:
    from msq.extract.encoders import ImageEncoder, TextEncoder, VideoEncoder
    from msq.extract.pipeline import ExtractResult

EMBEDDED = "embedded"
NONE = "none"


@dataclass(frozen=True, kw_only=True)
class ExtractRequest:
    """What to extract, with what, to where. See `msq extract --help` for each field."""

    manifest: Path | None = None
    dataset: str | None = None
    root: Path | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    out: Path | None = None
    classes: Path | None = None
    task: Literal["multilabel", "singlelabel"] = "multilabel"
    policy: Literal["skip", "error"] = "skip"
    limit: int | None = None
    video_encoder: str = EMBEDDED
    image_encoder: str = EMBEDDED
    text_encoder: str | None = None
    prompts: Sequence[str] = ("{}",)
    frames: int | None = None
    size: int | None = None
    pooling: Literal["frame", "band", "patch"] = "frame"
    clip_output: Literal["projected", "pooler"] = "projected"
    sampling: Literal["uniform", "official"] = "uniform"
    resize: Literal["torch", "pil"] = "torch"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    store_dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    device: str = "auto"
    shard: int = 64
    batch: int = 8
    workers: int | None = None
    retry_failed: bool = False
    on_degraded: Literal["keep", "skip", "fail"] = "keep"

    def read_dataset(self) -> Dataset:
        """The dataset named by `manifest`, or by `dataset`, `root` and `options`.

        Raises:
            UsageError: both or neither are given, the dataset or an option is unknown, or
                `classes` or `task` is set for a dataset that brings its own.
            DatasetError: annotations that cannot be read.
        """
        if (self.manifest is None) == (self.dataset is None):
            raise UsageError("expected --manifest FILE, or --dataset NAME with --root DIR")
        if self.dataset is not None:
            data = self._read_named(self.dataset)
        elif self.options or self.root is not None:
            raise UsageError("--root and --option go with --dataset NAME, not with --manifest")
        elif self.manifest is not None and self.manifest.is_dir():
            data = read_folder(self.manifest)
        elif self.manifest is not None:
            data = read_manifest(
                self.manifest, classes=self.classes, task=self.task, policy=self.policy
            )
        return data if self.limit is None else data.limited(self.limit)

    def _read_named(self, name: str) -> Dataset:
        """`--classes`, `--task` and `--policy` reach the datasets that have such an option."""
        adapter = find_adapter(name)
        options = dict(self.options)
        given = {
            "classes": None if self.classes is None else str(self.classes),
            "task": self.task if self.task != "multilabel" else None,
            "policy": self.policy if self.policy != "skip" else None,
        }
        for key, value in given.items():
            if value is not None and key in adapter.options:
                options.setdefault(key, value)
        data = read_dataset(adapter.name, self.root, options)
        if self.classes is not None and "classes" not in adapter.options:
            raise UsageError(f"--classes: dataset {adapter.name} has its own class order")
        if given["task"] not in (None, data.task):
            raise UsageError(f"--task {self.task}: dataset {adapter.name} is {data.task}")
        if self.policy == "error" and data.skipped:
            item, reason = data.skipped[0]
            raise DatasetError(
                f"dataset {adapter.name}, {item}: {reason} (--policy error; {len(data.skipped)} "
                "such items)"
            )
        return data

    def load_encoders(
        self,
    ) -> tuple[VideoEncoder | None, ImageEncoder | None, TextEncoder | None]:
        """The encoders named, on the device asked for."""
        from msq.extract.encoders import load_clip, load_video_encoder

        device = resolve_device(self.device)
        video = image = text = None
        if self.video_encoder != NONE:
            video = load_video_encoder(
                "timesformer",
                weights=None if self.video_encoder == EMBEDDED else self.video_encoder,
                frames=self.frames,
                size=self.size,
                pooling=self.pooling,
                precision=self.precision,
                device=device,
                sampling=self.sampling,
                resize=self.resize,
            )
        if self.image_encoder != NONE:
            name, weights = split_clip_name(self.image_encoder)
            image, text = load_clip(
                name,
                weights=weights,
                frames=video.spec.frames if video is not None else (self.frames or 8),
                precision=self.precision,
                device=device,
                output=self.clip_output,
                sampling=self.sampling,
                resize=self.resize,
            )
        if self.text_encoder == NONE:
            text = None
        elif self.text_encoder is not None:
            name, weights = split_clip_name(self.text_encoder)
            _, text = load_clip(name, weights=weights, device=device, output=self.clip_output)
        if video is None and image is None:
            raise UsageError(
                "nothing to extract: both --video-encoder and --image-encoder are none"
            )
        return video, image, text

    def run(self, progress: Callable[[dict[str, Any]], None] | None = None) -> ExtractResult:
        """Read the dataset, load the encoders, fill the store. Resumes what is there."""
        from msq.extract.pipeline import extract

        data = self.read_dataset()
        video, image, text = self.load_encoders()
        return extract(
            data,
            self.out or Path(f"{slug(data.name)}.zarr"),
            video=video,
            image=image,
            text=text,
            prompts={prompt_slug(p): p for p in self.prompts},
            store_dtype=self.store_dtype,
            shard=self.shard,
            batch=self.batch,
            workers=self.workers,
            retry_failed=self.retry_failed,
            on_degraded=self.on_degraded,
            progress=progress,
        )


def resolve_device(name: str) -> str:
    """`auto` is CUDA where there is a device, else the CPU; anything else is taken at its word.

    Raises:
        UsageError: CUDA is asked for and not there. Nothing falls back silently.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: expected a CUDA device, this machine has none")
    return name


def split_clip_name(name: str) -> tuple[str, str | None]:
    """`ViT-B-16/FILE` -> (architecture, weights); every other name says it all by itself."""
    architecture, slash, file = name.partition("/")
    if slash and not Path(name).exists() and ":" not in architecture and Path(file).exists():
        return architecture, file
    return name, None


def slug(name: str) -> str:
    """A name in the characters a store or file may have: `[a-z0-9_-]+`."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-") or "dataset"


def prompt_slug(template: str) -> str:
    """`{}` is `plain`; `a video of {}` is `a-video-of`.

    Raises:
        UsageError: the template has no `{}`.
    """
    if "{}" not in template:
        raise UsageError(f"prompt {template!r}: expected a template with {{}} for the class name")
    words = slug(template.replace("{}", " "))
    return "plain" if template.strip() == "{}" else words
