"""`msq zero-shot`: a sweep over class splits, from a plan to a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.report import sweeps, terminal

if TYPE_CHECKING:
    from msq.head.sweep import SweepProgress
    from msq.head.sweep_plan import Plan


def run(
    plan: Plan,
    out: Path,
    place: sweeps.Workplace,
    *,
    retry_failed: bool = False,
    quiet: bool = False,
    progress: SweepProgress | None = None,
) -> dict[str, Any]:
    """Train and score what is not done yet, and write the results; their document.

    Args:
        plan: of the sweep.
        out: its folder.
        place: who works, and where.
        retry_failed: try trials again that failed.
        quiet: show nothing on stderr.
        progress: called with a dict after each trial, in place of what is shown.

    Raises:
        MsqError: as `msq.head.sweep_workers.run_sweep`, or every trial failed.
    """
    from msq.head.sweep import prepare
    from msq.head.sweep_workers import run_sweep

    plan = prepare(out, plan, retry_failed=retry_failed, engine=place.engine)
    if progress is None:
        summary = sweeps.follow(plan, out, quiet=quiet, **place.how)
    else:
        summary = run_sweep(out, plan, progress=progress, **place.how)
    return sweeps.conclude(out, plan, summary, zero_shot=True)


def show(found: Mapping[str, Any], out: Path, *, json: bool = False) -> None:
    """The table, each split's own line, and a warning of every split that leaks."""
    results = found["results"]
    warn_of_leaks(results)
    if json:
        sweeps.say_failures(found)
        terminal.print_json(results)
        return
    header, rows = split_rows(results)
    if rows:
        terminal.table("each split: unseen only (%)", header, rows)
    sweeps.show(found, out)


def split_rows(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A row for each class split with its hash, a column for each kind of query."""
    modes = list(dict.fromkeys(_column(r) for r in results))
    rows: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for r in results:
        for run in r["runs"]:
            if run.get("hash"):
                key = (_share(r), str(run["split"]), run["source"], run["hash"][:12])
                rows.setdefault(key, {})[_column(r)] = run["unseen"]
    shown = [[*key, *(terminal.percent(values.get(mode)) for mode in modes)]
             for key, values in rows.items()]  # fmt: skip
    return ["", "split", "made by", "hash", *modes], shown


def _share(result: Mapping[str, Any]) -> str:
    """Its share of seen classes; "" where its splits have several, or nobody says."""
    seen = result.get("seen")
    return "" if seen is None else f"{seen} % seen"


def _column(result: Mapping[str, Any]) -> str:
    parts = [result["queries"], result.get("text"), result.get("prompt")]
    return ", ".join(str(x) for x in parts if x)


def warn_of_leaks(results: Sequence[Mapping[str, Any]]) -> None:
    """A line for each split that parts classes with the same clips."""
    for line in leaks_in(results):
        terminal.say(f"warning: {line}")


def leaks_in(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The splits that part classes with the same clips, a line each."""
    lines = {}
    for result in results:
        for run in result["runs"]:
            for leak in run.get("leaks", ()):
                name = ", ".join(x for x in (_share(result), run["source"]) if x)
                lines[name, leak["seen"], leak["unseen"]] = (
                    f"split {name} leaks: {terminal.percent(leak['share'])} % of the "
                    f"clips of one of {leak['seen']} (seen) and {leak['unseen']} (unseen) are "
                    "the other's too"
                )
    return list(lines.values())
