"""The step as a graph, and heads at once, on a second device: see second_device.py.

A graph here keeps every number that its recording had. So a rate, a count or a mask that came from
the processor would make the replays differ from the steps as they are.
"""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import msq.head.step
from msq.config import RunConfig
from msq.head import graph as graph_module
from msq.head import stack_plan
from msq.head.graph import WARM_UP
from msq.head.kernel_choice import HeadShape
from msq.head.packed_choice import bf16_is_native, choose_step
from msq.head.schedule import learning_rate
from msq.head.stack_engine import stacked_choice
from msq.head.stack_step import PLANNED
from msq.head.stack_training import StackedTraining
from msq.head.training import Training

HERE = Path(__file__).parent
toys = SimpleNamespace(**runpy.run_path(str(HERE / "test_train.py")))
second = SimpleNamespace(**runpy.run_path(str(HERE / "second_device_cuda.py")))
STEPS = WARM_UP + 6


def rounded(*arguments: Any) -> float:
    """The rate in float32, as a GPU has it."""
    return float(torch.tensor(learning_rate(*arguments), dtype=torch.float32))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(msq.head.step, "learning_rate", rounded)
    with second.second_device(monkeypatch, (9, 0)) as found:
        yield found


def begun(config: RunConfig, where: str, **changes: Any) -> Training:
    features = toys.toy().to(where)
    shape = HeadShape.of(features, config.head)
    choice = choose_step(config.train, where, shape, config.head.dropout)
    training = Training(features, config, choice)
    training.taking._counted = True
    return training


def state_of(training: Training) -> list[torch.Tensor]:
    """Weights, moments, average and sum of the losses."""
    moments = training.taking.optimiser.state_dict()["state"]
    kept = [value for one in moments.values() for value in one.values()]
    average = [] if training.average is None else training.average.average
    return [x.detach().cpu() for x in (training.flat.data, training.loss_sum, *average, *kept)]


def assert_same(one: Training, other: Training) -> None:
    pairs = list(zip(state_of(one), state_of(other), strict=True))
    assert len(pairs) >= 8
    for number, (a, b) in enumerate(pairs):
        assert torch.equal(a, b), number


@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize("more", [(), ("head.queries=vanilla", "optim.name=adam")])
def test_a_graph_of_the_step_is_the_step(
    device: Any, dropout: float, more: tuple[str, ...]
) -> None:
    config = toys.small(
        "train.graph=on", "train.precision=fp32", "optim.clip_grad=0.5", "train.ema=0.9",
        "optim.warmup=0.2", f"head.dropout={dropout}", *more,
    )  # fmt: skip
    captured = begun(config, "cuda")
    plain = begun(toys.configuration.override(config, ["train.graph=off"]), "cpu")
    assert captured.graph is not None
    for number in range(STEPS):
        with device.watched() as waits:
            captured._step()
        assert number < WARM_UP + 1 or waits == []
        plain._step()
    assert not captured.graph.refused
    assert captured.graph._replay is not None
    assert_same(captured, plain)


def test_a_graph_with_kernels_in_bf16_is_the_step(device: Any) -> None:
    both = [
        begun(toys.small("head.width=32", "train.kernels=triton", f"train.graph={graph}",
                         "train.ema=0.9"), "cuda")
        for graph in ("on", "off")
    ]  # fmt: skip
    assert both[0].choice.kernels
    assert both[0].choice.precision == "bf16"
    for _ in range(STEPS):
        for training in both:
            training._step()
    assert both[0].graph is not None
    assert not both[0].graph.refused
    assert_same(*both)


def test_a_graph_is_recorded_anew_after_a_state_was_loaded(device: Any) -> None:
    """What was recorded before knows the moments that were replaced."""
    config = toys.small("train.graph=on", "train.precision=fp32", "train.ema=0.9")
    whole, first, second_half = (begun(config, "cuda") for _ in range(3))
    for _ in range(2 * STEPS):
        whole._step()
    for _ in range(STEPS):
        first._step()
        second_half._step()  # has a recording of its own already
    second_half.load(first.state())
    for _ in range(STEPS):
        second_half._step()
    assert_same(whole, second_half)


def test_a_run_with_graphs_validates_between_replays(device: Any) -> None:
    """Weights are exchanged with their average and back, in the memory that the graph knows."""
    config = toys.small("train.graph=on", "train.precision=fp32", "train.ema=0.9", "train.val=0.3",
                        "train.epochs=6", "train.batch=16")  # fmt: skip
    captured = begun(config, "cuda")
    plain = begun(toys.configuration.override(config, ["train.graph=off"]), "cpu")
    directory = SimpleNamespace(log=lambda text: None, append_history=lambda line: None)
    saver = SimpleNamespace(save=lambda: None, save_if_due=lambda done: None)
    for training in (captured, plain):
        assert training.run(directory, saver, None, None)
    assert [line["val_map"] for line in captured.history] == [
        line["val_map"] for line in plain.history
    ]
    assert_same(captured, plain)


