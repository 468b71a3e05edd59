"""A grid as a TOML file: what is kept fixed, and the axes along which it varies.

    name = "frames"
    store = "clips.zarr"              # or a table [extract], the settings of `msq extract`
    seeds = 3                         # train.seed = 0, 1, 2; the table has their mean and std
    [head]                            # as in a run's configuration: head, optim, train, features
    layers = 2
    [product]                         # every combination of these
    "head.queries" = ["text", "multimodal"]
    [zip]                             # these go along with each other
    "head.width" = [128, 256]
    "head.ffn" = [512, 1024]
    [[list]]                          # settings one by one, named
    name = "with positions"
    "head.query_position" = true
    [repeat]                          # averaged over, like seeds
    "features.partition" = ["split1", "split2"]
    [choose]                          # validation clips choose one
    "optim.lr" = [1e-3, 2e-3]
    [zero_shot]                       # class splits, as in `msq zero-shot`
    seen = [50, 75]
    splits = 10

Files that ship with msq (`presets`) are asked for by name.
"""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any

from msq.config import RunConfig
from msq.config_values import nearest, toml_value
from msq.errors import UsageError
from msq.head.grid_axes import ZERO_SHOT, read_axes, without, zero_shot_axes

SECTIONS = ("head", "optim", "train", "features", "extract")
AXES = ("product", "zip", "list", "repeat", "choose")
TABLES = (*SECTIONS, *AXES, "zero_shot", "paper")
PLAIN = ("name", "store", "seeds", "metrics", "by")
PATHS = ("manifest", "root", "out", "classes")


@dataclass(frozen=True)
class Setting:
    """One combination of the axes.

    Attributes:
        values: dotted key -> value, of all axes.
        row: those that make a line of the table.
        repeat: those that it averages over.
        choice: those that validation clips decide.
    """

    values: Mapping[str, Any]
    row: Mapping[str, Any]
    repeat: Mapping[str, Any]
    choice: Mapping[str, Any]


@dataclass(frozen=True)
class Grid:
    """A grid file, checked.

    Attributes:
        name: of the grid.
        source: the file, for messages.
        base: dotted key -> value that every trial has.
        axes: each a list of (kind, settings): the combinations are their product.
        store: path of a feature store; None where `extract.*` makes them.
        zero_shot: class splits; None for all classes.
        table: `metrics, by, paper`.
    """

    name: str
    source: str
    base: Mapping[str, Any]
    axes: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
    store: str | None
    zero_shot: Mapping[str, Any] | None
    table: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> list[Setting]:
        """Every combination, the last axis running fastest."""
        found = []
        for parts in itertools.product(*(values for _, values in self.axes)):
            kinds = [kind for kind, _ in self.axes]
            of: dict[str, dict[str, Any]] = {"row": {}, "repeat": {}, "choose": {}}
            values = dict(self.base)
            for kind, part in zip(kinds, parts, strict=True):
                named = {"setting": part["name"]} if "name" in part else part
                of[kind if kind in of else "row"].update(named)
                values |= {key: value for key, value in part.items() if key != "name"}
            found.append(Setting(values, of["row"], of["repeat"], of["choose"]))
        return found


def extract_fields() -> tuple[str, ...]:
    """The settings of stage one that a grid may name."""
    from msq.extract.request import ExtractRequest

    return tuple(one.name for one in dataclasses.fields(ExtractRequest) if one.name != "out")


def known_keys() -> list[str]:
    """Every dotted key that may stand in a grid."""
    hints = typing.get_type_hints(RunConfig)
    keys = [
        f"{section}.{key}" for section in hints for key in typing.get_type_hints(hints[section])
    ]
    keys += [f"extract.{name}" for name in extract_fields()]
    return [*keys, *(f"zero_shot.{name}" for name in ZERO_SHOT)]


def preset_names() -> list[str]:
    """Names of the grids that ship with msq."""
    names = [x.name for x in (resources.files("msq") / "presets").iterdir()]
    return sorted(x.removesuffix(".toml") for x in names if x.endswith(".toml"))


def preset_text(name: str) -> str:
    """The file of a preset."""
    return (resources.files("msq") / "presets" / f"{name}.toml").read_text(encoding="utf-8")


def read_grid(file: str | Path, overrides: Iterable[str] = ()) -> Grid:
    """Read a grid file, or the preset of this name.

    Args:
        file: a path, or the name of a preset.
        overrides: `key=value`, as for `msq train-head`; also `store=PATH`, `seeds=N` and
            `extract.*`. An axis of that key is dropped.

    Raises:
        UsageError: no such file or preset, not TOML, an unknown table or key (names the nearest),
            an empty axis, zipped lists of several lengths, a key on two axes, or neither a store
            nor an extraction.
    """
    path = Path(file)
    if path.suffix == ".toml" or path.exists():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: expected a grid file; {error}") from None
    elif str(file) in preset_names():
        text = preset_text(str(file))
    else:
        near = nearest(str(file), preset_names())
        raise UsageError(f"grid {str(file)!r}: no such file, and no preset of this name{near}")
    return parse_grid(text, str(file), overrides)


