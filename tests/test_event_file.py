"""TensorBoard's event files: what TensorBoard itself reads is what stands in the run's files."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from msq import config as configuration
from msq.config import RunConfig
from msq.errors import SpecMismatch, UsageError
from msq.extract.store import open_store
from msq.head.batches import Batches
from msq.head.event_file import EventFile, event_files
from msq.head.features import Features, load_features
from msq.head.stack_engine import train_stacked
from msq.head.train import train_head
from msq.head.trial import Trial
from msq.head.trials import Job

HERE = Path(__file__)
stores = SimpleNamespace(**runpy.run_path(str(HERE.with_name("sweep_stores.py"))))
trains = SimpleNamespace(**runpy.run_path(str(HERE.with_name("train_command.py"))))
watched = SimpleNamespace(**runpy.run_path(str(HERE.with_name("watched_processes.py"))))
ASKED = "train.tensorboard=true"
UNLIMITED = {"scalars": 0, "tensors": 0}
Scalars = dict[str, list[tuple[int, float]]]


def settings(*overrides: str) -> RunConfig:
    return configuration.override(RunConfig(), [*stores.HEAD, "train.epochs=4", *overrides])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(stores.make_store(tmp_path_factory.mktemp("events") / "toy.zarr"))


@pytest.fixture(scope="module")
def features(store: Path) -> Features:
    return load_features(open_store(store))


def accumulated(run: Path) -> EventAccumulator:
    """What TensorBoard reads of a folder; it is told to leave nothing out."""
    return EventAccumulator(str(run), size_guidance=UNLIMITED).Reload()


def current(run: Path) -> Path:
    """The event file that something stands in."""
    (file,) = (path for path in event_files(run) if path.stat().st_size)
    return file


def scalars(read: EventAccumulator) -> Scalars:
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def history(run: Path) -> list[dict[str, float]]:
    return [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def expected(run: Path, steps: int, clips: int) -> Scalars:
    """What the other files of a finished run say, as scalars."""
    lines, found = history(run), result(run)
    names = {"loss": "train/loss", "lr": "train/lr", "seconds": "train/seconds",
             "val_map": "val/mAP_macro", "val_official": "val/official"}  # fmt: skip
    made: Scalars = {
        tag: [(steps * int(line["epoch"]), line[key]) for line in lines]
        for key, tag in names.items()
        if key in lines[0]
    }
    before = [0.0, *(line["seconds"] for line in lines)]
    made["train/clips_per_second"] = [
        (steps * (k + 1), clips / (line["seconds"] - before[k])) for k, line in enumerate(lines)
    ]
    last = steps * len(lines)
    for key, value in found["metrics"].items():
        if isinstance(value, float):
            made[f"test/{'mAP_macro' if key == 'map' else key}"] = [(last, value)]
    return made


def require_same(found: Scalars, wanted: Scalars) -> None:
    """The same tags, steps, and, up to float32, values."""
    assert found.keys() == wanted.keys()
    for tag, values in wanted.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in values], tag
        assert [x for _, x in found[tag]] == pytest.approx([x for _, x in values], rel=1e-6), tag


def timeless(scalars: Scalars) -> Scalars:
    return {k: v for k, v in scalars.items() if "second" not in k}


def test_every_epoch_and_score_is_there_at_its_step(features: Features, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_head(features, settings(ASKED), run)
    clips, size = result(run)["clips_by_split"]["train"], 16
    steps = round(clips / size)
    assert steps > 1
    read = accumulated(run)
    require_same(scalars(read), expected(run, steps, steps * size))
    (text,) = read.Tensors("config/text_summary")
    (markdown,) = text.tensor_proto.string_val
    lines = (run / "config.toml").read_text().splitlines()
    assert markdown.decode().splitlines() == [f"    {line}" for line in lines]
    (file,) = event_files(run)
    assert [path for path in run.iterdir() if "tfevents" in path.name] == [file]
    assert re.fullmatch(r"events\.out\.tfevents\.\d{10}\.msq", file.name)  # no machine's name


def test_the_table_of_hyperparameters_has_every_setting_and_the_end(
    features: Features, tmp_path: Path
) -> None:
    config = settings(ASKED, "head.width=16", "train.protocol=paper")
    train_head(features, config, tmp_path / "run")
    found = accumulated(tmp_path / "run").summary_metadata
    start = metadata.parse_session_start_info_plugin_data(
        found[metadata.SESSION_START_INFO_TAG].plugin_data.content
    )
    given = {
        f"{section}.{key}": value
        for section, values in configuration.deciding(config).items()
        for key, value in values.items()
        if value is not None
    }
    read = {k: v.string_value or v.number_value for k, v in start.hparams.items()}
    assert read == {k: v if isinstance(v, str) else float(v) for k, v in given.items()}
    assert "train.tensorboard" not in read
    end = plugin_data_pb2.HParamsPluginData.FromString(
        found[metadata.SESSION_END_INFO_TAG].plugin_data.content
    )
    assert end.session_end_info.status == 1  # STATUS_SUCCESS


def test_nothing_else_of_a_run_depends_on_it(features: Features, tmp_path: Path) -> None:
    plain, told = tmp_path / "plain", tmp_path / "told"
    # A state after each epoch: by the clock the last one would be of a step that a load decides.
    train_head(features, settings(), plain, checkpoint_seconds=0.0)
    train_head(features, settings(ASKED), told, checkpoint_seconds=0.0)
    assert event_files(plain) == []
    names = {path.name for path in plain.iterdir()}
    assert {path.name for path in told.iterdir()} - names == {event_files(told)[0].name}
    for name in ("head.safetensors", "predictions.npz"):
        assert (plain / name).read_bytes() == (told / name).read_bytes(), name

    def without_time(found: Any) -> Any:
        left = {k: v for k, v in found.items() if "second" not in k}
        return {**left, "run": None}

    assert without_time(result(plain)) == without_time(result(told))
    pairs = zip(history(plain), history(told), strict=True)
    assert all(without_time(a) == without_time(b) for a, b in pairs)
    one, other = ((run / "config.toml").read_text() for run in (plain, told))
    assert one.replace("tensorboard = false", "tensorboard = true") == other
    a, b = (torch.load(run / "state.pt", weights_only=True) for run in (plain, told))
    assert a.keys() == b.keys()
    assert a["step"] == b["step"] == 16
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def test_it_is_no_part_of_what_a_run_or_a_trial_is(features: Features, tmp_path: Path) -> None:
    plain, told = settings(), settings(ASKED)
    assert plain != told
    assert configuration.fingerprint(plain) == configuration.fingerprint(told)
    assert Trial(source="a", config=plain).id == Trial(source="a", config=told).id
    train_head(features, plain, tmp_path / "run", stop_after=3)
    with pytest.raises(SpecMismatch, match=r"optim\.lr"):
        train_head(features, settings(ASKED, "optim.lr=1"), tmp_path / "run")
    train_head(features, told, tmp_path / "run")  # the same run, and now with an event file
    read = scalars(accumulated(tmp_path / "run"))
    assert len(read["train/loss"]) == 4


def test_a_reader_that_looks_on_forgets_what_a_resumed_run_takes_back(
    features: Features, tmp_path: Path
) -> None:
    """Killed after epochs that no checkpoint has: they are in the file, and then come again."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    train_head(features, settings(ASKED), whole)
    train_head(features, settings(ASKED), run, stop_after=7)  # in the second epoch
    state = (run / "state.pt").read_bytes()
    train_head(features, settings(ASKED), run, stop_after=6)
    (run / "state.pt").write_bytes(state)
    looking = accumulated(run)
    steps = [step for step, _ in scalars(looking)["train/loss"]]
    assert len(steps) >= 2
    before = current(run)
    with before.open("ab") as file:
        file.write(b"\x18\0\0\0\0\0\0\0half a rec")  # torn by the kill
    train_head(features, settings(ASKED), run)
    after = current(run)
    assert after.name > before.name
    assert event_files(run) == [before, after]  # no more of them, however often it is resumed
    wanted = timeless(scalars(accumulated(whole)))
    require_same(timeless(scalars(accumulated(run))), wanted)
    require_same(timeless(scalars(looking.Reload())), wanted)


