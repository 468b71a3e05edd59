"""Trials that break their device, and trials that another device began."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msq import config as configuration
from msq.config import RunConfig
from msq.extract.store import open_store
from msq.head import trials
from msq.head.device_errors import DeviceFailed
from msq.head.features import Features, load_features
from msq.head.sweep import Loaded, do_group, prepare, work
from msq.head.sweep_breaks import breaks_path
from msq.head.sweep_plan import Plan, Source, read_outcome, run_path, summary
from msq.head.sweep_workers import run_sweep
from msq.head.train import train_head
from msq.head.zeroshot import Variant, plan_zero_shot

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sweep_stores.py"))))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(stores.make_store(tmp_path_factory.mktemp("breaks") / "toy.zarr"))


@pytest.fixture(scope="module")
def features(store: Path) -> Features:
    return load_features(open_store(store))


def planned(store: Path, features: Features, splits: int = 3) -> Plan:
    made = configuration.override(RunConfig(), [*stores.HEAD, "train.epochs=1"])
    variant = Variant(features, Source.of(features, str(store)))
    return plan_zero_shot([variant], made, seen=(50,), splits=splits, queries=("text",))


def counts(folder: Path, plan: Plan) -> tuple[int, int, int]:
    found = summary(folder, plan)
    return found["done"], found["failed"], found["pending"]


def lost_device() -> Exception:
    error = getattr(torch, "AcceleratorError", RuntimeError)
    return error("CUDA error: an illegal memory access was encountered")


def breaking(monkeypatch: pytest.MonkeyPatch, bad: str) -> list[str]:
    """Have the device break whenever one trial is trained; the trials that were, in their order."""
    real, asked = trials.train_head, []

    def train_head(features: Any, config: Any, run: Path, **how: Any) -> Any:
        asked.append(run.parent.name)
        if run.parent.name == bad:
            raise lost_device()
        return real(features, config, run, **how)

    monkeypatch.setattr(trials, "train_head", train_head)
    return asked


@pytest.mark.parametrize("place", [0, 2])
def test_a_trial_at_which_the_device_breaks_three_times_has_failed_and_the_sweep_ends(
    place: int, features: Features, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s"
    plan = prepare(folder, planned(store, features))
    bad, done = plan.trials[place].id, place  # those before it
    asked = breaking(monkeypatch, bad)
    for time in (1, 2):
        with pytest.raises(DeviceFailed, match=f"trial {bad}: time {time} of 3, .* tries again"):
            run_sweep(folder, plan)
        assert counts(folder, plan) == (done, 0, 3 - done)
    if place == 2:  # nothing is left then
        run_sweep(folder, plan)
    else:
        with pytest.raises(DeviceFailed, match=f"trial {bad}: time 3 of 3, a failure now"):
            run_sweep(folder, plan)
    assert counts(folder, plan) == (done, 1, 2 - done)
    found = run_sweep(folder, plan)
    assert (found["done"], found["failed"], found["pending"]) == (2, 1, 0)
    assert asked.count(bad) == 3
    (failed,) = found["failures"]
    assert failed["id"] == bad
    assert "a device broke at it 3 times, the last time with" in failed["error"]
    assert "illegal memory access" in failed["error"]
    assert "traceback" not in (read_outcome(folder, bad) or {})

    prepare(folder, planned(store, features), retry_failed=True)
    with pytest.raises(DeviceFailed, match="time 1 of 3"):
        run_sweep(folder, plan)
    assert breaks_path(folder, bad).exists()
    monkeypatch.undo()
    run_sweep(folder, plan)
    assert counts(folder, plan) == (3, 0, 0)
    assert not breaks_path(folder, bad).exists()


def test_only_the_first_trial_that_a_process_breaks_at_is_counted(
    features: Features, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dask worker goes on to other trials with the device as it was left."""
    plan = prepare(tmp_path / "s", planned(store, features))
    loaded = Loaded(lambda trial, source: features, "cpu")
    real, raising = trials.train_head, [lost_device() for _ in range(2)]

    def train_head(*given: Any, **how: Any) -> Any:
        if raising:
            raise raising.pop()
        return real(*given, **how)

    monkeypatch.setattr(trials, "train_head", train_head)
    for group in plan.groups[:2]:
        with pytest.raises(DeviceFailed):
            do_group(tmp_path / "s", plan, group, loaded)
    noted = [breaks_path(tmp_path / "s", trial.id).exists() for trial in plan.trials]
    assert noted == [True, False, False]
    do_group(tmp_path / "s", plan, plan.groups[2], loaded)
    raising.append(lost_device())  # after one that went well it counts again
    with pytest.raises(DeviceFailed, match="time 1 of 3"):
        do_group(tmp_path / "s", plan, plan.groups[1], loaded)
    assert counts(tmp_path / "s", plan) == (1, 0, 2)


def test_a_device_that_cannot_be_used_at_all_counts_against_no_trial(
    features: Features, store: Path, tmp_path: Path
) -> None:
    plan = prepare(tmp_path / "s", planned(store, features))
    for _ in range(4):
        with pytest.raises(DeviceFailed):
            run_sweep(tmp_path / "s", plan, devices=("cuda:97",))
    assert counts(tmp_path / "s", plan) == (0, 0, 3)
    assert not list((tmp_path / "s").rglob("breaks.json"))


@pytest.mark.parametrize("step", [{"kernels": "relu_drop"}, {"graph": "on"}, {}])
def test_a_trial_half_done_with_steps_of_a_gpu_begins_anew_on_a_cpu(
    step: dict[str, str], features: Features, store: Path, tmp_path: Path
) -> None:
    """One whose steps any device can take goes on where it was."""
    folder = tmp_path / "s"
    plan = prepare(folder, planned(store, features, splits=1))
    (trial,) = plan.trials
    run = run_path(folder, trial.id)
    train_head(trials.shown(trial, features), trial.config, run, stop_after=1)
    text = (run / "config.toml").read_text(encoding="utf-8")
    for key, value in {"device": "cuda", **step}.items():
        text, count = re.subn(f'(\\[data\\.step\\].*^{key} = )"[^"]*"', f'\\1"{value}"', text,
                              flags=re.M | re.S)  # fmt: skip
        assert count == 1
    (run / "config.toml").write_text(text, encoding="utf-8")
    work(folder, plan, lambda trial, source: features)
    assert counts(folder, plan) == (1, 0, 0)
    outcome = read_outcome(folder, trial.id)
    assert outcome is not None
    assert outcome["training"]["step"]["device"] == ("cpu" if step else "cuda")
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert ("resumed at step 1 of" in log) == (not step)

    if not step:
        return
    fresh = tmp_path / "fresh"
    prepare(fresh, planned(store, features, splits=1))
    work(fresh, plan, lambda trial, source: features)
    assert (read_outcome(fresh, trial.id) or {})["metrics"] == outcome["metrics"]
