"""Stage one killed at any moment and resumed: the same store, byte for byte."""

from __future__ import annotations

import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msq.extract import store_writer
from msq.extract.pipeline import extract

HERE = Path(__file__).parent
fakes = SimpleNamespace(**runpy.run_path(str(HERE / "fakes.py")))
encoders = SimpleNamespace(**runpy.run_path(str(HERE / "encoder_fixtures.py")))
watched = SimpleNamespace(**runpy.run_path(str(HERE / "watched_processes.py")))
KILLS = 10


def run(data: Any, out: Path, **options: Any) -> None:
    image = fakes.FakeEncoder(fakes.image_spec())
    text = fakes.FakeText()
    extract(
        data,
        out,
        video=fakes.FakeEncoder(),
        image=image,
        text=text,
        workers=0,
        shard=2,
        **options,
    )


def test_death_before_any_single_write_and_a_resume_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = fakes.make_dataset(tmp_path / "v", 3, broken=(1,))
    run(data, tmp_path / "whole.zarr")
    expected = fakes.tree(tmp_path / "whole.zarr")
    write = store_writer.write_file
    call, died = 0, True
    while died:
        call, died = call + 1, False
        out = tmp_path / f"{call}.zarr"
        monkeypatch.setattr(store_writer, "write_file", fakes.dying_at(call, write))
        try:
            run(data, out)
        except fakes.Killed:
            died = True
        monkeypatch.setattr(store_writer, "write_file", write)
        run(data, out)
        assert fakes.tree(out) == expected, f"died in write {call}"
    assert call > 30


def test_death_within_a_retry_leaves_a_store_that_is_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = fakes.make_dataset(tmp_path / "v", 4, broken=(1, 2))
    run(data, tmp_path / "old.zarr")
    old = fakes.tree(tmp_path / "old.zarr")
    fakes.write_video(data.clips[1].path, 1)
    run(data, tmp_path / "new.zarr")
    new = fakes.tree(tmp_path / "new.zarr")
    write = store_writer.write_file
    call, died = 0, True
    while died:
        call, died = call + 1, False
        out = tmp_path / f"{call}.zarr"
        shutil.copytree(tmp_path / "old.zarr", out)
        monkeypatch.setattr(store_writer, "write_file", fakes.dying_at(call, write))
        try:
            run(data, out, retry_failed=True)
        except fakes.Killed:
            died = True
        monkeypatch.setattr(store_writer, "write_file", write)
        run(data, out)
        assert fakes.tree(out) in (old, new), f"died in write {call}"
        run(data, out, retry_failed=True)
        assert fakes.tree(out) == new, f"died in write {call}"
    assert call > 6


@pytest.fixture(scope="module")
def request_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 16 real videos, one of them broken, and the weights of a small encoder."""
    folder = tmp_path_factory.mktemp("kill")
    model = encoders.random_timesformer(encoders.TINY_TIMESFORMER)
    encoders.write_timesformer_folder(folder / "weights", model)
    data = fakes.make_dataset(folder / "v", 16, broken=(5,))
    lines = [
        f'"{clip.path}","{";".join(data.classes[k] for k in clip.labels)}",{clip.split}'
        for clip in data.clips
    ]
    (folder / "clips.csv").write_text("\n".join(["path,labels,split", *lines]) + "\n")
    return folder


def start(folder: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    """`msq extract`, in shards of two clips."""
    options = {
        "--manifest": "clips.csv",
        "--out": str(out),
        "--video-encoder": "local-dir:weights",
        "--image-encoder": "none",
        "--shard": "2",
        "--workers": str(workers),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "msq", "extract", *(part for o in options.items() for part in o)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, words = process.communicate(timeout=watched.PATIENCE)
    assert process.returncode == 3, words.decode()  # done, with one failure recorded


def committed(out: Path) -> int:
    """Shards that are done."""
    return len(list(out.glob("status/*/c/*/0")))


@pytest.mark.slow
def test_kill_9_at_ten_random_moments_then_resume(request_files: Path, tmp_path: Path) -> None:
    process = start(request_files, tmp_path / "whole.zarr", workers=0)
    watched.until(lambda: watched.writes(process, tmp_path / "whole.zarr"), process)
    began = time.perf_counter()
    finish(process)
    duration = time.perf_counter() - began
    expected = fakes.tree(tmp_path / "whole.zarr")

    chance = random.Random(20260101)
    out, kills, stages = tmp_path / "killed.zarr", 0, set()
    while kills < KILLS:
        before = committed(out)
        process = start(request_files, out, workers=int(kills % 4 == 3))
        # Every second one has done a shard first, however slow the machine is.
        further = before + kills % 2
        watched.until(
            lambda p=process, n=further: watched.writes(p, out) and committed(out) >= n, process
        )
        time.sleep(chance.uniform(0, duration / 2))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=watched.PATIENCE)
        if process.returncode == -signal.SIGKILL:
            kills += 1
            stages.add(committed(out))
            continue
        assert fakes.tree(out) == expected  # it was quicker than the signal: another store
        shutil.rmtree(out)
    finish(start(request_files, out, workers=0))
    assert fakes.tree(out) == expected
    assert len(stages) > 1  # the signals fell at different places
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed.zarr", "whole.zarr"]
