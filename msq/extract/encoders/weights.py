"""From the name of weights to files on this machine, and from a file to tensors.

Names are the ecosystem's: `hf-hub:org/name` (optionally `@revision`), `local-dir:PATH`, a plain
folder, a file. The hub is reached through `huggingface_hub` alone, which respects `HF_HOME`,
`HF_HUB_CACHE` and `HF_HUB_OFFLINE`. Pickled files are opened with `weights_only=True` and never
otherwise.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from msq.errors import WeightsError, WeightsNotFound
from msq.extract.encoders.hub_files import HubRepository

HUB_PREFIX = "hf-hub:"
FOLDER_PREFIX = "local-dir:"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model_state.pyth")
_NAMES_SHOWN = 6
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightFiles:
    """Where weights lie on this machine, and what to call them elsewhere.

    Attributes:
        file: the file that holds the tensors.
        folder: the folder with the configuration files beside it.
        id: readable name without any path of this machine.
        name: last part of the id, without suffix; slugs are made of it.
        sha256: of `file`, where a file beside it states it; else empty.
    """

    file: Path
    folder: Path
    id: str
    name: str
    sha256: str = ""

    def read_json(self, filename: str) -> dict[str, Any] | None:
        """The JSON object in a file of the folder, or None if there is no such file.

        Raises:
            WeightsError: if the file holds anything else than one JSON object.
        """
        path = self.folder / filename
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise WeightsError(f"{path}: expected a JSON object, found {error}") from error
        if not isinstance(values, dict):
            raise WeightsError(f"{path}: expected a JSON object, found {type(values).__name__}")
        return values


def find_weights(
    name: str,
    *,
    weight_files: Sequence[str] = WEIGHT_FILES,
    config_files: Sequence[str] = ("config.json", "preprocessor_config.json"),
) -> WeightFiles:
    """Finds weights by name; fetches them only for `hf-hub:` names.

    Args:
        name: `hf-hub:org/name[@revision]`, `local-dir:PATH`, a folder or a file.
        weight_files: names to look for in a folder, best first; in a local folder, a single other
            file with a known suffix will do.
        config_files: further files to fetch from the hub where they exist.

    Raises:
        WeightsNotFound: there is no such path or repository, or no weights in it.
        WeightsError: the network failed; the message says what was looked for and where.
    """
    if name.startswith(HUB_PREFIX):
        return _from_hub(name, weight_files, config_files)
    path = Path(name.removeprefix(FOLDER_PREFIX)).expanduser()
    if path.is_dir():
        base = path.resolve().name
        file = _weights_in(path, weight_files)
        return WeightFiles(file, path, f"{FOLDER_PREFIX}{base}", base)
    if path.is_file() and not name.startswith(FOLDER_PREFIX):
        return WeightFiles(path, path.parent, path.name, path.stem)
    raise WeightsNotFound(
        f"weights {name!r}: no such {'folder' if name.startswith(FOLDER_PREFIX) else 'file'}; "
        f"give {HUB_PREFIX}org/name, {FOLDER_PREFIX}PATH, a folder or a file"
    )


def _weights_in(folder: Path, weight_files: Sequence[str]) -> Path:
    for filename in weight_files:
        if (folder / filename).is_file():
            return folder / filename
    suffixes = {".safetensors", ".bin", ".pt", ".pth", ".pyth"}
    others = sorted(p for p in folder.iterdir() if p.suffix in suffixes and p.is_file())
    if len(others) == 1:
        return others[0]
    found = ", ".join(p.name for p in others) or "no weights"
    raise WeightsNotFound(f"{folder}: expected one of {', '.join(weight_files)}, found {found}")


def _from_hub(name: str, weight_files: Sequence[str], config_files: Sequence[str]) -> WeightFiles:
    repository = HubRepository(name.removeprefix(HUB_PREFIX), f"weights {name}")
    file = repository.fetch_any(weight_files)
    absent = [filename for filename in config_files if repository.fetch(filename) is None]
    if file is None:
        raise repository.without(weight_files)
    if doubtful := [filename for filename in absent if filename in repository.unknown]:
        _log.warning(
            "%s: without network, no %s in the cache; if the repository has it, its settings "
            "are not used",
            name,
            ", ".join(doubtful),
        )
    return WeightFiles(file, file.parent, name, repository.name)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint file, as float32 where they are floating-point.

    Reads safetensors, and pickled files with `weights_only=True`; a wrapping dictionary under
    `model_state` (FAIR), `state_dict` or `model` is opened.

    Raises:
        WeightsError: for a damaged file, one that holds no tensors, or a pickled file with
            anything beyond plain data in it.
    """
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: refused, the file is damaged or holds Python objects besides tensors "
            "(msq never unpickles those); convert it to safetensors where you trust it"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise WeightsError(f"{path}: not a readable checkpoint: {error}") from error
    for wrapper in ("model_state", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise WeightsError(f"{path}: expected named tensors, found {type(state).__name__}")
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    if not tensors:
        raise WeightsError(f"{path}: expected named tensors, found none")
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def load_strictly(
    model: nn.Module, state: Mapping[str, Tensor], source: str, *, strict: bool = True
) -> list[str]:
    """Loads named tensors into a model and refuses whatever does not fit.

    Args:
        model: receives the tensors in place.
        state: tensors under the model's own names; other names count as unexpected.
        source: named in errors.
        strict: refuse missing and unexpected names; otherwise they are returned.

    Returns:
        One line each for missing and unexpected names, empty when all fits.

    Raises:
        WeightsError: for tensors of another shape (always), for missing or unexpected names
            (if strict), for values that are not finite.
    """
    own = model.state_dict()
    shapes = [
        f"{k} (expected {list(own[k].shape)}, found {list(state[k].shape)})"
        for k in own
        if k in state and own[k].shape != state[k].shape
    ]
    if shapes:
        raise WeightsError(f"{source}: tensors of another shape: {shortened(shapes)}")
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    problems = []
    if missing:
        problems.append(f"missing {shortened(missing)}")
    if unexpected:
        problems.append(f"unexpected {shortened(unexpected)}")
    if problems and strict:
        raise WeightsError(
            f"{source}: not weights of this architecture: {'; '.join(problems)}. "
            "Use strict=False only if that is known to be harmless"
        )
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    check_finite(model, source)
    return problems


def check_finite(model: nn.Module, source: str) -> None:
    """Raises WeightsError, naming the tensors, if any value in the model is not finite."""
    bad = [
        k
        for k, v in model.state_dict().items()
        if v.is_floating_point() and not bool(torch.isfinite(v).all())
    ]
    if bad:
        raise WeightsError(f"{source}: values that are not finite in {shortened(bad)}")


def shortened(names: Sequence[str]) -> str:
    """The number of names and the first few of them."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = f", … ({len(names) - _NAMES_SHOWN} more)" if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)}: {shown}{more}"
