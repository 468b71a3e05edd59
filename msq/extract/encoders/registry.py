"""Encoders by name."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch

from msq.errors import UsageError
from msq.extract.encoders.catalogue import list_encoders
from msq.extract.encoders.clip import ImageEncoder, TextEncoder
from msq.extract.encoders.embedded import (
    EMBEDDED_CLIP,
    EMBEDDED_FRAMES,
    EMBEDDED_VIDEO,
    embedded_folder,
)
from msq.extract.encoders.encoder import DTYPES, PRECISIONS, VideoEncoder
from msq.extract.encoders.families import (
    LIBRARIES,
    find_family,
    load_video_model,
    location_key,
)
from msq.extract.encoders.locations import remember
from msq.extract.encoders.pooling import POOLINGS, pooled_tokens
from msq.extract.encoders.spec import (
    EncoderSpec,
    Output,
    Pooling,
    Precision,
    Resize,
    Sampling,
    slugify,
    video_slug,
)
from msq.extract.encoders.timesformer import TimeSformer
from msq.extract.encoders.timesformer_weights import SpaceResize, TimeResize
from msq.extract.encoders.video_model import VideoModel
from msq.extract.encoders.weights import FOLDER_PREFIX, WeightFiles, find_weights, sha256_file
from msq.kernels.dispatch import KERNELS, Kernels

if TYPE_CHECKING:
    from msq.extract.encoders.clip_source import ClipSource

__all__ = ["list_encoders", "load_clip", "load_video_encoder"]

_EMBEDDED_CLIPS = ("embedded", EMBEDDED_CLIP)
_CLIP_FRAMES = 16  # the paper's T, where neither caller nor embedded weights say otherwise


def load_video_encoder(
    name: str = "timesformer",
    weights: str | None = None,
    frames: int | None = None,
    size: int | None = None,
    pooling: Pooling = "frame",
    precision: Precision = "fp32",
    device: str | torch.device = "cpu",
    sampling: Sampling = "uniform",
    resize: Resize = "torch",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    strict: bool = True,
    *,
    short_side: int = 0,
    kernels: Kernels = "auto",
    time_resize: TimeResize = "nearest",
    space_resize: SpaceResize = "nearest",
) -> VideoEncoder:
    """Loads a video encoder of any family; `docs/encoders.md` lists them.

    Args:
        name: `timesformer`, `videomae`, a name as on the command line (`timm/TAG`,
            `open_clip/ARCH/TAG`, `torchvision/NAME`, `embedded`, `hf-hub:…`, a folder), or `auto`,
            which takes the family from `weights`. `timesformer` without weights is the embedded
            one.
        weights: `hf-hub:org/name`, `local-dir:PATH`, a folder or a file, the directory of a run
            that trained an encoder; with `auto`, any name of the command line.
        frames: T; the checkpoint's own by default, 16 for image models. Another T interpolates
            TimeSformer's time embedding.
        size: height and width in pixels; the checkpoint's own by default. Another one
            interpolates the position embedding where there is one.
        pooling: `frame` (a global token, then one per step in time), `band` (S = T) or `patch`
            (all tokens).
        precision: `fp32`, `bf16` or `fp16`, of the forward pass.
        device: where the model goes.
        sampling: which frames of a video the encoder is to be fed, recorded in the spec.
        resize: how frames are resized, recorded in the spec.
        mean: per channel; the checkpoint's own by default.
        std: likewise.
        strict: refuse a checkpoint with missing or unexpected names.
        short_side: pixels of the short side before the centre crop, recorded in the spec; 0 for
            `size`.
        kernels: `auto`, `triton` or `reference`: by what a TimeSformer's attention over time is
            computed, chosen for `device` and `precision`; recorded in the spec where it is not
            torch's.
        time_resize: `nearest` (FAIR's and Hugging Face's rule) or `linear`; TimeSformer alone.
        space_resize: `nearest` (likewise) or `bicubic`; TimeSformer alone.

    Raises:
        UsageError: for unknown names and options.
        WeightsError: if the weights cannot be found, read or do not fit.
    """
    _check("pooling", pooling, POOLINGS)
    _check_inputs(precision, sampling, resize)
    _check("time_resize", time_resize, get_args(TimeResize))
    _check("space_resize", space_resize, get_args(SpaceResize))
    found = find_family(name, weights)
    embedded = found.family == "timesformer" and found.weights is None
    loaded = load_video_model(
        found,
        _embedded_video() if embedded else None,
        frames=frames,
        size=size,
        strict=strict,
        time_resize=time_resize,
        space_resize=space_resize,
    )
    spec = EncoderSpec(
        slug=video_slug(loaded.stem, pooling),
        kind="video",
        architecture=loaded.architecture,
        weights=loaded.files.id,
        sha256=loaded.files.sha256 or sha256_file(loaded.files.file),
        frames=loaded.frames,
        size=loaded.size,
        mean=_three(mean if mean is not None else loaded.mean, "mean"),
        std=_three(std if std is not None else loaded.std, "std"),
        pooling=pooling,
        precision=precision,
        sampling=sampling,
        resize=resize,
        output="",
        tokens=pooled_tokens(pooling, loaded.frames, loaded.patches, loaded.order),
        channels=loaded.channels,
        resized=loaded.resized,
        short_side=short_side,
        kernels=_chosen_kernels(loaded, kernels, torch.device(device), precision),
    )
    if found.weights is not None:
        typed = (found.typed, found.weights) if found.family in LIBRARIES else (found.weights,)
        remember(location_key(spec.weights, spec.sha256), *typed)
    return VideoEncoder(loaded.model, spec, loaded.order).to(device)


def load_clip(
    name: str = "embedded",
    weights: str | None = None,
    *,
    frames: int | None = None,
    size: int | None = None,
    precision: Precision = "fp32",
    device: str | torch.device = "cpu",
    output: Output = "projected",
    sampling: Sampling = "uniform",
    resize: Resize = "torch",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    strict: bool = True,
    short_side: int = 0,
) -> tuple[ImageEncoder, TextEncoder]:
    """Loads the two towers of a CLIP model through open_clip; they share one module.

    Args:
        name: `embedded`, an open_clip architecture (`ViT-B-16`), one with a tag
            (`ViT-B-16/openai`), `hf-hub:org/name`, `local-dir:PATH` or a folder.
        weights: a tag, `hf-hub:org/name`, `local-dir:PATH`, a folder or a file, for the
            architecture in `name`.
        frames: T of the image encoder; 8 for the embedded one, otherwise 16 by default.
        size: height and width in pixels; the model's own by default.
        precision: `fp32`, `bf16` or `fp16`, of the forward pass.
        device: where the model goes.
        output: `projected` (joint space) or `pooler` (before the projections, as the authors of
            MSQNet use them); the encoder's name tells them apart.
        sampling: which frames of a video the encoder is to be fed, recorded in the spec.
        resize: how frames are resized, recorded in the spec.
        mean: per channel; the model's own by default.
        std: likewise.
        strict: refuse a checkpoint with missing or unexpected names.
        short_side: pixels of the short side before the centre crop, recorded in the spec; 0 for
            `size`.

    Raises:
        UsageError: for unknown names and options.
        WeightsError: if the weights cannot be found, read or do not fit.
    """
    # open_clip takes seconds to import, and video encoders do without it.
    from msq.extract.encoders.clip_weights import load_clip_model

    _check_inputs(precision, sampling, resize)
    _check("output", output, get_args(Output))
    embedded = name in _EMBEDDED_CLIPS
    source = _clip_source(name, weights)
    loaded = load_clip_model(source, size=size, pooler=output == "pooler", strict=strict)
    slug = slugify(source.name).removeprefix("clip-")
    image_spec = EncoderSpec(
        slug=f"clip-{slug}" + ("-pooler" if output == "pooler" else ""),
        kind="image",
        architecture=loaded.architecture,
        weights=source.files.id,
        sha256=sha256_file(source.files.file),
        frames=frames or (EMBEDDED_FRAMES if embedded else _CLIP_FRAMES),
        size=loaded.size,
        mean=_three(mean if mean is not None else loaded.mean, "mean"),
        std=_three(std if std is not None else loaded.std, "std"),
        pooling="mean",
        precision=precision,
        sampling=sampling,
        resize=resize,
        output=output,
        tokens=0,
        channels=loaded.image_channels,
        resized=loaded.resized,
        short_side=short_side,
    )
    if not embedded:
        remember(image_spec.sha256, name, weights)
    image = ImageEncoder(loaded.model, image_spec).to(device)
    text_spec = _text_spec(image_spec, loaded.text_channels)
    text = TextEncoder(loaded.model, text_spec, loaded.tokenizer, loaded.vocabulary)
    return image, text


def _clip_source(name: str, weights: str | None) -> ClipSource:
    """The weights of a CLIP by its name."""
    from msq.extract.encoders.clip_source import find_clip

    if name not in _EMBEDDED_CLIPS:
        return find_clip(name, weights)
    if weights is not None:
        raise UsageError("the embedded CLIP has weights of its own; name an architecture too")
    source = find_clip(f"{FOLDER_PREFIX}{embedded_folder(EMBEDDED_CLIP)}", None)
    return replace(source, files=replace(source.files, id="embedded"))


def _text_spec(image: EncoderSpec, channels: int) -> EncoderSpec:
    """The spec of the text tower beside an image tower."""
    return replace(
        image,
        kind="text",
        frames=0,
        size=0,
        mean=(),
        std=(),
        pooling="",
        sampling="",
        resize="",
        channels=channels,
        resized="",
        short_side=0,
    )


def _embedded_video() -> WeightFiles:
    found = find_weights(f"{FOLDER_PREFIX}{embedded_folder(EMBEDDED_VIDEO)}")
    return replace(found, id="embedded")


def _chosen_kernels(
    loaded: VideoModel, kernels: Kernels, device: torch.device, precision: Precision
) -> Literal["", "triton"]:
    """Sets what a TimeSformer computes with, and what its spec says of it."""
    _check("kernels", kernels, KERNELS)
    if isinstance(loaded.model, TimeSformer):
        dtype = DTYPES.get(precision, torch.float32)
        choice = loaded.model.choose_kernels(kernels, device, dtype)
        return "triton" if choice.path == "triton" else ""
    if kernels == "triton":
        raise UsageError(
            f"kernels = triton: only a TimeSformer has an operation with a kernel, found "
            f"{loaded.architecture}; use auto"
        )
    return ""


def _three(values: tuple[float, ...], name: str) -> tuple[float, ...]:
    if len(values) != 3 or (name == "std" and min(values) <= 0):
        raise UsageError(f"{name} must be three numbers (positive for std), found {list(values)}")
    return tuple(float(v) for v in values)


def _check_inputs(precision: str, sampling: str, resize: str) -> None:
    _check("precision", precision, PRECISIONS)
    _check("sampling", sampling, get_args(Sampling))
    _check("resize", resize, get_args(Resize))


def _check(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} is one of {', '.join(cast(Any, allowed))}, not {value!r}")
