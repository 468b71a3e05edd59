"""Several processes train as one does, and end together. Real processes, over gloo."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from msq.cli import main
from msq.errors import SpecMismatch, UsageError
from msq.extract.cluster import Place
from msq.head.checkpoint import load_state
from msq.head.ranks import ALONE, Ranks, joined, own_device

HERE = Path(__file__)
worker = SimpleNamespace(**runpy.run_path(str(HERE.with_name("ranks_worker.py"))))
made = runpy.run_path(str(HERE.with_name("end_to_end_material.py")))
trains = SimpleNamespace(**runpy.run_path(str(HERE.with_name("train_command.py"))))
watched = SimpleNamespace(**runpy.run_path(str(HERE.with_name("watched_processes.py"))))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What two processes found in all scenarios, and one that they are compared with."""
    folder = tmp_path_factory.mktemp("ranks")
    data = made["dataset"](folder / "clips")
    features = made["features_of"](data, folder / "a.zarr", made["encoder"]())
    (folder / "world.pickle").write_bytes(pickle.dumps((data, features)))
    (folder / "broken.mp4").write_bytes(b"no video any more" * 50)
    broken = [clip.id for clip in data.clips if clip.split == "train"][::4]
    clips = [
        dataclasses.replace(clip, path=folder / "broken.mp4") if clip.id in broken else clip
        for clip in data.clips
    ]
    other = dataclasses.replace(data, clips=tuple(clips))
    (folder / "broken.pickle").write_bytes(pickle.dumps((other, features)))
    port, processes = watched.free_ports(5), []  # one for each scenario
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        command = [sys.executable, str(HERE.with_name("ranks_worker.py")), str(folder), str(port)]
        processes.append(
            subprocess.Popen(command, env=trains.environment(**place, MASTER_ADDR="localhost"))
        )
    try:
        one = {
            "same": worker.stepped(folder, ALONE, worker.Doubled, *worker.SAME),
            "short": worker.stepped(
                folder, ALONE, worker.Shortened, *worker.SHORT, "backbone.accumulate=4"
            ),
            "dropout": worker.trained(
                folder, ALONE, "one", *worker.DROPOUT, "backbone.accumulate=2"
            ),
        }
        assert [process.wait(watched.PATIENCE) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    found = {file.stem: torch.load(file, weights_only=False) for file in folder.glob("*-[01].pt")}
    return SimpleNamespace(folder=folder, one=one, two=found["peers-0"], found=found, broken=broken)


def require_close(found: Any, expected: Any, tolerance: float) -> None:
    """Losses and weights; the biases of keys, which have no gradient but rounding, are near 0."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weights in expected["weights"].items():
        scale = max(float(weights.abs().max()), 0.01)
        assert float((found["weights"][name] - weights).abs().max()) <= tolerance * scale, name


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a run wrote, of head and encoder."""
    head = safetensors.torch.load_file(folder / "head.safetensors")
    encoder = safetensors.torch.load_file(folder / "encoder" / "model.safetensors")
    return head | {f"encoder.{name}": tensor for name, tensor in encoder.items()}


def test_two_ranks_are_one_with_twice_the_batch(world: SimpleNamespace) -> None:
    """20 steps in float64, gradients clipped in all of them, dropout off."""
    found, expected = world.two["same"], world.one["same"]
    assert len(expected["losses"]) == 20
    assert all(weight.dtype == torch.float64 for weight in expected["weights"].values())
    assert all(0.02 < norm < 0.05 for norm in found["norms"])  # of the head; 0.05 with the encoder
    assert expected["losses"][-1] < 0.9 * expected["losses"][0]
    require_close(found, expected, 1e-9)
    for name, weights in found["weights"].items():
        assert torch.equal(weights, world.found["peers-1"]["same"]["weights"][name]), name


def test_short_batches_leave_a_rank_without_clips(world: SimpleNamespace) -> None:
    """4, 3, 1 and 2 clips for two ranks with two parts each, and with checkpointing."""
    require_close(world.two["short"], world.one["short"], 1e-9)


def test_with_dropout_two_ranks_are_one_with_two_parts(world: SimpleNamespace) -> None:
    found, expected = tensors(world.folder / "dropout"), tensors(world.folder / "one")
    for name, weights in expected.items():
        assert torch.equal(found[name], weights), name


def test_metrics_are_of_all_clips_and_said_once(world: SimpleNamespace) -> None:
    found, expected = world.two["dropout"], world.one["dropout"]
    assert json.dumps(world.found["peers-1"]["dropout"]) == json.dumps(found)
    for name, value in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, abs=1e-6, nan_ok=True), name
    lines = {}
    for name in ("one", "dropout"):
        text = (world.folder / name / "metrics.jsonl").read_text()
        lines[name] = [json.loads(line) for line in text.splitlines()]
    assert len(lines["dropout"]) == 3
    for one, two in zip(lines["one"], lines["dropout"], strict=True):
        assert two["val_map"] == pytest.approx(one["val_map"], abs=1e-6)
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)


def test_what_ranks_could_not_decode_is_added_up(world: SimpleNamespace) -> None:
    found, expected = world.two["dropout"], world.one["dropout"]
    assert found["replaced"] == expected["replaced"] == 3 * len(world.broken)
    assert found["failures"] == expected["failures"]
    assert [item["clip"] for item in found["failures"]] == sorted(world.broken)
    ranks = found["ranks"]
    assert ranks["world"] == len(ranks["clips_per_second"]) == len(ranks["waited_share"]) == 2