def test_a_number_of_the_processor_would_be_seen(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of this check: a decay that is a number, and not a tensor."""

    def take(average: Any) -> None:
        weight = float(1 - min(average.decay, (1 + average.step) / (10 + average.step)))
        for kept, parameter in zip(average.average, average.parameters, strict=True):
            kept.lerp_(parameter.detach(), weight)

    monkeypatch.setattr(msq.head.optim.WeightAverage, "take", torch.no_grad()(take))
    monkeypatch.setattr(msq.head.optim.WeightAverage, "plan",
                        lambda average, step: setattr(average, "step", step))  # fmt: skip
    both = [begun(toys.small(f"train.graph={g}", "train.precision=fp32", "train.ema=0.9"), "cuda")
            for g in ("on", "off")]  # fmt: skip
    for _ in range(STEPS):
        for training in both:
            training._step()
    averages = [training.average.average[0] for training in both]  # type: ignore[union-attr]
    assert not torch.equal(averages[0].cpu(), averages[1].cpu())
    assert torch.equal(both[0].flat.data.cpu(), both[1].flat.data.cpu())


def test_recordings_have_a_stream_of_the_current_device(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's own is of the device that recorded first: wrong for the second one of a process."""
    asked: list[Any] = []
    graph = torch.cuda.graph

    def noted(*arguments: Any, **options: Any) -> Any:
        asked.append(options.get("stream"))
        return graph(*arguments, **options)

    monkeypatch.setattr(torch.cuda, "graph", noted)
    graph_module._side_stream.cache_clear()
    graph_module.recorded(lambda: torch.zeros(2, device="cuda"))
    assert asked == [graph_module._side_stream(0)]
    graph_module._side_stream.cache_clear()


def test_a_device_is_timed_and_asked_itself(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the current one, which in a worker of `--device cuda:0,cuda:1` is the first."""
    waited: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda which=None: waited.append(which))
    stack_plan._seconds(lambda: None, "cuda:1")
    assert waited == ["cuda:1"] * 2
    current: list[Any] = []

    @contextmanager
    def entered(which: Any) -> Iterator[None]:
        current.append(which)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda **_: current == [torch.device("cuda", 1)])  # fmt: skip
    assert bf16_is_native("cuda:1")
    assert not bf16_is_native("cuda")


# Heads at once.


def stack(where: str, graph: str = "off", **more: Any) -> StackedTraining:
    trainings = []
    for number in range(3):
        features = toys.toy(seed=number, classes=(6, 4, 6)[number]).to(where)
        config = toys.small(f"train.seed={number}", f"optim.lr={1e-3 * (1 + number)}",
                            "train.precision=fp32", "train.ema=0.9", f"train.graph={graph}",
                            "optim.clip_grad=0.5", "head.dropout=0", "train.val=0.2")  # fmt: skip
        trainings.append(Training(features, config, stacked_choice(config, where)))
    made = StackedTraining(trainings)
    return made


@pytest.mark.parametrize("graph", ["off", "on"])
def test_heads_at_once_are_those_of_the_cpu_and_no_step_waits(device: Any, graph: str) -> None:
    there, here = stack("cuda", graph), stack("cpu")
    for number in range(STEPS):
        with device.watched() as waits:
            there.take_step()
        assert waits == [] or number in (0, WARM_UP)
        here.take_step()
    assert torch.equal(there.taking.parameters.data.cpu(), here.taking.parameters.data)
    assert torch.equal(there.taking.losses.cpu(), here.taking.losses)


def test_stacks_wait_once_an_epoch(device: Any) -> None:
    there, here = stack("cuda"), stack("cpu")
    directories = [SimpleNamespace(append_history=lambda line: None) for _ in range(3)]
    counts: list[int] = []
    end = there._end_epochs

    def ended(trainings: Any) -> None:
        with device.watched() as waits:
            end(trainings)
        counts.append(len(waits))

    there._end_epochs = ended  # type: ignore[method-assign]
    for training in (there, here):
        training.run(directories)
    assert counts == [1] * len(counts)
    assert len(counts) >= 3
    for one, other in zip(there.trainings, here.trainings, strict=True):
        assert [x["val_map"] for x in one.history] == [x["val_map"] for x in other.history]


def test_rates_beyond_those_brought_together(device: Any) -> None:
    made = stack("cuda").taking
    for step in (0, 1, PLANNED - 1, PLANNED, 3 * PLANNED + 5, 2):
        made.plan(step)
        rates = [t.taking.rate(min(step, t.steps - 1)) for t in made.trainings]
        assert made._rates.cpu().tolist() == torch.tensor(rates).tolist()
        weights = [1 - min(0.9, (1 + step) / (10 + step))] * 3
        assert made._weights.cpu().flatten().tolist() == torch.tensor(weights).tolist()


def test_rates_are_made_of_steps_that_come_and_once(device: Any) -> None:
    made, asked = stack("cuda").taking, []
    for training in made.trainings:
        rate = training.taking.rate
        training.taking.rate = lambda n, rate=rate: asked.append(n) or rate(n)
    steps = max(t.steps for t in made.trainings)
    for step in range(steps):
        made.plan(step)
    assert sorted(asked) == sorted([*range(steps)] * len(made.trainings))
