"""`--dry-run` of sweeps and grids: the trials, and how long they will take."""

from __future__ import annotations

from pathlib import Path

from msq.head.sweep_plan import Plan
from msq.report import terminal


def show(
    plan: Plan, out: Path, workers: int, device: str, *, retry_failed: bool = False,
    json: bool = False,
) -> None:  # fmt: skip
    """Measure a few steps and print the list; nothing is written."""
    from msq.head.sweep_estimate import estimate

    found = estimate(plan, out, workers, device, retry_failed=retry_failed)
    if json:
        terminal.print_json(found)
        return
    rows = [[one["name"], one["state"], _words(one["seconds"]), one["id"]]
            for one in found["trials"]]  # fmt: skip
    terminal.table(f"{plan.name}: {len(rows)} trials; dry run, nothing is written",
                   ["trial", "state", "about", "id"], rows)  # fmt: skip
    for store, exists in found["stores"].items():
        print(f"{store}: {'there' if exists else 'to be extracted'}")
    print(
        f"{found['to_do']} trials to do, time: {_words(found['seconds'])} with {workers} "
        f"worker{'s' if workers > 1 else ''}; measured by {found['measured']}"
    )


def _words(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
