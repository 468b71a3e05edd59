"""Datasets as a person sees them: the list, and what a folder holds beside what is published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from msq.extract.datasets.adapter import Survey
from msq.extract.datasets.archives import packed
from msq.extract.datasets.options import check_options, parse_options, with_class_file
from msq.extract.datasets.registry import find_adapter, list_adapters
from msq.report import terminal

SHOWN = 20


def show_list(*, json: bool = False) -> None:
    """Name, needs, access and options of every adapter."""
    adapters = list_adapters()
    if json:
        terminal.print_json(
            [
                {
                    "dataset": a.name,
                    "title": a.title,
                    "needs": a.needs,
                    "access": a.access,
                    "options": dict(a.options),
                }
                for a in adapters
            ]
        )
        return
    console = Console(highlight=False)
    for adapter in adapters:
        console.print(f"[bold]{escape(adapter.name)}[/bold]  {escape(adapter.title)}")
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row("  needs", escape(adapter.needs))
        grid.add_row("  access", escape(adapter.access))
        for key, text in adapter.options.items():
            grid.add_row(f"  --option {escape(key)}=", escape(text))
        console.print(grid)


def show_survey(name: str, root: Path, pairs: Sequence[str], *, json: bool = False) -> None:
    """What `root` holds. Videos that are missing are counted, they are no error.

    Raises:
        UsageError: an unknown dataset or option.
        DatasetError: annotations that cannot be read.
    """
    adapter = find_adapter(name)
    options = parse_options(pairs)
    check_options(adapter.name, options, adapter.options)
    survey = adapter.survey(root, with_class_file(options, root))
    if survey.missing and (archives := packed(root)):
        note = f"{survey.missing} clips have no file{archives}"
        survey = replace(survey, notes=(*survey.notes, note))
    if json:
        terminal.print_json(survey.to_dict())
        return
    rows = survey_rows(survey)
    columns = 4 if any(row[3] for row in rows) else 3
    header = ("", "found", "published", "")[:columns]
    terminal.table(f"{survey.dataset} in {root}", header, [row[:columns] for row in rows])
    listed = {"skipped": survey.skipped_items, "kept": survey.kept_items}
    for title, items in listed.items():
        for item in items[:SHOWN]:
            terminal.say(f"{title}: {item['item']}: {item.get('change') or item['reason']}")
        if (rest := len(items) - SHOWN) > 0:
            terminal.say(f"{title}: … and {rest} more (all of them with --json)")
    for note in survey.notes:
        print(note)
    if survey.missing:
        more = ", …" if survey.missing > len(survey.missing_examples) else ""
        print(f"missing, e.g. {', '.join(survey.missing_examples)}{more}")


def survey_rows(survey: Survey) -> list[tuple[str, str, str, str]]:
    """(what, found, published, `differs` or nothing) of everything that was counted."""
    found: dict[str, int] = {"classes": survey.classes}
    for split, count in survey.splits.items():
        found[split] = count.clips
        if count.unlabelled or f"{split}/unlabelled" in survey.published:
            found[f"{split}/unlabelled"] = count.unlabelled
    found |= survey.oddities
    found["missing"] = survey.missing
    rows: list[tuple[str, str, str, str]] = []
    for key in (*found, *(k for k in survey.published if k not in found)):
        here, there = found.get(key), survey.published.get(key)
        differs = here is not None and there is not None and here != there
        rows.append((key.replace("_", " "), _shown(here), _shown(there), "differs" * differs))
    return rows


def _shown(number: int | None) -> str:
    return "–" if number is None else str(number)
