"""Runs cases: the gate first, then all sides interleaved, then medians, quartiles and ratios.

Interleaving (every side once a round, in random order) lets other load on the machine hit all
sides alike; ratios are taken within the rounds. Two clocks run: wall time, and the processor time
of the process, which is what to trust on a busy machine where the work is on the CPU.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from msq.bench.cases import Case, Prepared, Settings, Side
from msq.bench.machine import machine

Progress = Callable[[int, int, str], None]
VERIFICATION_FAILED = 4


class Taken(NamedTuple):
    """Seconds of one run by both clocks."""

    wall: float
    cpu: float


def run_cases(
    cases: Sequence[Case], settings: Settings, progress: Progress | None = None
) -> dict[str, Any]:
    """The document of `msq bench`.

    Returns:
        `machine`, `settings`, `ceilings` (GFLOP/s of one large matrix product by precision, where
        a case counts operations) and `cases`: for each `name, compares, gate{ok, worst, tolerance,
        what}, base, rounds, sides{NAME: {median, q25, q75, unit, cpu{median, q25, q75, unit}}},
        ratios{"NAME / BASE": {median, q25, q75}}` of times, `cpu_ratios` likewise, `mfu{NAME}` and
        `left_out{NAME: reason}`, `figures{WHAT: {value, goal, most, met}}`. Where the gate is red,
        `sides` and `ratios` are empty.
        `not_run{CASE: reason}` are the cases that say nothing on this machine.
    """
    ceilings: dict[str, float] = {}
    found = []
    not_run = {case.name: case.not_here for case in cases if case.not_here}
    cases = [case for case in cases if not case.not_here]
    for number, case in enumerate(cases):
        if progress is not None:
            progress(number, len(cases), case.name)
        found.append(run_case(case, settings, ceilings))
    if progress is not None:
        progress(len(cases), len(cases), "")
    return {
        "machine": machine(settings.device),
        "settings": {
            "quick": settings.quick,
            "compile": settings.compile,
            "emulated": settings.emulated,
        },
        "ceilings": ceilings,
        "cases": found,
        "not_run": not_run,
    }


def run_case(case: Case, settings: Settings, ceilings: dict[str, float]) -> dict[str, Any]:
    """One case; `ceilings` is read, and filled where one is missing."""
    rounds = settings.rounds or (2 if settings.quick else case.rounds)
    with case.prepare(settings) as prepared:
        gate = prepared.gate()
        document: dict[str, Any] = {
            "name": case.name,
            "compares": case.compares,
            "gate": {
                "ok": gate.ok, "worst": gate.worst, "tolerance": gate.tolerance, "what": gate.what,
            },
            "base": case.base,
            "rounds": rounds,
            "sides": {}, "ratios": {}, "cpu_ratios": {}, "mfu": {}, "left_out": {}, "figures": {},
        }  # fmt: skip
        if not gate.ok:
            return document
        taken = interleaved(prepared.sides(), rounds, warm_up=1)
        document["left_out"] = dict(prepared.left_out)
        document["figures"] = {k: f.to_dict() for k, f in prepared.figures(taken).items()}
        if prepared.flops is not None and prepared.precision not in ceilings:
            size = 128 if settings.quick else 8192 if settings.device == "cuda" else 2048
            ceilings[prepared.precision] = ceiling(settings.device, prepared.precision, size) / 1e9
    return document | measured(case, prepared, taken, ceilings)


def measured(
    case: Case, prepared: Prepared, taken: Mapping[str, list[Taken]], ceilings: dict[str, float]
) -> dict[str, Any]:
    """Medians, quartiles and ratios of a case whose gate is green."""
    sides, ratios, cpu_ratios, mfu = {}, {}, {}, {}
    base = taken[case.base]
    for name, times in taken.items():
        wall = [t.wall for t in times]
        values = [_value(t, case, prepared) for t in wall]
        cpu = {**quartiles([1e3 * t.cpu for t in times]), "unit": "ms"}
        sides[name] = {**quartiles(values), "unit": case.unit, "cpu": cpu}
        if name != case.base:
            pairs = list(zip(times, base, strict=True))
            ratios[f"{name} / {case.base}"] = quartiles([a.wall / b.wall for a, b in pairs])
            if all(b.cpu > 0 for b in base):
                share = quartiles([a.cpu / b.cpu for a, b in pairs])
                cpu_ratios[f"{name} / {case.base}"] = share
        if prepared.flops is not None:
            reached = prepared.flops / statistics.median(wall) / 1e9
            mfu[name] = reached / ceilings[prepared.precision]
    return {"sides": sides, "ratios": ratios, "cpu_ratios": cpu_ratios, "mfu": mfu}


def exit_code(document: dict[str, Any]) -> int:
    """0, or 4 where a gate is red."""
    return 0 if all(case["gate"]["ok"] for case in document["cases"]) else VERIFICATION_FAILED


def interleaved(
    sides: Mapping[str, Side], rounds: int, warm_up: int = 1, seed: int = 0
) -> dict[str, list[Taken]]:
    """Every side once in each round, in random order.

    Args:
        sides: what to run.
        rounds: how often each.
        warm_up: rounds before them that are not counted.
        seed: of the order.
    """
    # Asking for a GPU takes milliseconds where there is none: once, not in every round.
    synchronise = synchroniser()
    order = random.Random(seed)
    taken: dict[str, list[Taken]] = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        for name in order.sample(list(sides), len(sides)):
            side = sides[name]
            if side.before is not None:
                side.before()
            synchronise()
            wall, cpu = time.perf_counter(), time.process_time()
            side.run()
            synchronise()
            if number >= warm_up:
                taken[name].append(Taken(time.perf_counter() - wall, time.process_time() - cpu))
    return taken


def synchroniser() -> Callable[[], object]:
    """Waits for the GPU; does nothing where there is none."""

    def nothing() -> None:
        pass

    wait: Callable[[], object] = torch.cuda.synchronize
    return wait if torch.cuda.is_available() else nothing


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """`median`, `q25` and `q75`; of one value all three are it."""
    if len(values) < 2:
        return dict.fromkeys(("median", "q25", "q75"), values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q25": low, "q75": high}


def ceiling(device: str, precision: str, size: int, rounds: int = 5) -> float:
    """FLOP/s of one product of two square matrices of random numbers, the best of some runs."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    out = torch.empty_like(a)
    runs = interleaved({"product": Side(lambda: torch.mm(a, b, out=out))}, rounds)["product"]
    return 2 * size**3 / min(t.wall for t in runs)


def _value(seconds: float, case: Case, prepared: Prepared) -> float:
    if case.unit == "ms":
        return 1e3 * seconds
    assert prepared.megabytes is not None
    return prepared.megabytes / seconds