VICTIM = """
import runpy, signal, sys
from pathlib import Path
made = runpy.run_path(sys.argv[1])
features = made["load_features"](made["open_store"](Path(sys.argv[2])))
config = made["settings"]("train.tensorboard=true", "train.epochs=40")

def told(event):
    if event["epoch"] == int(sys.argv[4]):  # so that it is there to be killed, however late
        signal.pause()

made["train_head"](features, config, Path(sys.argv[3]), checkpoint_seconds=0.0, progress=told)
"""


def test_a_run_killed_at_any_moment_shows_every_step_once(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", VICTIM, str(HERE), str(store), str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for wait, last in ((0.03, "13"), (0.13, "26"), (0.22, "39")):
        victim = subprocess.Popen([*command, last], env=environment, stderr=subprocess.PIPE)
        files = event_files(run)  # the new one is there as soon as the run goes on
        goes_on = watched.until(lambda before=files: event_files(run) != before, victim)
        assert goes_on, victim.stderr.read()
        time.sleep(wait)
        victim.send_signal(signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
        victim.stderr.close()
    loaded = load_features(open_store(store))
    train_head(loaded, settings(ASKED, "train.epochs=40"), run)
    steps = round(result(run)["clips_by_split"]["train"] / 16)
    require_same(scalars(accumulated(run)), expected(run, steps, steps * 16))
    assert len(history(run)) == 40


def test_a_run_that_began_one_goes_on_with_it_and_a_finished_one_can_be_given_one(
    features: Features, tmp_path: Path
) -> None:
    run, later, whole = (tmp_path / name for name in ("run", "later", "whole"))
    train_head(features, settings(ASKED), whole)
    train_head(features, settings(ASKED), run, stop_after=7)
    train_head(features, settings(), run)
    train_head(features, settings(), later)
    assert event_files(later) == []
    stamps = {path: path.stat().st_mtime_ns for path in later.iterdir()}
    train_head(features, settings(ASKED), later)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps  # nothing was trained
    wanted = timeless(scalars(accumulated(whole)))
    for folder in (run, later):
        require_same(timeless(scalars(accumulated(folder))), wanted)
        steps = round(result(folder)["clips_by_split"]["train"] / 16)
        require_same(scalars(accumulated(folder)), expected(folder, steps, steps * 16))
    files = {path: path.read_bytes() for path in event_files(later)}
    train_head(features, settings(ASKED), later)
    assert {path: path.read_bytes() for path in event_files(later)} == files
    train_head(features, settings(), later, overwrite=True)
    assert event_files(later) == []


def test_an_epoch_that_is_a_draw_of_clips_and_numbers_that_are_none(tmp_path: Path) -> None:
    """Protocol official: 40 of 100 clips an epoch, the last batch short; a metric of its own."""
    lines = [
        {"epoch": 1, "loss": 0.5, "lr": 1e-5, "val_map": math.nan, "val_official": 0.25,
         "seconds": 8.0},
        {"epoch": 2, "loss": 0.25, "lr": 1e-5, "val_map": None, "val_official": 0.5,
         "seconds": 10.0},
    ]  # fmt: skip
    batches = Batches(torch.arange(100), 16, 40, 0)
    EventFile(tmp_path, batches, "", {}, lines[:1]).add(lines[1])
    found = scalars(accumulated(tmp_path))
    assert found["train/clips_per_second"] == [(3, 5.0), (6, 20.0)]
    assert found["val/official"] == [(3, 0.25), (6, 0.5)]
    assert found["train/loss"] == [(3, 0.5), (6, 0.25)]
    assert found["train/seconds"] == [(3, 8.0), (6, 10.0)]
    assert found.keys() == {"train/loss", "train/lr", "train/seconds", "train/clips_per_second",
                            "val/official"}  # fmt: skip


def test_a_stack_writes_what_runs_of_their_own_do(features: Features, tmp_path: Path) -> None:
    both = [settings(ASKED, f"train.seed={k}", "train.precision=fp32") for k in (1, 2)]
    jobs = [Job(features, config, tmp_path / f"stack{k}") for k, config in enumerate(both)]
    assert all(not isinstance(x, Exception) for x in train_stacked(jobs, "cpu"))
    for job in jobs:
        assert job.run is not None
        steps = round(result(job.run)["clips_by_split"]["train"] / 16)
        require_same(scalars(accumulated(job.run)), expected(job.run, steps, steps * 16))


def test_a_sweep_can_be_asked_for_them(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    words = ("zero-shot", store, "--out", out, "--splits", 1, "--seen", 50, "--queries", "text",
             "--epochs", 2, "--device", "cpu", "-q", *stores.HEAD)  # fmt: skip
    assert stores.msq(*words, ASKED) == 0
    runs = [path.parent for path in out.glob("trials/*/run/result.json")]
    assert len(runs) == 1
    assert len(scalars(accumulated(runs[0]))["train/loss"]) == 2
    before = {path: path.read_bytes() for path in out.glob("trials/*/*.json")}
    assert stores.msq(*words) == 0  # the same trials
    assert {path: path.read_bytes() for path in out.glob("trials/*/*.json")} == before


def test_the_command_has_an_option_for_it(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("train-head", store, "--epochs", 2, "--device", "cpu", "-q", *stores.HEAD)
    assert stores.msq(*words, "--out", run, "--tensorboard") == 0
    assert len(scalars(accumulated(run))["val/mAP_macro"]) == 2
    assert configuration.load(run / "config.toml").train.tensorboard is True


@pytest.mark.parametrize("command", ["train-head", "train", "zero-shot"])
def test_without_the_package_nothing_is_begun(
    command: str,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    what = tmp_path / "clips.csv" if command == "train" else store
    asked = [ASKED] if command == "zero-shot" else ["--tensorboard"]
    assert stores.msq(command, what, "--out", tmp_path / "run", *asked) == 2
    said = capsys.readouterr().err
    assert "pip install 'msq[tensorboard]'" in said
    assert "leave --tensorboard (train.tensorboard) out" in said
    assert not (tmp_path / "run").exists()


def test_without_the_package_a_run_that_began_one_says_which_file_to_delete(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train_head(features, settings(ASKED), run, stop_after=3)
    (file,) = event_files(run)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UsageError, match=f"or delete {file}"):
        train_head(features, settings(), run)
    file.unlink()
    train_head(features, settings(), run)
    assert (run / "result.json").exists()


@pytest.mark.slow
def test_of_several_processes_the_first_writes(media: Any, tmp_path: Path) -> None:
    """`msq train` under torchrun, end to end."""
    run = tmp_path / "run"
    asked = ["--tensorboard", "--out", str(run), "--epochs", "3", "train.batch=4"]
    done = subprocess.run(
        [*trains.TORCHRUN, *trains.train_command(media, tmp_path), *asked],
        env=trains.environment(), capture_output=True, text=True, timeout=watched.PATIENCE,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len([path for path in run.iterdir() if "tfevents" in path.name]) == 1
    steps = round(6 / 4)
    require_same(scalars(accumulated(run)), expected(run, steps, steps * 4))
