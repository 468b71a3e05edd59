"""The configuration of a run: frozen dataclasses, TOML in and out, dotted overrides, fingerprint.

A configuration has four sections, which are also the tables of its TOML file and the first part
of an override's key: `head`, `optim`, `train`, `features`.

    config = override(RunConfig(), ["head.queries=text", "optim.lr=3e-4"])
    print(to_toml(config), fingerprint(config))

`train.protocol` decides the defaults of all the others: those of `RunConfig()` for `paper`, those
of `official_config()` for `official`. A switch that contradicts the protocol is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msq.config_sections import (
    Classifier,
    FeatureConfig,
    HeadConfig,
    OptimConfig,
    Queries,
    TrainConfig,
)
from msq.config_values import checked_section, nearest, toml_value
from msq.errors import UsageError
from msq.protocol import AMOUNTS, FIXED, Protocol, preset

__all__ = [
    "PASSED_OVER", "Classifier", "FeatureConfig", "HeadConfig", "OptimConfig", "Queries",
    "RunConfig", "TrainConfig", "deciding", "difference", "fingerprint", "from_dict", "identity",
    "load", "official_config", "override", "protocol_changes", "to_dict", "to_toml",
]  # fmt: skip

# Tables in the file of a run that are no part of a RunConfig: what it was trained on, and the
# sections of `msq train` (`msq.head.end_to_end_config`).
PASSED_OVER = ("data", "start", "backbone", "clips", "ranks")

# Fields younger than the first sweeps, by section: their defaults do what was done before.
LATER = {"train": ("gamma_neg", "gamma_pos", "clip_margin", "focal_gamma", "focal_alpha")}
# Fields that decide nothing of what a run gives, by section: with another value it is the same run.
ASIDE = {"train": ("tensorboard",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that decides a training run, apart from the features themselves.

    Raises:
        UsageError: a switch contradicts the protocol; the message lists them all.
    """

    head: HeadConfig = field(default_factory=HeadConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)

    def __post_init__(self) -> None:
        """Refuse switches that the protocol does not have."""
        protocol = self.train.protocol
        if protocol == "official" and self.train.loss not in ("auto", "bce", "ce"):
            raise UsageError(
                f"train.loss = {self.train.loss}: protocol official trains with the loss of the "
                "authors, auto, bce or ce; leave it out, or choose --protocol paper "
                "(docs/protocols.md)"
            )
        lines = [
            f"{key} = {_toml_word(value)} (found {_toml_word(found)})"
            for key, value in FIXED[protocol].items()
            if (found := _field(self, key)) != value
        ]
        if lines:
            other = "paper" if protocol == "official" else "official"
            raise UsageError(
                f"train.protocol = {protocol} means {', '.join(lines)}; leave them out, or choose "
                f"--protocol {other}, which decides them otherwise (docs/protocols.md)"
            )


def official_config(queries: Queries = "multimodal") -> RunConfig:
    """The configuration of the authors' code; the query mode is the paper's ablation."""
    return from_dict({"train": {"protocol": "official"}, "head": {"queries": queries}})


def protocol_changes(config: RunConfig) -> list[str]:
    """Amounts that are not the protocol's: lines such as `optim.lr: official 1e-05, here 0.001`."""
    protocol = config.train.protocol
    return [
        f"{key}: {protocol} {_toml_word(value)}, here {_toml_word(_field(config, key))}"
        for key, value in AMOUNTS[protocol].items()
        if _field(config, key) != value
    ]


