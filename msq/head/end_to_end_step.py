"""One end-to-end step: the parts of a batch through encoder and head, then both optimisers.

A step's batch is cut into parts: over processes, and over `backbone.accumulate` passes in each. The
loss of a part counts by its share of the step's clips (of the known labels, where some are not), so
that the cutting changes nothing but rounding, and which numbers dropout drops.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from msq.head.backbone import Backbone
from msq.head.distributed_backbone import clip_together
from msq.head.end_to_end_config import EndToEndConfig
from msq.head.loss import head_loss
from msq.head.masks import Masks, step_masks
from msq.head.model import MSQNet
from msq.head.optim import WeightAverage
from msq.head.packed_choice import StepChoice
from msq.head.ranks import ALONE, Ranks
from msq.head.schedule import learning_rate
from msq.head.step import TrainingStep


class Part(NamedTuple):
    """A part of a step's clips.

    Attributes:
        number: of the part in its step, over all processes; its dropout depends on it.
        rows: [b] of the features.
        frames: uint8 [b, T, 3, h, w].
        image: [b, D''], or None.
        labels: [b, K] uint8.
        known: [b, K] uint8, or None.
        weight: of its mean loss in that of the step; 0 for one that a process takes only to be
            there, where the others take their last.
        last: whether it is the last of the step in this process.
    """

    number: int
    rows: Tensor
    frames: Tensor
    image: Tensor | None
    labels: Tensor
    known: Tensor | None
    weight: float
    last: bool = True


class EndToEndStep(TrainingStep):
    """The step of an end-to-end run, and what it changes.

    Args:
        model: the head, on the device to train on.
        choice: how the head takes its part of the step.
        config: of the run.
        loss: as `msq.head.loss.loss_kind` has it; its numbers are those of `config`.
        steps: of the whole run.
        epoch_steps: of an epoch.
        backbone: the encoder, on the same device.
        ranks: the processes that take the step together.

    Attributes:
        backbone: the given one.
        tuning: the optimiser of the encoder; None where it is frozen.
    """

    def __init__(
        self,
        model: MSQNet,
        choice: StepChoice,
        config: EndToEndConfig,
        loss: str,
        steps: int,
        epoch_steps: int,
        backbone: Backbone,
        ranks: Ranks = ALONE,
    ) -> None:
        self.backbone, self.ranks, self._part = backbone, ranks, 0
        super().__init__(model, choice, config.run, loss, steps, epoch_steps)
        self.tuning = backbone.optimiser(config.run.optim)

    def _averaged(self, weights: list[Tensor]) -> WeightAverage | None:
        return super()._averaged([*weights, *self.backbone.learning.values()])

    def plan(self, step: int) -> None:
        """Say which step comes, 0 for the first of the run."""
        super().plan(step)
        if self.tuning is not None:
            relative = dataclasses.replace(self.config.optim, lr=self.backbone.config.lr)
            rate = learning_rate(relative, step, self.steps, self.epoch_steps)
            for group in self.tuning.param_groups:
                group["lr"] = rate * group["scale"]

    def run(self, batch: Iterable[Part]) -> None:  # type: ignore[override]
        """Take the step that was planned; its parts are asked for one after the other."""
        self.flat.begin()
        for parameter in self.backbone.learning.values():
            parameter.grad = None
        total = torch.zeros_like(self.loss)
        for place, part in enumerate(batch):
            with self.backbone.adding(part.last):
                loss = self.part_loss(part)
                torch.autograd.backward(loss)
            self.flat.gather(add=place > 0)
            total += loss.detach()
        self.ranks.add_up(self.flat.grad, total)
        self._clip()
        self.optimiser.step()
        if self.tuning is not None:
            self.tuning.step()
        if self.average is not None:
            self.average.take()
        self.loss.copy_(total)
        self.loss_sum += self.loss

    def part_loss(self, part: Part) -> Tensor:
        """What a part adds to the loss of its step."""
        self._part = part.number
        logits = self.logits(self.backbone.tokens(part.frames), part.image)
        loss = head_loss(logits, part.labels, self.kind, part.known, self.config.train)
        return loss * part.weight

    def _clip(self) -> None:
        """One norm over head and encoder, as if they were one model."""
        if self.config.optim.clip_grad:
            head, largest = [self.flat.matrices, self.flat.vectors], self.config.optim.clip_grad
            encoder = list(self.backbone.learning.values())
            if self.backbone.divided:
                clip_together(head, encoder, largest)
            else:
                torch.nn.utils.clip_grad_norm_([*head, *encoder], largest)

    def _step_masks(self) -> Masks | None:
        seed = part_seed(self.config.train.seed, self._part)
        return step_masks(seed, self._number, self.config.head.dropout, self._key.device)


def part_seed(seed: int, part: int) -> int:
    """Seed of the dropout of one part of each step; the run's own for the first."""
    if not part:
        return seed
    digest = hashlib.blake2b(f"{seed} part {part}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
