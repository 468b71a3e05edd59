"""Tables of results: rows with mean and std, the best marked, the paper's numbers beside ours.

A table knows which of its rows may be compared. Numbers of different protocols, datasets or class
splits can stand in one table, but never without a warning, and the best is marked among comparable
rows only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msq.errors import UsageError
from msq.head.sweep_plan import Plan
from msq.head.sweep_results import Line, Outcomes, baselines, lines
from msq.report.run_differences import told_apart
from msq.report.run_files import read_result, run_name
from msq.report.table_remarks import blind_choices, decided_by_validation, leaking_splits

DEFAULT = {"multilabel": ("map", "map_micro", "map_official"), "singlelabel": ("top1",)}
NAMES = {
    "map": "mAP",
    "map_micro": "micro AP",
    "map_official": "official micro AP",
    "top1": "top-1",
    "top5": "top-5",
    "unseen": "unseen only",
    "generalised_seen": "general. seen",
    "generalised_unseen": "general. unseen",
    "same_actors": "same actors",
    "transfer": "other actors",
}
UNRANKED = ("chance", "map_chance", "accuracy_all_negative")
# How metrics begin that are numbers of something, and neither percent nor better or worse.
COUNTS = ("classes_", "rows", "pairs_", "unseen_clips", "transfer_clips")


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
        labels: axis -> value.
        cells: metric -> `mean, std, values`, as fractions.
        paper: the paper's number, as a fraction; None where it has none.
        compare: what must be equal for two rows to be compared, by name.
        done: repeats that the numbers are over.
        planned: repeats that there should be.
        baseline: nothing was trained for it.
    """

    labels: Mapping[str, Any]
    cells: Mapping[str, Mapping[str, Any]]
    paper: float | None
    compare: Mapping[str, str]
    done: int
    planned: int
    baseline: bool = False


@dataclass(frozen=True)
class Table:
    """Rows, and what must be said beside them.

    Attributes:
        title: what it is of.
        axes: names of the label columns.
        metrics: names of the number columns.
        rows: in order.
        by: axes whose values part the rows into groups with a best one each.
        paper: `source, protocol, metric` of the paper's numbers; empty without any.
        notes: what a reader must know.
        cautions: what speaks against its numbers; the first of its warnings.
    """

    title: str
    axes: Sequence[str]
    metrics: Sequence[str]
    rows: Sequence[Row]
    by: Sequence[str] = ()
    paper: Mapping[str, str] | None = None
    notes: Sequence[str] = ()
    cautions: Sequence[str] = ()

    def best(self, metric: str) -> list[int]:
        """Rows that are ahead in a metric, among those that they may be compared with."""
        if metric in UNRANKED or is_count(metric):
            return []
        groups: dict[str, list[tuple[float, int]]] = {}
        for k, row in enumerate(self.rows):
            mean = row.cells.get(metric, {}).get("mean")
            if mean is not None:
                place = [str(row.labels.get(axis)) for axis in self.by]
                key = json.dumps([place, dict(row.compare)], sort_keys=True)
                groups.setdefault(key, []).append((mean, k))
        return [k for group in groups.values() if len(group) > 1
                for mean, k in group if mean == max(group)[0]]  # fmt: skip

    def warnings(self) -> list[str]:
        """What speaks against its numbers, or keeps rows from being compared."""
        found = list(self.cautions)
        for name in sorted({key for row in self.rows for key in row.compare}):
            values: dict[str, set[str]] = {}
            for row in self.rows:
                place = json.dumps([str(row.labels.get(axis)) for axis in self.by])
                # Shares of seen classes have splits of their own; protocols are one matter for all.
                values.setdefault(place if name == "class splits" else "", set()).add(
                    row.compare.get(name, "none")
                )
            differing = {x for group in values.values() if len(group) > 1 for x in group}
            if differing:
                which = ", ".join(sorted(differing))
                found.append(f"rows of different {name} stand in one table ({which}): they cannot "
                             "be compared, and the best is marked within each")  # fmt: skip
        found += [f"{_words(row.labels)}: {row.done} of {row.planned} done" for row in self.rows
                  if row.done < row.planned]  # fmt: skip
        return found


