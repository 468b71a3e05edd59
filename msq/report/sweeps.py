"""Sweeps and grids as a person sees them: started, followed, and shown at the end."""

from __future__ import annotations

import csv
import functools
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.errors import MsqError, UsageError
from msq.extract.devices import resolve_device
from msq.report import terminal
from msq.report.stage_one import item_line
from msq.whole_file import write_text

if TYPE_CHECKING:
    from msq.head.sweep_plan import Plan

SHOWN = 5
NUMBERS = ("unseen", "transfer", "map", "top1")


@dataclass(frozen=True)
class Workplace:
    """Who works at a sweep, and where.

    Attributes:
        devices: worker i has `devices[i % len(devices)]`.
        workers: processes; 1 trains in this one.
        threads: of each.
        stack: heads trained at once, at most; None leaves it to a measurement.
        scheduler: of dask; None for none.
    """

    devices: Sequence[str]
    workers: int
    threads: int
    stack: int | None = None
    scheduler: str | None = None

    @classmethod
    def of(
        cls,
        device: str = "auto",
        workers: int | None = None,
        threads: int | None = None,
        stack: int | None = None,
        scheduler: str | None = None,
    ) -> Workplace:
        """What the options of a command come to; None is not asked for.

        Raises:
            UsageError: no device is named, one that is not there, or a number below 1.
        """
        for name, number in (("workers", workers), ("threads", threads), ("stack", stack)):
            if number is not None and number < 1:
                raise UsageError(f"--{name}: expected at least 1, found {number}")
        places = devices(device)
        count = workers or len(places)
        return cls(places, count, thread_count(count, threads), stack, scheduler)

    @property
    def engine(self) -> Any:
        """What chooses how many heads are trained at once."""
        from msq.head.stack_plan import choose_engine

        return functools.partial(choose_engine, heads=self.stack, device=self.devices[0])

    @property
    def how(self) -> dict[str, Any]:
        """Arguments of `run_sweep`."""
        return {"workers": self.workers, "devices": self.devices, "scheduler": self.scheduler}


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
    """Threads of each process: asked for, else an equal share of the cores it may use."""
    from msq.extract.cores import cores

    if threads is not None:
        return threads
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() else max(1, cores() // max(workers, 1))


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
    from msq.head.sweep_plan import outcomes_of
    from msq.head.sweep_results import early_stopping
    from msq.head.zeroshot_results import zero_shot_results
    from msq.report.table_formats import csv_text, document, markdown
    from msq.report.tables import sweep_table

    outcomes = outcomes_of(out, plan)
    if not outcomes:
        first = summary["failures"][0]
        say_left_out(summary.get("stores", {}))
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
    write_text(out / "table.md", markdown(table))
    write_text(out / "table.csv", csv_text(table))
    write_text(out / "per_class.csv", _per_class(plan, outcomes))
    return found


def _per_class(plan: Plan, outcomes: Mapping[str, Mapping[str, Any]]) -> str:
    """AP of each class in each trial, as fractions; empty where no clip shows the class."""
    axes = list(dict.fromkeys(k for t in plan.trials for k in (*t.row, *t.repeat, *t.choice)))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*axes, "trial", "class", "ap"])
    for trial in plan.trials:
        places = {**trial.row, **trial.repeat, **trial.choice}
        detail = outcomes.get(trial.id, {}).get("detail", {})
        for name, ap in detail.get("per_class", {}).items():
            shown = "" if ap is None or not math.isfinite(ap) else repr(ap)
            writer.writerow([*(places.get(axis) for axis in axes), trial.id, name, shown])
    return text.getvalue()


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
    """The first few failures on stderr, and what is missing in the stores that a grid made."""
    for line in failures_in(found):
        terminal.say(line)
    say_left_out(found.get("stores", {}))


def failures_in(found: Mapping[str, Any]) -> list[str]:
    """The first few trials that failed, a line each, and what to do about them."""
    lines = [f"failed: {x['name']} ({x['id']}): {x['error']}" for x in found["failures"][:SHOWN]]
    if found["failed"]:
        more = found["failed"] - SHOWN
        rest = f"{more} more failed; " if more > 0 else ""
        lines.append(f"{rest}--retry-failed tries again")
    return lines


def say_left_out(stores: Mapping[str, Mapping[str, Any]]) -> None:
    """The first few clips and manifest lines that are not in the stores of a grid, on stderr.

    Args:
        stores: as `msq.head.grid_stores.extraction_records` gives them.
    """
    for store, record in stores.items():
        for warning in record["warnings"]:
            terminal.say(f"warning: {store}: {warning}")
        for title, key in (("failed", "failures"), ("degraded", "degraded"),
                           ("skipped", "skipped_items"), ("kept", "kept_items")):  # fmt: skip
            items = record.get(key, ())  # records of before have no kept_items
            for item in items[:SHOWN]:
                terminal.say(f"{title}: {store}: {item_line(item)}")
            if (more := len(items) - SHOWN) > 0:
                terminal.say(f"{title}: {store}: … and {more} more "
                             f"(all in {store}.extracted.json)")  # fmt: skip
        if record["failed"] or record["skipped"]:
            terminal.say(f"{store}: {record['failed']} of {record['clips']} clips failed, "
                         f"{record['skipped']} skipped: no head has seen them")  # fmt: skip


def exit_code(found: Mapping[str, Any]) -> int:
    """0 done, 3 where a trial failed, or a clip or manifest line of a store that the grid made."""
    stores = found.get("stores", {}).values()
    return 3 if found["failed"] or any(x["failed"] or x["skipped"] for x in stores) else 0
