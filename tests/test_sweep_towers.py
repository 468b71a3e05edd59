"""`msq train --overwrite` by several processes: towers of another making are made anew together."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from msq.cli import main
from msq.extract.store import open_store

HERE = Path(__file__)
encoders = runpy.run_path(str(HERE.with_name("encoder_fixtures.py")))


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


def environment(rank: int, port: str) -> dict[str, str]:
    """Of one of two processes on this machine, as torchrun sets it."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
             "MASTER_ADDR": "localhost", "MASTER_PORT": port}  # fmt: skip
    return {**os.environ, **place, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": str(HERE.parents[1])}  # fmt: skip


@pytest.fixture
def command(media: Any, tmp_path: Path) -> list[str]:
    """`msq train` of six tiny videos, with encoders in folders."""
    rows = ["path,labels,split"]
    for k in range(6):
        media.encode(tmp_path / f"{k}.mp4", 10, size=(48, 32), gop=4, bframes=0, seed=k)
        rows.append(f"{k}.mp4,{'run' if k % 3 else 'sit'},{'test' if k > 3 else 'train'}")
    (tmp_path / "clips.csv").write_text("\n".join(rows) + "\n")
    config = dataclasses.replace(encoders["TINY_TIMESFORMER"], image_size=(16, 16), width=32)
    encoders["write_timesformer_folder"](tmp_path / "video", encoders["random_timesformer"](config))
    tower = {**encoders["TINY_CLIP"]["vision_cfg"], "image_size": 16, "layers": 1}
    encoders["write_clip_folder"](tmp_path / "clip", {**encoders["TINY_CLIP"], "vision_cfg": tower})
    return ["train", str(tmp_path / "clips.csv"), "--video-encoder", f"local-dir:{tmp_path}/video",
            "--image-encoder", f"local-dir:{tmp_path}/clip", "--device", "cpu", "--workers", "0",
            "--out", str(tmp_path / "run"), "--epochs", "1", "--val", "0", "--json",
            "head.layers=1", "head.heads=2", "head.ffn=32", "train.batch=2",
            "train.select=last"]  # fmt: skip


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
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "msq", *command, "--frames", "2", "--overwrite"],
            env=environment(rank, port), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert json.loads(said[0][0])["ranks"]["world"] == 2
    assert frames() == 2
