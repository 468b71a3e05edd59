"""CLIP models and tokenizers built by open_clip, with checked weights."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import open_clip
from open_clip.factory import load_checkpoint
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from msq.errors import UsageError, WeightsError
from msq.extract.encoders.clip import Tokenizer
from msq.extract.encoders.clip_source import CONFIG_FILE, ClipSource, quiet_root_logger
from msq.extract.encoders.hub_files import COPY, hub_error
from msq.extract.encoders.weights import HUB_PREFIX, check_finite, read_tensors, shortened

# Shapes that open_clip adapts by itself when it loads.
_ADAPTED = {
    "visual.positional_embedding",
    "positional_embedding",
    "text.positional_embedding",
    "logit_scale",
    "logit_bias",
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedClip:
    """A CLIP model in evaluation mode with everything that its specs need."""

    model: nn.Module
    tokenizer: Tokenizer
    vocabulary: frozenset[str] | None
    architecture: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_channels: int
    text_channels: int
    resized: str


def load_clip_model(
    source: ClipSource, *, size: int | None, pooler: bool, strict: bool
) -> LoadedClip:
    """Builds the model, loads and checks its weights, finds its tokenizer.

    open_clip itself builds a tag's model with the exact GELU even where the tag's weights were
    trained with the quick one, and only warns; here the tag decides.

    Args:
        source: from `find_clip`.
        size: another image size; the model's own by default.
        pooler: leave out the last projections.
        strict: refuse missing and unexpected names; otherwise they are logged.

    Raises:
        WeightsError: if weights, configuration or tokenizer do not belong together.
        UsageError: if `pooler` is asked of towers that have no separate projection.
    """
    try:
        config = cast(dict[str, Any], open_clip.get_model_config(source.config))
        with quiet_root_logger():
            model = open_clip.create_model(
                source.config,
                load_weights=False,
                pretrained_text=False,
                force_quick_gelu=source.quick_gelu,
                force_image_size=size,
                force_preprocess_cfg=dict(source.preprocess),
            )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise WeightsError(
            f"{source.files.id}: open_clip cannot build this model: {error}"
        ) from error
    resized = _load_weights(model, source, strict)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    text_tower = getattr(model, "text", model)
    image_channels = text_channels = int(config["embed_dim"])
    if pooler:
        image_channels = _drop_projection(model.visual, "proj", source)
        text_channels = _drop_projection(text_tower, "text_projection", source)
    merges = _merges_file(source, config["text_cfg"])
    tokenizer = _tokenizer(source, config["text_cfg"], merges)
    _check_preprocess(preprocess, source)
    quick = source.quick_gelu or bool(config.get("quick_gelu", False))
    return LoadedClip(
        model=model.eval(),
        tokenizer=tokenizer,
        vocabulary=_vocabulary(source.files.folder / "vocabulary.txt"),
        architecture=_describe(config, quick, merges),
        size=_square(preprocess["size"], source),
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        image_channels=image_channels,
        text_channels=text_channels,
        resized=resized,
    )


def _load_weights(model: nn.Module, source: ClipSource, strict: bool) -> str:
    """Loads through open_clip, which knows third-party layouts; returns what was resized."""
    name = source.files.id
    state: dict[str, Tensor] = {}
    own = model.state_dict()
    if source.files.file.suffix not in (".npz", ".npy"):
        state = read_tensors(source.files.file)
        shapes = [
            f"{k} (expected {list(own[k].shape)}, found {list(state[k].shape)})"
            for k in own
            if k in state and k not in _ADAPTED and own[k].shape != state[k].shape
        ]
        if shapes:
            raise WeightsError(f"{name}: tensors of another shape: {shortened(shapes)}")
    try:
        with quiet_root_logger():
            result = load_checkpoint(model, str(source.files.file), strict=False)
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise WeightsError(f"{name}: not weights of this architecture: {error}") from error
    problems = [
        f"{kind} {shortened(names)}"
        for kind in ("missing", "unexpected")
        if (names := list(getattr(result, f"{kind}_keys", ())))
    ]
    if problems and strict:
        raise WeightsError(f"{name}: not weights of this architecture: {'; '.join(problems)}")
    for problem in problems:
        _log.warning("%s: %s", name, problem)
    check_finite(model, name)
    position = "visual.positional_embedding"
    if position in own and position in state and own[position].shape != state[position].shape:
        return f"space {len(state[position])}->{len(own[position])} bicubic"
    return ""


def _drop_projection(tower: Any, attribute: str, source: ClipSource) -> int:
    """Takes the last projection out of a tower; returns the channels before it."""
    projection = getattr(tower, attribute, None)
    weight = projection.weight.T if isinstance(projection, nn.Linear) else projection
    if not isinstance(weight, Tensor):
        raise UsageError(
            f"{source.files.id}: output 'pooler' is the token before the last projection, which "
            f"{type(tower).__name__} does not have apart; use output 'projected'"
        )
    setattr(tower, attribute, None)
    return int(weight.shape[0])


def _merges_file(source: ClipSource, text_config: Mapping[str, Any]) -> Path | None:
    """The model's own table of byte-pair merges, or None for a tokenizer that open_clip knows."""
    name: str | None = (text_config.get("tokenizer_kwargs") or {}).get("bpe_path")
    if name is None:
        return None
    path = source.files.folder / name  # an absolute name stays as it is
    if not path.is_file():
        raise WeightsError(f"{source.files.id}: the tokenizer's table {name!r} is not there")
    return path


