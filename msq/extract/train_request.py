"""One request of `msq train`, as typed on the command line: clips, the encoder to train, towers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from msq.errors import SpecMismatch, UsageError
from msq.extract.datasets import Dataset
from msq.extract.devices import resolve_device
from msq.extract.extract_options import EMBEDDED
from msq.extract.named_clips import named_clips
from msq.extract.request import NONE, ExtractRequest, Progress, split_clip_name
from msq.protocol import Protocol

if TYPE_CHECKING:
    from msq.extract.encoders import EncoderSpec, ImageEncoder, TextEncoder, VideoEncoder
    from msq.extract.extract_result import ExtractResult

_INPUTS = ("frames", "size", "pooling", "sampling", "resize")


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Which clips to train on and from which encoders. See `msq train --help` for each field.

    What is None was not asked for: it is the protocol's own, or as a store records it.

    Attributes:
        what: a manifest, a folder with a folder per class, or a dataset's name.
        store: features of the frozen towers, made earlier of the same clips.
    """

    what: str
    protocol: Protocol = "paper"
    root: Path | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    classes: Path | None = None
    task: Literal["multilabel", "singlelabel"] | None = None
    policy: Literal["skip", "error", "keep"] | None = None
    limit: int | None = None
    store: Path | None = None
    video_encoder: str | None = None
    image_encoder: str | None = None
    text_encoder: str | None = None
    prompts: Sequence[str] | None = None
    frames: int | None = None
    size: int | None = None
    pooling: Literal["frame", "band", "patch"] | None = None
    sampling: Literal["uniform", "official"] | None = None
    resize: Literal["torch", "pil"] | None = None
    device: str = "auto"
    workers: int | None = None

    @cached_property
    def making(self) -> ExtractRequest:
        """The same as a request of stage one.

        Raises:
            UsageError: WHAT is nothing that can be read, or settings contradict the protocol.
        """
        asked: dict[str, Any] = {key: getattr(self, key) for key in (*_INPUTS, "prompts")}
        return ExtractRequest(
            protocol=self.protocol,
            **self._place(),
            options=self.options,
            classes=self.classes,
            task=self.task,
            policy=self.policy,
            limit=self.limit,
            video_encoder=self.video_encoder or EMBEDDED,
            image_encoder=self.image_encoder or EMBEDDED,
            text_encoder=self.text_encoder,
            **{**asked, "resize": self.resize or "torch"},
            device=self.device,
            workers=self.workers,
        )

    def _place(self) -> dict[str, Any]:
        path = Path(self.what)
        hint = (
            f"msq train-head {path} trains a head on it, and msq train MANIFEST --store {path} "
            "takes the frozen towers' features from it"
        )
        return named_clips(self.what, self.root, self.options, store_hint=hint)

    @property
    def name(self) -> str:
        """A short name, for the run's folder."""
        path = Path(self.what)
        return path.parent.resolve().name if path.stem == "manifest" else path.stem

    def read_dataset(self) -> Dataset:
        """The clips; see `ExtractRequest.read_dataset`."""
        return self.making.read_dataset()

    def load_video(self, record: EncoderSpec | None = None) -> VideoEncoder:
        """The video encoder that training starts from.

        Args:
            record: that of the store, which is taken where none was asked for.

        Raises:
            UsageError: it is `none`, or features were imported and nothing here makes them.
            SpecMismatch: what lies where the recorded one lay is another one.
            WeightsError: weights cannot be found, read or do not fit.
        """
        if record is not None and self.video_encoder is None:
            return self._recorded_video(record)
        video = self.making.load_video()
        if video is None:
            raise UsageError("--video-encoder none: expected an encoder, for msq train trains it")
        return video

    def _recorded_video(self, record: EncoderSpec) -> VideoEncoder:
        """The store's own encoder; it may be fed otherwise here, its weights are the same."""
        from msq.extract.encoders import load_video_encoder
        from msq.extract.encoders.recorded import find_place, load_recorded

        device = resolve_device(self.device)
        given = {key: getattr(self, key) for key in _INPUTS if getattr(self, key) is not None}
        changed = {key: value for key, value in given.items() if value != getattr(record, key)}
        if not changed:
            return cast("VideoEncoder", load_recorded(record, device=device))
        place = find_place("video", record.to_dict())
        inputs: dict[str, Any] = {key: getattr(record, key) for key in (*_INPUTS, "mean", "std")}
        if "size" not in changed:
            inputs["short_side"] = record.short_side
        video = load_video_encoder(
            *place, precision=record.precision, device=device, **{**inputs, **changed}
        )
        if video.spec.sha256 != record.sha256:
            raise SpecMismatch(
                f"{record.slug}: expected the weights that the store records, SHA-256 "
                f"{record.sha256}, found {video.spec.sha256} at {place[0]!r}; say where they are "
                "with --video-encoder"
            )
        return video

    def load_image(self, record: EncoderSpec) -> ImageEncoder:
        """The image tower that was asked for, fed as a store's was; else the store's own.

        Raises:
            SpecMismatch: the store's own is not the recorded one any more.
            WeightsError: weights cannot be found, read or do not fit.
        """
        from msq.extract.encoders import load_clip
        from msq.extract.encoders.recorded import load_recorded

        device = resolve_device(self.device)
        if self.image_encoder is None:
            return cast("ImageEncoder", load_recorded(record, device=device))
        name, weights = split_clip_name(self.image_encoder)
        inputs: dict[str, Any] = {
            key: getattr(record, key)
            for key in ("frames", "precision", "sampling", "resize", "mean", "std")
        }
        making = self.making
        return load_clip(
            name,
            weights,
            output=making.clip_output,
            size=making.size if self.protocol == "official" else None,
            device=device,
            short_side=record.short_side,
            **inputs,
        )[0]

    def load_text(self) -> TextEncoder | None:
        """The text tower that was asked for, that of the CLIP by default; None for `none`."""
        return self.making.load_towers(None)[1]

    def extract_towers(
        self, out: Path, frames: int, progress: Progress | None = None
    ) -> ExtractResult:
        """Stage one for the frozen towers alone: image features of clean views, class texts.

        It goes on with what is in `out`, and finds it again when it is done.

        Args:
            out: the store.
            frames: of a clip, as many as the video encoder sees.
            progress: see `ExtractRequest.run`.
        """
        made = replace(
            self.making, video_encoder=NONE, frames=frames, out=out, store_dtype="float32"
        )
        return made.run(progress)

    def extract_command(self, run: Path, video: EncoderSpec, image: EncoderSpec | None) -> str:
        """The command that extracts features of these clips with the encoder that a run trained.

        Args:
            run: its directory.
            video: how the encoder was fed.
            image: the image tower that the head was trained with.
        """
        from msq.extract.encoders.recorded import find_place

        words = ["msq", "extract"]
        if "dataset" in self._place():
            words += ["--dataset", self.what, "--root", str(self.root)]
            for key, value in self.options.items():
                words += ["--option", f"{key}={value}"]
        else:
            words += ["--manifest", self.what]
        given: dict[str, Any] = {"protocol": self.protocol, "classes": self.classes}
        given |= {"task": self.task, "policy": self.policy, "video-encoder": run}
        given |= {"image-encoder": self.image_encoder}
        if self.image_encoder is None and self.store is not None and image is not None:
            place = find_place("image", image.to_dict())
            given["image-encoder"] = "/".join(part for part in place if part)
        given |= {"text-encoder": self.text_encoder, "resize": video.resize}
        if self.protocol == "paper":
            given |= {"pooling": video.pooling, "sampling": video.sampling}
        usual = {"protocol": "paper", "task": "multilabel", "resize": "torch", "pooling": "frame"}
        usual |= {"sampling": "uniform", "image-encoder": EMBEDDED}
        for key, value in given.items():
            if value is not None and value != usual.get(key):
                words += [f"--{key}", str(value)]
        for prompt in self.prompts or ():
            words += ["--prompts", prompt]
        return shlex.join([*words, "--out", f"{run.name}.zarr"])
