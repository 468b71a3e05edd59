"""Training G heads at once, each with its clips, its early stop and its run directory.

All heads take their first step together; one that has had all its epochs, or stops early, leaves
the stack, and the others go on in a smaller one. After an epoch of some heads their losses, their
validation scores and whether everything is finite are read together: one wait for all.

No checkpoint is written while a stack is trained: one that was killed is trained again whole, which
makes its numbers independent of when that happened. The files of every run are written at the end,
and are those of a run that was trained alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from msq.errors import MsqError
from msq.head.feeding import Batch
from msq.head.graph import StepGraph
from msq.head.run import RunDirectory
from msq.head.stack_step import StackedStep, require_alike
from msq.head.training import Training

StackProgress = Callable[[dict[str, Any]], None]


class StackedFeed:
    """The batches of G heads as one, gathered into buffers that it keeps.

    Args:
        trainings: whose feeds are asked.
        classes: K of the largest head; labels of the others are zero beyond their own.

    Attributes:
        shared: all heads see the same clips in the same order: these are gathered once.
    """

    def __init__(self, trainings: Sequence[Training], classes: int, share: bool = True) -> None:
        self._trainings, self._classes = list(trainings), classes
        self.shared = share and same_clips(trainings)
        self._buffers: dict[str, Tensor] = {}

    def of(self, step: int) -> Batch:
        """The clips of one step: rows [G, B], tokens [G or 1, B, S, D'], labels [G, B, K]."""
        made = []
        for g, training in enumerate(self._trainings):
            batch = training.feed.of(step)
            if g == 0 or not self.shared:
                self._put("tokens", g, batch.tokens, batch.tokens.shape[1:])
                if batch.image is not None:
                    self._put("image", g, batch.image, batch.image.shape[1:])
            self._put("labels", g, batch.labels, (self._classes,))
            if batch.known is not None:
                self._put("known", g, batch.known, (self._classes,))
            made.append(batch.rows)
        found = {name: buffer[:, : len(made[0])] for name, buffer in self._buffers.items()}
        return Batch(torch.stack(made), found["tokens"], found.get("image"), found["labels"],
                     found.get("known"))  # fmt: skip

    def _put(self, name: str, g: int, values: Tensor, shape: Sequence[int]) -> None:
        """Copy what a head sees to its place in a buffer [G, B, ...]."""
        if name not in self._buffers:
            heads = 1 if self.shared and name in ("tokens", "image") else len(self._trainings)
            size = (heads, self._trainings[0].batch, *shape)
            self._buffers[name] = values.new_zeros(size)
        own = self._buffers[name][g, : len(values)]
        (own[:, : values.shape[1]] if values.dim() == 2 else own).copy_(values)


def same_clips(trainings: Sequence[Training]) -> bool:
    """Whether all heads train on the same clips of one source in the same order."""

    def seen(training: Training) -> tuple[object, ...]:
        f, rows = training.features, training.train_rows.tolist()
        views = None if f.train_views is None else id(f.train_views)
        return training.config.train.seed, views, f.view_name, [f.ids[row] for row in rows]

    first = seen(trainings[0])
    return all(seen(training) == first for training in trainings[1:])


class StackedTraining:
    """Some runs, trained together until each has had its epochs.

    Args:
        trainings: that have not begun, on features of one source.
        share: gather clips once where all heads see the same.

    Attributes:
        errors: of the runs that came to nothing, by their place among `trainings`.
        graph: of the step; None where it is taken as it is.

    Raises:
        UsageError: runs that cannot be stacked.
    """

    def __init__(self, trainings: Sequence[Training], share: bool = True) -> None:
        require_alike(trainings)
        self.trainings, self._share = list(trainings), share
        self.errors: dict[int, Exception] = {}
        self.step, self.seconds = 0, 0.0
        self.taking = StackedStep(trainings)
        self._losses: list[Tensor] = []  # [G] of the steps since the stack last changed
        self._first = 0
        self._lay_out()

    def _lay_out(self) -> None:
        active = self.taking.trainings
        self.feed = StackedFeed(active, self.taking.head.valid.shape[1], self._share)
        graph = active[0].choice.graph == "on"
        self.graph = StepGraph(self.taking.run, active[0].batch) if graph else None

    def run(
        self,
        directories: Sequence[RunDirectory],
        progress: StackProgress | None = None,
    ) -> None:
        """Take steps until every head is done; the chosen weights are in the models then.

        Args:
            directories: one for each run.
            progress: called after each epoch of a head.
        """
        told: dict[int, RunDirectory] = {
            id(t): d for t, d in zip(self.trainings, directories, strict=True)
        }
        while self.taking.trainings:
            began = time.perf_counter()
            self.take_step()
            share = (time.perf_counter() - began) / len(self.taking.trainings)
            for training in self.taking.trainings:
                training.seconds += share
            ended = [t for t in self.taking.trainings if t.step % t.epoch_steps == 0]
            if not ended:
                continue
            self._end_epochs(ended)
            for training in ended:
                if self._failed(training):
                    continue
                line = training.history[-1]
                told[id(training)].append_history(line)
                if progress is not None:
                    epochs = training.config.train.epochs
                    progress({"event": "epoch", "epochs": epochs, **line})
            self._let_go()

    def take_step(self) -> None:
        """One step of every head that is still in the stack."""
        batch = self.feed.of(self.step)
        self.taking.plan(self.step)
        if self.graph is None:
            self.taking.run(batch)
        else:
            self.graph(batch)
            if self.graph.refused:
                raise MsqError(
                    "train.graph = on: the step of several heads cannot be captured: "
                    f"{self.graph.refused}; use train.graph = off, or --stack 1"
                )
        self._losses.append(self.taking.losses.clone())
        self.step += 1
        for training in self.taking.trainings:
            training.step = self.step

    def _end_epochs(self, ended: Sequence[Training]) -> None:
        """Read the numbers of some heads' epochs, and whether all is finite, in one go."""
        began = time.perf_counter()
        active = self.taking.trainings
        found = [training.epoch_numbers() for training in ended]
        good = torch.stack(self._losses).isfinite().all(0) & (
            self.taking.parameters.data.isfinite().all(1)
        )
        sizes = [len(good), *(len(numbers) for numbers, _ in found)]
        both = torch.cat([good.double(), *(numbers for numbers, _ in found)]).cpu()
        finite, *numbers = (part.tolist() for part in torch.split(both, sizes))
        for training, fine in zip(active, finite, strict=True):
            if not fine:
                self._name_the_step(training)
        for training, own, (_, logits) in zip(ended, numbers, found, strict=True):
            if self._failed(training):
                continue
            training.seconds += (time.perf_counter() - began) / len(ended)
            began = time.perf_counter()
            try:
                training.note_epoch(own, logits)
            except MsqError as error:
                self.errors[self.trainings.index(training)] = error
        self._losses, self._first = [], self.step

    def _name_the_step(self, training: Training) -> None:
        """Find the step after which a head was not finite any more, as a run of its own does."""
        place = self.taking.trainings.index(training)
        for number, losses in enumerate(self._losses):
            training.watch.note(self._first + number, losses[place])
        try:
            training.require_finite()
        except MsqError as error:
            self.errors[self.trainings.index(training)] = error

    def _failed(self, training: Training) -> bool:
        return self.trainings.index(training) in self.errors

    def _let_go(self) -> None:
        """Make the stack smaller by the heads that are done or came to nothing."""
        active = self.taking.trainings
        staying = [
            g
            for g, t in enumerate(active)
            if not (t.step >= t.steps or t.out_of_patience() or self._failed(t))
        ]
        if len(staying) == len(active):
            return
        for g, training in enumerate(active):
            if g not in staying and not self._failed(training):
                training.use_chosen_weights()
        self.taking.keep(staying)
        if staying:
            self._lay_out()
