"""Sweeps: planned first, killed and resumed to the last digit, failures recorded, shared work."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msq import config as configuration
from msq.config import RunConfig
from msq.errors import MsqError, UsageError
from msq.extract.store import open_store
from msq.head import trials
from msq.head.class_splits import ClassSplit, class_split
from msq.head.features import Features, load_features
from msq.head.sweep import Loaded, do_group, prepare, work
from msq.head.sweep_claims import at_work, claim
from msq.head.sweep_plan import (
    Plan,
    Source,
    outcome_path,
    read_outcome,
    read_plan,
    summary,
    write_outcome,
)
from msq.head.sweep_results import chosen, early_stopping, lines, spread
from msq.head.sweep_workers import run_sweep, run_workers
from msq.head.trial import Trial
from msq.head.zeroshot import Variant, plan_zero_shot, run_in_memory, zero_shot

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sweep_stores.py"))))
watched = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("watched_processes.py"))))
SMALL = ("--seen", "50", "--splits", "2", "--device", "cpu", "-q", *stores.HEAD)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(stores.make_store(tmp_path_factory.mktemp("sweep") / "toy.zarr"))


@pytest.fixture(scope="module")
def features(store: Path) -> Features:
    return load_features(open_store(store))


def config(*overrides: str) -> RunConfig:
    return configuration.override(RunConfig(), [*stores.HEAD, "train.epochs=1", *overrides])


def planned(features: Features, store: Path | str = "", **how: Any) -> Plan:
    made = config(*how.pop("overrides", ()))
    variant = Variant(features, Source.of(features, str(store)))
    given = {"seen": (50,), "splits": 2, "queries": ("text",), **how}
    return plan_zero_shot([variant], made, **given)


def test_killed_with_9_and_resumed_and_through_dask_the_numbers_are_the_same(
    store: Path, tmp_path: Path
) -> None:
    more = ("train.epochs=5", "--threads", "1")
    assert stores.msq("zero-shot", store, "--out", tmp_path / "whole", *SMALL, *more) == 0
    whole = stores.numbers(tmp_path / "whole")
    assert whole["done"] == 6
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "msq", "zero-shot", str(store), "--out", str(folder), *SMALL,
               *more]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    last = read_plan(tmp_path / "whole").groups[-1][0]
    with claim(folder, last) as mine:  # it cannot end before it is killed: one trial is another's
        assert mine
        process = subprocess.Popen([*command, "--workers", "2"], env=environment)
        assert watched.until(lambda: any(folder.glob("trials/*/outcome.json")), process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert watched.until(lambda: _nobody_at(folder)), "workers outlived the killed command"
    before = {p: p.stat().st_mtime_ns for p in folder.glob("trials/*/outcome.json")}
    assert 0 < len(before) < 6
    assert not (folder / "results.json").exists()
    assert stores.msq(*command[3:], "--workers", "2") == 0
    assert stores.numbers(folder) == whole
    assert {p: p.stat().st_mtime_ns for p in before} == before  # what was done was left alone

    dask = ("--out", tmp_path / "dask", "--scheduler", "dask", "--workers", "2")
    assert stores.msq("zero-shot", store, *dask, *SMALL, *more) == 0
    assert stores.numbers(tmp_path / "dask") == whole


def _nobody_at(folder: Path) -> bool:
    try:
        with at_work(folder, alone=True):
            return True
    except MsqError:
        return False


def test_the_plan_is_written_before_the_first_trial_and_says_everything(
    features: Features, tmp_path: Path
) -> None:
    plan = prepare(tmp_path / "s", planned(features, choose={"optim.lr": [1e-3, 2e-3]}))
    assert read_plan(tmp_path / "s").to_dict() == plan.to_dict()
    written = json.loads((tmp_path / "s" / "plan.json").read_text())
    assert written["engine"]["name"] == "sequential"
    assert [one["config"]["optim"]["lr"] for one in written["trials"]] == [1e-3, 2e-3] * 2
    assert {len(one["split"]["hash"]) for one in written["trials"]} == {64}
    written["trials"][0]["config"]["optim"]["lr"] = 0.5
    (tmp_path / "s" / "plan.json").write_text(json.dumps(written))
    with pytest.raises(UsageError, match="was edited, or another version"):
        read_plan(tmp_path / "s")


def test_a_trial_is_known_by_what_decides_its_numbers_and_by_nothing_else(
    features: Features,
) -> None:
    split = class_split(features.classes, 0.5, 0)
    base = Trial(source="a", config=config(), split=split)
    assert base.id == Trial(source="a", config=config(), split=split, row={"x": 1}).id
    renamed = ClassSplit(split.seen, split.unseen, 7, "another name")
    assert base.id == Trial(source="a", config=config(), split=renamed).id
    others = [
        Trial(source="b", config=config(), split=split),
        Trial(source="a", config=config("train.seed=1"), split=split),
        Trial(source="a", config=config(), split=class_split(features.classes, 0.5, 1)),
        Trial(source="a", config=config()),
    ]
    assert len({base.id, *(one.id for one in others)}) == 5
    with pytest.raises(UsageError, match="two trials are the same"):
        Plan("twice", [base, Trial(source="a", config=config(), split=split, row={"x": 1})], {})


def test_done_trials_are_skipped_and_a_plan_can_grow(features: Features, tmp_path: Path) -> None:
    def load(trial: Trial, source: Source) -> Features:
        return features

    out, told = tmp_path / "s", []
    plan = prepare(out, planned(features))
    work(out, plan, load, progress=lambda event: told.append(event["id"]))
    assert told == [trial.id for trial in plan.trials]
    bigger = prepare(out, planned(features, splits=3))
    assert len(read_plan(out).trials) == 3
    work(out, bigger, load, progress=lambda event: told.append(event["id"]))
    assert len(told) == 3
    assert set(told) == {trial.id for trial in bigger.trials}
    with at_work(out), pytest.raises(MsqError, match="another process is at work"):
        prepare(out, planned(features))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="expected an empty or new folder, or a sweep"):
        prepare(tmp_path / "other", plan)


def test_a_failure_is_recorded_hides_nothing_and_is_retried_on_request(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real = trials.train_head

    def failing(given: Features, made: RunConfig, *more: Any, **how: Any) -> Any:
        if made.head.queries == "text":
            raise MsqError("the loss is not finite")
        return real(given, made, *more, **how)

    monkeypatch.setattr(trials, "train_head", failing)
    out = tmp_path / "s"
    arguments = ("zero-shot", store, "--out", out, *SMALL, "--splits", "1", "--epochs", "1")
    assert stores.msq(*arguments) == 3
    found = json.loads((out / "results.json").read_text())
    assert (found["done"], found["failed"]) == (2, 1)
    assert found["failures"][0]["error"] == "the loss is not finite"
    monkeypatch.undo()
    assert stores.msq(*arguments) == 3  # not tried again by itself
    capsys.readouterr()
    for more, states in (((), ["done", "failed"]), (("--retry-failed",), ["done", "to do"])):
        assert stores.msq(*arguments, "--dry-run", "--json", *more) == 0
        dry = json.loads(capsys.readouterr().out)
        assert sorted({one["state"] for one in dry["trials"]}) == states
        assert dry["to_do"] == len(more)
    assert stores.msq(*arguments, "--retry-failed") == 0
    assert json.loads((out / "results.json").read_text())["done"] == 3


def test_an_unexpected_error_is_a_failure_too_with_its_traceback(
    features: Features, tmp_path: Path
) -> None:
    def load(trial: Trial, source: Source) -> Features:
        raise ZeroDivisionError("no such thing")

    plan = prepare(tmp_path / "s", planned(features))
    work(tmp_path / "s", plan, load)
    assert summary(tmp_path / "s", plan)["failed"] == 2
    outcome = read_outcome(tmp_path / "s", plan.trials[0].id)
    assert outcome is not None
    assert outcome["error_type"] == "ZeroDivisionError"
    assert "in load" in outcome["traceback"]


def test_a_claimed_trial_is_left_to_its_owner(features: Features, tmp_path: Path) -> None:
    plan = prepare(tmp_path / "s", planned(features))
    loaded = Loaded(lambda trial, source: features, "cpu")
    first = plan.groups[0]
    with claim(tmp_path / "s", first[0]) as mine:
        assert mine
        assert not do_group(tmp_path / "s", plan, first, loaded)
        assert not outcome_path(tmp_path / "s", first[0]).exists()
    assert do_group(tmp_path / "s", plan, first, loaded)
    assert outcome_path(tmp_path / "s", first[0]).exists()


def test_while_others_are_at_all_that_is_left_no_worker_is_started(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s"
    plan = prepare(folder, planned(features))
    looked, started = [], []

    def other_command(seconds: float) -> None:
        """Its second look finds one trial done, the third both."""
        looked.append(len(started))
        for trial in plan.trials[: len(looked) - 1]:
            write_outcome(folder, trials.failure(trial.id, MsqError("of the other command")))

    monkeypatch.setattr("msq.head.sweep_workers.time.sleep", other_command)
    monkeypatch.setattr("msq.head.sweep_workers.run_workers", lambda *given: started.append(given))
    with claim(folder, plan.groups[0][0]), claim(folder, plan.groups[1][0]):
        found = run_sweep(folder, plan, workers=2)
    assert (found["failed"], looked, started) == (2, [0, 0, 0], [])


def test_another_store_under_the_same_path_is_refused(store: Path, tmp_path: Path) -> None:
    features = load_features(open_store(store))
    other = stores.make_store(tmp_path / "other.zarr", clips=90)
    plan = prepare(tmp_path / "s", planned(features, other))
    found = run_sweep(tmp_path / "s", plan)
    assert found["failed"] == 2
    assert "clip_hash, clips differ" in found["failures"][0]["error"]


def mortal(folder: Path, plan: Plan, features: Features, deaths: int, at: str | None) -> Any:
    """A context of processes: the first `deaths` claim a trial (None: nothing) and die of it."""
    started: list[str] = []

    class Process:
        pid = os.getpid()

        def __init__(self, target: Any, args: tuple[str, str], daemon: bool) -> None:
            self.exitcode: int | None = None
            started.append(args[1])

        def start(self) -> None:
            if len(started) > deaths:
                work(folder, plan, lambda trial, source: features)
                self.exitcode = 0
                return
            if at is not None:
                with claim(folder, at):
                    pass
            self.exitcode = -9

    return SimpleNamespace(Process=Process, started=started)


@pytest.mark.parametrize(("deaths", "failed"), [(1, 0), (2, 0), (3, 1)])
def test_the_trial_of_a_worker_that_dies_is_taken_up_again_twice(
    deaths: int, failed: int, features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s"
    plan = prepare(folder, planned(features, queries=("vanilla", "text")))
    context = mortal(folder, plan, features, deaths, plan.groups[1][0])
    monkeypatch.setattr("multiprocessing.get_context", lambda kind: context)
    told: list[str] = []
    run_workers(folder, plan, 1, progress=lambda event: told.append(event["id"]))
    found = summary(folder, plan)
    assert (found["done"], found["failed"]) == (4 - failed, failed)
    assert len(context.started) == deaths + 1
    for one in found["failures"]:
        assert one["id"] == plan.groups[1][0]
        assert "3 processes died at it, the last with exit code -9" in one["error"]
    assert set(told) == {trial.id for trial in plan.trials}


def test_workers_that_die_before_they_have_a_trial_end_the_sweep(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = prepare(tmp_path / "s", planned(features))
    context = mortal(tmp_path / "s", plan, features, 3, None)
    monkeypatch.setattr("multiprocessing.get_context", lambda kind: context)
    with pytest.raises(MsqError, match="3 worker processes ended before they had a trial"):
        run_workers(tmp_path / "s", plan, 1)


def test_workers_take_the_devices_in_turn(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = prepare(tmp_path / "s", planned(features))
    context = mortal(tmp_path / "s", plan, features, 0, None)
    monkeypatch.setattr("multiprocessing.get_context", lambda kind: context)
    run_workers(tmp_path / "s", plan, 3, ("cuda:0", "cuda:1"))
    assert context.started == ["cuda:0", "cuda:1", "cuda:0"]


def outcome(score: float | None, test: float, **training: Any) -> dict[str, Any]:
    facts = {"best_val_score": score, "epochs": 4, "planned_epochs": 10, "seconds_per_epoch": 2.0}
    return {"metrics": {"unseen": test}, "task": "multilabel", "training": {**facts, **training}}


def test_validation_chooses_and_test_scores_play_no_part(features: Features) -> None:
    plan = planned(features, choose={"optim.lr": [1e-3, 2e-3, 4e-3]})
    ids = [trial.id for trial in plan.trials]
    found = {ids[0]: outcome(0.5, 0.9), ids[1]: outcome(0.7, 0.2), ids[2]: outcome(None, 1.0),
             ids[4]: outcome(0.1, 0.4)}  # fmt: skip
    (line,) = lines(plan, found)
    assert [dict(t.choice)["optim.lr"] for t, _ in line.trials] == [2e-3, 2e-3]
    assert line.metrics["unseen"]["values"] == [0.2, 0.4]
    assert chosen(plan.trials[:1], {}) is None
    with pytest.raises(UsageError, match=r"expected validation clips to choose by"):
        planned(features, choose={"optim.lr": [1e-3]}, overrides=("train.val=0",))


def test_validation_clips_of_the_dataset_choose_where_none_are_held_out(
    features: Features,
) -> None:
    own = tuple("val" if split == "train" and row % 2 else split
                for row, split in enumerate(features.splits))  # fmt: skip
    mine = dataclasses.replace(features, splits=own)
    for_both = {"choose": {"optim.lr": [1e-3, 2e-3]}, "overrides": ("train.val=0",)}
    plan = planned(mine, **for_both)
    outcomes = run_in_memory(plan, mine, "cpu")
    assert all(one["training"]["best_val_score"] is not None for one in outcomes.values())
    with pytest.raises(UsageError, match=r"found train.val = 0 and no clip of the split val"):
        planned(features, choose={"train.val": [0.1, 0]})
    held = planned(features, choose={"train.val": [0.1, 0.2]}, overrides=("train.val=0",))
    assert {trial.config.train.val for trial in held.trials} == {0.1, 0.2}


def test_trials_that_share_a_place_without_a_choice_are_refused(features: Features) -> None:
    """Else the better of them on validation clips would stand there, as if that was asked for."""
    made = [Trial(source="s", config=config(f"optim.lr={lr}"), row={"setting": "one"})
            for lr in (1e-3, 1e-1)]  # fmt: skip
    plan = Plan("merged", made, {})
    found = {trial.id: outcome(0.5, 0.5) for trial in made}
    with pytest.raises(UsageError, match=r"found 2 at 'setting one' \(trials .*no choice between"):
        lines(plan, found)
    chosen_from = [dataclasses.replace(trial, choice={"lr": k}) for k, trial in enumerate(made)]
    (line,) = lines(Plan("chosen", chosen_from, {}), found)
    assert (line.planned, len(line.trials)) == (1, 1)


def test_validation_clips_are_training_clips_with_seen_labels_only(features: Features) -> None:
    trial = planned(features).trials[0]
    assert trial.split is not None
    shown = trials.shown(trial, features)
    assert shown.classes == trial.split.seen
    val = trials.train_head(shown, config()).result["clips_by_split"]["val"]
    assert 0 < val < len(shown.rows("train"))


def test_early_stopping_says_what_it_saved_and_cost(features: Features, store: Path) -> None:
    full = planned(features).trials
    stopping = [
        Trial(source=t.source, split=t.split, row={"patience": 3},
              config=configuration.override(t.config, ["train.patience=3"]))
        for t in full
    ]  # fmt: skip
    plan = Plan("both", [*full, *stopping], {})
    ids = [trial.id for trial in plan.trials]
    found = {ids[0]: outcome(0.5, 0.75, epochs=10), ids[2]: outcome(0.5, 0.5),
             ids[3]: outcome(0.5, 0.5, epochs=10)}  # fmt: skip
    saved = early_stopping(plan, found)
    assert saved is not None
    assert (saved["trials"], saved["stopped"], saved["pairs"]) == (2, 1, 1)
    assert (saved["saved"], saved["seconds_saved"]) == (pytest.approx(0.3), 12.0)
    assert saved["cost"]["unseen"] == spread([0.25])
    assert early_stopping(planned(features), {}) is None


def test_a_run_that_stops_early_is_the_beginning_of_the_full_one(features: Features) -> None:
    made = config("train.epochs=8", "optim.lr=0.05")
    seen = trials.shown(planned(features).trials[0], features)
    full = trials.train_head(seen, made).result
    short_config = configuration.override(made, ["train.patience=1"])
    short = trials.train_head(seen, short_config).result
    assert short["epochs"] < full["epochs"] == 8
    history = [full["best_val_score"], short["best_val_score"]]
    assert history[0] >= history[1]


def test_prompts_cross_with_queries_and_each_reads_its_own_texts(tmp_path: Path) -> None:
    path = stores.make_store(tmp_path / "two.zarr")
    stores.add_prompt(path, "video-of", "a video of {}")
    out = tmp_path / "s"
    small = (*SMALL, "--splits", "1", "--epochs", "1", "--queries", "text,multimodal")
    assert stores.msq("zero-shot", path, "--out", out, *small) == 2  # which of the two?
    assert stores.msq("zero-shot", path, "--out", out, *small, "--prompts", "all") == 0
    results = json.loads((out / "results.json").read_text())["results"]
    assert [(r["queries"], r["prompt"]) for r in results] == [
        (mode, prompt) for prompt in ("plain", "video-of") for mode in ("text", "multimodal")
    ]
    hashes = {run["hash"] for r in results for run in r["runs"]}
    assert len(hashes) == 1
    first, second = (r["runs"][0]["unseen"] for r in results if r["queries"] == "text")
    assert first != second
    assert stores.msq("zero-shot", path, "--out", out, *small, "--prompts", "plane") == 2


def test_text_encoders_are_an_axis(tmp_path: Path) -> None:
    path = stores.make_store(tmp_path / "two.zarr")
    names = [stores.views.TEXT.slug, stores.add_text_encoder(path)]
    small = ("--out", tmp_path / "s", *SMALL, "--splits", "1", "--epochs", "1", "--queries", "text")
    assert stores.msq("zero-shot", path, *small, "--text-encoders", "all") == 0
    results = json.loads((tmp_path / "s" / "results.json").read_text())["results"]
    assert sorted(r["text"] for r in results) == sorted(names)
    first, second = (r["runs"][0] for r in results)
    assert first["hash"] == second["hash"]
    assert first["unseen"] != second["unseen"]


def test_clip_similarity_stands_beside_every_share(store: Path, tmp_path: Path) -> None:
    results = zero_shot(
        load_features(open_store(store)), config(), seen=(50, 75), splits=2, queries=("text",)
    )
    for result in results:
        clip = result["clip_similarity"]
        assert clip["unseen"]["map"].keys() == {"mean", "std", "values"}
        assert clip["generalised"].keys() == {"seen", "unseen", "harmonic"}
