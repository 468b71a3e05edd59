"""The files of a run that hold tensors: written whole or not at all; nothing is pickled."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError  # torch raises it; nothing is unpickled
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from msq.config import HeadConfig
from msq.errors import MsqError, UsageError
from msq.head.features import Features
from msq.head.json_file import jsonable, write_atomic
from msq.head.model import MSQNet

FORMAT = 1  # of head.safetensors


def save_head(path: Path, model: MSQNet, features: Features, protocol: str) -> None:
    """Write `head.safetensors`: the parameters by their plain names, and what `predict` needs.

    The header's entry `msq` is a JSON object: format, protocol, dataset, task, classes, head (the
    configuration, width resolved), token_width, image_width, seed, encoders (specs), prompt, view.
    """
    meta = {
        "format": FORMAT,
        "protocol": protocol,
        "dataset": features.name,
        "task": features.task,
        "classes": list(features.classes),
        "head": dataclasses.asdict(dataclasses.replace(model.config, width=model.width)),
        "token_width": model.memory.in_features,
        "image_width": None if model.fuse_image is None else model.fuse_image.in_features,
        "seed": model.seed,
        "encoders": {kind: dict(spec) for kind, spec in features.specs.items()},
        "prompt": features.prompt,
        "view": features.view,
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    header = {"msq": json.dumps(jsonable(meta), ensure_ascii=False)}
    write_atomic(path, safetensors.torch.save(tensors, header))


def load_model(path: Path, device: str | torch.device = "cpu") -> tuple[MSQNet, dict[str, Any]]:
    """Read `head.safetensors`: the head in evaluation mode, and the object of its header.

    Raises:
        UsageError: no such file.
        MsqError: not such a file, or written by a later format.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        if (path.parent / "result.json").exists():
            raise UsageError(
                f"{path}: no such file, though the run is finished (result.json); take the file "
                "from a copy, or train again with --overwrite"
            ) from None
        raise UsageError(
            f"{path}: no such file; is the run finished? `msq train-head` resumes it"
        ) from None
    except safetensors.SafetensorError as error:
        raise MsqError(f"{path}: expected safetensors; {error}") from None
    if "msq" not in header:
        raise MsqError(
            f"{path}: expected a head written by msq, found no entry 'msq' in its header"
        )
    meta: dict[str, Any] = json.loads(header["msq"])
    if meta["format"] != FORMAT:
        raise MsqError(f"{path}: expected format {FORMAT}, found {meta['format']}; update msq")
    model = MSQNet(
        HeadConfig(**meta["head"]),
        classes=len(meta["classes"]),
        token_width=meta["token_width"],
        image_width=meta["image_width"],
        text=tensors.get("text"),
        seed=meta["seed"],
    )
    model.load_state_dict(tensors)
    return model.eval().to(device), meta


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state of an unfinished run; plain values and tensors only."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomic(path, buffer.getvalue())


def load_state(path: Path) -> dict[str, Any] | None:
    """Read what `save_state` wrote, tensors on the CPU; None where there is none.

    Raises:
        UsageError: the file is damaged.
    """
    if not path.exists():
        return None
    content = io.BytesIO(path.read_bytes())
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError, LookupError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"{path}: expected the state of an unfinished run; {said}; delete the file or use "
            "--overwrite, and the run begins anew"
        ) from None
    if not isinstance(state, dict):
        raise UsageError(f"{path}: expected the state of an unfinished run, found {type(state)}")
    return state


def save_predictions(
    path: Path,
    ids: Sequence[str],
    logits: Tensor,
    scores: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    known: Tensor | None = None,
) -> None:
    """Write `predictions.npz`: `ids` [N]; `logits` and `scores` float32, `labels` uint8, [N, K].

    Beside them `classes` [K], their names, and `known` uint8 [N, K] where some labels are unknown.
    Metrics are computed from the logits: as float32 probabilities, high ones may tie.
    """
    buffer = io.BytesIO()
    some: dict[str, Any] = {} if known is None else {"known": known.to(torch.uint8).cpu().numpy()}
    np.savez_compressed(
        buffer,
        ids=np.array(list(ids), dtype=np.str_),
        logits=logits.float().cpu().numpy(),
        scores=scores.float().cpu().numpy(),
        labels=labels.to(torch.uint8).cpu().numpy(),
        classes=np.array(list(classes), dtype=np.str_),
        **some,
    )
    write_atomic(path, buffer.getvalue())