def _tokenizer(
    source: ClipSource, text_config: Mapping[str, Any], merges: Path | None
) -> Tokenizer:
    """The model's tokenizer, checked against the size of its vocabulary.

    open_clip reads a relative `bpe_path` from the working directory, and takes its own table of
    49,408 words where none is set, whatever the model was trained with.
    """
    kwargs = {} if merges is None else {"bpe_path": str(merges)}
    try:
        with quiet_root_logger():
            tokenizer = open_clip.get_tokenizer(source.tokenizer, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        if source.tokenizer.startswith(HUB_PREFIX) and not isinstance(error, ImportError):
            label = f"tokenizer of {source.files.id}"
            raise hub_error(error, label, "tokenizer", COPY) from error
        raise WeightsError(f"{source.files.id}: no tokenizer: {error}") from error
    expected = text_config.get("vocab_size", 49408)
    if isinstance(tokenizer, SimpleTokenizer) and tokenizer.vocab_size != expected:
        raise WeightsError(
            f"{source.files.id}: the tokenizer has {tokenizer.vocab_size} words, the model "
            f"{expected}; set text_cfg.tokenizer_kwargs.bpe_path in {CONFIG_FILE} to its own table"
        )
    return cast(Tokenizer, tokenizer)


def _vocabulary(path: Path) -> frozenset[str] | None:
    if not path.is_file():
        return None
    return frozenset(path.read_text(encoding="utf-8").lower().split())


def _square(size: int | tuple[int, int] | list[int], source: ClipSource) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise UsageError(
            f"{source.files.id}: images of {height}x{width}; only square ones are supported"
        )
    return int(height)


def _check_preprocess(preprocess: Mapping[str, Any], source: ClipSource) -> None:
    found = (preprocess.get("interpolation", "bicubic"), preprocess.get("resize_mode", "shortest"))
    if found != ("bicubic", "shortest"):
        _log.warning(
            "%s was trained on images resized by %s, %s; msq resizes the short side by bicubic "
            "interpolation and crops the centre",
            source.files.id,
            *found,
        )


def _describe(config: Mapping[str, Any], quick_gelu: bool, merges: Path | None) -> str:
    """The architecture in words that do not depend on where the configuration came from.

    The last word is a hash of the whole configuration and of the tokenizer's own table: both
    change outputs without changing the weights' file.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    layers, width = vision.get("layers", 12), vision.get("width", 768)
    if "timm_model_name" in vision:
        image = vision["timm_model_name"]
    elif isinstance(layers, list | tuple):
        image = f"resnet {'-'.join(map(str, layers))} w{width}"
    else:
        image = f"p{vision.get('patch_size', 16)} d{layers} w{width}"
    words = text.get("hf_model_name") or f"d{text.get('layers', 12)} w{text.get('width', 512)}"
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    digest.update(merges.read_bytes() if merges is not None else b"")
    description = (
        f"clip e{config['embed_dim']} image {image} text {words}"
        f"{' quickgelu' if quick_gelu else ''} cfg {digest.hexdigest()[:8]}"
    )
    return re.sub(r"\s+", " ", description)