def sweep_table(plan: Plan, outcomes: Outcomes, metrics: Sequence[str] = ()) -> Table:
    """The table of a sweep or grid.

    Args:
        plan: of it.
        outcomes: of its trials that are done.
        metrics: names of the columns; () takes those of the plan, or the usual ones of the task.

    Raises:
        UsageError: a metric that no trial has.
    """
    found = lines(plan, outcomes)
    tasks = {outcome["task"] for _, outcome in (one for line in found for one in line.trials)}
    wanted = list(metrics or plan.table.get("metrics", ()))
    wanted = wanted or [m for task in sorted(tasks) for m in DEFAULT[task]]
    _require(wanted, [line.metrics for line in found], f"no trial of {plan.name} has it; they have")
    paper = plan.table.get("paper") or {}
    rows = []
    for line in _with_baselines(found, plan.table.get("by", ())):
        rows.append(
            Row(line.row, line.metrics, None if line.baseline else _paper_number(line, paper),
                _compare(line), len(line.trials), line.planned, line.baseline)
        )  # fmt: skip
    axes = list(dict.fromkeys(axis for row in rows for axis in row.labels))
    return Table(
        plan.name, axes, wanted, rows, tuple(plan.table.get("by", ())),
        {k: str(v) for k, v in paper.items() if k != "rows"} or None,
        decided_by_validation(plan, outcomes),
        [*leaking_splits(found), *blind_choices(plan, outcomes)],
    )  # fmt: skip


def _require(metrics: Sequence[str], cells: Sequence[Mapping[str, Any]], complaint: str) -> None:
    """Refuse a metric that no row has; where there are no rows yet, all are welcome."""
    have = list(dict.fromkeys(name for row in cells for name in row))
    for name in metrics:
        if have and name not in have:
            raise UsageError(f"metric {name!r}: {complaint} {', '.join(have)}")


def _with_baselines(found: Sequence[Line], by: Sequence[str]) -> list[Line]:
    """The lines, those of one group together, each group after its baseline."""
    groups: dict[str, list[Line]] = {}
    for line in (*baselines(found), *found):
        groups.setdefault(str([line.row.get(axis) for axis in by]), []).append(line)
    order = list(dict.fromkeys(str([line.row.get(axis) for axis in by]) for line in found))
    return [line for key in order for line in groups[key]]


def _paper_number(line: Line, paper: Mapping[str, Any]) -> float | None:
    for row in paper.get("rows", ()):
        places = {k: v for k, v in row.items() if k != "value"}
        if all(line.row.get(key) == value for key, value in places.items()):
            return float(row["value"]) / 100
    return None


def _compare(line: Line) -> dict[str, str]:
    """What makes rows comparable; "mixed" where the trials of one row differ in it."""
    found = {}
    for key, name in (("protocol", "protocols"), ("dataset", "datasets"), ("variant", "variants"),
                      ("views", "test views")):  # fmt: skip
        value = line.common(key) if line.trials else ""
        found[name] = "mixed" if value is None else str(value)
    splits = {str(o.get("split", "test")) for _, o in line.trials}  # which not all outcomes say
    found["splits"] = "mixed" if len(splits) > 1 else "".join(splits)
    hashes = sorted({o["detail"]["split_hash"] for _, o in line.trials
                     if "split_hash" in o["detail"]})  # fmt: skip
    if hashes:
        found["class splits"] = "+".join(h[:6] for h in hashes)
    return {k: v for k, v in found.items() if v}


