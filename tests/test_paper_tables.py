"""Every command that the documents show exists, with each of its options and values."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from msq import config as configuration
from msq.cli import app
from msq.errors import MsqError
from msq.extract.datasets.options import check_options, parse_options
from msq.extract.datasets.registry import find_adapter
from msq.head.grid_file import preset_names, read_grid

ROOT = Path(__file__).parents[1]
# Words that stand for something: they show that a command goes on, and are no arguments.
OPEN = ("…", "...")
PLACES = {"N": "1", "V": "1", "T": "16"}  # numbers, as documents write them


class Shown(NamedTuple):
    """A command as a document shows it; `whole` where it is a line to type."""

    where: str
    text: str
    whole: bool


def commands(name: str, text: str) -> list[Shown]:
    """Lines that start with `msq` in fenced blocks, and `msq …` between backquotes."""
    found = []
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
    for block in blocks:
        for line in re.sub(r"\\\n", " ", block).splitlines():
            match = re.match(r"(?:\$ )?(msq .*)", line.strip())
            if match and "[OPTIONS]" not in line:  # the usage lines of cli.md
                found.append(Shown(name, match[1], whole=True))
    prose = re.sub(r"^```[^\n]*\n.*?^```", "", text, flags=re.M | re.S)
    for span in re.findall(r"`(msq [^`]+)`", prose):
        found.append(Shown(name, re.sub(r"\s+", " ", span), whole=False))
    return found


def wrong(shown: Shown) -> str | None:
    """What is wrong with a command; None where nothing is. Nothing is run."""
    command: Any = typer.main.get_command(app)
    words = shlex.split(shown.text, comments=True)[1:]
    cut = any(word in OPEN for word in words)
    words = [PLACES.get(word, word) for word in words if word not in OPEN]
    while hasattr(command, "commands"):
        if not words or words[0].startswith("-"):
            return None if set(words) <= {"--version", "--help"} else f"no option {words}"
        name = words.pop(0)
        if name not in command.commands:
            return f"no command {name!r}"
        command = command.commands[name]
    if "--help" in words:
        return None
    try:
        given = command.make_context(shown.text, words).params
    except Exception as error:  # of typer's own copy of click
        incomplete = type(error).__name__ in ("MissingParameter", "BadOptionUsage")
        return None if incomplete and (cut or not shown.whole) else str(error) or repr(error)
    try:
        if given.get("dataset"):
            adapter = find_adapter(given["dataset"])
            check_options(adapter.name, parse_options(given["option"] or ()), adapter.options)
        overrides = [x for x in given.get("overrides") or () if x != "KEY=VALUE"]
        if given.get("file") in preset_names():
            read_grid(given["file"], overrides)
        elif overrides and "file" not in given:
            configuration.override(configuration.RunConfig(), overrides)
    except MsqError as error:
        return str(error)
    return None


def pages() -> list[Path]:
    fixed = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")]
    return [*fixed, *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_a_page_shows_exists(page):
    shown = commands(page.name, page.read_text(encoding="utf-8"))
    problems = {one.text: problem for one in shown if (problem := wrong(one)) is not None}
    assert not problems


def test_the_page_of_the_papers_tables_has_every_table_and_commands_for_each():
    text = (ROOT / "docs" / "paper-tables.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    assert [s.split(":")[0] for s in sections] == [f"Table {k}" for k in range(1, 7)]
    for section in sections:
        shown = [one.text for one in commands("", section) if one.whole]
        assert any(line.startswith("msq extract ") for line in shown), section[:40]
        assert any(re.match("msq (train-head|zero-shot) ", line) for line in shown), section[:40]
        stores = {match[1] for line in shown if (match := re.search(r"--out (\S+\.zarr)", line))}
        used = {match[1] for line in shown if (match := re.search(r"(\S+\.zarr)", line))}
        assert used == stores, section[:40]


def test_the_page_holds_the_numbers_to_stand_beside():
    text = (ROOT / "docs" / "paper-tables.md").read_text(encoding="utf-8")
    table_1 = "44.11 47.57 71.63 73.10 79.71 83.16 93.45 96.95 43.99 55.59 93.29 67.47"
    table_3 = (
        "49.37 15.87 45.66 53.76 18.30 51.22 63.98 30.91 59.24 "
        "52.02 17.43 48.37 60.28 18.62 59.58 75.33 35.59 69.43"
    )
    expected = {
        1: table_1, 2: "93.25", 3: table_3, 4: "71.19 41.69 73.10 47.57",
        5: "67.74 43.06 69.73 45.33 73.10 47.57", 6: "69.81 43.57 71.63 44.11",
    }  # fmt: skip
    for number, section in enumerate(re.split(r"^## ", text, flags=re.M)[1:], start=1):
        rows = "\n".join(line for line in section.splitlines() if line.startswith("|"))
        assert re.findall(r"\b\d\d\.\d\d\b", rows) == expected[number].split(), number


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("msq extrakt --manifest clips.csv", "no command 'extrakt'"),
        ("msq store look clips.zarr", "no command 'look'"),
        ("msq extract --manifest clips.csv --frame-count 16", "No such option: --frame-count"),
        ("msq extract --manifest clips.csv --pooling bands", "'bands' is not one of"),
        ("msq extract --manifest clips.csv --frames many", "valid integer"),
        ("msq extract --dataset charade --root DIR", "unknown dataset 'charade'"),
        ("msq extract --dataset hmdb51 --root DIR --option spilt=all", "no option 'spilt'"),
        ("msq train-head", "Missing parameter"),
        ("msq train-head clips.zarr optim.rate=3e-4", "optim.rate"),
        ("msq train-head clips.zarr --queries video", "'video' is not one of"),
        ("msq grid table3-charades extract.rot=DIR", "unknown key extract.rot; did you mean"),
    ],
)
def test_a_wrong_line_is_noticed(line, problem):
    broken = line.replace(" ", " \\\n  ")
    for text in (f"```\n$ {line}   # a comment\n```\n", f"```\n{broken}\n```\n"):
        (shown,) = commands("page.md", text)
        assert problem in str(wrong(shown))
    (shown,) = commands("page.md", f"Say\n`{line}` to it.")
    assert (problem in str(wrong(shown))) == (problem != "Missing parameter")
