"""The offline tuner: which tile each kernel is launched with, and whether it beats the reference.

For each range of sizes: candidates that spill registers or do not fit are left out; those that are
wrong are left out; the rest are timed interleaved, forward and then each kernel of the backward
pass with the others held. The winner is timed against what the packed head does without kernels,
and that ratio decides what `auto` takes. Never at run time: a tile decides the order of additions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from msq.bench.kernel_builds import Build, Made, compile_for
from msq.bench.tune_candidates import Bucket, candidates
from msq.errors import UsageError
from msq.kernels.tiles import Tile, find_tile

Times = Mapping[str, Mapping[str, float]]  # name -> median, q25, q75 in ms
Note = Callable[[str], None]


@dataclass(frozen=True)
class Judge:
    """What the tuner asks about tiles; a GPU answers, or in a dry run nobody does.

    Attributes:
        right: whether a bucket's op with these tiles is right.
        time: of each of several choices of tiles; forward alone or both ways.
        against: time of the block of the head with these tiles, `kernel`, and of what runs without
            kernels, any other names.
    """

    right: Callable[[Bucket, Sequence[Tile]], bool]
    time: Callable[[Bucket, Mapping[str, Sequence[Tile]], bool], Times]
    against: Callable[[Bucket, Sequence[Tile]], Times]


@dataclass
class Tuning:
    """What was found for one bucket.

    Attributes:
        bucket: which.
        tiles: the winners, forward first; with `ratio` where it was measured.
        left_out: candidate -> why it was not timed.
        timed: candidate -> its time, for people.
    """

    bucket: Bucket
    tiles: list[Tile] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    timed: dict[str, Mapping[str, float]] = field(default_factory=dict)


def tune(
    bucket: Bucket, architecture: int, judge: Judge, machine: str, note: Note, most: int = 0
) -> Tuning:
    """One bucket.

    Args:
        bucket: which.
        architecture: such as 90.
        judge: of correctness and time.
        machine: what it runs on, for the record.
        note: is told every candidate and what became of it.
        most: candidates of each kernel at most; 0 takes all.

    Raises:
        UsageError: no candidate of a kernel is left.
    """
    builds = bucket.builds()
    found = Tuning(bucket)
    chosen = [_default(build, bucket, architecture) for build in builds]
    for place, build in enumerate(builds):
        fitting = _fitting(build, bucket, architecture, found, note, most)
        sets = {
            name: [*chosen[:place], tile, *chosen[place + 1 :]] for name, tile in fitting.items()
        }
        sets = {name: tiles for name, tiles in sets.items() if _is_right(judge, found, name, tiles)}
        if not sets:
            raise UsageError(f"{bucket}: no candidate of {build.op} is left; see the list")
        times = judge.time(bucket, sets, place > 0)
        if not times:
            raise UsageError(f"{bucket}: no candidate of {build.op} could be timed")
        found.timed |= times
        winner = min(times, key=lambda name: times[name]["median"])
        chosen = list(sets[winner])
        note(f"{build.op}: {winner}: {_shown(times[winner])}, of {len(sets)} timed")
    against = judge.against(bucket, chosen)
    if "kernel" not in against or len(against) < 2:
        raise UsageError(f"{bucket}: kernel and reference could not be timed: {sorted(against)}")
    reference = min((n for n in against if n != "kernel"), key=lambda n: against[n]["median"])
    ratio = against[reference]["median"] / against["kernel"]["median"]
    note(f"{bucket}: {ratio:.2f} x the reference ({reference})")
    measured = {
        "kernel_us": _microseconds(against["kernel"]), "reference": reference,
        "reference_us": _microseconds(against[reference]), "shape": str(bucket), "machine": machine,
    }  # fmt: skip
    chosen[0] = replace(chosen[0], ratio=round(ratio, 3), measured=measured)
    found.tiles = chosen
    return found


def merged(table: Iterable[Tile], found: Iterable[Tuning]) -> list[Tile]:
    """The table with what was found; lines for the same op, architecture and size give way."""
    fresh = [tile for tuning in found for tile in tuning.tiles]
    replaced = {(tile.op, tile.architecture, tile.keys) for tile in fresh}
    kept = [t for t in table if (t.op, t.architecture, t.keys) not in replaced]
    return [*kept, *fresh]


def untimed(buckets: Iterable[Bucket], timed: Iterable[Bucket], architecture: int) -> list[Tuning]:
    """Lines without a ratio for those buckets of a timed op that were not timed themselves.

    Without them a smaller size would find the line of a larger one, and take its ratio for its own.
    """
    done = set(timed)
    ops = {bucket.op for bucket in done}
    return [
        Tuning(b, [replace(_default(build, b, architecture), ratio=None, measured=None)
                   for build in b.builds()])
        for b in buckets
        if b.op in ops and b not in done
    ]  # fmt: skip


def write_table(file: Path, tiles: Iterable[Tile]) -> None:
    """One tile a line, as the package reads them."""
    lines = []
    for tile in tiles:
        line: dict[str, Any] = {
            "op": tile.op, "architecture": tile.architecture, "keys": tile.keys,
            "sizes": dict(tile.sizes), "warps": tile.warps, "stages": tile.stages,
        }  # fmt: skip
        if tile.ratio is not None:
            line |= {"ratio": tile.ratio, "measured": dict(tile.measured or {})}
        lines.append(" " + json.dumps(line))
    file.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def named(tile: Tile) -> str:
    """A candidate in a word or two."""
    sizes = " ".join(f"{name}={size}" for name, size in tile.sizes.items())
    return f"{tile.op} {sizes} warps={tile.warps} stages={tile.stages}"


def _fitting(
    build: Build, bucket: Bucket, architecture: int, found: Tuning, note: Note, most: int
) -> dict[str, Tile]:
    """Candidates that compile to something that neither spills nor asks for too much."""
    fitting: dict[str, Tile] = {}
    tiles = list(candidates(build.op, f"sm_{architecture}", bucket.keys))
    for tile in tiles[: most or len(tiles)]:
        reason = _obstacle(build, tile, architecture)
        note(f"  {named(tile)}: {reason or 'fits'}")
        if reason:
            found.left_out[named(tile)] = reason
        else:
            fitting[named(tile)] = tile
    return fitting


def _obstacle(build: Build, tile: Tile, architecture: int) -> str:
    try:
        made: Made = compile_for(build, architecture, tile)
    except Exception as error:  # the compiler's own, of many kinds
        return f"does not compile: {(str(error).strip() or repr(error)).splitlines()[0][:120]}"
    if made.stack:
        return f"spills ({made.stack} bytes of stack)"
    return "" if made.fits(architecture) else f"{made.shared} bytes of shared memory"


def _is_right(judge: Judge, found: Tuning, name: str, tiles: Sequence[Tile]) -> bool:
    try:
        reason = "" if judge.right(found.bucket, tiles) else "wrong"
    except Exception as error:  # such as a launch that asks for too much
        reason = f"does not run: {(str(error).strip() or repr(error)).splitlines()[0][:120]}"
    if reason:
        found.left_out[name] = reason
    return not reason


def _default(build: Build, bucket: Bucket, architecture: int) -> Tile:
    capability = (architecture // 10, architecture % 10)
    tile = find_tile(build.op, capability, build.keys)
    return replace(tile, architecture=f"sm_{architecture}", keys=bucket.keys)


def _microseconds(times: Mapping[str, float]) -> dict[str, float]:
    return {name: round(1e3 * times[name], 2) for name in ("median", "q25", "q75")}


def _shown(times: Mapping[str, float]) -> str:
    us = _microseconds(times)
    return f"{us['median']:g} us ({us['q25']:g} to {us['q75']:g})"
