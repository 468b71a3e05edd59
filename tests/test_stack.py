"""Stacked heads against the same heads trained one by one."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from msq import config as configuration
from msq.config import HeadConfig, RunConfig
from msq.errors import UsageError
from msq.head import stack_plan
from msq.head.batches import Batches
from msq.head.class_splits import ClassSplit
from msq.head.features import Features
from msq.head.feeding import Feed
from msq.head.graph import StepGraph
from msq.head.kernel_choice import HeadShape
from msq.head.loss import head_loss
from msq.head.masks import Masks
from msq.head.model import MSQNet
from msq.head.packed import PackedHead
from msq.head.packed_choice import choose_step
from msq.head.run import RunResult
from msq.head.stack_engine import ROOM, _begin, stacked_choice
from msq.head.stack_masks import StackedMasks
from msq.head.stack_model import StackedHead
from msq.head.stack_parameters import StackedParameters
from msq.head.stack_step import stacked_loss
from msq.head.stack_training import StackedTraining
from msq.head.step import TrainingStep
from msq.head.sweep_plan import Plan, Source, outcome_path, read_outcome, read_plan
from msq.head.train import Training
from msq.head.trials import ENGINES, Job, Trial

STEPS = 50
stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sweep_stores.py"))))
Jobs = list[tuple[Features, RunConfig]]
SHAPES = {  # every mode of the queries, every classifier, every kind of position
    "paper": {},
    "positions": {"query_position": True, "classifier": "text", "queries": "text"},
    "shared": {"queries": "vanilla", "classifier": "shared", "memory_position": "none"},
}  # fmt: skip


def world(clips: int = 60, classes: int = 9, task: str = "multilabel") -> Features:
    g = torch.Generator().manual_seed(5)
    if task == "multilabel":
        labels = (torch.rand(clips, classes, generator=g) < 0.3).to(torch.uint8)
    else:
        kind = torch.randint(classes, (clips,), generator=g)
        labels = torch.nn.functional.one_hot(kind, classes).to(torch.uint8)
    mark = labels.float() @ torch.randn(classes, 10, generator=g)
    return Features(
        name="toy",
        task=task,
        classes=tuple(f"class {k}" for k in range(classes)),
        ids=tuple(f"clip {n}" for n in range(clips)),
        splits=tuple("test" if n % 5 == 4 else "train" for n in range(clips)),
        tokens=torch.randn(clips, 4, 10, generator=g) + mark[:, None],
        labels=labels,
        image=torch.randn(clips, 6, generator=g),
        text=torch.randn(classes, 12, generator=g) + 1,
    )


def config(head: dict[str, Any], optim: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    values = {
        "head": {"width": 12, "layers": 2, "heads": 3, "ffn": 20, **head},
        "optim": {"lr": 3e-3, **(optim or {})},
        "train": {"epochs": 20, "batch": 8, "precision": "fp32", **train},
    }
    return configuration.from_dict(values)


def three(head: dict[str, Any], task: str = "multilabel", **train: Any) -> Jobs:
    """Heads with other classes, clips, seeds and hyper-parameters."""
    f = world(task=task)
    first = torch.arange(0, 40)
    optim = {"lr": 1e-3, "weight_decay": 0.1, "warmup": 0.5}
    other = {"clip_grad": 0.1, "schedule": "constant", "beta2": 0.98}
    return [
        (f.select(columns=[0, 2, 3, 5, 8]), config(head, **{"seed": 1, **train})),
        (f.select(rows=first, columns=[1, 2, 7]),
         config(head, optim, **{"seed": 2, "ema": 0.9, **train})),
        (f, config(head, other, **{"seed": 7, "epochs": 30, **train})),
    ]  # fmt: skip


def trainings(jobs: Jobs, dtype: torch.dtype) -> list[Training]:
    return [wide(Training(f, c)) if dtype == torch.float64 else Training(f, c) for f, c in jobs]


def wide(training: Training) -> Training:
    """The same run in float64."""
    t = training
    t.model.double()
    t.taking = TrainingStep(t.model, t.choice, t.config, t.loss, t.steps, t.epoch_steps)
    t.flat, t.average, t.loss_sum = t.taking.flat, t.taking.average, t.taking.loss_sum
    t.parameters = list(t.model.parameters())
    t.feed = Feed(t.features, t.batches, t.config.train.seed, torch.float64)
    return t


def weights(training: Training) -> dict[str, Tensor]:
    """Parameters, and their averages, by name."""
    found = {n: p.detach().clone() for n, p in training.model.named_parameters()}
    if training.average is not None:
        training.average.swap()
        found |= {f"average of {n}": p.detach().clone()
                  for n, p in training.model.named_parameters()}  # fmt: skip
        training.average.swap()
    return found


def furthest(found: list[Training], expected: list[Training], leave_out: str = "-") -> float:
    """Largest difference of a weight, over the largest weight of its tensor."""
    worst = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        own, right = weights(mine), weights(theirs)
        assert own.keys() == right.keys()
        for name, value in right.items():
            if name.endswith(leave_out):
                continue
            # The bias of the keys has no gradient: both sides hold rounding only, near zero.
            size = 1.0 if name.endswith(".k.bias") else float(value.abs().max())
            worst = max(worst, float((own[name] - value).abs().max()) / size)
    return worst


ASYMMETRIC = {"loss": "asymmetric", "gamma_neg": 2.0, "gamma_pos": 1.0, "clip_margin": 0.1}
FOCAL = {"loss": "focal", "focal_gamma": 1.5, "focal_alpha": 0.6}


@pytest.mark.parametrize(
    ("shape", "task", "loss"),
    [
        ("paper", "multilabel", {}),
        ("positions", "singlelabel", {}),
        ("shared", "multilabel", {}),
        ("paper", "multilabel", ASYMMETRIC),
        ("shared", "multilabel", FOCAL),
    ],
)
def test_stacked_equals_separate_after_50_steps_in_float64(
    shape: str, task: str, loss: dict[str, Any]
) -> None:
    jobs = three(SHAPES[shape], task, **loss)
    together, alone = trainings(jobs, torch.float64), trainings(jobs, torch.float64)
    starts = [weights(training) for training in alone]
    stack = StackedTraining(together)
    assert not stack.feed.shared
    for _ in range(STEPS):
        stack.take_step()
        for training in alone:
            training._step()
    assert furthest(together, alone) < 1e-10
    for training, start in zip(alone, starts, strict=True):  # it did learn something
        moved = weights(training)
        assert all(not torch.equal(moved[name], start[name]) for name in start)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.loss_sum, other.loss_sum, rtol=1e-5, atol=0)


def test_stacked_equals_separate_after_50_steps_in_float32() -> None:
    jobs = three({})
    together, alone = trainings(jobs, torch.float32), trainings(jobs, torch.float32)
    stack = StackedTraining(together)
    for _ in range(STEPS):
        stack.take_step()
        for training in alone:
            training._step()
    # The bias of the keys shifts every score of a row alike: its gradient is rounding only.
    assert furthest(together, alone, ".k.bias") < 1e-4


@pytest.mark.parametrize("kind", ["bce", "ce", "asymmetric", "focal"])
def test_encoder_and_unknown_labels_one_step(kind: str) -> None:
    """What no small run reaches: an encoder of the tokens, as the authors' protocol has it."""
    head = HeadConfig(width=12, layers=1, heads=3, ffn=20, encoder_layers=1, dropout=0.3,
                      memory_position="sincos-input", label_projection="fused")  # fmt: skip
    g = torch.Generator().manual_seed(3)
    counts, masks = (6, 4), [Masks(seed, 5, 0.3) for seed in (1, 2)]
    models = [
        MSQNet(head, classes=k, token_width=10, image_width=6, seed=k,
               text=torch.randn(k, 12, generator=g)).double()
        for k in counts
    ]  # fmt: skip
    tokens = torch.randn(2, 5, 4, 10, generator=g).double()
    image = torch.randn(2, 5, 6, generator=g).double()
    labels = (torch.rand(2, 5, 6, generator=g) < 0.4).double()
    known = (torch.rand(2, 5, 6, generator=g) < 0.8).to(torch.uint8)
    labels[1, :, 4:], known[1, :, 4:] = 0, 0
    alone = []
    for n, (model, k) in enumerate(zip(models, counts, strict=True)):
        logits = PackedHead(model, absorb=False)(tokens[n], image[n], masks=masks[n])["logits"]
        loss = head_loss(logits, labels[n, :, :k], kind, known[n, :, :k])
        torch.autograd.backward(loss)
        alone.append((loss.detach(), {m: p.grad for m, p in model.named_parameters()}))
        model.zero_grad(set_to_none=True)
    parameters = StackedParameters(models)
    stacked = StackedHead(parameters)
    found = stacked(tokens, image, StackedMasks(masks, counts))
    losses = stacked_loss(found, labels, stacked.valid, kind, known)
    torch.autograd.backward(losses.sum())
    parameters.gather()
    for n, (loss, gradients) in enumerate(alone):
        torch.testing.assert_close(losses[n].detach(), loss, rtol=0, atol=1e-12)
        for name, gradient in gradients.items():
            mine = parameters._part(parameters.grad[n], name, gradient.shape)
            torch.testing.assert_close(mine, gradient, rtol=0, atol=1e-12, msg=name)
    assert float(parameters.grad.abs().sum()) == pytest.approx(
        sum(float(x.abs().sum()) for _, all_ in alone for x in all_.values()), rel=1e-9
    )  # nothing is left to the padding


