"""One request of stage one, as typed on the command line: dataset + encoders -> feature store."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.errors import UsageError
from msq.extract.datasets import Dataset, read_manifest
from msq.extract.datasets.registry import find_adapter
from msq.extract.datasets.survey import missing_media, require_media
from msq.extract.devices import resolve_device
from msq.extract.extract_options import EMBEDDED, ExtractOptions, require_least
from msq.extract.location import locate
from msq.extract.making import dataset_options, preset, require_making
from msq.extract.named_dataset import read_named
from msq.extract.views import CLEAN, View, augmented_views, parse_clips_by_crops
from msq.protocol import EXTRACT_FIXED

if TYPE_CHECKING:
    from msq.extract.crew import Team
    from msq.extract.encoders import ImageEncoder, TextEncoder, VideoEncoder
    from msq.extract.extract_result import ExtractResult
    from msq.extract.extraction import Extraction

Progress = Callable[[dict[str, Any]], None]

NONE = "none"


@dataclass(frozen=True, kw_only=True)
class ExtractRequest(ExtractOptions):
    """What to extract, with what, to where; the fields are those of `ExtractOptions`.

    Raises:
        UsageError: settings that contradict the protocol; the message lists them all. A number
            below its least. Image features of each frame without an image encoder.
    """

    def __post_init__(self) -> None:
        """Fill in what the protocol sets, and refuse what contradicts it, or itself."""
        if self.protocol not in EXTRACT_FIXED:
            known = ", ".join(EXTRACT_FIXED)
            raise UsageError(f"--protocol {self.protocol}: expected one of {known}")
        require_least(self)
        for name, value in preset(self.protocol).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        wanted = self._protocol_options()
        given = {k: (v, self.options[k]) for k, v in wanted.items() if k in self.options}
        found = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(self).items()}
        require_making(self.protocol, found, given)
        if self.image_frames and self.image_encoder == NONE:
            raise UsageError("--image-frames: expected an --image-encoder, found none")

    def _protocol_options(self) -> dict[str, str]:
        name = None if self.dataset is None else find_adapter(self.dataset).name
        return dataset_options(self.protocol, name, self.frames)

    def read_dataset(self) -> Dataset:
        """The dataset named by `manifest`, or by `dataset`, `root` and `options`.

        Raises:
            UsageError: both or neither are given, the dataset or an option is unknown, `classes`
                or `task` is set for a dataset that brings its own, or an option says otherwise.
            DatasetError: annotations that cannot be read, or an unusable item under the policy
                `error`.
        """
        if (self.manifest is None) == (self.dataset is None):
            raise UsageError("expected --manifest FILE, or --dataset NAME with --root DIR")
        if self.dataset is not None:
            data = self._read_named(self.dataset, self.root)
        elif self.options or self.root is not None:
            kind = "folder" if self.manifest is not None and self.manifest.is_dir() else "manifest"
            raise UsageError(
                "--root and --option go with --dataset NAME, not with --manifest; expected "
                f"--dataset {kind} --root {self.manifest}, which is the same with options"
            )
        elif self.manifest is not None and self.manifest.is_dir():
            data = self._read_named("folder", self.manifest)
        elif self.manifest is not None:
            data = read_manifest(
                self.manifest,
                classes=self.classes,
                task=self.task or "multilabel",
                policy=self.policy or "skip",
            )
        return data if self.limit is None else data.limited(self.limit)

    def _read_named(self, name: str, root: Path | None) -> Dataset:
        options = {**self._protocol_options(), **self.options}
        return read_named(
            name, root, options, classes=self.classes, task=self.task, policy=self.policy
        )

    def load_encoders(
        self,
    ) -> tuple[VideoEncoder | None, ImageEncoder | None, TextEncoder | None]:
        """The encoders named, on the device asked for.

        Raises:
            UsageError: none is named, or one that the protocol cannot use.
            WeightsError: weights cannot be found, read or do not fit.
        """
        self._require_poolers()
        if self.video_encoder == NONE and self.kernels == "triton":
            raise UsageError(
                "--kernels triton: only a TimeSformer has such, found no video encoder"
            )
        video = self.load_video()
        image, text = self.load_towers(self.frames if video is None else video.spec.frames)
        if video is None and image is None and text is None:
            raise UsageError(
                "nothing to extract: --video-encoder and --image-encoder are none, and no "
                "--text-encoder is named for the class embeddings alone"
            )
        return video, image, text

    def load_video(self) -> VideoEncoder | None:
        """The video encoder named; None for `none`.

        Raises:
            UsageError: an encoder that the protocol or an option cannot use.
            WeightsError: as `load_encoders`.
        """
        from msq.extract.encoders import load_video_encoder

        if self.video_encoder == NONE:
            return None
        return load_video_encoder(
            "auto",
            weights=self.video_encoder,
            frames=self.frames,
            size=self.size,
            pooling=self.pooling,
            precision=self.precision,
            device=resolve_device(self.device),
            sampling=self.sampling,
            resize=self.resize,
            mean=self.mean,
            std=self.std,
            short_side=self.short_side or 0,
            kernels=self.kernels,
        )

    def load_towers(self, frames: int | None) -> tuple[ImageEncoder | None, TextEncoder | None]:
        """The image and the text encoder named.

        Args:
            frames: of a clip that the image encoder sees, those of the video encoder; None for 8.

        Raises:
            UsageError: encoders that the protocol or an option cannot use.
            WeightsError: as `load_encoders`.
        """
        from msq.extract.encoders import load_clip, load_text_encoder

        self._require_poolers()
        device = resolve_device(self.device)
        image = text = None
        if self.image_encoder != NONE:
            name, weights = split_clip_name(self.image_encoder)
            image, text = load_clip(
                name,
                weights=weights,
                frames=frames or 8,
                precision=self.precision,
                device=device,
                output=self.clip_output,
                sampling=self.sampling,
                resize=self.resize,
                size=self.size if self.protocol == "official" else None,
                mean=self.mean,
                std=self.std,
                short_side=self.short_side or 0,
            )
        if self.text_encoder == NONE:
            text = None
        elif self.text_encoder is not None:
            name, weights = split_clip_name(self.text_encoder)
            text = load_text_encoder(
                name,
                weights,
                pooling=self.text_pooling,
                clip_output=self.clip_output,
                device=device,
            )
        if self.text_pooling not in (None, "" if text is None else text.spec.output):
            found = "no text encoder" if text is None else f"{text.spec.slug}, a CLIP"
            raise UsageError(
                f"--text-pooling {self.text_pooling}: expected a text model of Hugging Face "
                f"(--text-encoder bert-base-uncased), found {found} (--clip-output is for those)"
            )
        return image, text

    def _require_poolers(self) -> None:
        if self.clip_output == "pooler" and self.image_encoder == EMBEDDED:
            raise UsageError(
                "--clip-output pooler (part of --protocol official): expected a CLIP whose image "
                "tower is a ViT, such as --image-encoder ViT-B-16/openai or local-dir:DIR; found "
                "the embedded one, which has no poolers"
            )

    def asked_views(self) -> tuple[View, ...]:
        """The clean view, `views` augmented ones and those of `test_views`.

        Raises:
            UsageError: numbers that cannot be.
        """
        test = () if self.test_views is None else parse_clips_by_crops(self.test_views)
        return (CLEAN, *augmented_views(self.views), *test)

    def run(self, progress: Progress | None = None) -> ExtractResult:
        """Fill the store, by this process alone or by as many workers as are asked for.

        Raises:
            MsqError: see `cluster.run` and `work`.
        """
        from msq.extract.cluster import run

        return run(self, progress)

    def work(self, progress: Progress | None = None, team: Team | None = None) -> ExtractResult:
        """Read the dataset, load the encoders, fill the store. Resumes what is there.

        Args:
            progress: see `pipeline.extract`.
            team: this worker among others.
        """
        job = self.extraction(progress, team)
        with job.joined() as member:
            job.fill(member)
            return self.noted(job.dataset, job.result(member))

    def extraction(self, progress: Progress | None = None, team: Team | None = None) -> Extraction:
        """One worker's part, with the dataset read and the encoders loaded."""
        from msq.extract.encoders.prompts import parse_prompts
        from msq.extract.extraction import Extraction
        from msq.extract.plan_run import require_space

        prompts, views = parse_prompts(self.prompts), self.asked_views()
        data = self.read_dataset()
        out = locate(self.out or Path(f"{slug(data.name)}.zarr"))
        if self.root is not None and not out.exists():
            require_media(data, self.root)
        video, image, text = self.load_encoders()
        require_space(
            data,
            out,
            [encoder.spec for encoder in (video, image) if encoder is not None],
            views=len(views),
            store_dtype=self.store_dtype,
            image_frames=self.image_frames,
        )
        return Extraction(
            data,
            out,
            video=video,
            image=image,
            text=text,
            prompts=prompts,
            store_dtype=self.store_dtype,
            shard=self.shard,
            batch=self.batch,
            workers=self.workers,
            retry_failed=self.retry_failed,
            on_degraded=self.on_degraded,
            progress=progress,
            views=views,
            team=team,
            image_frames=self.image_frames,
        )

    def noted(self, data: Dataset, result: ExtractResult) -> ExtractResult:
        """A result with what the dataset has to say."""
        lost = missing_media(data, self.root) if self.root is not None and result.failed else ""
        notes = [f"{data.name}: {note}" for note in (*data.notes, *([lost] if lost else ()))]
        return replace(result, warnings=[*notes, *result.warnings])


def split_clip_name(name: str) -> tuple[str, str | None]:
    """`ViT-B-16/FILE` -> (architecture, weights); every other name says it all by itself."""
    architecture, slash, file = name.partition("/")
    if slash and not Path(name).exists() and ":" not in architecture and Path(file).exists():
        return architecture, file
    return name, None


def slug(name: str) -> str:
    """A name in the characters a store or file may have: `[a-z0-9_-]+`."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-") or "dataset"
