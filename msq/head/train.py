"""One training run: how it begins or goes on, its checkpoints, its result."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from msq.config import RunConfig
from msq.errors import MsqError
from msq.head.batches import split_rows
from msq.head.build import build_head
from msq.head.checkpoint import load_model, load_state, save_state
from msq.head.conclusion import conclude
from msq.head.features import Features
from msq.head.kernel_choice import HeadShape
from msq.head.memory import StepShape, moving_bytes, require_room
from msq.head.packed_choice import choose_step
from msq.head.protocol import require_protocol
from msq.head.run import RunDirectory, RunResult, recorded_choice
from msq.head.training import Progress, Training

__all__ = ["Progress", "Training", "build_head", "split_rows", "train_head"]


def train_head(
    features: Features,
    config: RunConfig,
    out: Path | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
    stop_after: int | None = None,
    checkpoint_seconds: float = 60.0,
) -> RunResult:
    """Train a head, choose its weights on validation clips, score the test clips once.

    The weights validated and kept are the averaged ones where `train.ema` is not 0, else the raw
    ones. A run found unfinished in `out` goes on where its last checkpoint stands, in the middle
    of an epoch too, with the number of threads that it began with, and ends with the same bits as
    one that was never interrupted (same torch and processor). A finished one is returned as it is.

    Args:
        features: of train, validation and test clips together.
        config: the run.
        out: its directory; None writes nothing.
        resume: False starts an unfinished run anew.
        progress: called with a dict after each epoch: `event, epoch, epochs, loss, lr, val_map,
            seconds`.
        overwrite: delete what another run left in `out`.
        device: where to train.
        stop_after: leave after so many further steps, with a checkpoint.
        checkpoint_seconds: longest time between two checkpoints. One is also written after each
            epoch, unless writing would take more than a twentieth of the time.

    Raises:
        SpecMismatch: `out` holds a run of another configuration or on other features, or the
            features are not those that `train.protocol` is about.
        UsageError: no training clips, features that the configuration needs are not there, a step
            that does not fit into memory, or a run begun on a GPU whose steps need one.
        MsqError: the loss is not finite; it names the step and its clips, and the last checkpoint
            is kept.
    """
    require_protocol(features, config)
    device = torch.device(device)
    choice = None if overwrite else recorded_choice(out)
    if choice is None:
        sizes = HeadShape.of(features, config.head)
        choice = choose_step(config.train, device, sizes, config.head.dropout)
    if overwrite or out is None or not (out / "result.json").exists():
        choice.require_device(device)
        shape = StepShape.of(features, config, choice, device)
        require_room(shape, device, moving_bytes(features, device))
    directory = RunDirectory(out, config, features, overwrite, choice)
    stored = directory.finished()
    if stored is not None and out is not None:
        return RunResult(out, True, stored, load_model(out / "head.safetensors", device)[0])
    return _trained(features, config, directory, resume, progress, device, stop_after,
                    checkpoint_seconds)  # fmt: skip


def _trained(
    features: Features,
    config: RunConfig,
    directory: RunDirectory,
    resume: bool,
    progress: Progress | None,
    device: torch.device,
    stop_after: int | None,
    checkpoint_seconds: float,
) -> RunResult:
    """A run from its start, or from its last checkpoint; arguments as `train_head` has them."""
    choice, out = directory.choice, directory.path
    assert choice is not None
    note = choice.surroundings(device)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), choice.in_threads():
        training = Training(features.to(device), config, choice)
        state = load_state(out / "state.pt") if out is not None and resume else None
        if state is not None:
            training.load(state)
            directory.log(training.resumed())
        else:
            directory.write_environment(device)
            directory.log(training.opening())
        if note:
            directory.log(note)
        directory.write_history(training.history, training.batches)
        saver = Checkpoints(directory, training, checkpoint_seconds)
        try:
            finished = training.run(directory, saver, progress, stop_after)
        except MsqError as error:
            directory.log(f"stopped: {error}")
            raise
        if not finished:
            return RunResult(out, False, {}, training.model.eval())
        training.use_chosen_weights()
        result = conclude(training, directory)
    return RunResult(out, True, result, training.model.eval())


class Checkpoints:
    """Decides when a checkpoint is written.

    Args:
        directory: of the run.
        training: whose state it is.
        seconds: longest time between two.
    """

    def __init__(self, directory: RunDirectory, training: Training, seconds: float) -> None:
        self.directory, self.training, self.seconds = directory, training, seconds
        self.last, self.cost = time.perf_counter(), 0.0

    def save(self) -> None:
        """Write one now."""
        if self.directory.path is None:
            return
        self.training.require_finite()
        began = time.perf_counter()
        save_state(self.directory.path / "state.pt", self.training.state())
        self.training.saved = self.training.step
        self.last = time.perf_counter()
        self.cost = self.last - began

    def save_if_due(self, epoch_done: bool) -> None:
        """Write one after an epoch where that is cheap, and whenever the last one is old."""
        if self.due(epoch_done):
            self.save()

    def due(self, epoch_done: bool) -> bool:
        """Whether it is time for one."""
        since = time.perf_counter() - self.last
        return since >= self.seconds or (epoch_done and since >= 20 * self.cost)