def test_a_divided_encoder_learns_what_a_whole_one_does(world: SimpleNamespace) -> None:
    """FSDP2, with EMA and checkpointing, in float32."""
    found, expected = tensors(world.folder / "fsdp"), tensors(world.folder / "one")
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, atol=1e-4, rtol=1e-4, msg=name)
    assert world.two["fsdp"]["metrics"] == pytest.approx(world.one["dropout"]["metrics"], abs=1e-6)
    log = (world.folder / "fsdp" / "log.txt").read_text()
    assert "2 processes, encoder divided (FSDP)" in log


def test_a_divided_encoder_goes_on_with_the_same_bits(world: SimpleNamespace) -> None:
    """In the middle of the first epoch, and after the second; from gathered moments."""
    found, expected = tensors(world.folder / "fsdp-parts"), tensors(world.folder / "fsdp")
    for name, weights in expected.items():
        assert torch.equal(found[name], weights), name


@pytest.mark.parametrize("how", ["error", "nan", "interrupt"])
def test_what_ends_one_rank_ends_all_and_is_said_once(world: SimpleNamespace, how: str) -> None:
    ends = [world.found[f"{how}-{rank}"] for rank in (0, 1)]
    peers = [end for end in ends if end["error"].startswith("PeerError: process")]
    (first,) = [end for end in ends if end not in peers]
    assert len(peers) == 1
    expected, code = {
        "error": ("UsageError: the second process cannot go on", 2),
        "nan": ("MsqError: the loss is not finite in epoch 1", 1),
        "interrupt": ("KeyboardInterrupt", 130),
    }[how]
    assert first["error"].startswith(expected)
    assert [end["code"] for end in ends] == [code, code]
    state = load_state(world.folder / how / "state.pt")
    assert state is not None
    assert state["step"] >= 1
    if how == "error":
        log = (world.folder / how / "log.txt").read_text()
        assert "stopped: process 1: the second process cannot go on" in log


def test_a_rank_that_is_killed_ends_the_others(world: SimpleNamespace) -> None:
    assert "kill-1" not in world.found
    assert "ended without a word" in world.found["kill-0"]["error"]
    assert load_state(world.folder / "kill" / "state.pt") is not None


def test_another_number_of_ranks_is_refused(world: SimpleNamespace) -> None:
    with pytest.raises(SpecMismatch, match=r"ranks\.world: expected 2, found 1"):
        worker.trained(world.folder, ALONE, "kill")


@pytest.fixture
def command(media: Any, tmp_path: Path) -> list[str]:
    """`msq train` of eight tiny videos."""
    asked = ["--epochs", "40", "--json", "train.batch=4", "optim.warmup=0.5", "train.select=last"]
    return [*trains.train_command(media, tmp_path), *asked]


def test_killed_ranks_of_torchrun_go_on_with_the_same_bits(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Towers made by both, `kill -9` after a checkpoint; the whole is one process in two parts."""
    run, whole = tmp_path / "killed" / "run", tmp_path / "whole" / "run"

    def started() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*trains.TORCHRUN, *command, "--out", str(run)],
            env=trains.environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def alone(*changes: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main([*command, *changes])
        return int(stop.value.code or 0)

    killed = started()
    assert watched.until((run / "state.pt").exists, killed), killed.communicate()
    killed.send_signal(signal.SIGSTOP)  # it would end the second one itself, once the first is dead
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    killed.send_signal(signal.SIGCONT)
    said = killed.communicate(timeout=watched.PATIENCE)
    assert len(children) == 2, said
    assert not (run / "result.json").exists(), said
    resumed = started()
    shutil.copytree(run / "towers.zarr", whole / "towers.zarr")
    assert alone("--out", str(whole), "backbone.accumulate=2") == 0
    expected = json.loads(capsys.readouterr().out)
    out, err = resumed.communicate(timeout=watched.PATIENCE)
    assert resumed.returncode == 0, err
    found = json.loads(out)  # of one process alone
    assert "resumed at step" in (run / "log.txt").read_text()
    for name in ("head.safetensors", "encoder/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-6, nan_ok=True)
    assert found["ranks"]["world"] == 2
    assert alone("--out", str(run)) == 1
    assert "ranks.world: expected 2, found 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"RANK": "1"}, "no WORLD_SIZE and no MASTER_ADDR and no MASTER_PORT; start with torchrun"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "found no RANK; start"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "found no MASTER_ADDR and no MASTER_PORT"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "where 4 processes meet, found no MASTER_A"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK: expec"),
    ],
)
def test_variables_of_a_launcher_that_are_half_there(found: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message), joined("cpu", found):
        pass


def test_without_a_launcher_a_process_is_alone() -> None:
    for found in ({}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}):
        with joined("cpu", found) as ranks:
            assert (ranks.rank, ranks.world, ranks.leads) == (0, 1, True)
            assert ranks.of_all(3) == [3]


def test_each_process_takes_the_gpu_of_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("cuda", Place(3, 4, 1, 2), {}) == torch.device("cuda", 1)
    assert own_device("cpu", Place(3, 4, 1, 2), {}) == torch.device("cpu")
    assert own_device("cuda:1", Place(1, 2, 0, 1), {}) == torch.device("cuda", 1)
    with pytest.raises(UsageError, match=r"found 2 GPUs and local rank 2"):
        own_device("cuda", Place(2, 3, 2, 3), {})
    with pytest.raises(UsageError, match=r"--device cuda:0: expected auto, cuda or cpu"):
        own_device("cuda:0", Place(1, 2, 1, 2), {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    slurm = {"SLURM_PROCID": "1"}
    assert own_device("cuda", Place(1, 2, 1, 2), slurm) == torch.device("cuda", 0)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_rank_scores_as_many_rows_and_all_are_there(world: int) -> None:
    for count in range(1, 8):
        rows = torch.arange(count) * 3
        parts = [Ranks(rank, world).share(rows) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        assert torch.cat(parts)[:count].tolist() == rows.tolist()
