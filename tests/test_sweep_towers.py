"""`msq train --overwrite` by several processes: towers of another making are made anew together."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msq.cli import main
from msq.extract.store import open_store

HERE = Path(__file__)
trains = SimpleNamespace(**runpy.run_path(str(HERE.with_name("train_command.py"))))
watched = SimpleNamespace(**runpy.run_path(str(HERE.with_name("watched_processes.py"))))


def place(rank: int, port: str) -> dict[str, str]:
    """One of two processes on this machine, as torchrun says it."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost", "MASTER_PORT": port}  # fmt: skip


@pytest.fixture
def command(media: Any, tmp_path: Path) -> list[str]:
    """`msq train` of six tiny videos."""
    asked = ["--out", str(tmp_path / "run"), "--epochs", "1", "--json", "train.batch=2"]
    return [*trains.train_command(media, tmp_path, videos=6), *asked, "train.select=last"]


def test_processes_replace_towers_of_another_making_together(
    command: list[str], tmp_path: Path
) -> None:
    """One process made them of other frames; without --overwrite, msq train refuses them."""

    def frames() -> int:
        store = open_store(tmp_path / "run" / "towers.zarr")
        return int(store.spec(next(iter(store.encoders("image"))), "image").frames)

    def alone(*more: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main([*command, *more])
        return int(stop.value.code or 0)

    assert alone() == 0
    assert frames() != 2
    assert alone("--frames", "2") == 1
    port = str(watched.free_ports())
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "msq", *command, "--frames", "2", "--overwrite"],
            env=trains.environment(**place(rank, port)), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=watched.PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert json.loads(said[0][0])["ranks"]["world"] == 2
    assert frames() == 2
