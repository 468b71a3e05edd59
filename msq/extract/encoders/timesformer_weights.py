"""Public TimeSformer checkpoints: configurations, other frame counts and sizes, loading."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from msq.errors import UsageError, WeightsError
from msq.extract.encoders.timesformer import TimeSformer
from msq.extract.encoders.timesformer_config import TimeSformerConfig
from msq.extract.encoders.timesformer_names import layout_of, to_msq
from msq.extract.encoders.weights import WeightFiles, load_strictly, read_tensors, shortened

TimeResize = Literal["nearest", "linear"]
SpaceResize = Literal["nearest", "bicubic"]

DEFAULT_MEAN = (0.45, 0.45, 0.45)
DEFAULT_STD = (0.225, 0.225, 0.225)
_FAIR_HEAD_WIDTH = 64  # of every published size: 768/12 and 1024/16
_log = logging.getLogger(__name__)


def config_from_huggingface(values: Mapping[str, Any], source: str) -> TimeSformerConfig:
    """Reads a Hugging Face `config.json`; absent keys mean Hugging Face's defaults.

    Raises:
        WeightsError: for a variant whose forward pass is not the one implemented here.
    """
    required = {
        "model_type": "timesformer",
        "attention_type": "divided_space_time",
        "qkv_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "num_channels": 3,
    }
    wrong = [
        f"{k} (expected {v!r}, found {values[k]!r})"
        for k, v in required.items()
        if k in values and values[k] != v
    ]
    if wrong:
        raise WeightsError(f"{source}: not this TimeSformer: {', '.join(wrong)}")
    patch = _pair(values.get("patch_size", 16))
    if patch[0] != patch[1]:
        raise WeightsError(f"{source}: patches must be square, found {patch[0]}x{patch[1]}")
    width = int(values.get("hidden_size", 768))
    return TimeSformerConfig(
        image_size=_pair(values.get("image_size", 224)),
        patch_size=patch[0],
        frames=int(values.get("num_frames", 8)),
        width=width,
        depth=int(values.get("num_hidden_layers", 12)),
        heads=int(values.get("num_attention_heads", 12)),
        mlp_ratio=int(values.get("intermediate_size", 3072)) / width,
    )


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, list | tuple) else (value, value)


def config_from_tensors(state: Mapping[str, Tensor], source: str) -> TimeSformerConfig:
    """Works out the architecture from tensors under our names, for files without configuration.

    The image is taken to be square, and the heads to be 64 channels wide as in every published
    TimeSformer: neither can be read from the tensors.

    Raises:
        WeightsError: if that is impossible.
    """
    needed = ("position_embed", "time_embed", "stem.proj.weight", "blocks.0.mlp.up.weight")
    missing = [k for k in needed if k not in state]
    if missing:
        raise WeightsError(
            f"{source}: cannot tell the architecture without {', '.join(missing)} (our names; "
            "a model without divided attention, or one of ours without its config.json?)"
        )
    width, _, patch, _ = state["stem.proj.weight"].shape
    side = math.isqrt(state["position_embed"].shape[1] - 1)
    if side * side != state["position_embed"].shape[1] - 1 or width % _FAIR_HEAD_WIDTH:
        raise WeightsError(
            f"{source}: cannot tell the architecture: {state['position_embed'].shape[1] - 1} "
            f"patches per frame, width {width}; give a folder with config.json"
        )
    return TimeSformerConfig(
        image_size=(side * patch, side * patch),
        patch_size=patch,
        frames=state["time_embed"].shape[1],
        width=width,
        depth=1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        heads=width // _FAIR_HEAD_WIDTH,
        mlp_ratio=state["blocks.0.mlp.up.weight"].shape[0] / width,
    )


def resize_embeddings(
    state: Mapping[str, Tensor],
    source: TimeSformerConfig,
    target: TimeSformerConfig,
    *,
    time: TimeResize = "nearest",
    space: SpaceResize = "nearest",
) -> tuple[dict[str, Tensor], str]:
    """Fits the time and position embeddings to another T and another h×w.

    The default, nearest neighbour for both, is what FAIR's and Hugging Face's forward passes do;
    `linear` (time) and `bicubic` (space) are smoother. The global token's entry is kept.

    Returns:
        The tensors, and a readable note of what was resized, empty if nothing was.
    """
    resized, notes = dict(state), []
    if source.frames != target.frames:
        embed = state["time_embed"].transpose(1, 2)
        # align_corners is an error for "nearest" and False by default for the others.
        resized["time_embed"] = F.interpolate(embed, size=target.frames, mode=time).transpose(1, 2)
        notes.append(f"time {source.frames}->{target.frames} {time}")
    if source.grid != target.grid:
        position = state["position_embed"]
        grid = position[:, 1:].transpose(1, 2).reshape(1, source.width, *source.grid)
        grid = F.interpolate(grid, size=target.grid, mode=space).flatten(2).transpose(1, 2)
        resized["position_embed"] = torch.cat([position[:, :1], grid], dim=1)
        (a, b), (c, d) = source.grid, target.grid
        notes.append(f"space {a}x{b}->{c}x{d} {space}")
    return resized, ", ".join(notes)


@dataclass(frozen=True)
class LoadedTimeSformer:
    """A TimeSformer with what its checkpoint says about its input.

    Attributes:
        model: in evaluation mode.
        mean: the checkpoint's own, per channel.
        std: likewise.
        resized: note of `resize_embeddings`.
        ignored: names of classifier tensors that were left out.
    """

    model: TimeSformer
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resized: str
    ignored: tuple[str, ...]


def load_timesformer(
    files: WeightFiles,
    *,
    frames: int | None = None,
    size: int | tuple[int, int] | None = None,
    time_resize: TimeResize = "nearest",
    space_resize: SpaceResize = "nearest",
    strict: bool = True,
) -> LoadedTimeSformer:
    """Loads a TimeSformer in any of the three layouts.

    Args:
        files: a folder of Hugging Face's or ours, or a FAIR file.
        frames: T; the checkpoint's own by default.
        size: height and width in pixels; the checkpoint's own by default.
        time_resize: interpolation of the time embedding where T differs.
        space_resize: interpolation of the position embedding where the size differs.
        strict: refuse missing and unexpected names; otherwise they are logged.

    Raises:
        WeightsError: if the checkpoint is not one of this architecture.
    """
    tensors = read_tensors(files.file)
    # A FAIR file has no configuration; a config.json beside it would be somebody else's.
    values = files.read_json("config.json") if layout_of(tensors) != "fair" else None
    state, ignored = to_msq(tensors)
    source = _config(files, state, values)
    own_size = source.image_size if size is None else size
    pair = (own_size, own_size) if isinstance(own_size, int) else own_size
    target = replace(source, frames=frames or source.frames, image_size=pair)
    if "position_embed" in state and "time_embed" in state:
        _check_embedding_shapes(state, source, files.id)
        state, resized = resize_embeddings(
            state, source, target, time=time_resize, space=space_resize
        )
    else:
        resized = ""
    model = TimeSformer(target)
    for problem in load_strictly(model, state, files.id, strict=strict):
        _log.warning("%s: %s", files.id, problem)
    if resized:
        _log.info("%s: embeddings resized: %s", files.id, resized)
    if ignored:
        _log.info("%s: classifier left out: %s", files.id, shortened(ignored))
    mean, std = _normalisation(files, values)
    return LoadedTimeSformer(model.eval(), mean, std, resized, tuple(ignored))


def _config(
    files: WeightFiles, state: Mapping[str, Tensor], values: Mapping[str, Any] | None
) -> TimeSformerConfig:
    if values is None:
        return config_from_tensors(state, files.id)
    if "architecture" not in values:
        return config_from_huggingface(values, files.id)
    try:
        return TimeSformerConfig.from_dict(values["architecture"])
    except (UsageError, TypeError) as error:
        raise WeightsError(f"{files.id}: config.json: {error}") from error


def _check_embedding_shapes(
    state: Mapping[str, Tensor], config: TimeSformerConfig, source: str
) -> None:
    """The checkpoint must agree with its own configuration before anything is interpolated."""
    expected = {
        "position_embed": (1, 1 + config.patches, config.width),
        "time_embed": (1, config.frames, config.width),
    }
    wrong = [
        f"{k} (expected {list(v)}, found {list(state[k].shape)})"
        for k, v in expected.items()
        if tuple(state[k].shape) != v
    ]
    if wrong:
        raise WeightsError(f"{source}: tensors of another shape: {shortened(wrong)}")


def _normalisation(
    files: WeightFiles, values: Mapping[str, Any] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The checkpoint's own mean and std: ours in config.json, Hugging Face's beside it."""
    if values is not None and "architecture" in values:
        return tuple(values.get("mean", DEFAULT_MEAN)), tuple(values.get("std", DEFAULT_STD))
    preprocessor = files.read_json("preprocessor_config.json") if values is not None else None
    preprocessor = preprocessor or {}
    mean = tuple(preprocessor.get("image_mean", DEFAULT_MEAN))
    std = tuple(preprocessor.get("image_std", DEFAULT_STD))
    return mean, std
