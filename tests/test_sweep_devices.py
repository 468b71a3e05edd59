"""A device that fails ends its worker and no trial; workers elsewhere; what a done trial leaves."""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msq import config as configuration
from msq.config import RunConfig
from msq.errors import MsqError
from msq.extract.store import open_store
from msq.head import sweep_dask, trials
from msq.head.device_errors import DeviceFailed, is_of_device
from msq.head.features import Features, load_features
from msq.head.sweep import prepare, work
from msq.head.sweep_dask import run_dask
from msq.head.sweep_plan import Plan, Source, read_outcome, run_path, summary
from msq.head.sweep_workers import run_sweep
from msq.head.zeroshot import Variant, plan_zero_shot
from msq.report.sweeps import conclude, thread_count
from msq.report.tables import load_table

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sweep_stores.py"))))
ABSENT = "cuda:97"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(stores.make_store(tmp_path_factory.mktemp("devices") / "toy.zarr"))


@pytest.fixture(scope="module")
def features(store: Path) -> Features:
    return load_features(open_store(store))


def planned(store: Path, splits: int = 3) -> Plan:
    made = configuration.override(RunConfig(), [*stores.HEAD, "train.epochs=1"])
    features = load_features(open_store(store))
    variant = Variant(features, Source.of(features, str(store)))
    return plan_zero_shot([variant], made, seen=(50,), splits=splits, queries=("text",))


def counts(folder: Path, plan: Plan) -> tuple[int, int, int]:
    found = summary(folder, plan)
    return found["done"], found["failed"], found["pending"]


class Inline:
    """A context whose processes do their part in this one, when they are started."""

    def __init__(self, idle: int = 0) -> None:
        self.devices: list[str] = []
        self.idle = idle  # so many processes find everything claimed by others

    def Process(self, target: Any, args: tuple[str, str], daemon: bool) -> Any:
        self.devices.append(args[1])
        process = SimpleNamespace(pid=os.getpid(), exitcode=None)
        idle = len(self.devices) <= self.idle

        def start() -> None:
            process.exitcode = 0
            try:
                if not idle:
                    target(*args)
            except SystemExit as left:
                process.exitcode = left.code

        process.start = start
        return process


