"""Tables in a terminal of eighty characters: words are not broken."""

from __future__ import annotations

import pytest

from msq.report import terminal
from msq.report.column_widths import column_widths

HEADER = [
    "seen",
    "queries",
    "unseen only",
    "general. unseen",
    "general. seen",
    "harmonic",
    "chance",
]
ROWS = [
    ["75", name, "12.34 ± 1.23", "*45.67 ± 10.1", "56.78 ± 2.34", "20.11 ± 2.20", "11.11 ± 0.52"]
    for name in ("CLIP similarity", "multimodal", "vanilla")
]


def printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int,
    header: list[str], rows: list[list[str]],
) -> list[str]:  # fmt: skip
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal.table("a table", header, rows)
    return capsys.readouterr().out.splitlines()


def test_words_and_numbers_of_a_zero_shot_table_stay_whole_at_eighty_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = printed(capsys, monkeypatch, 80, HEADER, ROWS)
    assert max(map(len, lines)) <= 80
    shown = {word for line in lines for word in line.replace("│", " ").replace("┃", " ").split()}
    assert {word for row in (HEADER, *ROWS) for cell in row for word in cell.split()} <= shown


def test_a_table_that_fits_is_as_wide_as_its_cells() -> None:
    assert column_widths([["a", "b c"], ["long cell", "1"]], 80) == [None, None]
    assert column_widths([["a", "b c"], ["long cell", "1"]], 19) == [None, None]
    assert column_widths([["a", "b c"], ["long cell", "1"]], 18) == [8, 3]


def test_the_widest_gives_way_first_and_never_below_its_words() -> None:
    lines = [["one two three", "four five"]]
    assert column_widths(lines, 13 + 7 + 7) == [11, 9]
    assert column_widths(lines, 8 + 8 + 7) == [8, 8]
    assert column_widths(lines, 5 + 4 + 7) == [5, 4]
    # Without room for its words the longest of them is broken, and no other.
    assert column_widths([["features.video", "multimodal", "12.34"]], 8 + 8 + 5 + 10) == [8, 8, 5]
    assert column_widths([["features.video", "multimodal", "12.34"]], 10 + 10 + 5 + 10) == [
        10,
        10,
        5,
    ]


def test_where_words_have_no_room_and_for_paths_nothing_is_cut_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/somewhere/" + "deep/" * 30 + "run"
    lines = printed(capsys, monkeypatch, 80, ["of", "map"], [[path, "12.34"]])
    assert max(map(len, lines)) <= 80
    body = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert "".join(body) == path
    lines = printed(capsys, monkeypatch, 20, HEADER, ROWS[:1])
    assert max(map(len, lines)) <= 20
