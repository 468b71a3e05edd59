"""Heads trained at once against one after another: epochs of heads per minute.

A head has B clips in an epoch of its own here, so that one step is one epoch of that size; every
head has clips of its own. The gate takes a few steps both ways in float32.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from msq.bench.cases import Case, Figure, Gate, Prepared, Settings, Side
from msq.config import HeadConfig, OptimConfig, RunConfig, TrainConfig
from msq.head.features import Features
from msq.head.stack_engine import stacked_choice
from msq.head.stack_training import StackedTraining
from msq.head.training import Training

CLASSES, CLIPS = (12, 20, 51, 157), 64
EPOCHS = 10_000  # more than are taken
GATE_STEPS, TOLERANCE = 3, 1e-4
Taken = Mapping[str, Sequence[tuple[float, float]]]


def cases(settings: Settings) -> Iterable[Case]:
    """One for each number of classes."""
    heads = 2 if settings.quick else 10 if settings.device == "cuda" else 4
    for classes in (5, 7) if settings.quick else CLASSES:
        clips = 4 if settings.quick else CLIPS
        yield Case(
            name=f"stack K={classes} B={clips} G={heads}",
            compares=f"one training step of {heads} heads: at once, one after another",
            base="stacked",
            unit="ms",
            rounds=9,
            prepare=functools.partial(_prepare, classes, clips, heads),
        )


def _begun(classes: int, clips: int, heads: int, settings: Settings) -> list[Training]:
    """Heads at their start, each with clips of its own."""
    quick = settings.quick
    length, wide, image, width = (4, 24, 12, 16) if quick else (17, 768, 512, 512)
    head = HeadConfig(width=width, layers=2 if quick else 6, heads=2 if quick else 8)
    made = []
    for seed in range(heads):
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
            optim=OptimConfig(lr=1e-4 * (1 + seed)),
            train=TrainConfig(batch=clips, epochs=EPOCHS, seed=seed, val=0.0),
        )
        choice = stacked_choice(config, settings.device)
        made.append(Training(features.to(settings.device), config, choice))
    return made


@contextmanager
def _prepare(classes: int, clips: int, heads: int, settings: Settings) -> Iterator[Prepared]:
    begin = functools.partial(_begun, classes, clips, heads, settings)

    def figures(taken: Taken) -> Mapping[str, Figure]:
        return {
            f"heads x epochs of {clips} clips a minute, {side}":
            Figure(60 * heads / statistics.median(wall for wall, _ in times))
            for side, times in taken.items()
        }  # fmt: skip

    yield Prepared(
        gate=lambda: _gate(begin(), begin()), sides=lambda: _sides(begin(), begin()),
        figures=figures,
    )  # fmt: skip


def _gate(together: list[Training], alone: list[Training]) -> Gate:
    for side in _sides(together, alone).values():
        for _ in range(GATE_STEPS):
            side.run()
    worst = 0.0
    for one, other in zip(together, alone, strict=True):
        named = dict(other.model.named_parameters())
        for name, p in one.model.named_parameters():
            if not name.endswith(".k.bias"):  # its gradient is rounding only
                far = (p - named[name]).abs().max() / named[name].abs().max().clamp(min=1e-3)
                worst = max(worst, float(far))
    tolerance = TOLERANCE if together[0].choice.precision == "fp32" else 100 * TOLERANCE
    return Gate(worst, tolerance, f"weights after {GATE_STEPS} steps, largest difference over the "
                "largest weight of a tensor; without the bias of the keys")  # fmt: skip


def _sides(together: list[Training], alone: list[Training]) -> Mapping[str, Side]:
    stack = StackedTraining(together)

    def one_after_another() -> None:
        for training in alone:
            training._step()

    return {"stacked": Side(stack.take_step), "sequential": Side(one_after_another)}