def _field(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _toml_word(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Plain dicts, one per section, every field present (None where it is unset)."""
    return dataclasses.asdict(config)


def from_dict(tables: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """A RunConfig from plain dicts; missing fields take the defaults of `train.protocol`.

    Tables of `PASSED_OVER` are not looked at.

    Raises:
        UsageError: an unknown section or field (names the nearest), a value of another type, or
            one that contradicts the protocol.
    """
    sections: dict[str, Any] = {}
    train = tables.get("train", {})
    defaults = preset(train.get("protocol", "paper") if isinstance(train, Mapping) else None)
    tables = {**{section: {} for section in defaults}, **tables}
    known = {f.name: _section_type(f.name) for f in dataclasses.fields(RunConfig)}
    for section, values in tables.items():
        if section in PASSED_OVER:
            continue
        if section not in known:
            raise UsageError(f"{source}: unknown section {section!r}{nearest(section, known)}")
        checked = checked_section(section, values, known, source)
        sections[section] = known[section](**{**defaults.get(section, {}), **checked})
    return RunConfig(**sections)


def override(config: RunConfig, assignments: Iterable[str]) -> RunConfig:
    """Apply overrides such as `optim.lr=1e-4`, `head.queries=text`, `head.width=none`.

    The value is read as TOML where it is TOML, otherwise as the bare string it is. Where
    `train.protocol` changes, fields that had the old protocol's defaults take the new one's; so
    give the other assignments in the same call.

    Raises:
        UsageError: not of the form `section.key=value`, an unknown key (names the nearest), a
            value of another type, or one that contradicts the protocol.
    """
    assignments = list(assignments)
    protocols = [toml_value(a.partition("=")[2].strip()) for a in assignments
                 if a.partition("=")[0].strip() == "train.protocol"]  # fmt: skip
    tables = to_dict(config)
    if protocols and protocols[-1] in FIXED:
        tables = _moved(tables, config.train.protocol, protocols[-1])
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot:
            near = nearest(key.strip(), [f"{s}.{k}" for s, t in tables.items() for k in t])
            raise UsageError(f"override {assignment!r}: expected section.key=value{near}")
        tables.setdefault(section, {})[name] = toml_value(text.strip())
    return from_dict(tables, source="override")


def _moved(
    tables: dict[str, dict[str, Any]], old: Protocol, new: Protocol
) -> dict[str, dict[str, Any]]:
    """`tables` with the defaults of one protocol replaced by those of another."""
    before = to_dict(from_dict(preset(old)))
    after = to_dict(from_dict(preset(new)))
    return {
        section: {
            key: after[section][key] if value == before[section][key] else value
            for key, value in values.items()
        }
        for section, values in tables.items()
    }


def load(path: Path) -> RunConfig:
    """Read a TOML file.

    Raises:
        UsageError: missing, not TOML, or not a configuration.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such configuration file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected TOML in UTF-8; {error}") from None
    return from_dict(tables, source=str(path))


def to_toml(
    config: RunConfig,
    data: Mapping[str, Any] | None = None,
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The configuration as TOML; unset fields are left out, since TOML has no null.

    Args:
        config: the configuration.
        data: what the run was trained on, for a table `data` that `load` passes over.
        more: further sections, which `load` passes over likewise.
    """
    import tomli_w  # imported here: `msq.head` must load where it is not installed

    tables: dict[str, Any] = {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in {**to_dict(config), **(more or {})}.items()
    }
    if data is not None:
        tables["data"] = dict(data)
    return tomli_w.dumps(tables)


def deciding(config: RunConfig) -> dict[str, dict[str, Any]]:
    """As `to_dict`, without the fields of `ASIDE`."""
    return {
        section: {key: x for key, x in values.items() if key not in ASIDE.get(section, ())}
        for section, values in to_dict(config).items()
    }


def identity(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What stands for a configuration in a hash: what decides, but a `LATER` one at its default.

    So a sweep that was begun before a field existed finds its trials again.
    """
    default = to_dict(RunConfig())
    return {
        section: {
            key: value
            for key, value in values.items()
            if key not in LATER.get(section, ()) or value != default[section][key]
        }
        for section, values in deciding(config).items()
    }


def fingerprint(config: RunConfig) -> str:
    """SHA-256 over its `identity`."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()


def difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Lines such as `optim.lr: expected 0.001, found 0.0005`, for nested plain dicts."""
    lines = []
    for key in [*expected, *(k for k in found if k not in expected)]:
        left, right = expected.get(key), found.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            lines += [f"{key}.{line}" for line in difference(left, right)]
        elif left != right:
            lines.append(f"{key}: expected {left!r}, found {right!r}")
    return lines


def _section_type(name: str) -> Any:
    return typing.get_type_hints(RunConfig)[name]
