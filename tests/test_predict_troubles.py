"""`msq predict` of several videos, of which one has far too many windows; rows on a full disk."""

from __future__ import annotations

import csv
import errno
import json
import os
import resource
import runpy
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from msq.cli import main
from msq.head.predict import load_head
from msq.report.row_file import RowFile

_predict = runpy.run_path(str(Path(__file__).with_name("test_predict.py")))
_media = runpy.run_path(str(Path(__file__).with_name("media.py")))
world = _predict["world"]


def run(*arguments: Any) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@contextmanager
def room(size: int) -> Iterator[None]:
    """The kernel refuses to make a file larger, as with `ulimit -f`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its last frame claims to be shown after 28 hours."""
    path = tmp_path_factory.mktemp("endless") / "endless.mp4"
    _media["encode"](path, 9, ticks=[*(40 * i for i in range(8)), 100_000_000])
    return path


# --- a video of more windows than there may be ----------------------------------------------------


def test_too_many_windows_are_the_affair_of_one_video(
    world: Any, endless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = world.videos[:2]
    given = ("predict", before, endless, after, "--run", world.run("text"), "--device", "cpu",
             "--every", 0.25)  # fmt: skip
    words = f"{endless}: --every 0.25: expected at most 100000 windows, found 400001"
    assert run(*given, "--json", "-q") == 3
    out, err = capsys.readouterr()
    items = json.loads(out)
    assert [item["clip"] for item in items] == [before.stem, "endless", after.stem]
    assert all(item["predictions"] for item in items)  # each as a whole
    (part,) = items[1]["segments"]
    assert part["error"].startswith(words)
    assert "let them begin less often" in part["error"]
    assert all(p["predictions"] for item in (items[0], items[2]) for p in item["segments"])
    assert words in err
    for more in ((), ("--threshold", 0.0, "--merge")):
        out_file = tmp_path / f"rows{len(more)}.csv"
        assert run(*given, *more, "--out", out_file, "-q") == 3
        assert f"failed: endless, 0:00 – the end: {words}" in capsys.readouterr().err
        with out_file.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert {row["clip"] for row in rows if row["label"]} == {before.stem, after.stem}
        (failed,) = [row for row in rows if row["error"]]
        assert failed["clip"] == "endless"
        assert failed["error"].startswith(words)
    assert run("predict", endless, *given[4:], "--format", "csv", "-q") == 1  # and nothing else


def test_too_many_windows_are_handed_out_as_an_error(world: Any, endless: Path) -> None:
    head = load_head(world.run("text"), weights=world.weights)
    (part,) = head.segments(endless, every=0.25)
    assert part["error"].startswith(str(endless))
    assert part["predictions"] == []


# --- rows on a full disk --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_full_disk_names_the_file_and_keeps_whole_rows(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out, whole = tmp_path / f"rows.{kind}", tmp_path / f"whole.{kind}"
    given = ("predict", *world.videos, "--run", world.run("text"), "--device", "cpu", "-q",
             "--every", 0.1, "--out")  # fmt: skip
    assert run(*given, whole) == 0
    expected = whole.read_bytes()
    size = len(expected) // 2
    while expected[size - 1 : size] == b"\n":
        size += 1
    out.write_text("rows of a night\n")
    capsys.readouterr()
    with room(size):
        code = run(*given, out)
    assert code == 1
    err = capsys.readouterr().err
    assert f"msq: {out}: {os.strerror(errno.EFBIG)}" in err
    assert "what was finished is kept" in err
    kept = out.read_bytes()
    assert kept == expected[: expected.rindex(b"\n", 0, size) + 1]  # and no half of a row
    assert kept.count(b"\n") > 4
    assert run(*given, out) == 0
    assert out.read_bytes() == expected


def test_a_device_that_takes_nothing_is_named(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    link = tmp_path / "full.csv"
    link.symlink_to("/dev/full")
    given = ("predict", world.videos[0], "--run", world.run("text"), "--device", "cpu", "-q")
    assert run(*given, "--out", link) == 1
    assert f"msq: {link}: No space left on device" in capsys.readouterr().err
    command = [sys.executable, "-m", "msq", *map(str, given), "--format", "csv"]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (
        1, "msq: stdout: No space left on device; what was finished is kept\n"
    )  # fmt: skip


def test_a_row_file_keeps_what_was_there_until_it_is_begun(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("before\n")
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    file = RowFile(descriptor, str(path))
    assert path.read_text() == "before\n"
    file.begin()
    assert path.read_text() == ""
    file.write("é,1\n")
    assert path.read_text() == "é,1\n"
    with room(7), pytest.raises(OSError, match=r"File too large: '.*rows\.csv'"):
        file.write("longer,2\n")
    assert path.read_text() == "é,1\n"
    file.write("b\n")
    os.close(descriptor)
    assert path.read_text() == "é,1\nb\n"
    assert stat.S_ISREG(path.stat().st_mode)
