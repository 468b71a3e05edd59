"""A table as the terminal, Markdown, CSV and LaTeX have it.

Percent with two digits, `mean ± std` where there are several values, the best in bold; counts (of
classes, of clips) are numbers as they are, and none is the best. CSV holds fractions with all
digits, for programs.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msq.report import terminal
from msq.report.tables import Row, Table, heading, is_count, paper_notes

_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {c: rf"\{c}" for c in "&%$#_{}"}


def cells(
    table: Table, bold: Callable[[str], str], number: Callable[[Mapping[str, Any]], str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text.

    Args:
        table: of results.
        bold: marks the best.
        number: a cell of fractions as text; counts are shown as they are.
    """
    papered = any(row.paper is not None for row in table.rows)
    protocols = len({row.compare.get("protocols") for row in table.rows}) > 1
    names = [heading(m) + (" (number)" if is_count(m) else "") for m in table.metrics]
    header = [*table.axes, *(["protocol"] if protocols else []), *names]
    best = {metric: set(table.best(metric)) for metric in table.metrics}
    rows = []
    for k, row in enumerate(table.rows):
        labels = [_label(row.labels.get(axis)) for axis in table.axes]
        labels += [row.compare.get("protocols", "–")] if protocols else []
        numbers = []
        for metric in table.metrics:
            text = (_count if is_count(metric) else number)(row.cells.get(metric, {}))
            numbers.append(bold(text) if k in best[metric] else text)
        rows.append([*labels, *numbers, *([terminal.percent(row.paper)] if papered else [])])
    return [*header, *(["paper"] if papered else [])], rows


def _label(value: Any) -> str:
    return "–" if value is None else str(value)


def _number(cell: Mapping[str, Any]) -> str:
    return terminal.spread(cell.get("mean"), cell.get("std"))


def _count(cell: Mapping[str, Any]) -> str:
    """A number of something; its mean and spread where repeats differ in it."""
    mean, std = cell.get("mean"), cell.get("std")
    if mean is None or not math.isfinite(mean):
        return "–"
    return f"{mean:g} ± {std:g}" if std else f"{mean:g}"


def remarks(table: Table) -> list[str]:
    """Notes and warnings, the latter marked."""
    return [
        *(f"warning: {one}" for one in table.warnings()),
        *table.notes,
        *paper_notes(table),
    ]


def show_terminal(table: Table) -> str:
    """Print it, warnings on stderr; the best has a star, which survives a pipe."""
    for remark in remarks(table):
        terminal.say(remark)
    header, rows = cells(table, lambda text: f"*{text}", _number)
    terminal.table(f"{table.title} (%)", header, rows)
    return ""


def markdown(table: Table) -> str:
    """A Markdown table with its remarks."""
    header, rows = cells(table, lambda text: f"**{text}**", _number)
    count = len(header) - len(table.axes)
    rule = ["---"] * len(table.axes) + ["---:"] * count
    text = [[x.replace("|", r"\|") for x in row] for row in (header, rule, *rows)]
    body = [f"**{table.title}** (%)", "", *("| " + " | ".join(row) + " |" for row in text)]
    notes = remarks(table)
    return "\n".join([*body, *([""] if notes else []), *(f"- {note}" for note in notes)]) + "\n"


def latex(table: Table) -> str:
    """A `booktabs` table; a rule between groups, remarks below and as comments."""
    header, rows = cells(table, lambda text: rf"\textbf{{{text}}}", _number)
    labels = len(header) - len(table.metrics) - any(row.paper is not None for row in table.rows)
    lines = [
        "% needs \\usepackage{booktabs}",
        *(f"% {note}" for note in remarks(table)),
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(table.title)} (\%)."
        + "".join(f" {escape(note)}." for note in remarks(table))
        + "}",
        rf"\begin{{tabular}}{{{'l' * labels}{'r' * (len(header) - labels)}}}",
        r"\toprule",
        " & ".join(escape(name) for name in header) + r" \\",
        r"\midrule",
    ]
    before: Any = None
    for row, text in zip(table.rows, rows, strict=True):
        group = [row.labels.get(axis) for axis in table.by]
        if before is not None and group != before:
            lines.append(r"\midrule")
        before = group
        numbers = [x.replace("–", "--").replace("±", r"$\pm$") for x in text[labels:]]
        words = [*map(escape, text[:labels]), *numbers]
        lines.append(" & ".join(words) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def escape(text: str) -> str:
    """Text as LaTeX shows it."""
    return "".join(_LATEX.get(c, c) for c in text).replace("–", "--").replace("±", r"$\pm$")


def csv_text(table: Table) -> str:
    """Fractions with all digits: mean, std and number of repeats; remarks in the last column."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [f"{m}_{part}" for m in table.metrics for part in ("mean", "std")]
    writer.writerow(
        [*table.axes, "protocol", "repeats", *names, "paper", "paper_metric", "remarks"]
    )
    for row in table.rows:
        writer.writerow(_csv_row(table, row))
    return out.getvalue()


def _csv_row(table: Table, row: Row) -> list[Any]:
    numbers = [row.cells.get(m, {}).get(part) for m in table.metrics for part in ("mean", "std")]
    of = None if row.paper is None else (table.paper or {}).get("metric")
    return [
        *(row.labels.get(axis) for axis in table.axes), row.compare.get("protocols"), row.done,
        *(None if x is None or not math.isfinite(x) else repr(float(x)) for x in numbers),
        row.paper, of, "; ".join(remarks(table)),
    ]  # fmt: skip


def document(table: Table) -> dict[str, Any]:
    """The table as JSON; fractions."""
    return {
        "title": table.title,
        "axes": list(table.axes),
        "metrics": list(table.metrics),
        "rows": [
            {"labels": dict(row.labels), "baseline": row.baseline, "done": row.done,
             "planned": row.planned, "paper": row.paper, "protocol": row.compare.get("protocols"),
             "metrics": {k: dict(v) for k, v in row.cells.items()}}
            for row in table.rows
        ],
        "paper": dict(table.paper or {}) or None,
        "warnings": table.warnings(),
        "notes": [*table.notes, *paper_notes(table)],
    }  # fmt: skip


FORMATS: Mapping[str, Callable[[Table], str]] = {
    "terminal": show_terminal,
    "markdown": markdown,
    "latex": latex,
    "csv": csv_text,
}


def format_names() -> Sequence[str]:
    """What `--format` can be."""
    return tuple(FORMATS)
