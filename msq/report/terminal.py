"""Progress, tables and messages in the terminal. Results go to stdout, all else to stderr."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from msq.report.column_widths import column_widths
from msq.whole_file import write_text

SECONDS_BETWEEN_LINES = 10.0


class Update(Protocol):
    """Reports how far a task is: `done` of `total` units, and a few words on what happens now."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show it."""


def say(message: str) -> None:
    """One line on stderr, as it is (no markup)."""
    _plain(Console(stderr=True, highlight=False, soft_wrap=True), message)


def _plain(console: Console, line: str) -> None:
    """A line as it is: `[b]` and `:smile:` in the names of files and classes are no markup."""
    console.print(line, markup=False, emoji=False)


def print_json(document: Any) -> None:
    """Exactly one JSON document on stdout; NaN becomes null."""
    sys.stdout.write(json_text(document))
    sys.stdout.flush()


def write_json(path: Path, document: Any) -> None:
    """The same document as a file, whole or not at all."""
    write_text(path, json_text(document))


def json_text(document: Any) -> str:
    """The same document as text, with a line end."""
    return json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextmanager
def progress(title: str, *, quiet: bool = False) -> Iterator[Update]:
    """A live bar on a terminal; elsewhere a plain line at most every ten seconds, and at the end.

    Args:
        title: what is being done, in plain words.
        quiet: show nothing.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if quiet:
        yield lambda done, total, note="": None
    elif console.is_terminal:
        with _live(console, title) as update:
            yield update
    else:
        yield _Lines(console, title)


@contextmanager
def late_progress(title: str, *, quiet: bool = False) -> Iterator[Update]:
    """As `progress`, begun with the first report: lines may be said before it."""
    begun: list[Update] = []
    with ExitStack() as stack:

        def update(done: int, total: int, note: str = "") -> None:
            if not begun:
                begun.append(stack.enter_context(progress(title, quiet=quiet)))
            begun[0](done, total, note)

        yield update


@contextmanager
def _live(console: Console, title: str) -> Iterator[Update]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None, note="")

        def update(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield update


class _Lines:
    """Progress as plain lines, for files and pipes."""

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title
        self.last = -math.inf

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if done < total and now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        line = f"{self.title}: {done}/{total}{' · ' + note if note else ''}"
        _plain(self.console, line)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout. The first column is text; all others are numbers, right-aligned.

    No text is markup: titles and headers have the names of files, runs and classes in them. Where
    it is too wide for the terminal, cells break between words; see `column_widths`.
    """
    grid = Table(title=Text(title, style="bold"), title_justify="left")
    console = Console(highlight=False)
    widths = column_widths([header, *rows], console.width)
    for k, name in enumerate(header):
        side: Literal["left", "right"] = "left" if k == 0 else "right"
        grid.add_column(Text(name), justify=side, overflow="fold", width=widths[k])
    for row in rows:
        grid.add_row(*map(Text, row))
    console.print(grid)


def percent(value: float | None) -> str:
    """A fraction as percent with two digits; `–` where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.2f}"


def spread(mean: float | None, std: float | None) -> str:
    """`mean ± std` in percent."""
    if mean is None or std is None:
        return percent(mean)
    return f"{percent(mean)} ± {percent(std)}"
