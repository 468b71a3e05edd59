"""Text encoders by name: CLIP's text towers and the text models of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Final, cast

import torch

from msq.errors import UsageError, WeightsNotFound
from msq.extract.encoders.clip import TextEncoder
from msq.extract.encoders.encoder import PRECISIONS
from msq.extract.encoders.hf_text_files import find_text_model
from msq.extract.encoders.hf_text_recipe import POOLINGS, TextPooling
from msq.extract.encoders.locations import remember
from msq.extract.encoders.spec import Output, Precision
from msq.extract.encoders.weights import FOLDER_PREFIX, HUB_PREFIX

# Names so well known that nobody looks up whose they are.
ALIASES: Final = {
    "bert-base-uncased": "hf-hub:google-bert/bert-base-uncased",
    "bert-base-cased": "hf-hub:google-bert/bert-base-cased",
    "bert-large-uncased": "hf-hub:google-bert/bert-large-uncased",
    "all-MiniLM-L6-v2": "hf-hub:sentence-transformers/all-MiniLM-L6-v2",
    "all-mpnet-base-v2": "hf-hub:sentence-transformers/all-mpnet-base-v2",
}


def load_text_encoder(
    name: str,
    weights: str | None = None,
    *,
    pooling: str | None = None,
    clip_output: str = "projected",
    precision: Precision = "fp32",
    device: str | torch.device = "cpu",
) -> TextEncoder:
    """Loads a text encoder by name.

    `hf-hub:org/name`, `local-dir:PATH` and folders are looked at: with an `open_clip_config.json`
    they hold a CLIP, with a `config.json` a text model of Hugging Face. `bert-base-uncased` and a
    few more names stand for repositories; every other name is a CLIP, as in `load_clip`.

    Args:
        name: see above; a folder named like a known repository is given as `./NAME`.
        weights: of a CLIP architecture in `name`, as in `load_clip`.
        pooling: `pooler`, `mean` or `cls`, for a text model. None is the folder's own, else
            `pooler` where the model has one, else `mean`; so is what a spec recorded in several
            words, such as `mean unit`.
        clip_output: `projected` or `pooler`, for a CLIP.
        precision: `fp32`, `bf16` or `fp16`, of the forward pass.
        device: where the model goes.

    Raises:
        UsageError: for unknown names and options, or without the library that a name needs.
        WeightsError: if the weights cannot be found, read or do not fit.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision is one of {', '.join(PRECISIONS)}, not {precision!r}")
    source = ALIASES.get(name, name)
    named_so = source.startswith((HUB_PREFIX, FOLDER_PREFIX)) or Path(source).expanduser().is_dir()
    files = find_text_model(source) if named_so and weights is None else None
    if files is None:
        return _clip(name, weights, clip_output, precision, device)
    from msq.extract.encoders.hf_text import load_hf_text

    folders_own = pooling is None or " " in pooling
    if not folders_own and pooling not in POOLINGS:
        raise UsageError(f"pooling of a text encoder: expected {', '.join(POOLINGS)}, "
                         f"found {pooling!r}")  # fmt: skip
    chosen = None if folders_own else cast(TextPooling, pooling)
    encoder = load_hf_text(files, pooling=chosen, precision=precision, device=device)
    remember(encoder.spec.sha256, source)
    return encoder


def _clip(
    name: str, weights: str | None, output: str, precision: Precision, device: str | torch.device
) -> TextEncoder:
    from msq.extract.encoders.registry import load_clip

    if weights is None and Path(name).expanduser().is_file():
        raise UsageError(
            f"text encoder {name!r}: expected a folder with a text model, or an architecture of "
            "CLIP before the file (ViT-B-16/FILE), found a file alone"
        )
    try:
        return load_clip(
            name, weights, output=cast(Output, output), precision=precision, device=device
        )[1]
    except WeightsNotFound:
        raise
    except UsageError as error:
        if weights is not None or name.startswith((HUB_PREFIX, FOLDER_PREFIX)):
            raise
        raise UsageError(
            f"{error}; a text model of Hugging Face is given as {HUB_PREFIX}ORG/NAME or "
            f"{FOLDER_PREFIX}PATH"
        ) from error