def test_heads_that_see_the_same_clips_share_them() -> None:
    f = world()
    jobs = [(f, config({}, {"lr": rate}, seed=3)) for rate in (1e-3, 3e-3)]
    shared, own = trainings(jobs, torch.float64), trainings(jobs, torch.float64)
    stacks = StackedTraining(shared), StackedTraining(own, share=False)
    assert stacks[0].feed.shared
    assert not stacks[1].feed.shared
    for stack in stacks:
        for _ in range(5):
            stack.take_step()
    assert stacks[0].feed.of(5).tokens.shape[0] == 1
    assert furthest(shared, own) < 1e-12


def test_what_differs_in_more_than_rates_is_not_stacked() -> None:
    f = world()
    jobs = [(f, config({})), (f, config({"layers": 1}, batch=4))]
    with pytest.raises(UsageError, match=r"batch, head\.layers differ"):
        StackedTraining(trainings(jobs, torch.float32))
    # Numbers of the loss are the same for all; those that it does not read may differ.
    jobs = [(f, config({}, loss="asymmetric", gamma_neg=x, focal_gamma=x)) for x in (1.0, 2.0)]
    with pytest.raises(UsageError, match=r"classes: train\.gamma_neg differ"):
        StackedTraining(trainings(jobs, torch.float32))
    jobs = [(f, config({}, gamma_neg=x)) for x in (1.0, 2.0)]
    assert len(StackedTraining(trainings(jobs, torch.float32)).trainings) == 2


