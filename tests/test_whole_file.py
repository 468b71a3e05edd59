"""Files of runs and reports on a full disk: the old one or the new one, never a part."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msq import cli, whole_file
from msq.head.checkpoint import load_state, save_state
from msq.head.json_file import write_atomic
from msq.head.train import train_head
from msq.report import terminal
from msq.report.reports import report
from msq.whole_file import append_text, write_text, write_whole

toys = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_train.py"))))


@contextmanager
def limit(size: int) -> Iterator[None]:
    """The kernel refuses to make a file larger, as with `ulimit -f`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    writers = {
        "write_whole": lambda: write_whole(file, [b"new"]),
        "write_atomic": lambda: write_atomic(file, b"new"),
        "write_json": lambda: terminal.write_json(file, {"new": 1}),
        "save_state": lambda: save_state(file, {"new": 1}),
    }
    for name, writer in writers.items():
        file.write_bytes(b"old")
        with monkeypatch.context() as patch:
            patch.setattr(whole_file.os, "write", full)
            with pytest.raises(OSError, match=re.escape(f"No space left on device: '{file}'")):
                writer()
        assert file.read_bytes() == b"old", name
        assert names(tmp_path) == ["a.json"], name
        writer()
        assert file.read_bytes() != b"old", name


def test_an_addition_that_does_not_fit_names_the_file(tmp_path: Path) -> None:
    append_text(tmp_path / "log.txt", "a\r\né\n")
    assert (tmp_path / "log.txt").read_bytes() == b"a\r\n\xc3\xa9\n"
    with limit(3), pytest.raises(OSError, match=r"File too large: '.*log\.txt'"):
        append_text(tmp_path / "log.txt", "more")


def test_a_text_goes_where_a_link_leads_and_into_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    write_text(tmp_path / "link", "one\n")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "one\n"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "two\n")
    assert os.read(reader, 99) == b"two\n"
    os.close(reader)


def test_a_run_on_a_full_disk_keeps_its_checkpoint_and_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_head(toys.toy(), toys.small(), run, stop_after=2)
    before = (run / "state.pt").read_bytes()
    with limit(4096), pytest.raises(OSError, match=r"File too large: '.*/run/state\.pt'"):
        train_head(toys.toy(), toys.small(), run)
    assert (run / "state.pt").read_bytes() == before
    assert load_state(run / "state.pt") is not None
    assert not [name for name in names(run) if name.startswith(".")]
    assert train_head(toys.toy(), toys.small(), run).finished


def test_a_report_that_does_not_fit_leaves_the_earlier_one(tmp_path: Path) -> None:
    train_head(toys.toy(), toys.small(), tmp_path / "run")
    page = tmp_path / "p.html"
    report([tmp_path / "run"], None, [], page, json=False)
    before = page.read_bytes()
    with limit(1000), pytest.raises(OSError, match=r"File too large: '.*p\.html'"):
        report([tmp_path / "run"], None, [], page, json=False)
    assert page.read_bytes() == before
    assert names(tmp_path) == ["p.html", "run"]


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    train_head(toys.toy(), toys.small(), tmp_path / "run")
    command = ["report", tmp_path / "run", "--out", tmp_path / "p.html"]
    ended = subprocess.run(
        [sys.executable, "-m", "msq", *map(str, command)],
        capture_output=True, text=True, preexec_fn=limited, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    said = f"msq: {tmp_path / 'p.html'}: File too large; what was finished is kept\n"
    assert ended.stderr.endswith(said)
    assert "Traceback" not in ended.stderr
    assert names(tmp_path) == ["run"]
    assert json.loads((tmp_path / "run/result.json").read_text())["metrics"]


def test_an_error_that_names_no_file_is_said_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(SystemExit) as left:
        cli.main([])
    assert left.value.code == 1
    assert capsys.readouterr().err == ("msq: No space left on device; what was finished is kept\n")

    def other(_: Any) -> None:
        raise OSError(errno.ENOTCONN, "no message for people")

    monkeypatch.setattr(cli, "app", other)
    with pytest.raises(OSError, match="no message"):
        cli.main([])
