"""What validation decides by: of single-label sets too, the metric that is reported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from msq import config as configuration
from msq.config import RunConfig
from msq.head.actor_scores import evaluate_actors
from msq.head.actors import ActorSplit
from msq.head.checkpoint import load_state, save_state
from msq.head.evaluate import score
from msq.head.features import Features
from msq.head.metrics import all_metrics, average_precision, mean_average_precision
from msq.head.stack_training import StackedTraining
from msq.head.sweep_plan import Plan
from msq.head.train import train_head
from msq.head.training import Training
from msq.head.trial import Trial
from msq.head.trials import Job, train_at_once, train_sequentially
from msq.head.zeroshot import run_in_memory
from msq.protocol import FIXED
from msq.report.tables import sweep_table

SMALL = ["head.layers=1", "head.heads=2", "head.ffn=32", "train.batch=16", "optim.lr=3e-3"]


def world(seed: int = 0, clips: int = 200, classes: int = 8) -> Features:
    """Clips of one class each that differ in how strongly they show it."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(classes, (clips,), generator=g)
    mark = torch.randn(classes, 16, generator=g)
    strength = torch.exp(torch.randn(clips, 1, 1, generator=g))
    return Features(
        name="toy",
        task="singlelabel",
        classes=tuple(f"class {k}" for k in range(classes)),
        ids=tuple(f"clip {n}" for n in range(clips)),
        splits=tuple("val" if n % 4 == 2 else "test" if n % 4 == 3 else "train"
                     for n in range(clips)),
        tokens=strength * (mark[kind][:, None] + 2 * torch.randn(clips, 4, 16, generator=g)),
        labels=torch.nn.functional.one_hot(kind, classes).to(torch.uint8),
        image=mark[kind] + torch.randn(clips, 16, generator=g),
        text=mark,
    )  # fmt: skip


def config(*changes: str) -> RunConfig:
    return configuration.override(RunConfig(), [*SMALL, *changes])


def both(training: Training, features: Features) -> tuple[float, float]:
    """The metric of the validation clips, and what their raw logits would give."""
    rows = training.val_rows
    logits, labels = score(training.model, features, rows), features.labels[rows]
    return (all_metrics(logits, labels, features.task)["map"],
            float(mean_average_precision(logits, labels)))  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
def test_the_score_that_validation_decides_by_is_the_metric(seed: int) -> None:
    features = world(seed)
    training = Training(features, config("train.ema=0", "train.epochs=3"))
    for _ in range(2 * training.epoch_steps):
        training._step()
        if training.step % training.epoch_steps == 0:
            training._end_epoch()
            metric, raw = both(training, features)
            assert training.history[-1]["val_map"] == metric
            assert abs(metric - raw) > 1e-3  # else this test could not fail
    assert training.best is not None
    assert training.best["value"] == max(line["val_map"] for line in training.history)


def test_heads_of_a_stack_are_chosen_by_it_too() -> None:
    features = world()
    made = [Training(features, config("train.ema=0", f"train.seed={n}")) for n in range(2)]
    stack = StackedTraining(made)
    for _ in range(made[0].epoch_steps):
        stack.take_step()
    stack._end_epochs(made)
    for training in made:
        metric, raw = both(training, features)
        assert training.history[-1]["val_map"] == pytest.approx(metric, abs=1e-9)
        assert abs(metric - raw) > 1e-3


@pytest.mark.parametrize("engine", [train_sequentially, train_at_once])
def test_the_result_of_a_run_has_one_number_for_one_set(engine: object) -> None:
    """Where the clips that validate are scored, the best score is the metric of the weights."""
    features = world()
    clips = [n for n, split in enumerate(features.splits) if split != "test"]
    shown = features.select(rows=torch.tensor(clips))
    jobs = [Job(shown, config("train.epochs=4", f"train.seed={n}"), None) for n in range(2)]
    for found in engine(jobs, "cpu", None):  # type: ignore[operator]
        assert found.result["split"] == "val"
        assert found.result["best_val_map"] == pytest.approx(found.metrics["map"], abs=1e-6)


def test_per_class_numbers_of_other_actors_are_ranked_as_the_metric_is() -> None:
    features = world()
    sides = {name: tuple(clip for clip, split in zip(features.ids, features.splits, strict=True)
                         if split == name) for name in ("train", "val", "test")}  # fmt: skip
    split = ActorSplit(("a",), ("b",), sides["train"], sides["test"], sides["val"])
    training = Training(features, config())
    for _ in range(training.epoch_steps):
        training._step()
    found = evaluate_actors(training.model, features, split)
    rows = features.rows("test")
    logits, labels = score(training.model, features, rows), features.labels[rows]
    expected = average_precision(logits.double().log_softmax(1), labels)
    raw = average_precision(logits, labels)
    assert list(found["per_class"].values()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert float((expected - raw).abs().max()) > 1e-2


def test_a_choice_that_no_validation_clip_decides_is_warned_of() -> None:
    features = world(clips=60)
    labels = features.labels.clone()
    labels[features.rows("val")] = 0
    trials = [
        Trial(source="s", config=config("train.epochs=1", f"optim.lr={lr}"), choice={"lr": lr})
        for lr in (1e-3, 1e-1)
    ]
    plan = Plan("chosen", trials, {})
    decided = sweep_table(plan, run_in_memory(plan, features, "cpu"))
    assert decided.notes == ["lr chosen by validation clips, in each repeat"]
    assert decided.warnings() == []
    blind = dataclasses.replace(features, labels=labels)
    table = sweep_table(plan, run_in_memory(plan, blind, "cpu"))
    (warning,) = table.warnings()
    assert warning.startswith("lr: in 1 of 1 places and repeats no trial has a validation")
    assert table.notes == []


@pytest.mark.parametrize(
    ("task", "by", "dropped"),
    [("singlelabel", "map", True), ("multilabel", "map", False),
     ("singlelabel", "official", False)],
)  # fmt: skip
def test_a_best_epoch_found_by_raw_logits_is_not_compared_with_later_ones(
    task: str, by: str, dropped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unfinished run of before epochs were ranked as the metric is."""
    features = dataclasses.replace(world(), task=task)
    # The only protocol with `official` has a head that is too large for a test.
    monkeypatch.delitem(FIXED["paper"], "train.select_by")
    made = config("train.epochs=3", "train.ema=0", f"train.select_by={by}")
    for name, old in (("new", False), ("old", True)):
        out = tmp_path / name
        steps = Training(features, made).epoch_steps
        train_head(features, made, out, stop_after=steps + 1)
        state = load_state(out / "state.pt")
        assert state is not None
        assert state["best"]["epoch"] == 1
        state["best"]["value"] = 2.0  # no later epoch comes near
        if old:
            del state["best_by"]
        save_state(out / "state.pt", state)
        result = train_head(features, made, out).result
        assert (result["best_epoch"] != 1) == (old and dropped)
        assert (result["best_val_score"] <= 1) == (old and dropped)
        log = (out / "log.txt").read_text(encoding="utf-8")
        assert f"resumed at step {steps + 1} of {3 * steps}" in log
        assert ("its best epoch, 1, was found by ranking clips by logits" in log) == (
            old and dropped
        )
