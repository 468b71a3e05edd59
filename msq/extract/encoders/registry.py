"""Encoders by name."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, cast, get_args

import torch

from msq.errors import UsageError
from msq.extract.encoders.clip import ImageEncoder, TextEncoder
from msq.extract.encoders.embedded import (
    EMBEDDED_CLIP,
    EMBEDDED_FRAMES,
    EMBEDDED_VIDEO,
    embedded_folder,
)
from msq.extract.encoders.encoder import PRECISIONS, VideoEncoder
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
)
from msq.extract.encoders.timesformer import TimeSformerConfig
from msq.extract.encoders.timesformer_weights import SpaceResize, TimeResize, load_timesformer
from msq.extract.encoders.weights import FOLDER_PREFIX, WeightFiles, find_weights, sha256_file

_CLIP_FRAMES = 16  # the paper's T, where neither caller nor embedded weights say otherwise


@dataclass(frozen=True)
class EncoderInfo:
    """One line of `msq encoders list`.

    Attributes:
        name: what to give as encoder name.
        kind: `video` or `image+text`.
        needs: where its weights come from.
        licence: of those weights.
    """

    name: str
    kind: str
    needs: str
    licence: str


_ENCODERS = (
    EncoderInfo("timesformer-embedded", "video", "nothing: inside the package", "Apache-2.0"),
    EncoderInfo(
        "timesformer",
        "video",
        "weights: hf-hub:facebook/timesformer-base-finetuned-k400 (or -k600, -ssv2, -hr-…), "
        "local-dir:PATH in the same layout, or a FAIR .pyth file",
        "the checkpoint's own; CC BY-NC 4.0 for those of FAIR",
    ),
    EncoderInfo("clip-embedded", "image+text", "nothing: inside the package", "Apache-2.0"),
    EncoderInfo(
        "ViT-B-16 and every other open_clip architecture",
        "image+text",
        "weights: an open_clip tag (ViT-B-16/openai), hf-hub:org/name, local-dir:PATH or a file",
        "the checkpoint's own; MIT for openai and laion tags",
    ),
)


def list_encoders() -> list[dict[str, str]]:
    """What can be loaded: name, kind, what it needs, licence of the weights."""
    return [asdict(encoder) for encoder in _ENCODERS]


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
    time_resize: TimeResize = "nearest",
    space_resize: SpaceResize = "nearest",
) -> VideoEncoder:
    """Loads a video encoder.

    Args:
        name: `timesformer`; `timesformer-embedded` is the same without weights.
        weights: `hf-hub:org/name`, `local-dir:PATH`, a folder or a file; the embedded ones by
            default.
        frames: T; the checkpoint's own by default. Another T interpolates the time embedding.
        size: height and width in pixels; the checkpoint's own by default. Another one
            interpolates the position embedding.
        pooling: `frame` (S = 1 + T), `band` (S = T) or `patch` (all tokens).
        precision: `fp32`, `bf16` or `fp16`, of the forward pass.
        device: where the model goes.
        sampling: which frames of a video the encoder is to be fed, recorded in the spec.
        resize: how frames are resized, recorded in the spec.
        mean: per channel; the checkpoint's own by default.
        std: likewise.
        strict: refuse a checkpoint with missing or unexpected names.
        time_resize: `nearest` (FAIR's and Hugging Face's rule) or `linear`.
        space_resize: `nearest` (likewise) or `bicubic`.

    Raises:
        UsageError: for unknown names and options.
        WeightsError: if the weights cannot be found, read or do not fit.
    """
    if name not in ("timesformer", EMBEDDED_VIDEO):
        raise UsageError(f"no video encoder {name!r}; there are timesformer, {EMBEDDED_VIDEO}")
    if name == EMBEDDED_VIDEO and weights is not None:
        raise UsageError(f"{EMBEDDED_VIDEO} has weights of its own; use 'timesformer' with others")
    _check("pooling", pooling, POOLINGS)
    _check_inputs(precision, sampling, resize)
    _check("time_resize", time_resize, get_args(TimeResize))
    _check("space_resize", space_resize, get_args(SpaceResize))
    files = _embedded_video() if weights is None else find_weights(weights)
    loaded = load_timesformer(
        files,
        frames=frames,
        size=size,
        time_resize=time_resize,
        space_resize=space_resize,
        strict=strict,
    )
    config = loaded.model.config
    if config.image_size[0] != config.image_size[1]:
        raise UsageError(
            f"{files.id}: made for {config.image_size[0]}x{config.image_size[1]} pixels; videos "
            "are cropped to squares, so give size="
        )
    spec = EncoderSpec(
        slug=_video_slug(files.name, pooling),
        kind="video",
        architecture=_describe(config),
        weights=files.id,
        sha256=sha256_file(files.file),
        frames=config.frames,
        size=config.image_size[0],
        mean=_three(mean if mean is not None else loaded.mean, "mean"),
        std=_three(std if std is not None else loaded.std, "std"),
        pooling=pooling,
        precision=precision,
        sampling=sampling,
        resize=resize,
        output="",
        tokens=pooled_tokens(pooling, config.frames, config.patches),
        channels=config.width,
        resized=loaded.resized,
    )
    if weights is not None:
        remember(spec.sha256, weights)
    return VideoEncoder(loaded.model, spec).to(device)


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

    Raises:
        UsageError: for unknown names and options.
        WeightsError: if the weights cannot be found, read or do not fit.
    """
    # open_clip takes seconds to import, and video encoders do without it.
    from msq.extract.encoders.clip_source import find_clip
    from msq.extract.encoders.clip_weights import load_clip_model

    _check_inputs(precision, sampling, resize)
    _check("output", output, get_args(Output))
    embedded = name in ("embedded", EMBEDDED_CLIP)
    if embedded:
        if weights is not None:
            raise UsageError("the embedded CLIP has weights of its own; name an architecture too")
        folder = embedded_folder(EMBEDDED_CLIP)
        source = find_clip(f"{FOLDER_PREFIX}{folder}", None)
        source = replace(source, files=replace(source.files, id="embedded"))
    else:
        source = find_clip(name, weights)
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
    )
    text_spec = replace(
        image_spec,
        kind="text",
        frames=0,
        size=0,
        mean=(),
        std=(),
        pooling="",
        sampling="",
        resize="",
        channels=loaded.text_channels,
        resized="",
    )
    if not embedded:
        remember(image_spec.sha256, name, weights)
    image = ImageEncoder(loaded.model, image_spec).to(device)
    text = TextEncoder(loaded.model, text_spec, loaded.tokenizer, loaded.vocabulary)
    return image, text


def _embedded_video() -> WeightFiles:
    found = find_weights(f"{FOLDER_PREFIX}{embedded_folder(EMBEDDED_VIDEO)}")
    return replace(found, id="embedded")


def _video_slug(name: str, pooling: Pooling) -> str:
    """`timesformer-…`; poolings other than the usual one are part of the name."""
    slug = slugify(name).removeprefix("timesformer").strip("-")
    return "-".join(p for p in ("timesformer", slug, "" if pooling == "frame" else pooling) if p)


def _describe(config: TimeSformerConfig) -> str:
    stem = "" if config.stem == "patch" else f" {config.stem}-stem"
    return (
        f"timesformer p{config.patch_size} d{config.depth} w{config.width} h{config.heads} "
        f"m{config.mlp_width}{stem}"
    )


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
