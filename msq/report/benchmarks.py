"""`msq bench`: cases run, shown as tables or as one JSON document."""

from __future__ import annotations

from typing import Any

from msq.bench.cases import Settings, registry
from msq.bench.machine import line
from msq.bench.runner import exit_code, run_cases
from msq.report import terminal


def run(
    kind: str,
    *,
    quick: bool = False,
    rounds: int | None = None,
    device: str = "cpu",
    compile: bool = False,
    emulated: bool = False,
    only: str = "",
    quiet: bool = False,
) -> dict[str, Any]:
    """The document of `msq.bench.runner.run_cases` for the cases of a kind.

    Args:
        kind: `head`, `store`, `decode` or `extract`.
        quick: tiny sizes.
        rounds: how often each side runs; None leaves it to the case.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        compile: also time torch.compile.
        emulated: bf16 also where the processor only emulates it.
        only: names of cases contain this.
        quiet: no progress.

    Raises:
        UsageError: no such case, or no such device.
    """
    from msq.extract.devices import resolve_device

    place = _chosen(resolve_device(device), kind)
    settings = Settings(
        quick=quick, rounds=rounds, device=place, compile=compile, only=only, emulated=emulated
    )
    cases = registry(kind, settings)
    with terminal.progress(f"bench {kind}", quiet=quiet) as update:
        return run_cases(cases, settings, update)


def _chosen(device: str, kind: str) -> str:
    """The device as cases of a kind name it; one of several GPUs becomes the current one."""
    name, _, number = device.partition(":")
    if not number:
        return device
    import torch

    torch.cuda.set_device(int(number))
    # Stage one works in threads, for which another GPU than this one is the current one.
    return device if kind == "extract" else name


def show(document: dict[str, Any], *, json: bool = False) -> int:
    """Prints a document; the exit code is 0, or 4 where a gate is red."""
    if json:
        terminal.print_json(document)
        return exit_code(document)
    print(line(document["machine"]))
    for precision, speed in document["ceilings"].items():
        print(f"one large matrix product, {precision}: {speed:.0f} GFLOP/s")
    if document["settings"]["quick"]:
        print("--quick: tiny sizes, to see that everything runs; the numbers mean nothing")
    for case in document["cases"]:
        _show_case(case)
    for name, reason in document["not_run"].items():
        print(f"\n{name}: not run: {reason}")
    return exit_code(document)


def _show_case(case: dict[str, Any]) -> None:
    gate = case["gate"]
    print(f"\n{case['name']}: {case['compares']}")
    state = "the same" if gate["ok"] else "NOT THE SAME, so there is no speed to report"
    print(f"gate: {state}; {gate['what']}: {gate['worst']:.2g}, at most {gate['tolerance']:.2g}")
    for name, reason in case["left_out"].items():
        print(f"left out: {name}: {reason}")
    if not gate["ok"]:
        return
    base = case["base"]
    unit = case["sides"][base]["unit"]
    header = ["side", unit, "CPU ms", f"time / {base}", f"CPU time / {base}"]
    header += ["of the ceiling"] if case["mfu"] else []
    rows = []
    for name, side in case["sides"].items():
        key = f"{name} / {base}"
        ratios = [case[kind].get(key) for kind in ("ratios", "cpu_ratios")]
        cells = [name, _spread(side, 1), _spread(side["cpu"], 1)]
        cells += ["–" if ratio is None else _spread(ratio, 2) for ratio in ratios]
        if case["mfu"]:
            cells.append(f"{100 * case['mfu'][name]:.1f} %")
        rows.append(cells)
    terminal.table(f"median (quartiles) of {case['rounds']} rounds", header, rows)
    for what, figure in case["figures"].items():
        wanted = ""
        if figure["goal"] is not None:
            bound = "at most" if figure["most"] else "at least"
            state = "reached" if figure["met"] else "MISSED"
            wanted = f" ({bound} {figure['goal']:g}: {state})"
        print(f"{what}: {figure['value']:.3g}{wanted}")


def _spread(found: dict[str, float], digits: int) -> str:
    middle, low, high = (found[key] for key in ("median", "q25", "q75"))
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"
