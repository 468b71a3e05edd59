"""Tile sizes by architecture, op and shape, from a table that is part of the package.

Nothing is tuned at run time: the choice of a tile changes the order of additions, and two runs with
one seed must give the same bits. `benchmarks/tune.py` writes the table on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Tile:
    """How one kernel is launched.

    Attributes:
        op: name of the op.
        architecture: such as `sm_90`; `any` for the safe default.
        keys: largest size it is meant for.
        sizes: constants of the kernel, such as `BLOCK_ROWS`.
        warps: per program.
        stages: of the software pipeline.
        ratio: time of the reference over time of the kernel, both ways, where that was measured,
            else None.
        measured: what was measured, for people: times in microseconds, machine, versions, date.
    """

    op: str
    architecture: str
    keys: int
    sizes: Mapping[str, int]
    warps: int
    stages: int
    ratio: float | None = None
    measured: Mapping[str, Any] | None = None

    def options(self) -> dict[str, int | bool]:
        """What the compiler is told.

        Fusing a product and a sum is asked for by name: versions of Triton differ in what they
        do unasked.
        """
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def launch(self) -> dict[str, int | bool]:
        """Keyword arguments of the launch: constants and options."""
        return {**self.sizes, **self.options()}


@functools.cache
def all_tiles() -> tuple[Tile, ...]:
    """The whole table."""
    table: list[dict[str, Any]] = json.loads(
        files("msq.kernels").joinpath("tiles.json").read_text(encoding="utf-8")
    )
    return tuple(Tile(**line) for line in table)


_forced: dict[str, Tile] = {}


@contextlib.contextmanager
def forced(*tiles: Tile) -> Iterator[None]:
    """These tiles for their ops while it lasts, whatever the table says: for the tuner."""
    before = dict(_forced)
    _forced.update({tile.op: tile for tile in tiles})
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def find_tile(op: str, capability: tuple[int, int] | None, keys: int) -> Tile:
    """The tile for one op: that of the architecture where it has one, else the safe default.

    Of several, the one for the smallest `keys` that is large enough.

    Raises:
        KeyError: the op has no tile for so many keys.
    """
    return _forced.get(op) or _from_table(op, capability, keys)


@functools.lru_cache(maxsize=256)
def _from_table(op: str, capability: tuple[int, int] | None, keys: int) -> Tile:
    architecture = "any" if capability is None else f"sm_{capability[0]}{capability[1]}"
    for wanted in (architecture, "any"):
        fitting = [
            tile
            for tile in all_tiles()
            if tile.op == op and tile.architecture == wanted and keys <= tile.keys
        ]
        if fitting:
            return min(fitting, key=lambda tile: tile.keys)
    raise KeyError(f"{op}: no tile for {keys}")
