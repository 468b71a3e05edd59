"""The settings of a run, as commands and Python callers give them.

They come in the order: defaults, a file (`--config`), `KEY=VALUE`, and options by name, such as
`--epochs`. What `--queries text` is in a shell is `queries="text"` in Python, and both are the key
`head.queries`.
"""

from __future__ import annotations

import json
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict

from msq import config as configuration
from msq.config import Classifier, Queries, RunConfig
from msq.config_values import nearest, toml_value
from msq.errors import UsageError
from msq.protocol import Protocol

# A file, its tables (or dotted keys), or a configuration that is made.
Base: TypeAlias = RunConfig | Mapping[str, Any] | str | os.PathLike[str]
# `{"optim.lr": 1e-3}`, or as it is typed: `["optim.lr=1e-3"]`.
Overrides: TypeAlias = Mapping[str, Any] | Sequence[str]

# Options that have names of their own, and the keys that they set.
KEYS = {
    "queries": "head.queries",
    "classifier": "head.classifier",
    "loss": "train.loss",
    "protocol": "train.protocol",
    "epochs": "train.epochs",
    "seed": "train.seed",
    "val": "train.val",
    "patience": "train.patience",
    "partition": "features.partition",
    "tensorboard": "train.tensorboard",
    "unfreeze": "backbone.unfreeze",
}


class HeadOptions(TypedDict, total=False):
    """The options of `msq train-head` that are keys of the configuration; see `KEYS`."""

    queries: Queries
    classifier: Classifier
    loss: Literal["auto", "bce", "ce", "asymmetric", "focal"]
    protocol: Protocol
    epochs: int
    seed: int
    val: float
    partition: str | None
    tensorboard: bool


def run_settings(
    config: Base | None, overrides: Overrides | None, options: Mapping[str, Any]
) -> RunConfig:
    """The configuration: defaults, then `config`, then `overrides`, then `options`.

    Args:
        config: a TOML file, its tables as a dict (dotted keys too), or a `RunConfig`.
        overrides: `{"optim.lr": 1e-3}` or `["optim.lr=1e-3"]`.
        options: name or key -> value; None is what was not asked for.

    Raises:
        UsageError: an unknown key, a value of another type or one that the protocol excludes, a
            key with two values, or TensorBoard is asked for and not there.
    """
    # In one call: a protocol among them changes the defaults, not what is given beside it.
    made = configuration.override(_base(config), assignments(overrides, options))
    if made.train.tensorboard:
        from msq.head.event_file import require_tensorboard

        require_tensorboard(True)
    return made


def assignments(overrides: Overrides | None, options: Mapping[str, Any]) -> list[str]:
    """Overrides, and options by name, all in the form `key=value`.

    Raises:
        UsageError: a key is given two values: neither may be passed over without a word.
    """
    given = [
        f"{KEYS.get(name, name)}={override_text(value)}"
        for name, value in options.items()
        if value is not None
    ]
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={override_text(value)}" for key, value in _flat(overrides)]
    elif isinstance(overrides, str):
        overrides = [overrides]
    found: dict[str, str] = {}
    for text in (*(overrides or ()), *given):
        key, equals, value = text.partition("=")
        key, value = key.strip(), value.strip()
        before = found.setdefault(key, value)
        if equals and toml_value(before) != toml_value(value):
            raise UsageError(f"{key}: expected one value, found {before!r} and {value!r} (an "
                             "option of the command is such a key too)")  # fmt: skip
    return [*(overrides or ()), *given]


def override_text(value: Any) -> str:
    """A value as an override has it: `toml_value` reads the same value back."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, numbers.Integral):  # NumPy's too
        return str(int(value))
    if isinstance(value, numbers.Real):
        return repr(float(value))
    text = str(value)
    plain = toml_value(text) == text == text.strip()
    return text if plain else json.dumps(text, ensure_ascii=False)


def require_options(found: Mapping[str, Any], known: Mapping[str, Any], caller: str) -> None:
    """Refuse options that a function does not have.

    Raises:
        UsageError: one is unknown; the message names the nearest, and where other keys go.
    """
    for name in found:
        if name not in known:
            where = f'overrides={{"{name}": …}}' if "." in name else nearest(name, known)[2:]
            raise UsageError(f"{caller}: unknown option {name!r}; {where}")


def _base(config: Base | None) -> RunConfig:
    if config is None or isinstance(config, RunConfig):
        return config or RunConfig()
    if not isinstance(config, Mapping):
        return configuration.load(Path(config))
    tables: dict[str, Any] = {}
    for key, value in _flat(config):
        section, dot, name = key.partition(".")
        if dot:
            tables.setdefault(section, {})[name] = toml_value(override_text(value))
        else:
            tables[section] = value
    return configuration.from_dict(tables, source="config")


def _flat(tables: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values: `{"optim": {"lr": 1}}` is `{"optim.lr": 1}`."""
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", part) for name, part in _flat(value))
        else:
            yield str(key), value
