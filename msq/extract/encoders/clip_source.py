"""Which CLIP is meant: from names as open_clip and the hub write them to files."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import download_pretrained

from msq.errors import UsageError, WeightsError, WeightsNotFound
from msq.extract.encoders.hub_files import hub_error
from msq.extract.encoders.weights import FOLDER_PREFIX, HUB_PREFIX, WeightFiles, find_weights

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class ClipSource:
    """What to hand to open_clip, and what to call it.

    Attributes:
        config: architecture name, or `local-dir:` of a folder with a configuration.
        tokenizer: the same for the tokenizer.
        files: the weights.
        name: slugs are made of it.
        preprocess: settings that belong to a pretrained tag.
        quick_gelu: the tag's weights were trained with the sigmoid approximation of GELU.
    """

    config: str
    tokenizer: str
    files: WeightFiles
    name: str
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    quick_gelu: bool = False


def find_clip(name: str, weights: str | None) -> ClipSource:
    """Resolves an architecture and weights.

    Args:
        name: an open_clip architecture (`ViT-B-16`), that and a tag (`ViT-B-16/openai`), or
            `hf-hub:`, `local-dir:` or a folder, which bring their own configuration.
        weights: a tag, `hf-hub:org/name`, `local-dir:PATH`, a folder or a file; None where `name`
            says it all.

    Raises:
        UsageError: for an unknown architecture or one without weights.
        WeightsNotFound: there are no such weights.
        WeightsError: the network failed.
    """
    if weights is None:
        if name.startswith((HUB_PREFIX, FOLDER_PREFIX)) or Path(name).is_dir():
            return _from_files("", name)
        architecture, slash, tag = name.rpartition("/")
        if not slash or not open_clip.get_model_config(architecture.replace("/", "-")):
            architecture, tag = name, ""
        name, weights = _known(architecture), tag
        if not tag:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none published"
            raise UsageError(
                f"CLIP {name} needs weights: a tag ({tags}), hf-hub:org/name, local-dir:PATH or a "
                "file; or use the embedded CLIP, which needs none"
            )
    is_file = Path(weights).expanduser().exists()
    if weights.startswith((HUB_PREFIX, FOLDER_PREFIX)) or is_file:
        return _from_files(name, weights)
    return _from_tag(_known(name), weights)


def _known(name: str) -> str:
    """The architecture's name in open_clip's own spelling."""
    cleaned = name.replace("/", "-")
    known = open_clip.list_models()
    if cleaned not in known:
        close = difflib.get_close_matches(cleaned, known, n=4, cutoff=0.4)
        raise UsageError(
            f"open_clip has no architecture {name!r}; close ones: {', '.join(close) or 'none'}"
        )
    return cleaned


def _from_files(architecture: str, weights: str) -> ClipSource:
    files = find_weights(weights, weight_files=WEIGHT_FILES, config_files=(CONFIG_FILE,))
    if architecture:
        label = slug_name = architecture
    else:
        label, slug_name = files.id, files.name
    is_folder = weights.startswith((HUB_PREFIX, FOLDER_PREFIX)) or Path(weights).is_dir()
    if is_folder and files.read_json(CONFIG_FILE) is not None:
        config = f"{FOLDER_PREFIX}{files.folder}"
        # The hub's tokenizer files may not be among those fetched: open_clip fetches its own.
        tokenizer = weights if weights.startswith(HUB_PREFIX) else config
        return ClipSource(config, tokenizer, files, slug_name)
    if not architecture:
        raise WeightsError(
            f"{label}: expected {CONFIG_FILE} beside the weights, found none; give the "
            "architecture's name as well (for instance ViT-B-16)"
        )
    known = _known(architecture)
    return ClipSource(known, known, files, slug_name)


def _from_tag(architecture: str, tag: str) -> ClipSource:
    settings = open_clip.get_pretrained_cfg(architecture, tag)
    if not settings:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise WeightsNotFound(
            f"{architecture}: weights {tag!r} are neither a file nor one of its tags: {tags}"
        )
    try:
        with quiet_root_logger():
            path = Path(download_pretrained(settings))
    except (OSError, RuntimeError) as error:
        raise hub_error(
            error,
            f"weights {architecture}/{tag}",
            "weights file",
            f"give the file's path or {FOLDER_PREFIX}PATH of a folder with {CONFIG_FILE} and the "
            "weights",
        ) from error
    files = WeightFiles(path, path.parent, f"{architecture}/{tag}", architecture)
    wanted = ("mean", "std", "interpolation", "resize_mode")
    preprocess = {k: settings[k] for k in wanted if k in settings}
    quick_gelu = bool(settings.get("quick_gelu", False))
    return ClipSource(architecture, architecture, files, architecture, preprocess, quick_gelu)


@contextmanager
def quiet_root_logger() -> Iterator[None]:
    """Keeps open_clip's messages on the root logger from configuring or reaching it.

    It logs by `logging.info(…)`, which installs a handler where the program has none, and warns
    that a model is random although its weights are about to be loaded.
    """
    root = logging.getLogger()
    handler = logging.NullHandler()

    def own_loggers_only(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    root.addHandler(handler)
    root.addFilter(own_loggers_only)
    try:
        yield
    finally:
        root.removeFilter(own_loggers_only)
        root.removeHandler(handler)