def run_table(path: Path) -> Table:
    """A run directory as a table of one row.

    Raises:
        UsageError: the run is not finished, or its result is damaged.
    """
    result = read_result(path)
    metrics = {k: v for k, v in result["metrics"].items() if isinstance(v, int | float)}
    std = result.get("spread", {})
    cells = {k: {"mean": v, "std": std.get(k), "values": [v]} for k, v in metrics.items()}
    keys = (("protocol", "protocols"), ("dataset", "datasets"), ("variant", "variants"),
            ("views", "test views"), ("split", "splits"))  # fmt: skip
    compare = {name: str(result[key]) for key, name in keys if result.get(key)}
    labels = {"queries": result.get("queries"), "classifier": result.get("classifier")}
    # Runs did not always say their task; only those of multilabel have this metric.
    task = result.get("task") or ("multilabel" if "accuracy" in metrics else "singlelabel")
    count = len(result.get("partitions", ())) or 1
    row = Row(labels, cells, None, compare, count, count)
    return Table(run_name(path), tuple(labels), DEFAULT[task], [row])


def joined(tables: Sequence[Table], metrics: Sequence[str] = ()) -> Table:
    """Several tables as one, each row led by the name of its own.

    Raises:
        UsageError: a metric that no row has.
    """
    if len(tables) == 1:
        return tables[0]
    _require(metrics, [row.cells for table in tables for row in table.rows],
             "no row has it; they have")  # fmt: skip
    rows = [replace(row, labels={"of": table.title, **row.labels})
            for table in tables for row in table.rows]  # fmt: skip
    axes = list(dict.fromkeys(axis for row in rows for axis in row.labels))
    columns = list(metrics) or list(dict.fromkeys(m for table in tables for m in table.metrics))
    papers = [table.paper for table in tables if table.paper]
    paper = papers[0] if papers and all(one == papers[0] for one in papers) else None
    by = list(dict.fromkeys(axis for table in tables for axis in table.by))
    notes = []
    for table in tables:
        own = [*table.notes, *([] if paper else paper_notes(table))]
        notes += [f"{table.title}: {note}" for note in own]
    cautions = [f"{table.title}: {one}" for table in tables for one in table.cautions]
    title = " and ".join(t.title for t in tables)
    return Table(title, axes, columns, rows, by, paper, notes, cautions)


def load_table(path: Path, metrics: Sequence[str] = ()) -> Table:
    """The table of a sweep's folder, or of a run's.

    Raises:
        UsageError: neither of them is there, or a metric that it does not have.
    """
    from msq.head.sweep_plan import outcomes_of, read_plan

    if (path / "plan.json").exists():
        plan = read_plan(path)
        return sweep_table(plan, outcomes_of(path, plan), metrics)
    found = run_table(path)
    _require(metrics, [row.cells for row in found.rows], f"{path} does not have it; it has")
    return replace(found, metrics=tuple(metrics)) if metrics else found


def load_tables(paths: Sequence[Path], metrics: Sequence[str] = ()) -> list[Table]:
    """Those of several folders, for `joined`; folders of one name are told apart by their paths.

    Runs that would be shown alike have the fields of their configurations in which they differ
    beside them; see `told_apart`.

    Raises:
        UsageError: as `load_table`. Of several, each may lack a metric that another has.
    """
    tables = [load_table(path, metrics if len(paths) == 1 else ()) for path in paths]
    titles = [table.title for table in tables]
    named = [replace(table, title=str(path)) if titles.count(table.title) > 1 else table
             for path, table in zip(paths, tables, strict=True)]  # fmt: skip
    return told_apart(named, paths) if len(paths) > 1 else named


def is_count(metric: str) -> bool:
    """Whether a metric is a number of something, such as classes or clips, and no fraction."""
    return metric.startswith(COUNTS)


def heading(metric: str) -> str:
    """A metric as a column names it."""
    return NAMES.get(metric, metric.replace("_", " "))


def paper_notes(table: Table) -> list[str]:
    """Where the paper's numbers are from, and why they are not the same thing."""
    paper = table.paper
    if not paper or all(row.paper is None for row in table.rows):
        return []
    return [f"paper: {paper.get('source', '')}; {paper.get('protocol', '')}; to be read beside "
            f"{heading(paper.get('metric', ''))}"]  # fmt: skip


def _words(labels: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in labels.items())
