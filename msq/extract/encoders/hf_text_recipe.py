"""From a transformer's hidden states to one vector, as sentence-transformers' files describe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from msq.errors import WeightsError
from msq.extract.encoders.hf_text_files import (
    CONFIG_FILE,
    LENGTH_FILE,
    MODULES_FILE,
    WEIGHT_FILES,
    read_steps,
)
from msq.extract.encoders.weights import WeightFiles

TextPooling = Literal["pooler", "mean", "cls"]
POOLINGS: tuple[TextPooling, ...] = get_args(TextPooling)
_ACTIVATIONS = ("Identity", "Tanh")


@dataclass(frozen=True)
class Dense:
    """A linear layer after the pooling, as sentence-transformers saves it.

    Attributes:
        file: its weights, `linear.weight` and maybe `linear.bias`.
        inputs: width of its input.
        outputs: of its output.
        bias: whether it has one.
        activation: `Identity` or `Tanh`.
    """

    file: Path
    inputs: int
    outputs: int
    bias: bool
    activation: str


@dataclass(frozen=True)
class Recipe:
    """From the model's last hidden states to one vector.

    Attributes:
        pooling: `pooler`, `mean`, `cls`; None where the folder does not say.
        dense: layers after the pooling.
        unit: scaled to unit length at the end.
        max_tokens: where texts are cut off, None where the folder does not say.
        lower: texts are put in lower case before the tokenizer.
    """

    pooling: TextPooling | None = None
    dense: tuple[Dense, ...] = ()
    unit: bool = False
    max_tokens: int | None = None
    lower: bool = False

    def output(self, pooling: TextPooling) -> str:
        """The steps in words, as a spec records them, such as `mean dense unit`."""
        return " ".join([pooling, *("dense" for _ in self.dense), *(["unit"] * self.unit)])


def read_recipe(files: WeightFiles, pooling: TextPooling | None = None) -> Recipe:
    """What sentence-transformers' files in a folder ask for; an empty recipe without them.

    Args:
        files: of the model.
        pooling: takes the place of all steps after the transformer.

    Raises:
        WeightsError: a file is missing or damaged, or asks for a step that msq does not know.
    """
    path = files.folder / MODULES_FILE
    if not path.is_file():
        return Recipe(pooling)
    limits = files.read_json(LENGTH_FILE) or {}
    length, lower = limits.get("max_seq_length"), bool(limits.get("do_lower_case", False))
    recipe = Recipe(pooling) if pooling is not None else _read_modules(files, path)
    return replace(recipe, max_tokens=length if isinstance(length, int) else None, lower=lower)


def _read_modules(files: WeightFiles, path: Path) -> Recipe:
    pooling: TextPooling | None = None
    dense: list[Dense] = []
    unit = False
    for step in read_steps(path):
        kind, folder = step["type"].rpartition(".")[2], files.folder / step["path"]
        if kind == "Transformer" and not step["path"]:
            continue
        if kind == "Pooling":
            pooling = _pooling(_settings(files, step["path"]), folder / CONFIG_FILE)
        elif kind == "Dense" and pooling is not None:
            dense.append(_dense(_settings(files, step["path"]), folder))
        elif kind == "Normalize" and pooling is not None:
            unit = True
        else:
            raise WeightsError(
                f"{path}: expected a transformer in the folder itself, then pooling, dense layers "
                f"and scaling to unit length; found {step['type']!r} in {step['path']!r}"
            )
    if pooling is None:
        raise WeightsError(f"{path}: expected a module 'Pooling', found none")
    return Recipe(pooling, tuple(dense), unit)


def _settings(files: WeightFiles, folder: str) -> Mapping[str, Any]:
    settings = files.read_json(f"{folder}/{CONFIG_FILE}")
    if settings is None:
        raise WeightsError(
            f"{files.id}: {MODULES_FILE} names {folder}/{CONFIG_FILE}, which is not there; copy "
            "the repository's folders, too"
        )
    return settings


def _pooling(settings: Mapping[str, Any], file: Path) -> TextPooling:
    chosen = [key.removeprefix("pooling_mode_") for key, on in settings.items()
              if key.startswith("pooling_mode_") and on is True]  # fmt: skip
    if isinstance(settings.get("pooling_mode"), str):
        chosen = [settings["pooling_mode"]]
    known: dict[str, TextPooling] = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean",
                                     "cls": "cls"}  # fmt: skip
    if len(chosen) != 1 or chosen[0] not in known:
        raise WeightsError(
            f"{file}: expected one pooling, mean or cls, found {', '.join(chosen) or 'none'}; "
            "another one can be chosen with --text-pooling"
        )
    return known[chosen[0]]


def _dense(settings: Mapping[str, Any], folder: Path) -> Dense:
    activation = str(settings.get("activation_function", "Identity")).rpartition(".")[2]
    if activation.removesuffix("()") not in _ACTIVATIONS:
        raise WeightsError(
            f"{folder / CONFIG_FILE}: expected activation {' or '.join(_ACTIVATIONS)}, found "
            f"{activation}"
        )
    file = next((folder / n for n in WEIGHT_FILES if (folder / n).is_file()), None)
    if file is None:
        raise WeightsError(f"{folder}: expected one of {', '.join(WEIGHT_FILES)}, found none")
    try:
        inputs, outputs = int(settings["in_features"]), int(settings["out_features"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{folder / CONFIG_FILE}: expected in_features and out_features, found {error!r}"
        ) from error
    return Dense(file, inputs, outputs, bool(settings.get("bias", True)), activation)
