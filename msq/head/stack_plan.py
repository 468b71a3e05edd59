"""How many heads of a sweep are trained at once: decided before its first step, and kept.

On a CPU one head after another is as fast, and a stack is made where it is asked for only. On a GPU
a few steps of one kind of trials tell, stacked and one by one. What was found stands in the plan,
which every worker reads, and with which an interrupted sweep goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from msq import config as configuration
from msq.errors import MsqError
from msq.head.features import Features
from msq.head.graph import WARM_UP
from msq.head.kernel_choice import HeadShape
from msq.head.memory import give_back
from msq.head.packed_choice import choose_step
from msq.head.stack_engine import bucket, stackable, stacked_choice
from msq.head.stack_training import StackedTraining
from msq.head.sweep import Load, load_source
from msq.head.sweep_plan import Plan
from msq.head.training import Training
from msq.head.trial import Trial
from msq.head.trials import shown

SIZES = (4, 8, 16)  # heads, tried on a GPU
STEPS = 10  # timed
WORTH = 1.1  # times as fast as sequential, at least
# What trials that are stacked may differ in.
FREE = {"optim": ("lr", "weight_decay", "schedule", "restart_epochs", "warmup", "clip_grad",
                  "beta2"),
        "train": ("epochs", "seed", "patience", "select")}  # fmt: skip


def choose_engine(plan: Plan, heads: int | None, device: str, load: Load = load_source) -> Plan:
    """The plan with its engine and groups.

    Args:
        plan: with one trial in each group.
        heads: at once, at most; 1 trains one after another; None decides.
        device: to train on.
        load: gives the features of a trial, for the measurement.
    """
    if heads is not None:
        if heads < 2:
            return plan
        return stacked(plan, heads, f"asked for: up to {heads} heads at once")
    if not device.startswith("cuda"):
        # A rule, no measurement: what a clock decides may differ between two runs, and on a CPU
        # there is nothing to win by it (`msq bench stack`).
        why = "one head after another: on a CPU a stack is no faster; --stack N makes one"
        return dataclasses.replace(plan, engine={"name": "sequential", "why": why})
    return _by_measurement(plan, device, load)


def stacked(plan: Plan, heads: int, why: str) -> Plan:
    """The plan with groups of up to so many trials that can be trained at once."""
    return dataclasses.replace(
        plan, engine={"name": "stacked", "why": why}, groups=tuple(groups(plan, heads))
    )


def groups(plan: Plan, heads: int) -> list[tuple[str, ...]]:
    """Ids of trials of one kind, up to so many together, as even as they come."""
    kinds: dict[str, list[str]] = {}
    for trial in plan.trials:
        kinds.setdefault(kind(trial), []).append(trial.id)
    made = []
    for ids in kinds.values():
        count = -(-len(ids) // heads)
        size = -(-len(ids) // count)
        made += [tuple(ids[first : first + size]) for first in range(0, len(ids), size)]
    return made


def kind(trial: Trial) -> str:
    """What trials of one stack have in common, as far as the plan tells."""
    if not stackable(trial.config):
        return trial.id
    values = configuration.to_dict(trial.config)
    for section, keys in FREE.items():
        values[section] = {k: v for k, v in values[section].items() if k not in keys}
    values["train"]["ema"] = bool(trial.config.train.ema)
    classes = None if trial.split is None else bucket(len(trial.split.seen))
    return repr((trial.source, classes, values))


def head_seconds(
    trials: Sequence[Trial], features: Features, device: str
) -> tuple[dict[int, float], str]:
    """Seconds of one step of one head, for stacks of several sizes; 1 is one after another.

    One after another a head takes the steps that it takes alone, kernels included. Each size is
    measured by itself, with what the one before it took given back.

    Args:
        trials: of one kind; the sizes are those in `SIZES` that there are enough trials for.
        features: of all classes, on the device.
        device: to train on.

    Returns:
        Size -> seconds, up to the first size that cannot be trained; and why that one cannot, ""
        where all can.

    Raises:
        MsqError: a head alone cannot be trained.
        RuntimeError: likewise.
    """
    found = {1: _alone_seconds(trials[0], features, device)}
    for size in [size for size in SIZES if size <= len(trials)] or [len(trials)]:
        give_back(device)
        try:
            found[size] = _stack_seconds(trials[:size], features, device)
        except (MsqError, RuntimeError) as error:
            stopped = f"{size} heads: {str(error).splitlines()[0][:120]}"
            break
    else:
        stopped = ""
    give_back(device)
    return found, stopped


def _alone_seconds(trial: Trial, features: Features, device: str) -> float:
    """Seconds of a step of a head that is trained by itself."""
    seen, config = shown(trial, features), trial.config
    own = choose_step(config.train, device, HeadShape.of(seen, config.head), config.head.dropout)
    return _seconds(Training(seen, config, own)._step, device)


def _stack_seconds(trials: Sequence[Trial], features: Features, device: str) -> float:
    """Seconds of a step of a stack, for each of its heads."""
    begun = [
        Training(shown(trial, features), trial.config, stacked_choice(trial.config, device))
        for trial in trials
    ]
    return _seconds(StackedTraining(begun).take_step, device) / len(trials)


def _by_measurement(plan: Plan, device: str, load: Load) -> Plan:
    """As a few steps of the largest group tell."""
    largest = max(groups(plan, max(SIZES)), key=len)
    trials = [plan.trial(one) for one in largest]
    source = plan.sources[trials[0].source]
    try:
        features = load(trials[0], source).to(device)
        if len(trials) < 2 or not isinstance(features.tokens, Tensor):
            return plan
        taken, stopped = head_seconds(trials, features, device)
    except (MsqError, OSError, RuntimeError) as error:  # no store yet, no memory: one by one goes
        why = f"one head after another: no measurement ({str(error).splitlines()[0][:120]})"
        return dataclasses.replace(plan, engine={"name": "sequential", "why": why})
    told = ", ".join(f"{size}: {1e3 * each:.2f}" for size, each in taken.items())
    why = f"ms a step of one head, by heads at once: {told}" + (stopped and f"; {stopped}")
    best = min(taken, key=lambda size: taken[size])
    if taken[1] < WORTH * taken[best]:
        return dataclasses.replace(plan, engine={"name": "sequential", "why": why})
    return stacked(plan, best, why)


def _seconds(step: Callable[[], None], device: str) -> float:
    """Seconds of a step, after those that a recording needs."""
    wait: Callable[[], object] = int
    if device.startswith("cuda"):
        wait = functools.partial(torch.cuda.synchronize, device)
    for _ in range(WARM_UP + 2):
        step()
    wait()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    wait()
    return (time.perf_counter() - began) / STEPS
