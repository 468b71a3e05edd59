"""The axes of a grid file: lists of settings, whose product are the trials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msq.config_values import nearest
from msq.errors import UsageError

# Kind (`product`, `zip`, `list`, `repeat`, `choose`, `row`) and the settings along the axis.
Axes = list[tuple[str, list[Mapping[str, Any]]]]
ZERO_SHOT = ("seen", "splits", "classifier", "class_order", "split_dir")


def read_axes(tables: Mapping[str, Any], source: str) -> Axes:
    """Every axis: its kind, and the settings along it.

    Raises:
        UsageError: an axis that is no list of values, zipped lists of several lengths, or entries
            of `[[list]]` that are no tables or share a name, which is their row.
    """
    axes: Axes = []
    for kind in ("product", "zip", "repeat", "choose"):
        found = tables.get(kind, {})
        for table in found if kind == "zip" and isinstance(found, list) else [found]:
            if not isinstance(table, Mapping):
                raise UsageError(f"{source}: {kind} is a table, found {table!r}")
            for key, values in table.items():
                if not isinstance(values, list) or not values:
                    what = "an empty axis" if values == [] else f"{values!r}"
                    raise UsageError(f"{source}: {kind}: {key}: expected a list of values, "
                                     f"found {what}")  # fmt: skip
            if kind != "zip":
                axes += [(kind, [{key: x} for x in values]) for key, values in table.items()]
            elif table:
                lengths = {key: len(values) for key, values in table.items()}
                if len(set(lengths.values())) > 1:
                    found_words = ", ".join(f"{k}: {n}" for k, n in lengths.items())
                    raise UsageError(
                        f"{source}: zip: expected lists of one length, found {found_words}"
                    )
                axes.append(
                    (
                        kind,
                        [
                            dict(zip(table, one, strict=True))
                            for one in zip(*table.values(), strict=True)
                        ],
                    )
                )
    if "list" in tables:
        axes.append(("list", _listed(tables["list"], source)))
    return axes


def _listed(listed: Any, source: str) -> list[Mapping[str, Any]]:
    """The settings of `[[list]]`, each with a row of its own: by its name, where it has one."""
    tables = isinstance(listed, list) and all(isinstance(one, Mapping) for one in listed)
    if not tables or not listed:
        raise UsageError(f"{source}: list: expected tables [[list]], found {listed!r}")
    names = [str(one["name"]) for one in listed if "name" in one]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            f"{source}: list: expected a name of its own for each entry, found "
            f"{names.count(twice)} of the name {twice!r}; for the one that does best on validation "
            "clips there is [choose]"
        )
    return [dict(one) for one in listed]


def without(axes: Axes, key: str) -> Axes:
    """The axes without a key; what has nothing left is dropped."""
    left: Axes = []
    for kind, settings in axes:
        kept: list[Mapping[str, Any]] = [
            {k: v for k, v in one.items() if k != key} for one in settings
        ]
        distinct = [one for k, one in enumerate(kept) if one not in kept[:k]]
        if any(distinct):
            left.append((kind, distinct))
    return left


def zero_shot_axes(source: str, zero_shot: Mapping[str, Any]) -> Axes:
    """The shares of seen classes, and the number of the split, over which tables average."""
    for key in zero_shot:
        if key not in ZERO_SHOT:
            near = nearest(key, ZERO_SHOT)
            raise UsageError(f"{source}: unknown key zero_shot.{key}{near}")
    shares = zero_shot.get("seen", [50, 75])
    shares = shares if isinstance(shares, list) else [shares]
    for share in shares:
        if isinstance(share, bool) or not isinstance(share, int | float):
            raise UsageError(
                f"{source}: zero_shot.seen: expected shares in percent, found {share!r}"
            )
    splits = zero_shot.get("splits", 10)
    if isinstance(splits, bool) or not isinstance(splits, int):
        raise UsageError(f"{source}: zero_shot.splits: expected a number, found {splits!r}")
    if not shares:
        raise UsageError(
            f"{source}: zero_shot.seen: expected shares in percent, found an empty axis"
        )
    axes: Axes = []
    if "split_dir" not in zero_shot:
        axes.append(("row", [{"zero_shot.seen": x} for x in shares]))
        count = 1 if zero_shot.get("class_order") else splits
        if count < 1:
            raise UsageError(f"{source}: zero_shot.splits: expected 1 or more, found {count}")
        axes.append(("repeat", [{"split": k} for k in range(count)]))
    return axes
