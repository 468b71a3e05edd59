"""Which fields of their configurations tell runs apart that a table would show alike."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.config import ASIDE

if TYPE_CHECKING:
    from msq.report.tables import Table

SECTIONS = ("head", "optim", "train", "features")
MOST = 4  # columns


def told_apart(tables: Sequence[Table], paths: Sequence[Path]) -> list[Table]:
    """Tables of runs, with a label for each field in which runs of the same labels differ.

    The fields are in the order of the configuration, `MOST` of them; a note names those beyond.
    Runs of different protocols are told apart by these.
    Sweeps, whose axes say what differs, and runs without a `config.toml` stay as they are.

    Args:
        tables: of `paths`, in their order.
        paths: folders of runs and of sweeps.
    """
    fields = {k: _fields(path / "config.toml") for k, path in enumerate(paths)
              if not (path / "plan.json").exists()}  # fmt: skip
    fields = {k: found for k, found in fields.items() if found}
    alike: dict[str, list[int]] = {}
    for k in fields:
        protocol = fields[k].get("train.protocol")  # a column of its own, and what it fixes follows
        shown = json.dumps([protocol, *(dict(row.labels) for row in tables[k].rows)],
                           sort_keys=True)  # fmt: skip
        alike.setdefault(shown, []).append(k)
    names = dict.fromkeys(name for found in fields.values() for name in found)
    differing = [name for name in sorted(names, key=lambda x: SECTIONS.index(x.split(".")[0]))
                 if any(len({json.dumps(fields[k].get(name)) for k in group}) > 1
                        for group in alike.values())]  # fmt: skip
    told = list(tables)
    for k, found in fields.items():
        more = {name: found.get(name) for name in differing[:MOST]}
        rows = [replace(row, labels={**row.labels, **more}) for row in tables[k].rows]
        told[k] = replace(tables[k], axes=(*tables[k].axes, *more), rows=rows)
    if differing[MOST:]:
        last = max(fields)
        note = f"the runs differ in {', '.join(differing[MOST:])}, too"
        told[last] = replace(told[last], notes=(*told[last].notes, note))
    return told


def _fields(file: Path) -> Mapping[str, Any]:
    """`section.key` -> value, but of what decides nothing; {} where the file cannot be read."""
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {
        f"{section}.{key}": value
        for section in SECTIONS
        if isinstance(found.get(section), dict)
        for key, value in found[section].items()
        if key not in ASIDE.get(section, ())
    }
