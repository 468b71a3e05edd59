"""`msq report --format html`: runs and sweeps on one page, a single file with everything in it.

A run has its making, every metric, its curves and the average precision of each class; a sweep has
its table. Nothing is loaded from anywhere, and there is no script.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msq.head.grid_stores import extraction_records
from msq.head.sweep_plan import read_plan, summary
from msq.report import page, terminal
from msq.report.run_files import RunFiles, read_run
from msq.report.scores import METRICS
from msq.report.stage_one import item_line
from msq.report.table_formats import cells, remarks
from msq.report.tables import Table, heading, is_count

# Entries of a result that have a place of their own on the page.
ELSEWHERE = ("metrics", "per_class", "partitions", "spread")
FIRST = ("protocol", "protocol_changes", "dataset", "variant", "partition", "task", "queries",
         "classifier", "split", "views")  # fmt: skip
CURVES = (
    ("loss", "training loss"),
    ("val_map", "validation mAP"),
    ("val_official", "validation, official metric"),
)
LISTED = 20


def build(paths: Sequence[Path], tables: Sequence[Table], table: Table) -> str:
    """The whole page.

    Args:
        paths: folders of sweeps, grids and runs.
        tables: of each, as `msq.report.tables.load_tables` gives them.
        table: all of them together.

    Raises:
        UsageError: a file of one that is damaged.
    """
    sweeps = [path for path in paths if (path / "plan.json").exists()]
    runs = [read_run(path, one.title)
            for path, one in zip(paths, tables, strict=True) if path not in sweeps]  # fmt: skip
    sections = [_table(table)] if sweeps or len(runs) > 1 else []
    sections += [_sweep(path) for path in sweeps]
    trained = [part for run in runs for part in run.parts or (run,)]
    sections += [] if not trained else [_curves(trained)]
    for run in runs:
        sections += _run(run)
    kinds = ((len(runs), "run"), (len(sweeps), "sweep"))
    lead = " and ".join(f"{n} {kind}{'s' if n > 1 else ''}" for n, kind in kinds if n)
    return page.page(table.title, f"Report of {lead}, made by msq report.", sections)


def _table(table: Table) -> str:
    """The table of several rows, with the best among comparable rows in bold."""
    header, rows = cells(table, str, lambda c: terminal.spread(c.get("mean"), c.get("std")))
    first = len(header) - len(table.metrics) - any(row.paper is not None for row in table.rows)
    marks = {(row, first + k) for k, name in enumerate(table.metrics) for row in table.best(name)}
    return page.section(
        "Results (%)",
        page.grid(header, rows, best=False, marks=marks),
        page.remarks(remarks(table)),
        note="Mean ± sample standard deviation; the best of comparable rows is bold.",
    )


def _sweep(folder: Path) -> str:
    """What a sweep has done, what failed, and what is not in the stores that it made."""
    plan = read_plan(folder)
    found, stores = summary(folder, plan), extraction_records(plan)
    rows = [
        ("trials", f"{found['done']} of {found['trials']} done, {found['failed']} failed"),
        ("engine", f"{plan.engine['name']}: {plan.engine['why']}"),
        ("threads", str(plan.threads)),
        *((f"source {key}", one.store) for key, one in plan.sources.items()),
    ]
    lost = [f"failed: {x['name']} ({x['id']}): {x['error']}" for x in found["failures"]]
    for store, record in stores.items():
        rows.append((store, f"{record['done']} of {record['clips']} clips done, "
                            f"{record['failed']} failed, {record['skipped']} skipped"))  # fmt: skip
        lost += [f"failed: {store}: {item_line(item)}" for item in record["failures"]]
        lost += [f"skipped: {store}: {item_line(item)}" for item in record["skipped_items"]]
        lost += [f"kept: {store}: {item_line(item)}" for item in record.get("kept_items", ())]
    return page.section(f"{plan.name}: the sweep", page.facts(rows), page.remarks(lost))


def _curves(runs: Sequence[RunFiles]) -> str:
    """Loss and validation scores over epochs, the runs in one picture each."""
    pictures = []
    for key, title in CURVES:
        series = {run.name: [line.get(key) for line in run.history] for run in runs}
        known = {name: line for name, line in series.items() if any(v is not None for v in line)}
        if known:
            pictures.append(page.curves(known, x="epoch", y=title))
    held = any("val_map" in line for run in runs for line in run.history)
    note = "" if held else "No validation clips were held out."
    return page.section("Training", *pictures, note=note)


def _run(run: RunFiles) -> list[str]:
    """The sections of one run."""
    result = run.result
    order = [key for key in FIRST if key in result] + [key for key in result if key not in FIRST]
    making = [row for key in order if key not in ELSEWHERE for row in _facts(key, result[key])]
    texts = [
        page.folded(title, text)
        for title, text in (
            ("config.toml", run.config),
            ("env.json", json.dumps(run.environment, indent=2) if run.environment else ""),
        )
        if text
    ]
    return [
        page.section(
            f"{run.name}: metrics",
            page.grid(*_metrics(result), best=False),
            note=f"Protocol {result.get('protocol')}, {result.get('split')} split. mAP is the mean "
            "over classes of average precision over the whole set; what else is called mAP is not "
            "comparable with it.",
        ),
        page.section(
            f"{run.name}: how it was made", page.facts(making), *texts, note="As in result.json."
        ),
        *(_classes(part) for part in run.parts or (run,) if part.result.get("per_class")),
    ]


def _metrics(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows with every metric: of the run, of its partitions, over several views."""
    spread: Mapping[str, float | None] = result.get("spread", {})
    columns: dict[str, Mapping[str, Any]] = {
        "mean" if result.get("partitions") else "value": result["metrics"],
        **result.get("partitions", {}),
    }
    if test_views := result.get("test_views"):
        columns[f"over views {test_views['views']}"] = test_views["metrics"]
    names, rows = dict(METRICS), []
    for key in dict.fromkeys(name for column in columns.values() for name in column):
        row = [f"{names.get(key, heading(key)).strip()} ({key})"]
        for column, values in columns.items():
            std = spread.get(key) if column == "mean" else None
            row.append(_value(key, values.get(key), std))
        rows.append(row)
    return ["metric", *columns], rows


def _value(key: str, value: Any, std: float | None) -> str:
    """A fraction as percent, a count as it is."""
    if value is None or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    if is_count(key):
        return f"{value:g}"
    return f"{terminal.spread(value, std)} %"


def _classes(run: RunFiles) -> str:
    """Average precision of each class, worst first, with the number of its positives."""
    per_class = run.result["per_class"]
    known = sorted((ap, name) for name, ap in per_class.items() if _is_number(ap))
    without = [name for name, ap in per_class.items() if not _is_number(ap)]
    beside = [f"{run.positives[name]} positive" for _, name in known] if run.positives else []
    of = "" if run.clips is None else f" of {run.clips} clips"
    notes = [f"no positive clip, so no average precision: {', '.join(without)}"] if without else []
    return page.section(
        f"{run.name}: average precision of each class",
        page.bars([(name, ap, False) for ap, name in known], digits=4, beside=beside),
        page.remarks(notes),
        note=f"Worst first; beside it how many{of} of the {run.result.get('split')} split show it.",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _facts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """An entry of a result as rows of text; what is in it has dotted names."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in ELSEWHERE:
                yield from _facts(f"{key}.{name}", inner)
    elif isinstance(value, list):
        words = [_words(item) for item in value[:LISTED]]
        more = len(value) - LISTED
        yield key, ", ".join([*words, *([f"… and {more} more"] if more > 0 else [])]) or "none"
    else:
        yield key, _words(value)


def _words(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else str(value)
