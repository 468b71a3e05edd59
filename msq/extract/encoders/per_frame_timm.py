"""Any image model of timm as a per-frame video encoder."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import timm
from torch import Tensor, nn

from msq.errors import UsageError, WeightsError
from msq.extract.encoders.per_frame import PerFrame
from msq.extract.encoders.pooling import TokenOrder
from msq.extract.encoders.spec import slugify
from msq.extract.encoders.url_weights import fetch_url
from msq.extract.encoders.video_model import VideoModel
from msq.extract.encoders.weights import (
    HUB_PREFIX,
    WEIGHT_FILES,
    WeightFiles,
    check_finite,
    find_weights,
    read_tensors,
)

PREFIX = "timm/"
FRAMES = 16  # the paper's T; an image model has none of its own
_log = logging.getLogger(__name__)


class TimmFrames(PerFrame):
    """A timm model; its `forward_features` is what comes after the final norm, before pooling."""

    def split(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """Class token where the model has one; register tokens are dropped."""
        tower = cast(Any, self.tower)
        features = tower.forward_features(images)
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            found = (
                list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            )
            raise UsageError(
                f"{type(tower).__name__}: expected forward_features to give [M, N, D] or a feature "
                f"map, found {found}; it cannot be a video encoder"
            )
        if features.ndim == 4:
            channels_last = str(getattr(tower, "output_fmt", "NCHW")) == "NHWC"
            return None, features.flatten(1, 2) if channels_last else features.flatten(2).mT
        prefix = int(getattr(tower, "num_prefix_tokens", 0))
        has_class = prefix > 0 and getattr(tower, "cls_token", None) is not None
        return features[:, 0] if has_class else None, features[:, prefix:]


@dataclass(frozen=True)
class _Source:
    """An architecture, its published configuration with changes, and files."""

    architecture: str
    changes: Mapping[str, Any]
    files: WeightFiles
    label: str


def load_timm(
    name: str,
    weights: str | None = None,
    *,
    frames: int | None = None,
    size: int | None = None,
    strict: bool = True,
) -> VideoModel:
    """Loads an image model of timm.

    Args:
        name: a timm architecture, with or without tag (`vit_base_patch16_224.augreg_in21k`); empty
            where the weights' folder has timm's own `config.json`.
        weights: a file, folder or `hf-hub:` name; None for the tag's own weights.
        frames: T; 16 by default.
        size: height and width in pixels; the tag's own by default.
        strict: refuse missing and unexpected names; otherwise timm's own rule.

    Raises:
        UsageError: for an unknown architecture, or one that gives no feature map.
        WeightsError: if the weights cannot be found, read or do not fit.
    """
    source = _from_files(name, weights) if weights is not None else _from_tag(name)
    state = read_tensors(source.files.file)
    tower, resized = _build(source, state, size, strict)
    check_finite(tower, source.files.id)
    cfg = tower.pretrained_cfg
    own = cfg["input_size"][-2:]
    if size is None and own[0] != own[1]:
        raise UsageError(f"{source.label}: made for {own[0]}x{own[1]} pixels; videos are cropped "
                         "to squares, so give size=")  # fmt: skip
    model = TimmFrames(tower).eval()
    t, pixels = frames or FRAMES, size or int(own[0])
    patches, channels = _places(model, pixels, source.label)
    return VideoModel(
        model=model,
        order=TokenOrder(t),
        patches=patches,
        channels=channels,
        files=source.files,
        stem=f"timm-{slugify(source.label)}",
        architecture=f"per frame timm {source.architecture}",
        frames=t,
        size=pixels,
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        resized=resized,
    )


def _places(model: TimmFrames, size: int, label: str) -> tuple[int, int]:
    try:
        return model.places(size)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(f"{label}: cannot take images of {size}x{size} pixels: {error}") from error


def _from_tag(name: str) -> _Source:
    """The tag's own weights, from the hub or, where they never moved there, their address."""
    cfg = _published(name)
    tag = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else name
    remedy = f"Without network, give {PREFIX}{tag}/FILE"
    if cfg.hf_hub_id:
        filenames = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else WEIGHT_FILES
        try:
            files = find_weights(HUB_PREFIX + cfg.hf_hub_id, weight_files=filenames)
        except WeightsError as error:
            raise type(error)(f"{PREFIX}{tag}: {error}; or give {PREFIX}{tag}/FILE") from error
    elif cfg.url:
        path = fetch_url(str(cfg.url), PREFIX + tag, remedy)
        files = WeightFiles(path, path.parent, "", "")
    else:
        raise UsageError(f"timm publishes no weights for {name}; {remedy.split(', ')[1]}")
    return _Source(tag, {}, replace(files, id=PREFIX + tag, name=tag), tag)


