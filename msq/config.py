"""The configuration of a run: frozen dataclasses, TOML in and out, dotted overrides, fingerprint.

A configuration has four sections, which are also the tables of its TOML file and the first part
of an override's key: `head`, `optim`, `train`, `features`.

    config = override(RunConfig(), ["head.queries=text", "optim.lr=3e-4"])
    print(to_toml(config), fingerprint(config))
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from msq.errors import UsageError

Queries = Literal["vanilla", "text", "multimodal"]
Classifier = Literal["per-class", "shared", "text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """Shape and ablation switches of the head.

    Attributes:
        queries: what the class queries start from (Section 3.2 of the paper): `vanilla` random,
            `text` the class text embeddings, `multimodal` text plus the clip's image feature.
        classifier: `per-class` (Eq. 7), `shared` (one vector for all classes) or `text` (a vector
            generated from the class text). Only the last two can score classes never trained.
        width: D; None means the width of the text embeddings (of the tokens where no text is).
        layers: decoder layers L.
        heads: attention heads H; must divide the width.
        ffn: hidden width of the feed-forward part; None means 4 * width.
        dropout: probability of every dropout of the decoder.
        memory_position: position code added to the keys of the cross-attention.
        query_position: learned position per class, added to query and key; starts at zero.
    """

    queries: Queries = "multimodal"
    classifier: Classifier = "per-class"
    width: int | None = None
    layers: int = 6
    heads: int = 8
    ffn: int | None = None
    dropout: float = 0.1
    memory_position: Literal["sincos", "none"] = "sincos"
    query_position: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no head can have."""
        _at_least("head.layers", self.layers, 1)
        _at_least("head.heads", self.heads, 1)
        if self.width is not None:
            _at_least("head.width", self.width, 1)
        if self.ffn is not None:
            _at_least("head.ffn", self.ffn, 1)
        _share("head.dropout", self.dropout)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedule.

    Attributes:
        name: `adamw` (decoupled decay) or `adam` (as in the paper).
        lr: highest learning rate; the paper's is 1e-5 with `adam` and 100 epochs.
        weight_decay: applied to matrices only, never to biases and LayerNorm.
        schedule: `cosine` to zero over all epochs, or `constant`; both after the warm-up.
        warmup: epochs of linear warm-up, fractions allowed.
        clip_grad: largest gradient norm; 0 switches clipping off.
        beta2: second-moment decay.
    """

    name: Literal["adamw", "adam"] = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 1.0
    clip_grad: float = 1.0
    beta2: float = 0.999

    def __post_init__(self) -> None:
        """Refuse values that no optimiser can have."""
        for key in ("lr", "weight_decay", "warmup", "clip_grad"):
            _at_least(f"optim.{key}", getattr(self, key), 0)
        _share("optim.beta2", self.beta2)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The loop.

    Attributes:
        protocol: which reading of the method the run follows; every result names it.
        loss: `bce`, `ce`, or `auto`: `bce` for multilabel and `ce` for singlelabel (Eq. 8).
        epochs: passes over the training clips.
        batch: clips per step; a smaller training set makes it smaller.
        seed: of the start, the order, the dropout and the validation tenth.
        val: share of the training clips held out, where the dataset has no validation split;
            0 trains on everything, and then nothing is selected and nothing stops early.
        select: `best` keeps the weights of the epoch with the highest validation mAP, `last`
            those of the last epoch.
        patience: epochs without a better validation mAP after which training stops; 0 never.
        ema: decay of the averaged weights, which are then the ones validated, kept and tested;
            0 uses the raw weights.
    """

    protocol: Literal["paper"] = "paper"
    loss: Literal["auto", "bce", "ce"] = "auto"
    epochs: int = 30
    batch: int = 32
    seed: int = 0
    val: float = 0.1
    select: Literal["best", "last"] = "best"
    patience: int = 0
    ema: float = 0.99

    def __post_init__(self) -> None:
        """Refuse values that no loop can have."""
        _at_least("train.epochs", self.epochs, 1)
        _at_least("train.batch", self.batch, 1)
        _at_least("train.patience", self.patience, 0)
        _share("train.val", self.val)
        _share("train.ema", self.ema)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureConfig:
    """Which arrays of the store are read.

    Attributes:
        video: name of the video encoder; None where the store has one only.
        image: name of the image encoder; None where the store has one only.
        text: name of the text encoder; None where the store has one only.
        prompt: name of the prompt; None where the store has one only.
        view: 0 is the clean view.
    """

    video: str | None = None
    image: str | None = None
    text: str | None = None
    prompt: str | None = None
    view: int = 0

    def __post_init__(self) -> None:
        """Refuse a view that no store can have."""
        _at_least("features.view", self.view, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that decides a training run, apart from the features themselves."""

    head: HeadConfig = field(default_factory=HeadConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise UsageError(f"{name}: expected at least {low}, found {value}")


def _share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UsageError(f"{name}: expected a share in [0, 1), found {value}")


def to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Plain dicts, one per section, every field present (None where it is unset)."""
    return dataclasses.asdict(config)


def from_dict(tables: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """A RunConfig from plain dicts; missing fields take their defaults.

    A table `data` is passed over: run directories write there what they were trained on.

    Raises:
        UsageError: an unknown section or field (names the nearest), or a value of another type.
    """
    sections: dict[str, Any] = {}
    known = {f.name: _section_type(f.name) for f in dataclasses.fields(RunConfig)}
    for section, values in tables.items():
        if section == "data":
            continue
        if section not in known:
            raise UsageError(f"{source}: unknown section {section!r}{_nearest(section, known)}")
        if not isinstance(values, Mapping):
            raise UsageError(f"{source}: {section} is a section, found the value {values!r}")
        hints = typing.get_type_hints(known[section])
        checked = {}
        for key, value in values.items():
            if key not in hints:
                dotted = [f"{s}.{k}" for s, t in known.items() for k in typing.get_type_hints(t)]
                raise UsageError(
                    f"{source}: unknown key {section}.{key}{_nearest(f'{section}.{key}', dotted)}"
                )
            checked[key] = _checked(f"{source}: {section}.{key}", value, hints[key])
        sections[section] = known[section](**checked)
    return RunConfig(**sections)


def override(config: RunConfig, assignments: Iterable[str]) -> RunConfig:
    """Apply overrides such as `optim.lr=1e-4`, `head.queries=text`, `head.width=none`.

    The value is read as TOML where it is TOML, otherwise as the bare string it is.

    Raises:
        UsageError: not of the form `section.key=value`, an unknown key (names the nearest), or a
            value of another type.
    """
    tables = to_dict(config)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot:
            nearest = _nearest(key.strip(), [f"{s}.{k}" for s, t in tables.items() for k in t])
            raise UsageError(f"override {assignment!r}: expected section.key=value{nearest}")
        tables.setdefault(section, {})[name] = _toml_value(text.strip())
    return from_dict(tables, source="override")


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


def to_toml(config: RunConfig, data: Mapping[str, Any] | None = None) -> str:
    """The configuration as TOML; unset fields are left out, since TOML has no null.

    Args:
        config: the configuration.
        data: what the run was trained on, for a table `data` that `load` passes over.
    """
    import tomli_w  # imported here: `msq.head` must load where it is not installed

    tables: dict[str, Any] = {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in to_dict(config).items()
    }
    if data is not None:
        tables["data"] = dict(data)
    return tomli_w.dumps(tables)


def fingerprint(config: RunConfig) -> str:
    """SHA-256 over every field."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


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


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else f"; known: {', '.join(names)}"


def _toml_value(text: str) -> Any:
    if text.lower() in ("none", "null"):
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value` if it has the type `hint`; whole numbers pass for fractions.

    Raises:
        UsageError: another type, or a word that is not one of the allowed ones.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option) and isinstance(value, str):
                return value
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif option is type(None):
            if value is None:
                return None
        elif type(value) is option:
            return value
    wanted = " or ".join(_type_words(option) for option in options)
    raise UsageError(f"{name}: expected {wanted}, found {value!r}")


def _type_words(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(typing.get_args(option))
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return words.get(option, "none")
