"""Heads trained at once against one after another: epochs of heads per minute.

A head has B clips in an epoch of its own here, so that one step is one epoch of that size; every
head has clips of its own. One after another they take the steps that they would take alone, kernels
and absorbed cross-attention included; on a GPU the steps of both ways are CUDA graphs. Where heads
see the same clips, another case compares gathering these once with gathering them for each. The
gates take a few steps both ways in float64, of two heads on a CPU.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from msq.bench.cases import Case, Figure, Gate, Prepared, Settings, Side
from msq.config import HeadConfig, OptimConfig, RunConfig, TrainConfig
from msq.head.features import Features
from msq.head.feeding import Feed
from msq.head.graph import WARM_UP, StepGraph
from msq.head.kernel_choice import HeadShape
from msq.head.packed_choice import choose_step
from msq.head.stack_engine import stacked_choice
from msq.head.stack_training import StackedTraining
from msq.head.step import TrainingStep
from msq.head.training import Training

CLASSES, CLIPS = (12, 20, 51, 157), 64
EPOCHS = 10_000  # more than are taken
GATE_STEPS, TOLERANCE = WARM_UP + 2, 1e-10  # the last are replays, where there are graphs
LARGE = 100  # classes: four heads at once take more than 24 GB from here on
CPU_GATE = 2, 2  # heads and steps: float64 is slow there
Taken = Mapping[str, Sequence[tuple[float, float]]]


def cases(settings: Settings) -> Iterable[Case]:
    """One for each number of classes, and one of heads that see the same clips."""
    clips = 4 if settings.quick else CLIPS
    for classes in (5, 7) if settings.quick else CLASSES:
        heads = _heads(classes, settings)
        yield Case(
            name=f"stack K={classes} B={clips} G={heads}",
            compares=f"one training step of {heads} heads: at once, one after another",
            base="stacked",
            unit="ms",
            rounds=9,
            prepare=functools.partial(_prepare, classes, clips, heads),
        )
    classes = 5 if settings.quick else 20
    heads = _heads(classes, settings)
    yield Case(
        name=f"stack, same clips, K={classes} B={clips} G={heads}",
        compares=f"one training step of {heads} heads at once that see the same clips: gathered "
        "once, gathered for each",
        base="gathered once",
        unit="ms",
        rounds=9,
        prepare=functools.partial(_prepare_same, classes, clips, heads),
    )


def _heads(classes: int, settings: Settings) -> int:
    if settings.quick:
        return 2
    if settings.device.startswith("cuda"):
        return 10
    return 4 if classes < LARGE else 2


def begun(
    classes: int,
    clips: int,
    heads: int,
    settings: Settings,
    *,
    stacked: bool,
    alike: bool = False,
    exact: bool = False,
    graph: Any = None,
) -> list[Training]:
    """Heads at their start.

    Args:
        classes: K.
        clips: B.
        heads: how many.
        settings: of the benchmark.
        stacked: their steps are chosen as in a stack; else as each would take them alone.
        alike: all see the same clips; else each has its own.
        exact: float32 and no kernels, to be widened; else as a run chooses.
        graph: as `train.graph`; None is `on` on a GPU.
    """
    quick = settings.quick
    length, wide, image, width = (4, 24, 12, 16) if quick else (17, 768, 512, 512)
    head = HeadConfig(width=width, layers=2 if quick else 6, heads=2 if quick else 8)
    graph = graph or ("on" if settings.device.startswith("cuda") else "auto")
    made = []
    for number in range(heads):
        seed = 0 if alike else number
        g = torch.Generator().manual_seed(seed)
        features = Features(
            name="random", task="multilabel", splits=("train",) * clips,
            classes=tuple(str(k) for k in range(classes)), ids=tuple(map(str, range(clips))),
            tokens=torch.randn(clips, length, wide, generator=g),
            labels=(torch.rand(clips, classes, generator=g) < 0.1).to(torch.uint8),
            image=torch.randn(clips, image, generator=g),
            text=torch.randn(classes, width, generator=g),
        )  # fmt: skip
        config = RunConfig(
            head=head,
            optim=OptimConfig(lr=1e-4 * (1 + number)),
            train=TrainConfig(
                batch=clips,
                epochs=EPOCHS,
                seed=seed,
                val=0.0,
                graph=graph,
                precision="fp32" if exact else "auto",  # in which no kernel runs
            ),
        )
        shape = HeadShape.of(features, head)
        choice = (
            stacked_choice(config, settings.device)
            if stacked
            else choose_step(config.train, settings.device, shape, head.dropout)
        )
        made.append(Training(features.to(settings.device), config, choice))
    return made


@contextmanager
def _prepare(classes: int, clips: int, heads: int, settings: Settings) -> Iterator[Prepared]:
    begin = functools.partial(begun, classes, clips, heads, settings)
    few = functools.partial(begun, classes, clips, gate_heads(heads, settings), settings)

    def gate() -> Gate:
        together, alone = (few(stacked=at_once, exact=True) for at_once in (True, False))
        return agreement(together, alone, lambda: sides_of(together, alone).values())

    yield Prepared(
        gate=gate, sides=lambda: sides_of(begin(stacked=True), begin(stacked=False)),
        figures=functools.partial(_figures, clips, heads),
    )  # fmt: skip


@contextmanager
def _prepare_same(classes: int, clips: int, heads: int, settings: Settings) -> Iterator[Prepared]:
    begin = functools.partial(begun, classes, clips, heads, settings, stacked=True, alike=True)
    count = gate_heads(heads, settings)
    few = functools.partial(begun, classes, clips, count, settings, stacked=True, alike=True)

    def gathered(once: list[Training], each: list[Training]) -> Mapping[str, Side]:
        shared, own = StackedTraining(once), StackedTraining(each, share=False)
        assert shared.feed.shared  # or the two sides would be the same
        return {"gathered once": Side(shared.take_step), "gathered for each": Side(own.take_step)}

    def gate() -> Gate:
        once, each = (few(exact=True) for _ in range(2))
        return agreement(once, each, lambda: gathered(once, each).values())

    yield Prepared(gate=gate, sides=lambda: gathered(begin(), begin()),
                   figures=functools.partial(_figures, clips, heads))  # fmt: skip


def _figures(clips: int, heads: int, taken: Taken) -> Mapping[str, Figure]:
    return {
        f"heads x epochs of {clips} clips a minute, {side}":
        Figure(60 * heads / statistics.median(wall for wall, _ in times))
        for side, times in taken.items()
    }  # fmt: skip


def gate_heads(heads: int, settings: Settings) -> int:
    """How many heads the gate trains."""
    return heads if settings.device.startswith("cuda") else min(heads, CPU_GATE[0])


def agreement(
    together: list[Training], alone: list[Training], sides: Callable[[], Iterable[Side]]
) -> Gate:
    """How far the weights of the same heads are apart after a few steps of each side, in float64.

    In float32 they differ at these sizes whoever is right: an input of a ReLU within rounding of
    zero has a gradient on one side and none on the other, and Adam's first steps are as long for a
    gradient that is rounding alone as for any other (docs/log.md).

    Args:
        together: heads of one side, that have not begun.
        alone: the same heads of the other.
        sides: made of them, once they are in float64.
    """
    for training in (*together, *alone):
        _widen(training)
    steps = GATE_STEPS if together[0].loss_sum.is_cuda else CPU_GATE[1]
    for side in sides():
        for _ in range(steps):
            side.run()
    worst = 0.0
    for one, other in zip(together, alone, strict=True):
        named = dict(other.model.named_parameters())
        for name, p in one.model.named_parameters():
            if not name.endswith(".k.bias"):  # its gradient is rounding only
                far = (p - named[name]).abs().max() / named[name].abs().max()
                worst = max(worst, float(far.detach()))
    what = (
        f"weights in float64 after {steps} steps, largest difference over the largest weight of a "
        "tensor; without the bias of the keys"
    )
    return Gate(worst, TOLERANCE, what)


def _widen(training: Training) -> None:
    """Make a run that has not begun one in float64."""
    t = training
    t.model.double()
    t.taking = TrainingStep(t.model, t.choice, t.config, t.loss, t.steps, t.epoch_steps)
    t.flat, t.average, t.loss_sum = t.taking.flat, t.taking.average, t.taking.loss_sum
    t.graph = None if t.graph is None else StepGraph(t.taking.run, t.batch)
    t.parameters = list(t.model.parameters())
    t.feed = Feed(t.features, t.batches, t.config.train.seed, torch.float64)


def sides_of(together: list[Training], alone: list[Training]) -> Mapping[str, Side]:
    """One step of all heads, at once and one after another."""
    stack = StackedTraining(together)
    return {
        "stacked": Side(stack.take_step),
        "sequential": Side(functools.partial(in_turn, alone)),
    }


def in_turn(trainings: Sequence[Training]) -> None:
    """One step of each head, one after another."""
    for training in trainings:
        training._step()
