"""The configuration of end-to-end training: that of a head, and two sections of its own.

`backbone` says what of the video encoder learns and how, `clips` what the step is shown. They stand
in the same TOML file as the sections of `msq.config`, and are overridden in the same way:

    settings = end_to_end_settings(Path("run.toml"), ["backbone.unfreeze=last:2", "optim.lr=3e-4"])
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from msq import config as configuration
from msq.config import RunConfig
from msq.config_values import checked_section, nearest, toml_value
from msq.errors import UsageError

_LAST = re.compile(r"last:([1-9]\d*)")
UNFREEZE = "none, norms, temporal, last:N or all"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneConfig:
    """What of the video encoder learns, and how.

    Attributes:
        unfreeze: `none`, `norms` (all LayerNorms), `temporal` (what acts over time), `last:N` (the
            last N layers and the norm after them) or `all`.
        lr: highest learning rate of its last layer; schedule and warm-up are those of `optim`.
        layer_decay: each layer further down has a rate this much lower.
        weight_decay: applied to matrices only.
        checkpointing: `on` computes each layer's activations again in the backward pass: a third
            more time, a fraction of the memory.
        accumulate: parts in which a step's batch is taken, one after the other.
        compile: `on` puts the encoder through torch.compile.
        shard: over several processes: `off` keeps the encoder whole in each (DDP), `fsdp` divides
            it among them (FSDP2).
    """

    unfreeze: str = "all"
    lr: float = 1e-5
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    checkpointing: Literal["off", "on"] = "off"
    accumulate: int = 1
    compile: Literal["off", "on"] = "off"
    shard: Literal["off", "fsdp"] = "off"

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        named = self.unfreeze in ("none", "norms", "temporal", "all")
        if not named and not _LAST.fullmatch(self.unfreeze):
            raise UsageError(f"backbone.unfreeze: expected {UNFREEZE}, found {self.unfreeze!r}")
        for key in ("lr", "weight_decay"):
            if not getattr(self, key) >= 0:
                raise UsageError(f"backbone.{key}: expected at least 0, found {getattr(self, key)}")
        if not 0 < self.layer_decay <= 1:
            raise UsageError(
                f"backbone.layer_decay: expected a number in (0, 1], found {self.layer_decay}"
            )
        if self.accumulate < 1:
            raise UsageError(f"backbone.accumulate: expected at least 1, found {self.accumulate}")

    @property
    def last_layers(self) -> int | None:
        """N of `last:N`."""
        found = _LAST.fullmatch(self.unfreeze)
        return None if found is None else int(found[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipsConfig:
    """What the step is shown.

    Attributes:
        augment: of training clips: `none`; `consistent`, what augmented views of a store are, anew
            for each step; `official`, as the authors' code does (no flip, frames at segment
            centres, colours drawn for every frame).
        image: `clean` takes the image feature of a clip's clean view, made once; `shown` runs the
            image tower on the frames of the step.
        cache: where decoded frames of clean views are kept: `memory`, `disk`, `off`, or `auto`,
            the first of them with room.
        prefetch_mb: MiB of frames that are decoded ahead of the step.
        test_views: such as `10x3`, clips x crops: the test clips are scored in each of these
            views, and the probabilities averaged; None scores the clean view.
    """

    augment: Literal["none", "consistent", "official"] = "consistent"
    image: Literal["clean", "shown"] = "clean"
    cache: Literal["auto", "off", "memory", "disk"] = "auto"
    prefetch_mb: int = 256
    test_views: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        if self.prefetch_mb < 1:
            raise UsageError(f"clips.prefetch_mb: expected at least 1, found {self.prefetch_mb}")


# What the authors' code does (method.md, section 3): nothing else goes by its name.
OFFICIAL_FIXED: dict[str, dict[str, Any]] = {
    "backbone": {"unfreeze": "all", "layer_decay": 1.0, "weight_decay": 0.0},
    "clips": {"augment": "official", "image": "shown"},
}
OFFICIAL_LR = 1e-5
_SECTIONS: dict[str, type[BackboneConfig] | type[ClipsConfig]] = {
    "backbone": BackboneConfig,
    "clips": ClipsConfig,
}


@dataclass(frozen=True, kw_only=True)
class EndToEndConfig:
    """Everything that decides an end-to-end run, apart from the clips themselves.

    Raises:
        UsageError: a setting that contradicts the protocol, or a whole-step CUDA graph.
    """

    run: RunConfig = field(default_factory=RunConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    clips: ClipsConfig = field(default_factory=ClipsConfig)

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.run.train.graph == "on":
            raise UsageError("train.graph = on: end-to-end steps are no CUDA graph; use auto")
        if self.run.features.train_views != "clean" or self.run.features.view:
            raise UsageError(
                "features.view and features.train_views are of stored features; what clips are "
                "shown in end-to-end training is clips.augment"
            )
        if self.run.train.protocol != "official":
            return
        wrong = [
            f"{section}.{key} = {value} (found {found})"
            for section, values in OFFICIAL_FIXED.items()
            for key, value in values.items()
            if (found := getattr(getattr(self, section), key)) != value
        ]
        if wrong:
            raise UsageError(
                f"train.protocol = official means {', '.join(wrong)}; leave them out, or choose "
                "--protocol paper (docs/protocols.md)"
            )

    def sections(self) -> dict[str, dict[str, Any]]:
        """The two sections as plain values, unset ones left out."""
        tables = {
            "backbone": dataclasses.asdict(self.backbone),
            "clips": dataclasses.asdict(self.clips),
        }
        return {
            name: {key: value for key, value in table.items() if value is not None}
            for name, table in tables.items()
        }


def end_to_end_settings(file: Path | None, assignments: Sequence[str] = ()) -> EndToEndConfig:
    """A configuration: defaults of the protocol, then the file, then `section.key=value`.

    Raises:
        UsageError: as `msq.config.load` and `msq.config.override`.
    """
    tables, source = _tables(file), "configuration" if file is None else str(file)
    known = {f.name: f.type for f in dataclasses.fields(RunConfig)} | _SECTIONS
    unknown = [name for name in tables if name not in {*known, *configuration.PASSED_OVER}]
    if unknown:
        near = nearest(unknown[0], known)
        raise UsageError(f"{source}: unknown section {unknown[0]!r}{near}")
    run = configuration.from_dict(tables, source)
    mine: list[str] = []
    others: list[str] = []
    for assignment in assignments:
        section = assignment.partition("=")[0].strip().partition(".")[0]
        (mine if section in _SECTIONS else others).append(assignment)
    run = configuration.override(run, others)
    values = {name: dict(tables.get(name, {})) for name in _SECTIONS}
    for assignment in mine:
        key, equals, text = assignment.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot:
            raise UsageError(f"override {assignment!r}: expected section.key=value")
        values[section][name] = toml_value(text.strip())
    official = run.train.protocol == "official"
    made = {}
    for name, kind in _SECTIONS.items():
        checked = checked_section(name, values[name], _SECTIONS, source)
        made[name] = kind(**{**(OFFICIAL_FIXED[name] if official else {}), **checked})
    return EndToEndConfig(run=run, **made)  # type: ignore[arg-type]


def end_to_end_changes(config: EndToEndConfig) -> list[str]:
    """`protocol_changes` of the run, with those of the backbone's rate."""
    lines = configuration.protocol_changes(config.run)
    if config.run.train.protocol == "official" and config.backbone.lr != OFFICIAL_LR:
        lines.append(f"backbone.lr: official {OFFICIAL_LR}, here {config.backbone.lr}")
    return lines


def _tables(file: Path | None) -> Mapping[str, Any]:
    if file is None:
        return {}
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{file}: no such configuration file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: expected TOML in UTF-8; {error}") from None
