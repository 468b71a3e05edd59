"""Sweeps and grids as a person sees them: started, followed, and shown at the end."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq import config as configuration
from msq.errors import MsqError, UsageError
from msq.extract.request import resolve_device
from msq.report import terminal

if TYPE_CHECKING:
    from msq.head.sweep_plan import Plan

SHOWN = 5
NUMBERS = ("unseen", "transfer", "map", "top1")


def devices(names: str) -> list[str]:
    """`cuda:0,cuda:1` -> each of them, resolved.

    Raises:
        UsageError: none is named, or one that is not there.
    """
    found = [resolve_device(name.strip()) for name in names.split(",") if name.strip()]
    if not found:
        raise UsageError("--device: expected auto, cpu, cuda, or cuda:0,cuda:1, found nothing")
    return found


def thread_count(workers: int, threads: int | None) -> int:
    """Threads of each process: what was asked for, else an equal share of the cores."""
    if threads is not None:
        return threads
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() else max(1, (os.cpu_count() or 1) // max(workers, 1))


def choices(given: Sequence[str]) -> dict[str, list[Any]]:
    """`optim.lr=1e-3,2e-3` -> key and values.

    Raises:
        UsageError: not of this form.
    """
    found = {}
    for text in given:
        key, equals, values = text.partition("=")
        parts = [configuration.toml_value(x.strip()) for x in values.split(",") if x.strip()]
        if not equals or not parts:
            raise UsageError(f"--choose {text!r}: expected KEY=VALUE,VALUE,… such as "
                             "optim.lr=1e-3,2e-3")  # fmt: skip
        found[key.strip()] = parts
    return found


def shares(text: str) -> list[float]:
    """`50,75` or `10..90` (in tens) -> percentages.

    Raises:
        UsageError: anything else.
    """
    low, dots, high = text.partition("..")
    try:
        if dots:
            found = [float(x) for x in range(int(low), int(high) + 1, 10)]
        else:
            found = [float(x) for x in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(math.isfinite(x) for x in found):
        raise UsageError(f"--seen {text!r}: expected percentages such as 50,75 or 10..90")
    return found


def trial_note(event: Mapping[str, Any]) -> str:
    """A finished trial in a few words."""
    outcome = event["outcome"]
    if outcome["status"] == "failed":
        return f"{event['name']}: failed"
    name = next((x for x in NUMBERS if x in outcome["metrics"]), None)
    value = outcome["metrics"].get(name)
    shown = "" if name is None else f": {name} {terminal.percent(value)}"
    return f"{event['name']}{shown}"


def follow(plan: Plan, out: Path, *, quiet: bool, **how: Any) -> dict[str, Any]:
    """Do a prepared sweep and show its progress; its summary."""
    from msq.head.sweep_workers import run_sweep

    with terminal.progress(plan.name, quiet=quiet) as update:
        return run_sweep(
            out, plan,
            progress=lambda e: update(e["done"], e["total"], trial_note(e)), **how,
        )  # fmt: skip


def conclude(
    out: Path, plan: Plan, summary: Mapping[str, Any], *, zero_shot: bool = False
) -> dict[str, Any]:
    """Write `results.json`, `table.md`, `table.csv` and `per_class.csv`; the document.

    Raises:
        MsqError: no trial is done.
    """
    from msq.head.sweep import outcomes_of
    from msq.head.sweep_results import early_stopping
    from msq.head.zeroshot_results import zero_shot_results
    from msq.report.table_formats import csv_text, document, markdown
    from msq.report.tables import sweep_table

    outcomes = outcomes_of(out, plan)
    if not outcomes:
        first = summary["failures"][0]
        raise MsqError(f"{out}: every trial failed; the first, {first['name']}: {first['error']}")
    table = sweep_table(plan, outcomes)
    found = {
        "sweep": str(out),
        **summary,
        "threads": plan.threads,
        "engine": dict(plan.engine),
        "table": document(table),
        "early_stopping": early_stopping(plan, outcomes),
    }
    if zero_shot:
        found["results"] = zero_shot_results(plan, outcomes)
    terminal.write_json(out / "results.json", found)
    (out / "table.md").write_text(markdown(table), encoding="utf-8")
    (out / "table.csv").write_text(csv_text(table), encoding="utf-8")
    _write_per_class(out / "per_class.csv", plan, outcomes)
    return found


def _write_per_class(path: Path, plan: Plan, outcomes: Mapping[str, Mapping[str, Any]]) -> None:
    """AP of each class in each trial, as fractions; empty where no clip shows the class."""
    axes = list(dict.fromkeys(k for t in plan.trials for k in (*t.row, *t.repeat, *t.choice)))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*axes, "trial", "class", "ap"])
        for trial in plan.trials:
            places = {**trial.row, **trial.repeat, **trial.choice}
            detail = outcomes.get(trial.id, {}).get("detail", {})
            for name, ap in detail.get("per_class", {}).items():
                shown = "" if ap is None or not math.isfinite(ap) else repr(ap)
                writer.writerow([*(places.get(axis) for axis in axes), trial.id, name, shown])


def show(found: Mapping[str, Any], out: Path) -> None:
    """The table, what failed, and where the rest is."""
    from msq.report.table_formats import show_terminal
    from msq.report.tables import load_table

    show_terminal(load_table(out))
    say_failures(found)
    saved = found["early_stopping"]
    if saved is not None:
        terminal.say(f"early stopping saved {saved['seconds_saved']:.0f} s of training")
    terminal.say(f"{out}: {found['done']} of {found['trials']} trials done; results.json, "
                 "table.md, table.csv, per_class.csv")  # fmt: skip


def say_failures(found: Mapping[str, Any]) -> None:
    """The first few failures on stderr."""
    for failure in found["failures"][:SHOWN]:
        terminal.say(f"failed: {failure['name']} ({failure['id']}): {failure['error']}")
    if found["failed"]:
        more = found["failed"] - SHOWN
        rest = f"{more} more failed; " if more > 0 else ""
        terminal.say(f"{rest}--retry-failed tries again")


def exit_code(found: Mapping[str, Any]) -> int:
    """0 done, 3 where a trial failed."""
    return 3 if found["failed"] else 0


def report(
    paths: Sequence[Path], kind: str, metrics: Sequence[str], out: Path | None, *, json: bool
) -> None:
    """Show sweeps, grids and runs in one table.

    Raises:
        UsageError: a folder that is none of them, or a metric that is not there.
    """
    from msq.report.table_formats import FORMATS, document, remarks
    from msq.report.tables import joined, load_table

    # Of several, each may lack a metric that another has.
    alone = metrics if len(paths) == 1 else ()
    table = joined([load_table(path, alone) for path in paths], metrics)
    if json:
        terminal.print_json(document(table))
        return
    if kind == "terminal":
        FORMATS[kind](table)
        return
    for remark in remarks(table):
        if remark.startswith("warning"):
            terminal.say(remark)
    text = FORMATS[kind](table)
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
        terminal.say(str(out))
