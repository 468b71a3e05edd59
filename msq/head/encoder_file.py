"""The fine-tuned video encoder of a run, written as something that stage one loads.

`RUN/encoder/model.safetensors` holds the weights as float32: TimeSformer's under msq's names,
VideoMAE's under those of Hugging Face. `RUN/encoder/config.json` says:

| entry | |
|---|---|
| `format` | 1 |
| `run` | the run's name: the encoder is `run:NAME` wherever it lies later |
| `sha256` | of `model.safetensors`; a file with another one is refused |
| `architecture`, `mean`, `std` | of a TimeSformer; for a VideoMAE Hugging Face's entries |
| `trained_on` | pooling, sampling and the rest of how the run showed it its clips |
| `made_by` | the weights it started from, and what the caller notes of the run |

Each file is written under a temporary name and renamed, the weights first: what a killed process
leaves behind has no `config.json`, or one that names other weights, and is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from torch import Tensor, nn

from msq.errors import UsageError
from msq.head.json_file import jsonable, write_atomic

if TYPE_CHECKING:
    from msq.extract.encoders import EncoderSpec, VideoEncoder
    from msq.extract.encoders.weights import WeightFiles

_TRAINED_ON = ("frames", "size", "short_side", "resize", "sampling", "pooling", "precision")


def require_trainable(encoder: VideoEncoder) -> None:
    """Refuse an encoder that cannot be written back after training.

    Raises:
        UsageError: neither a TimeSformer nor a VideoMAE; the message says what to do instead.
    """
    _refuse_others(encoder.model, encoder.spec)


def save_encoder(
    folder: Path,
    model: nn.Module,
    spec: EncoderSpec,
    note: Mapping[str, Any],
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the encoder of a run; the same weights and notes give the same bytes.

    Args:
        folder: `RUN/encoder`, made when missing; an encoder that is there is replaced. The name of
            RUN becomes the encoder's.
        model: a TimeSformer or VideoMAE, not wrapped (DDP, torch.compile).
        spec: of the encoder that the training began with.
        note: further entries of `made_by`: what was unfrozen, the protocol.
        state: weights to write in place of the model's own, by the names of its `state_dict`: an
            average of them, or what was gathered from several processes.

    Raises:
        UsageError: a model of another family, or weights of other names than the model's.
        OSError: the folder cannot be written.
    """
    from msq.extract.atomic import flush_directory, make_directory
    from msq.extract.encoders.run_encoder import CONFIG, FORMAT, MODEL
    from msq.extract.encoders.weights import sha256_file

    _refuse_others(model, spec)
    given = model.state_dict() if state is None else state
    if other := sorted(set(given) ^ set(model.state_dict())):
        raise UsageError(f"{folder}: expected the weights by the model's own names, found "
                         f"{len(other)} missing or unknown, such as {other[0]!r}")  # fmt: skip
    tensors = {name: t.detach().cpu().float().contiguous() for name, t in given.items()}
    values, tensors = _layout(model, spec, tensors)
    make_directory(folder)
    for name in (CONFIG, MODEL):
        for part in folder.glob(f".{name}.*"):  # half-written by a process that was killed
            part.unlink()
    temporary = folder / f".{MODEL}.{os.getpid()}"
    safetensors.torch.save_file(tensors, temporary, {"format": "pt"})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    sha256 = sha256_file(temporary)
    temporary.replace(folder / MODEL)
    begun = {name: getattr(spec, name) for name in ("weights", "sha256", "architecture", "resized")}
    document = {
        "format": FORMAT,
        "run": folder.resolve().parent.name or "run",
        "sha256": sha256,
        **values,
        "trained_on": {name: getattr(spec, name) for name in _TRAINED_ON},
        "made_by": {**note, "started_from": begun},
    }
    text = json.dumps(jsonable(document), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(folder / CONFIG, (text + "\n").encode())
    flush_directory(folder)


def recorded_spec(run: Path, spec: EncoderSpec) -> EncoderSpec:
    """The spec that `load_video_encoder("auto", RUN, …)` gives with the options of `spec`.

    It is what `head.safetensors` records, so that a store made by `msq extract --video-encoder RUN`
    fits the run. The weights are not read.

    Args:
        run: the run directory, its encoder written.
        spec: of the encoder in training: T, size, pooling, precision and the rest.

    Raises:
        WeightsError: no encoder is there, or not whole.
        UsageError: the run trained a head only, or its encoder has another T or size than `spec`.
    """
    from msq.extract.encoders.families import slug_stem
    from msq.extract.encoders.run_encoder import find_video_weights
    from msq.extract.encoders.spec import video_slug

    files = find_video_weights(str(run))
    family, architecture, frames, size = _made_for(files)
    if (frames, size) != (spec.frames, (spec.size, spec.size)):
        raise UsageError(
            f"{files.folder}: expected an encoder of {spec.frames} frames of {spec.size}x"
            f"{spec.size} pixels, found {frames} of {size[0]}x{size[1]}"
        )
    return replace(
        spec,
        slug=video_slug(slug_stem(family, files.name), spec.pooling),
        architecture=architecture,
        weights=files.id,
        sha256=files.sha256,
        resized="",
    )


def _made_for(files: WeightFiles) -> tuple[str, str, int, tuple[int, int]]:
    """Family, architecture in words, T, and height and width in pixels of a written encoder."""
    from msq.extract.encoders import videomae_weights
    from msq.extract.encoders.families import describe_timesformer
    from msq.extract.encoders.timesformer_config import TimeSformerConfig

    values = files.read_json("config.json") or {}
    if "architecture" in values:
        plain = TimeSformerConfig.from_dict(values["architecture"])
        return "timesformer", describe_timesformer(plain), plain.frames, plain.image_size
    joint = videomae_weights.config_from_huggingface(values, files.id)
    return "videomae", videomae_weights.describe(joint), joint.frames, joint.image_size


def _layout(
    model: nn.Module, spec: EncoderSpec, tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `config.json` says of the model, and its tensors under the names of its family."""
    from msq.extract.encoders.timesformer import TimeSformer
    from msq.extract.encoders.videomae import VideoMAE
    from msq.extract.encoders.videomae_weights import from_msq, huggingface_config

    mean, std = list(spec.mean), list(spec.std)
    if isinstance(model, TimeSformer):
        values = {"architecture": model.config.to_dict(), "mean": mean, "std": std}
        return values, tensors
    assert isinstance(model, VideoMAE)
    values = {**huggingface_config(model.config), "image_mean": mean, "image_std": std}
    return values, from_msq(tensors)


def _refuse_others(model: nn.Module, spec: EncoderSpec) -> None:
    from msq.extract.encoders.timesformer import TimeSformer
    from msq.extract.encoders.videomae import VideoMAE

    if not isinstance(model, TimeSformer | VideoMAE):
        raise UsageError(
            f"{spec.slug} ({spec.architecture}): expected a TimeSformer or a VideoMAE, whose "
            f"weights msq trains and writes, found {type(model).__name__}; train a head on its "
            "features: msq extract, then msq train-head"
        )