def parse_grid(text: str, source: str, overrides: Iterable[str] = ()) -> Grid:
    """A grid from the text of its file; see `read_grid`."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source}: expected TOML; {error}") from None
    keys = known_keys()
    for name in tables:
        if name not in (*TABLES, *PLAIN):
            near = nearest(name, (*TABLES, *PLAIN))
            raise UsageError(f"{source}: unknown {name!r}{near}")
    _check_plain(tables, source)
    base = {f"{section}.{key}": value for section in SECTIONS
            for key, value in _table(tables, section, source).items()}  # fmt: skip
    zero_shot = None if "zero_shot" not in tables else dict(_table(tables, "zero_shot", source))
    axes = read_axes(tables, source)
    store, seeds = tables.get("store"), tables.get("seeds")
    given = {}
    for assignment in overrides:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"override {assignment!r}: expected key=value")
        given[key.strip()] = toml_value(value.strip())
    if "store" in given:  # a store that is there needs no extraction
        base = {key: value for key, value in base.items() if not key.startswith("extract.")}
    _check_plain(given, "override")
    store, seeds = given.pop("store", store), given.pop("seeds", seeds)
    for key, value in given.items():
        _require_known(key, keys, "override")
        if key.startswith("zero_shot."):
            zero_shot = {**(zero_shot or {}), key.partition(".")[2]: value}
        else:
            base[key] = value
        axes = without(axes, key)
    if seeds is not None:
        values = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
        if not values:
            raise UsageError(f"{source}: seeds: expected 1 or more, found an empty axis ({seeds})")
        axes.append(("repeat", [{"train.seed": value} for value in values]))
    _check(source, keys, base, zero_shot, axes, store)
    if zero_shot is not None:
        axes = [*zero_shot_axes(source, zero_shot), *axes]
    table = {"metrics": list(tables.get("metrics", ())), "by": list(tables.get("by", ())),
             "paper": dict(_table(tables, "paper", source))}  # fmt: skip
    name = tables.get("name", Path(source).stem)
    return Grid(name, source, base, axes, store, zero_shot, table)


def _check_plain(values: Mapping[str, Any], source: str) -> None:
    """Refuse what stands outside of the tables and is of another type than it has to be."""
    kinds: dict[str, tuple[type | UnionType, str]] = {
        "name": (str, "a text"), "store": (str, "a path"),
        "seeds": (int | list, "a number or a list"),
        "metrics": (list, "a list of names"), "by": (list, "a list of names"),
    }  # fmt: skip
    for key, (kind, words) in kinds.items():
        if key in values and not isinstance(values[key], kind):
            raise UsageError(f"{source}: {key}: expected {words}, found {values[key]!r}")
    paper = values.get("paper", {})
    rows = paper.get("rows", []) if isinstance(paper, Mapping) else []
    for row in rows if isinstance(rows, list) else [rows]:
        if not isinstance(row, Mapping) or not isinstance(row.get("value"), int | float):
            raise UsageError(f"{source}: paper.rows: expected tables with a value, found {row!r}")


def _table(tables: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    found = tables.get(name, {})
    if not isinstance(found, Mapping):
        raise UsageError(f"{source}: {name} is a table, found the value {found!r}")
    return found


def _check(
    source: str,
    keys: Sequence[str],
    base: Mapping[str, Any],
    zero_shot: Mapping[str, Any] | None,
    axes: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    store: str | None,
) -> None:
    for key in base:
        _require_known(key, keys, source)
    seen: set[str] = set()
    for _, settings in axes:
        if not settings:
            raise UsageError(f"{source}: expected a value on every axis, found an empty axis")
        here = set().union(*settings) - {"name"}
        for key in sorted(here):
            _require_known(key, keys, source)
            if key in seen:
                raise UsageError(f"{source}: {key} stands on two axes")
        seen |= here
    extracts = [key for key in (*base, *sorted(seen)) if key.startswith("extract.")]
    if store is not None and extracts:
        raise UsageError(f"{source}: expected a store, or an extraction that makes one; found "
                         f"store = {store!r} and {', '.join(extracts)}")  # fmt: skip
    if store is None and not extracts:
        raise UsageError(f"{source}: expected features to train on: store = \"PATH\", or a table "
                         "[extract]; on the command line store=PATH")  # fmt: skip


def _require_known(key: str, keys: Sequence[str], source: str) -> None:
    if key not in keys:
        raise UsageError(f"{source}: unknown key {key}{nearest(key, keys)}")
