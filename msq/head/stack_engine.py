"""The engine that trains the heads of a group at once (see `msq.head.trials.Engine`).

A group is done where every run of it has its result. Otherwise all of it is trained again, so that
its numbers do not depend on when it was killed. What cannot be stacked, or has no company of its
kind, is trained on its own, by the sequential engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msq.config import RunConfig
from msq.errors import MsqError
from msq.head.checkpoint import load_model
from msq.head.conclusion import conclude
from msq.head.device_errors import out_of_memory
from msq.head.memory import StepShape, available_bytes, give_back, step_bytes
from msq.head.packed_choice import StepChoice, choose_step
from msq.head.protocol import require_protocol
from msq.head.run import RunDirectory, RunResult, recorded_choice
from msq.head.stack_step import stack_kind
from msq.head.stack_training import StackedTraining
from msq.head.training import Training
from msq.head.trials import Job, train_sequentially

Progress = Callable[[dict[str, Any]], None]
BUCKETS = (16, 32, 64, 160)  # classes; heads are padded within one
WHY = "one of several heads, trained at once"
ROOM = 0.8  # of the memory that is free, for the heads of a stack
KEPT = 6  # numbers kept for each parameter: two moments, average, the best weights, two in passing


@dataclass(eq=False)
class _Begun:
    """A run that is about to be stacked: its place in the group, its files, its state."""

    place: int
    directory: RunDirectory
    training: Training
    bytes: int


def bucket(classes: int) -> int:
    """The bucket of K: the number of classes that heads with so many may be padded to."""
    return next((room for room in BUCKETS if classes <= room), classes)


def stackable(config: RunConfig) -> bool:
    """Whether a configuration leaves it open how the steps are taken."""
    return config.train.path != "plain" and config.train.kernels != "triton"


def train_stacked(
    jobs: Sequence[Job], device: str, progress: Progress | None = None
) -> list[RunResult | Exception]:
    """Train the heads of a group, those of one kind at once; a result or the error for each.

    A stack that turns out to have no room is trained again in halves.
    """
    stored = _stored(jobs, device)
    if stored is not None:
        return stored
    alone = [
        place
        for place, job in enumerate(jobs)
        if not (stackable(job.config) and isinstance(job.features.tokens, Tensor))
    ]
    ended: list[_Begun] = []
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        together = [place for place in range(len(jobs)) if place not in alone]
        kinds, results = _begin_all(jobs, together, device)
        for kind in list(kinds):
            for stack in _that_fit(kinds.pop(kind), device):
                trained, errors = _train_with_room(jobs, stack, device, progress)
                ended += trained
                results |= errors
    for place in alone:
        results[place] = train_sequentially([jobs[place]], device, progress)[0]
    for begun in ended:  # only now: a group that is killed before has no result
        if begun.place not in results:
            results[begun.place] = _conclude(begun)
    return [results[place] for place in range(len(jobs))]


def _stored(jobs: Sequence[Job], device: str) -> list[RunResult | Exception] | None:
    """The results of a group that was trained already."""
    found: list[RunResult | Exception] = []
    for job in jobs:
        if job.run is None or not (job.run / "result.json").exists():
            return None
        directory = RunDirectory(job.run, job.config, job.features)
        model = load_model(job.run / "head.safetensors", device)[0]
        found.append(RunResult(job.run, True, directory.finished() or {}, model))
    return found


def _begin_all(
    jobs: Sequence[Job], places: Sequence[int], device: str
) -> tuple[dict[str, list[_Begun]], dict[int, RunResult | Exception]]:
    """Some runs at their start, those that can be stacked together; and errors, by place."""
    kinds: dict[str, list[_Begun]] = {}
    errors: dict[int, RunResult | Exception] = {}
    for place in places:
        try:
            begun = _begin(place, jobs[place], device)
        except Exception as error:
            errors[place] = error
            continue
        kind = repr((bucket(begun.training.model.classes), stack_kind(begun.training)))
        kinds.setdefault(kind, []).append(begun)
    return kinds, errors


def _begin(place: int, job: Job, device: str) -> _Begun:
    """A run at its start, whatever of it was done before.

    Raises:
        MsqError: as `msq.head.train.train_head` does before its first step.
    """
    require_protocol(job.features, job.config)
    choice = recorded_choice(job.run) or stacked_choice(job.config, device)
    directory = RunDirectory(job.run, job.config, job.features, choice=choice)
    training = Training(job.features.to(device), job.config, choice)
    shape = StepShape.of(job.features, job.config, choice, device)
    shape = dataclasses.replace(shape, path="stacked")
    parameters = sum(p.numel() for p in training.parameters)
    return _Begun(place, directory, training, step_bytes(shape) + 4 * KEPT * parameters)


def stacked_choice(config: RunConfig, device: str) -> StepChoice:
    """How the steps of a stacked head are taken: without kernels, the standard cross-attention."""
    chosen = choose_step(config.train, device)
    return dataclasses.replace(chosen, cross="standard", reasons={"step": WHY})


def _that_fit(several: Sequence[_Begun], device: str) -> list[list[_Begun]]:
    """Runs of one kind in as few stacks as memory has room for, alike in size."""
    there = max(ROOM * available_bytes(device), 1)
    largest = max(begun.bytes for begun in several)
    most = max(int(there // largest), 1)
    count = -(-len(several) // most)
    return [list(several[first::count]) for first in range(count)]


def _train_with_room(
    jobs: Sequence[Job], stack: list[_Begun], device: str, progress: Progress | None
) -> tuple[list[_Begun], dict[int, RunResult | Exception]]:
    """Take all steps of a stack; where there is no room for it, of its halves from their start.

    Args:
        jobs: of the whole group.
        stack: some of its runs; emptied where they begin again.
        device: to train on.
        progress: as in `train_stacked`.

    Returns:
        The runs whose steps were taken, and the errors of those that came to nothing, by place.
    """
    errors = _train(stack, device, progress)
    if len(stack) == 1 or not any(map(_is_no_room, errors.values())):
        return stack, errors
    places = [begun.place for begun in stack]
    for begun in stack:
        begun.directory.log(f"no room for {len(stack)} heads at once: again in two parts")
    stack.clear()
    errors.clear()  # their tracebacks hold the stack
    give_back(device)
    half = -(-len(places) // 2)
    trained: list[_Begun] = []
    for part in (places[:half], places[half:]):
        again, failed = _begin_all(jobs, part, device)
        errors |= failed
        for kind in list(again):
            there, failed = _train_with_room(jobs, again.pop(kind), device, progress)
            trained += there
            errors |= failed
    return trained, errors


def _is_no_room(found: RunResult | Exception) -> bool:
    return isinstance(found, Exception) and out_of_memory(found)


def _train(
    stack: Sequence[_Begun], device: str, progress: Progress | None
) -> dict[int, RunResult | Exception]:
    """Take all steps of some runs; the errors of those that came to nothing, by their place."""
    for begun in stack:
        directory = begun.directory
        directory.write_environment(torch.device(device))
        directory.log(f"{begun.training.opening()}; {len(stack)} heads at once")
        directory.write_history([], begun.training.batches)
    try:
        together = StackedTraining([begun.training for begun in stack])
        together.run([begun.directory for begun in stack], progress)
        errors = together.errors
    except Exception as error:
        errors = dict.fromkeys(range(len(stack)), error)
    for number, found in errors.items():
        if isinstance(found, MsqError):
            stack[number].directory.log(f"stopped: {found}")
    return {stack[number].place: found for number, found in errors.items()}


def _conclude(begun: _Begun) -> RunResult | Exception:
    """The result of a run whose steps are all taken, and its files."""
    try:
        result = conclude(begun.training, begun.directory)
    except Exception as error:
        return error
    return RunResult(begun.directory.path, True, result, begun.training.model.eval())
