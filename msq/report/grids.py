"""`msq grid`: started, followed, shown; the presets that ship with msq."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.errors import UsageError
from msq.report import sweeps, terminal

if TYPE_CHECKING:
    from msq.head.sweep_plan import Plan


def run(
    plan: Plan, out: Path, *, retry_failed: bool = False, quiet: bool = False, **how: Any
) -> dict[str, Any]:
    """Extract, train, and write the results; their document."""
    from msq.head.grid import run_grid
    from msq.report.stage_one import note

    with terminal.progress(plan.name, quiet=quiet) as update:
        told: set[str] = set()

        def extracting(store: str, event: dict[str, Any]) -> None:
            if store not in told and not quiet:
                told.add(store)
                terminal.say(f"extracting {store}")
            if "total" in event:
                update(event["done"], event["total"], note(event))

        plan, summary = run_grid(
            plan, out, retry_failed=retry_failed, extracting=extracting,
            progress=lambda e: update(e["done"], e["total"], sweeps.trial_note(e)), **how,
        )  # fmt: skip
    zero_shot = any(trial.split is not None for trial in plan.trials)
    return sweeps.conclude(out, plan, summary, zero_shot=zero_shot)


def show(found: Mapping[str, Any], out: Path, *, json: bool = False) -> None:
    """The table, or the whole document."""
    from msq.report.zero_shot import warn_of_leaks

    warn_of_leaks(found.get("results", ()))
    if json:
        sweeps.say_failures(found)
        terminal.print_json(found)
    else:
        sweeps.show(found, out)


def text(file: str) -> str:
    """A grid file as it is; a preset by its name.

    Raises:
        UsageError: neither.
    """
    from msq.config_values import nearest
    from msq.head.grid_file import preset_names, preset_text

    if file in preset_names():
        return preset_text(file)
    if Path(file).is_file():
        try:
            return Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{file}: expected a grid file; {error}") from None
    near = nearest(file, preset_names())
    raise UsageError(f"grid {file!r}: no such file, and no preset of this name{near}")


def show_file(file: str, *, json: bool = False) -> None:
    """Print a grid file, or a preset: as it is, or its tables and values as JSON.

    Raises:
        UsageError: no such file, or with `json` one that is not TOML.
    """
    content = text(file)
    if not json:
        print(content, end="")
        return
    try:
        terminal.print_json(tomllib.loads(content))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{file}: expected TOML; {error}") from None


def show_list(*, json: bool = False) -> None:
    """Each preset with what it is, its number of trials and what it costs."""
    from msq.head.grid_file import parse_grid, preset_names, preset_text

    rows: list[dict[str, Any]] = []
    for name in preset_names():
        content = preset_text(name)
        grid = parse_grid(content, name, () if "[extract]" in content else ("store=STORE",))
        opening = [line.lstrip("# ") for line in content.splitlines() if line.startswith("#")]
        cost = next((x.partition(":")[2].strip() for x in opening if x.startswith("Cost:")), "")
        rows.append({"name": name, "what": opening[0], "trials": len(grid.settings()),
                     "cost": cost})  # fmt: skip
    if json:
        terminal.print_json(rows)
        return
    terminal.table("presets of msq grid (msq grid NAME --show prints one)",
                   ["name", "what", "trials"],
                   [[x["name"], x["what"], str(x["trials"])] for x in rows])  # fmt: skip