def run(jobs: Jobs, folder: Path, engine: str = "stacked") -> list[RunResult | Exception]:
    made = [Job(f, c, folder / str(n)) for n, (f, c) in enumerate(jobs)]
    return ENGINES[engine](made, "cpu", None)


def test_runs_are_in_form_and_numbers_those_of_single_ones(tmp_path: Path) -> None:
    """Other lengths, early stop, a kind of its own, and one that diverges among them."""
    jobs = three({"layers": 1}, epochs=6)
    f, c = jobs[2]
    longer = dataclasses.replace(c.train, epochs=9, patience=2)
    jobs[2] = (f, dataclasses.replace(c, train=longer))
    jobs.append((f, config({"layers": 1}, {"lr": 1e30, "clip_grad": 0.0, "warmup": 0.0})))
    jobs.append((f, config({"layers": 1, "queries": "text"}, epochs=2)))
    alone, stacked = run(jobs, tmp_path / "a", "sequential"), run(jobs, tmp_path / "b")
    for n, (one, other) in enumerate(zip(alone, stacked, strict=True)):
        if n == 3:
            assert isinstance(one, Exception)
            assert str(one) == str(other)
            continue
        assert isinstance(one, RunResult)
        assert isinstance(other, RunResult)
        assert one.result.keys() == other.result.keys()
        for key in ("epochs", "best_epoch", "clips", "parameters", "seed", "fingerprint"):
            assert one.result[key] == other.result[key], key
        assert other.metrics["map"] == pytest.approx(one.metrics["map"], abs=1e-3)
        folders = [tmp_path / side / str(n) for side in "ab"]
        names = [{path.name for path in folder.iterdir()} - {"state.pt"} for folder in folders]
        assert names[0] == names[1]
        lines = [[json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
                 for folder in folders]  # fmt: skip
        assert [x.keys() for x in lines[0]] == [x.keys() for x in lines[1]]
        for first, second in zip(*lines, strict=True):
            assert second["loss"] == pytest.approx(first["loss"], rel=1e-3)
            assert second["lr"] == first["lr"]
    assert jobs[2][1].train.epochs > alone[2].result["epochs"]  # type: ignore[union-attr]


def test_a_killed_group_is_run_again_whole(tmp_path: Path, monkeypatch: Any) -> None:
    jobs = three({"layers": 1}, epochs=3)
    whole = run(jobs, tmp_path / "a")
    calls = []

    def killed(*given: Any) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("msq.head.stack_engine.conclude", killed)
        with pytest.raises(KeyboardInterrupt):
            run(jobs, tmp_path / "b")
    again, stored = run(jobs, tmp_path / "b"), run(jobs, tmp_path / "b")
    for one, other, third in zip(whole, again, stored, strict=True):
        assert isinstance(one, RunResult)
        assert isinstance(other, RunResult)
        assert isinstance(third, RunResult)
        own = dict(other.model.named_parameters())
        assert all(torch.equal(p, own[name]) for name, p in one.model.named_parameters())
        assert one.metrics == other.metrics
        assert third.result == json.loads(json.dumps(other.result))


def test_a_sweep_is_planned_in_groups_and_keeps_its_plan(tmp_path: Path) -> None:
    """Query modes and buckets of K are kept apart; the same command again changes nothing."""
    store = stores.make_store(tmp_path / "a.zarr")
    out = tmp_path / "sweep"
    words = ("zero-shot", store, *stores.HEAD, "--seen", "50", "--splits", 3, "--queries",
             "vanilla,text", "--epochs", 2, "--device", "cpu", "--quiet", "--out", out)  # fmt: skip
    assert stores.msq(*words, "--stack", 2) == 0
    plan = read_plan(out)
    assert plan.engine["name"] == "stacked"
    assert sorted(len(group) for group in plan.groups) == [1, 1, 2, 2]
    for group in plan.groups:
        assert len({plan.trial(one).config.head.queries for one in group}) == 1
    found = stores.numbers(out)
    assert all(read_outcome(out, trial.id)["status"] == "done" for trial in plan.trials)  # type: ignore[index]
    for one in plan.groups[0]:
        outcome_path(out, one).unlink()
        (out / "trials" / one / "run" / "result.json").unlink()
    assert stores.msq(*words) == 0
    assert read_plan(out).to_dict() == plan.to_dict()
    assert stores.numbers(out) == found


def test_heads_are_grouped_by_bucket_of_their_classes() -> None:
    names = [f"class {k}" for k in range(157)]
    counts = (12, 16, 17, 32, 33, 51, 64, 65, 156)
    trials = [
        Trial(source="x", config=config({}), split=ClassSplit(tuple(names[:k]), tuple(names[k:])))
        for k in counts
    ]
    found = stack_plan.groups(Plan("p", trials, {}), 8)
    sizes = {trial.id: k for trial, k in zip(trials, counts, strict=True)}
    assert [tuple(sizes[one] for one in group) for group in found] == [
        (12, 16), (17, 32), (33, 51, 64), (65, 156)
    ]  # fmt: skip
    found = stack_plan.groups(Plan("p", trials, {}), 2)
    assert [len(group) for group in found] == [2, 2, 2, 1, 2]


def test_heads_that_do_not_fit_together_are_stacked_in_parts(
    tmp_path: Path, monkeypatch: Any
) -> None:
    f = world()
    jobs = [(f, config({"layers": 1}, seed=n, epochs=2)) for n in range(3)]
    together: list[int] = []

    class Noting(StackedTraining):
        def __init__(self, trainings: Any) -> None:
            together.append(len(trainings))
            super().__init__(trainings)

    monkeypatch.setattr("msq.head.stack_engine.StackedTraining", Noting)
    (own,) = (begun.bytes for begun in [_begin(0, Job(*jobs[0], None), "cpu")])
    monkeypatch.setattr("msq.head.stack_engine.available_bytes", lambda device: 2.5 * own / ROOM)
    assert all(isinstance(one, RunResult) for one in run(jobs, tmp_path))
    assert together == [2, 1]


def test_the_planner_measures_both_ways(monkeypatch: Any) -> None:
    f = world()
    made = [Trial(source="x", config=config({"layers": 1}, seed=n)) for n in range(4)]
    taken, stopped = stack_plan.head_seconds(made, f, "cpu")
    assert (set(taken), stopped) == ({1, 4}, "")
    assert all(seconds > 0 for seconds in taken.values())
    plan = Plan("p", made, {"x": Source.of(f)})
    plan = dataclasses.replace(
        plan, trials=[dataclasses.replace(t, source=Source.of(f).key) for t in made],
        sources={Source.of(f).key: Source.of(f)}, groups=(),
    )  # fmt: skip
    for times, name, size in (
        ({1: 2.0, 4: 1.0}, "stacked", 4),
        ({1: 1.0, 4: 1.1}, "sequential", 1),
    ):
        monkeypatch.setattr(stack_plan, "head_seconds", lambda *_, times=times: (times, ""))
        chosen = stack_plan._by_measurement(plan, "cpu", lambda trial, source: f)
        assert chosen.engine["name"] == name
        assert {len(group) for group in chosen.groups} == {size}
        assert "1: " in chosen.engine["why"]
    on_cpu = stack_plan.choose_engine(plan, None, "cpu")
    assert (on_cpu.engine["name"], on_cpu.groups) == ("sequential", plan.groups)


def test_the_planner_times_a_head_alone_as_it_would_be_trained(monkeypatch: Any) -> None:
    """Absorbed cross-attention, kernels: what a stack cannot have is not taken from its rival."""
    choices: list[Any] = []

    class Noting(Training):
        def __init__(self, features: Features, made: RunConfig, choice: Any) -> None:
            choices.append(choice)
            super().__init__(features, made, choice)

    monkeypatch.setattr(stack_plan, "Training", Noting)
    f, made = world(), config({"layers": 1})
    trials = [Trial(source="x", config=config({"layers": 1}, seed=n)) for n in range(2)]
    stack_plan.head_seconds(trials, f, "cpu")
    alone, *together = choices
    assert alone == choose_step(made.train, "cpu", HeadShape.of(f, made.head), made.head.dropout)
    assert together == [stacked_choice(made, "cpu")] * 2
    assert alone != together[0]


def test_a_short_last_batch_is_no_replay_of_a_whole_one() -> None:
    """Epochs counted in clips end in a batch of fewer clips, for every head."""
    together, alone = (trainings(three({}), torch.float32) for _ in range(2))
    for t in (*together, *alone):  # as protocol official has it
        t.batches = Batches(t.train_rows, 8, 20, t.config.train.seed)
        t.feed = Feed(t.features, t.batches, t.config.train.seed)
    stack = StackedTraining(together)
    recorded: list[int] = []

    def record(call: Any) -> Any:
        recorded.append(stack.step)
        return call

    size = together[0].batch
    stack.graph = StepGraph(stack.taking.run, size, record, lambda call: call())
    for _ in range(9):  # of 8, 8 and 4 clips
        stack.take_step()
        for training in alone:
            training._step()
    assert recorded == [4]
    assert stack.graph.refused == ""
    assert furthest(together, alone, ".k.bias") < 1e-4
