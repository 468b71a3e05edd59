"""`msq report`: sweeps, grids and runs in one table, or on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msq.errors import UsageError
from msq.report import run_page, terminal
from msq.report.table_formats import FORMATS, document, remarks, show_terminal
from msq.report.tables import joined, load_tables
from msq.whole_file import write_text

SUFFIXES = {".md": "markdown", ".tex": "latex", ".csv": "csv", ".html": "html", ".json": "json"}


def report(
    paths: Sequence[Path],
    kind: str | None,
    metrics: Sequence[str],
    out: Path | None,
    *,
    json: bool,
) -> None:
    """Show sweeps, grids and runs in one table, or on one page.

    Args:
        paths: folders of them.
        kind: a name in `TableFormat`; None for what `out` ends in, or the terminal.
        metrics: columns; () for the usual ones.
        out: a file, instead of stdout.
        json: the table as a JSON document.

    Raises:
        UsageError: a folder that is none of them, a metric that is not there, or a file whose
            format nobody says.
    """
    form = _form(kind, out, json=json)
    tables = load_tables(paths, metrics)
    table = joined(tables, metrics)
    if form == "terminal":
        show_terminal(table)
        return
    if form == "json":
        text = terminal.json_text(document(table))
    else:
        for remark in remarks(table):
            if remark.startswith("warning"):
                terminal.say(remark)
        text = run_page.build(paths, tables, table) if form == "html" else FORMATS[form](table)
    if out is None:
        print(text, end="")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text)
        terminal.say(str(out))


def _form(kind: str | None, out: Path | None, *, json: bool) -> str:
    """How results are written: as asked for, or as the file's name ends."""
    if json and kind is not None:
        raise UsageError(f"expected --json or --format {kind}, found both")
    if json or out is None:
        return "json" if json else kind or "terminal"
    form = kind or SUFFIXES.get(out.suffix.lower())
    if form is None or form == "terminal":
        found = "a file of another name" if form is None else "--format terminal"
        raise UsageError(
            f"--out {out}: expected --format markdown, latex, csv or html, --json, or a file that "
            f"ends in {', '.join(SUFFIXES)}; found {found}"
        )
    return form