@pytest.mark.parametrize(
    ("devices", "idle", "expected"),
    [((ABSENT, "cpu"), 0, [ABSENT, "cpu"]), (("cpu", ABSENT), 1, ["cpu", ABSENT, "cpu"])],
)
def test_a_worker_whose_device_cannot_be_used_leaves_its_trials_to_the_others(
    devices: tuple[str, ...], idle: int, expected: list[str], store: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    plan = prepare(tmp_path / "s", planned(store))
    context = Inline(idle)
    monkeypatch.setattr("multiprocessing.get_context", lambda kind: context)
    run_sweep(tmp_path / "s", plan, workers=2, devices=devices)
    assert counts(tmp_path / "s", plan) == (3, 0, 0)
    assert context.devices == expected
    assert f"msq: device {ABSENT} cannot be used: " in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_without_a_usable_device_a_sweep_ends_and_no_trial_has_failed(
    workers: int, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = prepare(tmp_path / "s", planned(store))
    monkeypatch.setattr("multiprocessing.get_context", lambda kind: Inline())
    with pytest.raises(DeviceFailed, match=f"{ABSENT}.*the same command with another --device"):
        run_sweep(tmp_path / "s", plan, workers=workers, devices=(ABSENT,))
    assert counts(tmp_path / "s", plan) == (0, 0, 3)
    run_sweep(tmp_path / "s", plan)
    assert counts(tmp_path / "s", plan) == (3, 0, 0)


def lost_device() -> Exception:
    error = getattr(torch, "AcceleratorError", RuntimeError)
    return error("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("where", ["train_head", "scored"])
def test_an_error_of_the_device_ends_the_worker_and_one_of_room_the_trial(
    where: str, features: Features, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = prepare(tmp_path / "s", planned(store))
    real, asked = getattr(trials, where), []
    raised: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory."), lost_device()]

    def failing(*given: Any, **how: Any) -> Any:
        asked.append(given)
        if raised:
            raise raised.pop(0)
        return real(*given, **how)

    monkeypatch.setattr(trials, where, failing)
    with pytest.raises(DeviceFailed, match="illegal memory access"):
        work(tmp_path / "s", plan, lambda trial, source: features)
    assert len(asked) == 2
    assert counts(tmp_path / "s", plan) == (0, 1, 2)
    assert summary(tmp_path / "s", plan)["failures"][0]["id"] == plan.trials[0].id
    work(tmp_path / "s", plan, lambda trial, source: features)
    assert counts(tmp_path / "s", plan) == (2, 1, 0)


def test_errors_of_devices_are_told_from_those_of_trials() -> None:
    for error in (lost_device(), RuntimeError("CUDA error: uncorrectable ECC error")):
        assert is_of_device(error)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MsqError("CUDA error"),
                  RuntimeError("shapes do not fit"), ValueError("CUDA error")):  # fmt: skip
        assert not is_of_device(error)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two dask workers in this process."""
    distributed: Any = pytest.importorskip("distributed")
    made = distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False,
                                    dashboard_address=None)  # fmt: skip
    yield made
    made.close()


def test_dask_workers_in_other_folders_share_a_sweep_and_one_that_cannot_hides_nothing(
    cluster: Any, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    plan = prepare(Path("s"), planned(store, splits=4))
    real, done = sweep_dask._train, []
    unable = {next(iter(cluster.workers.values())).address}

    def train(folder: Path, group: list[str], device: str) -> None:
        import distributed

        worker: Any = distributed
        os.chdir(tmp_path / "elsewhere")
        if worker.get_worker().address in unable:
            real(folder, group, ABSENT)
        done.append(group)
        real(folder, group, device)

    monkeypatch.setattr(sweep_dask, "_train", train)
    monkeypatch.setattr(sweep_dask, "PAUSE_SECONDS", 0.01)
    folder = tmp_path / "here" / "s"
    run_dask(Path("s"), plan, cluster.scheduler_address, 2)
    assert counts(folder, plan) == (4, 0, 0)
    assert len(done) == 4

    unable |= {worker.address for worker in cluster.workers.values()}
    more = prepare(folder, planned(store, splits=5))
    with pytest.raises(DeviceFailed, match=f"no dask worker can do what is left of .*{ABSENT}"):
        run_dask(folder, more, cluster.scheduler_address, 2)
    assert counts(folder, more) == (4, 0, 1)


def test_a_dask_worker_that_does_not_see_the_files_says_so(store: Path, tmp_path: Path) -> None:
    plan = prepare(tmp_path / "s", planned(store, splits=1))
    group = list(plan.groups[0])
    with pytest.raises(DeviceFailed, match="does not see the sweep there"):
        sweep_dask._train(tmp_path / "absent", group, "cpu")
    moved = store.rename(tmp_path / "moved.zarr")
    try:
        with pytest.raises(DeviceFailed, match="does not see the feature store there"):
            sweep_dask._train(tmp_path / "s", group, "cpu")
    finally:
        moved.rename(store)
    assert counts(tmp_path / "s", plan) == (0, 0, 1)


def test_a_trial_that_is_done_keeps_no_checkpoint_and_one_that_failed_does(
    features: Features, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msq.head.train.Checkpoints.due", lambda self, epoch_done: epoch_done)
    folder, real = tmp_path / "s", trials.scored
    plan = prepare(folder, planned(store, splits=2))
    bad = plan.trials[1].id

    def scored(trial: Any, *more: Any) -> Any:
        if trial.id == bad:
            raise MsqError("no test clip")
        return real(trial, *more)

    monkeypatch.setattr(trials, "scored", scored)
    there: list[bool] = []
    state = run_path(folder, plan.trials[0].id) / "state.pt"
    work(folder, plan, lambda trial, source: features,
         progress=lambda event: there.append(state.exists()))  # fmt: skip
    assert there[0] is False
    assert (state.parent / "result.json").exists()
    assert (state.parent / "head.safetensors").exists()
    assert (run_path(folder, bad) / "state.pt").exists()
    monkeypatch.setattr(trials, "scored", real)
    plan = prepare(folder, planned(store, splits=2), retry_failed=True)
    assert read_outcome(folder, bad) is None
    work(folder, plan, lambda trial, source: features)
    assert counts(folder, plan) == (2, 0, 0)
    assert not list(folder.rglob("state.pt"))
    again = prepare(folder, planned(store, splits=3))
    found = run_sweep(folder, again)
    assert (found["done"], found["failed"]) == (3, 0)
    conclude(folder, again, found, zero_shot=True)
    assert [row.done for row in load_table(folder).rows if not row.baseline] == [3]


def test_threads_are_a_share_of_the_cores_that_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert thread_count(2, None) == 4
    assert thread_count(16, None) == 1
    assert thread_count(2, 7) == 7