def _published(name: str) -> Any:
    """The library's configuration of an architecture or tag."""
    architecture = name.partition(".")[0]
    try:
        cfg = timm.get_pretrained_cfg(name) if timm.is_model(architecture) else None
    except RuntimeError:  # a tag that this architecture does not have
        cfg = None
    if cfg is None:
        known = timm.list_models(pretrained=True) + timm.list_models()
        close = difflib.get_close_matches(name, known, n=4, cutoff=0.4)
        raise UsageError(f"timm has no model {name!r}; close ones: {', '.join(close) or 'none'}")
    return cfg


def _from_files(name: str, weights: str) -> _Source:
    """Weights at hand; a folder of the hub brings architecture and settings along."""
    files = find_weights(weights)
    is_folder = weights.startswith(HUB_PREFIX) or not Path(weights).expanduser().is_file()
    values = (files.read_json("config.json") or {}) if is_folder else {}
    found = values.get("architecture")
    named = bool(name)
    if not named:
        if not isinstance(found, str):
            raise WeightsError(f"{files.id}: expected timm's config.json with an architecture; "
                               f"give {PREFIX}ARCHITECTURE/FILE")  # fmt: skip
        name = found
    _published(name)
    changes = dict(values.get("pretrained_cfg") or {}) if found == name.partition(".")[0] else {}
    if named:
        files = replace(files, id=f"{PREFIX}{name}/{files.id}")
    return _Source(name, changes, files, name)


def _build(
    source: _Source, state: dict[str, Tensor], size: int | None, strict: bool
) -> tuple[Any, str]:
    """A model without classifier that holds the tensors, and a note of resized embeddings.

    timm loads strictly only with as many classes as the file has; so the model is built with
    those, and the classifier is taken off afterwards.
    """
    published = _published(source.architecture)
    changes = {k: v for k, v in source.changes.items() if k in ("mean", "std", "input_size",
               "num_classes", "fixed_input_size", "classifier", "first_conv")}  # fmt: skip
    classifier = changes.get("classifier", published.classifier)
    weight = state.get(f"{classifier}.weight") if isinstance(classifier, str) else None
    classes = [changes.get("num_classes", published.num_classes), 0]
    if weight is not None:
        classes.insert(0, weight.shape[0])
    kwargs: dict[str, Any] = {}
    if size is not None and published.fixed_input_size:
        kwargs["img_size"] = size
    if not strict:
        kwargs["pretrained_strict"] = False
    first_error: Exception | None = None
    for count in dict.fromkeys(int(c) for c in classes):
        overlay = {**changes, "state_dict": dict(state), "num_classes": count, "source": "",
                   "custom_load": False, "label_offset": 0}  # fmt: skip
        try:
            tower: Any = timm.create_model(
                source.architecture,
                pretrained=True,
                pretrained_cfg_overlay=overlay,
                num_classes=count,
                **kwargs,
            )
        except (RuntimeError, KeyError, TypeError, ValueError, AssertionError) as error:
            first_error = first_error or error
            continue
        tower.reset_classifier(0)
        tower.pretrained_cfg.pop("state_dict", None)
        return tower, _resized(tower, state)
    raise WeightsError(
        f"{source.files.id}: not weights of timm's {source.architecture}: {first_error}"
    ) from first_error


def _resized(tower: nn.Module, state: Mapping[str, Tensor]) -> str:
    """A note of position embeddings, which timm resizes by itself."""
    own = getattr(tower, "pos_embed", None)
    theirs = state.get("pos_embed")
    if own is None or theirs is None or theirs.ndim != 3 or own.shape == theirs.shape:
        return ""
    return f"positions {theirs.shape[1]}->{own.shape[1]} by timm"
