"""The state of a training run between two steps, and what happens after each."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from msq.config import RunConfig
from msq.errors import MsqError, UsageError
from msq.head.batches import Batches, split_rows
from msq.head.build import build_head
from msq.head.device import in_words
from msq.head.evaluate import score
from msq.head.features import Features
from msq.head.feeding import Feed
from msq.head.finite import LossWatch, loss_error
from msq.head.graph import StepGraph
from msq.head.loss import loss_kind
from msq.head.model import MSQNet
from msq.head.packed_choice import StepChoice, choose_step
from msq.head.run import RunDirectory
from msq.head.step import TrainingStep
from msq.head.training_state import load_state, state_of
from msq.head.validation import Validation

Progress = Callable[[dict[str, Any]], None]


class Saver(Protocol):
    """Who writes checkpoints while a run goes on."""

    def save(self) -> None:
        """Write one now."""

    def save_if_due(self, epoch_done: bool) -> None:
        """Write one where it is time."""


class Training:
    """The state of one run between two steps.

    Args:
        features: on the device to train on.
        config: of the run.
        choice: how to take the steps; None chooses by the configuration and the device.
    """

    def __init__(
        self, features: Features, config: RunConfig, choice: StepChoice | None = None
    ) -> None:
        self.features, self.config = features, config
        self.loss = loss_kind(config.train.loss, features.task)
        self.train_rows, self.val_rows = split_rows(features, config.train.val, config.train.seed)
        if self.val_rows.numel() and not self.train_rows.numel() and features.rows("train").numel():
            raise UsageError(f"train.val = {config.train.val}: holds out all {len(self.val_rows)} "
                             "training clips; expected a share that leaves some")  # fmt: skip
        if not self.train_rows.numel():
            raise UsageError(f"features of {features.name}: no training clip among "
                             f"{features.coverage()}")  # fmt: skip
        self.clips = len(self.train_rows)
        self.validation = Validation(features, self.val_rows, config.train.select_by)
        t = config.train
        self.batches = Batches(self.train_rows, t.batch, t.epoch_clips, t.seed)
        self.batch, self.epoch_steps = self.batches.size, self.batches.epoch_steps
        self.steps = self.epoch_steps * config.train.epochs
        device = features.tokens.device
        self.model = self._head().to(device)
        self.choice = choice or choose_step(config.train, device)
        self.feed, self.taking = self._feed_and_step()
        self.graph = StepGraph(self.taking.run, self.batch) if self.choice.graph == "on" else None
        self.flat, self.average = self.taking.flat, self.taking.average
        self.loss_sum = self.taking.loss_sum
        self.parameters = list(self.model.parameters())
        self.step = 0
        self.seconds = 0.0
        self.watch = LossWatch()
        self.saved: int | None = None  # step of the last checkpoint
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None
        self.lost = ""  # of a state that was loaded

    def _head(self) -> MSQNet:
        """The head at its start."""
        return build_head(self.features, self.config, self.train_rows)

    def _feed_and_step(self) -> tuple[Any, TrainingStep]:
        """What the steps are fed, and what takes them."""
        feed = Feed(self.features, self.batches, self.config.train.seed, end=self.steps)
        step = TrainingStep(
            self.model, self.choice, self.config, self.loss, self.steps, self.epoch_steps
        )
        return feed, step

    def scored(self, rows: Tensor) -> Tensor:
        """Logits [n, K] of some clips, by the weights as they are."""
        return score(self.model, self.features, rows)

    def run(
        self,
        directory: RunDirectory,
        saver: Saver,
        progress: Progress | None,
        stop_after: int | None,
    ) -> bool:
        """Take steps until the end (True) or until `stop_after` further ones are taken (False)."""
        last = self.steps if stop_after is None else min(self.steps, self.step + stop_after)
        began, told = time.perf_counter(), False
        while self.step < self.steps and not self.out_of_patience():
            if self.step >= last:
                saver.save()
                return False
            self._step()
            if not told and self.graph_report():
                directory.log(self.graph_report())
                told = True
            now = time.perf_counter()
            self.seconds, began = self.seconds + now - began, now
            epoch_done = self.step % self.epoch_steps == 0
            if epoch_done:
                self._end_epoch()
                now = time.perf_counter()
                self.seconds, began = self.seconds + now - began, now
                line = self.history[-1]
                directory.append_history(line)
                if progress is not None:
                    progress({"event": "epoch", "epochs": self.config.train.epochs, **line})
            saver.save_if_due(epoch_done)
        return True

    def _step(self) -> None:
        """One step of the optimiser."""
        batch = self.feed.of(self.step)
        self.taking.plan(self.step)
        if self.graph is None:
            self.taking.run(batch)
        else:
            self.graph(batch)
            if self.graph.refused and self.config.train.graph == "on":
                raise MsqError(
                    f"train.graph = on: the step cannot be captured: {self.graph.refused}; use "
                    "train.graph = off"
                )
        self.watch.note(self.step, self.taking.loss.clone())
        self.step += 1

    def graph_report(self) -> str:
        """Why the steps run one by one although a graph was chosen; empty where all is well."""
        refused = "" if self.graph is None else self.graph.refused
        return refused and f"no CUDA graph, the steps run one by one: {refused}"

    def _logits(self, tokens: Tensor, image: Tensor | None) -> Tensor:
        """Forward pass of this step, for whoever wants to look at it."""
        self.taking.plan(self.step)
        return self.taking.logits(tokens, image)

    def _end_epoch(self) -> None:
        self.require_finite()
        numbers, logits = self.epoch_numbers()
        self.note_epoch(numbers.tolist(), logits)  # all that is waited for

    def epoch_numbers(self) -> tuple[Tensor, Tensor | None]:
        """What an epoch came to, on the device; nothing waits for it.

        Returns:
            [1] the sum of the losses, or [3] that, the mAP of the validation clips and how many of
            their scores are NaN; and the logits of these clips, None where there are none.
        """
        numbers, logits = [self.loss_sum.double()], None
        if self.val_rows.numel():
            if self.average is not None:
                self.average.swap()
            logits = self.scored(self.val_rows)
            numbers += self.validation.numbers(logits).unbind()
            if self.average is not None:
                self.average.swap()
        return torch.stack(numbers), logits

    def note_epoch(self, numbers: list[float], logits: Tensor | None) -> None:
        """Write down an epoch, and keep its weights where they are the best so far.

        Args:
            numbers: of `epoch_numbers`.
            logits: likewise.

        Raises:
            MsqError: scores of the validation clips are NaN.
        """
        epoch = self.step // self.epoch_steps
        loss, *found = numbers
        line: dict[str, float] = {
            "epoch": epoch,
            "loss": loss / self.epoch_steps,
            "lr": self.taking.rate(self.step - 1),
        }
        self.loss_sum.zero_()
        if logits is not None:
            mean, bad = found
            value, scores = self.validation.scores(mean, bad, logits, epoch)
            line |= scores
            # Without a positive among the validation clips it is NaN, and chooses nothing.
            if value == value and (self.best is None or value > self.best["value"]):
                self.best = {"value": value, "val_map": line["val_map"], "epoch": epoch,
                             "weights": self._kept_weights()}  # fmt: skip
        line["seconds"] = self.seconds
        self.history.append(line)

    def _kept_weights(self) -> list[Tensor]:
        """A copy of the weights that are validated."""
        if self.average is not None:
            self.average.swap()
        weights = [p.detach().clone() for p in self.parameters]
        if self.average is not None:
            self.average.swap()
        return weights

    def require_finite(self) -> None:
        """Stop before a loss or weights that are not finite can reach a checkpoint.

        Raises:
            MsqError: naming the step and its clips, and which of their features are not finite.
        """
        found = self.watch.first_bad(self.flat.data)
        if found is not None:
            step, what = found
            kept = (
                "there is no checkpoint yet"
                if self.saved is None
                else f"the last good checkpoint, after step {self.saved}, is kept"
            )
            raise self.step_error(what, step, kept)

    def step_error(self, what: str, step: int, kept: str) -> MsqError:
        """The error of a step that left numbers that are not finite; see `loss_error`."""
        batch = self.feed.of(step)
        return loss_error(what, self.features, batch, step, self.epoch_steps, kept)

    def out_of_patience(self) -> bool:
        """Whether so many epochs went by without a better validation score."""
        patience = self.config.train.patience
        return bool(patience and self.best and len(self.history) - self.best["epoch"] >= patience)

    @torch.no_grad()
    def use_chosen_weights(self) -> None:
        """Put the weights into the model that the configuration selects."""
        if self.config.train.select == "best" and self.best is not None:
            for parameter, weight in zip(self.parameters, self.best["weights"], strict=True):
                parameter.copy_(weight)
        elif self.average is not None:
            self.average.swap()

    def state(self) -> dict[str, Any]:
        """Everything that going on exactly here needs; plain values and tensors."""
        return state_of(self)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`.

        Raises:
            MsqError: another version of msq wrote it, and trained otherwise.
        """
        load_state(self, state)

    def resumed(self) -> str:
        """A line on where a run goes on, and what of its checkpoint is of no use."""
        line = f"resumed at step {self.step} of {self.steps}"
        return f"{line}; {self.lost}" if self.lost else line

    def opening(self) -> str:
        """A line on what is about to happen."""
        f = self.features
        return (
            f"protocol {self.config.train.protocol}; {f.name}: {f.coverage()}; training on "
            f"{self.clips}, validating on {len(self.val_rows)}, {len(f.classes)} classes, "
            f"{self.steps} steps of {self.batch}; {self.choice.path} head in "
            f"{self.choice.precision} on {in_words(self.loss_sum.device)}, Triton kernels: "
            f"{self.choice.kernels or 'none'}"
            + f"; {self.choice.lines()}"
            * bool(self.choice.reasons)
        )
