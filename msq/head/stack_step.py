"""One training step of G heads at once: forward, backward, clipping, optimiser, averages.

Each head has its own learning rate and schedule, weight decay, momenta, bound of its gradients,
average and dropout. As in `msq.head.step`, `plan` says which step comes and `run` asks nothing of
the processor, so that it can be recorded in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from msq.config import TrainConfig
from msq.errors import UsageError
from msq.head.feeding import Batch
from msq.head.loss import NUMBERS, class_losses
from msq.head.masks import CountedMasks, Masks, drop_rate
from msq.head.sending import sent
from msq.head.stack_masks import StackedMasks
from msq.head.stack_model import StackedHead
from msq.head.stack_parameters import StackedParameters
from msq.head.training import Training

# Steps whose rates are brought to the device together: few, for it runs on while they are made.
PLANNED = 32


def stacked_loss(
    logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    kind: str,
    known: Tensor | None = None,
    numbers: TrainConfig | None = None,
) -> Tensor:
    """The loss of each head [G], as `msq.head.loss.head_loss` has it for its own classes.

    Args:
        logits: [G, B, K].
        labels: [G, B, K], zero beyond a head's own classes.
        valid: bool [G, K], a head's own classes.
        kind: `bce`, `asymmetric`, `focal` or `ce`.
        known: [G, B, K], zero where a label is not known; None where all are.
        numbers: of the loss, the same for all heads; None for the defaults.
    """
    target, counts = labels.to(logits.dtype), valid[:, None].expand_as(logits)
    if known is not None:
        counts = counts & (known != 0)
        target = target * counts
    if kind != "ce":
        each = class_losses(logits, target, kind, numbers or TrainConfig())
        share = counts.to(logits.dtype)
        return (each * share).sum((1, 2)) / share.sum((1, 2)).clamp(min=1)
    logits = logits.masked_fill(~counts, torch.finfo(logits.dtype).min)
    target = target / target.sum(2, keepdim=True).clamp(min=1)
    return -(target * logits.log_softmax(2)).sum(2).mean(1)


class StackedStep:
    """The step of some runs, whose parameters and averages move into buffers of all heads.

    Args:
        trainings: G runs that have not begun, of one architecture, loss, precision and step size.

    Attributes:
        parameters: of all heads.
        losses: [G] of the last step.
        loss_sums: [G] of the steps since a head's was last set to zero.
    """

    def __init__(self, trainings: Sequence[Training]) -> None:
        self.trainings = list(trainings)
        first = self.trainings[0]
        self.kind, self.precision = first.loss, first.choice.precision
        self._graph = first.choice.graph == "on"
        low = torch.bfloat16 if self.precision == "bf16" else None
        self.parameters = StackedParameters([t.model for t in self.trainings], low)
        device = self.device = self.parameters.data.device
        self.average = self.parameters.data.clone() if first.average is not None else None
        self.losses = torch.zeros(len(self.trainings), device=device)
        self.loss_sums = torch.zeros_like(self.losses)
        self._number = 0
        self._lay_out()
        groups = [
            {"params": [part], "weight_decay": decay, "lr": rate,
             "betas": (0.9, t.config.optim.beta2)}
            for t, rate in zip(self.trainings, self._rates, strict=True)
            for part, decay in ((t.flat.matrices, t.config.optim.weight_decay),
                                (t.flat.vectors, 0.0))
        ]  # fmt: skip
        adam = torch.optim.AdamW if first.config.optim.name == "adamw" else torch.optim.Adam
        self.optimiser = adam(groups, fused=True, capturable=self._graph)

    def _lay_out(self) -> None:
        """Make what is read in a step, and let the runs look at their rows."""
        trainings, device, split = self.trainings, self.device, self.parameters.split
        wide = torch.float32 if device.type == "cuda" else torch.float64  # as in TrainingStep
        self._rates = torch.zeros(len(trainings), dtype=wide, device=device)
        self._weights = self.parameters.data.new_zeros(len(trainings), 1)
        self._first, self._coming = 0, torch.zeros(0, 2, len(trainings), device=device)
        self._keys = torch.tensor([[t.config.train.seed, 0] for t in trainings], device=device)
        bounds = [t.config.optim.clip_grad or math.inf for t in trainings]
        self._bounds = self.parameters.data.new_tensor(bounds)
        self._clips = any(t.config.optim.clip_grad for t in trainings)
        self.head = StackedHead(self.parameters, self.precision)
        for g, training in enumerate(trainings):
            row, grad, flat = self.parameters.data[g], self.parameters.grad[g], training.flat
            for part, place in ((flat.matrices, slice(split)), (flat.vectors, slice(split, None))):
                part.grad = None
                part.data = row[place]
                part.grad = grad[place]
            flat.data, flat.grad, flat.low = row, grad, None
            training.loss_sum = training.taking.loss_sum = self.loss_sums[g]
            if training.average is not None and self.average is not None:
                training.average.parameters = [row]
                training.average.average = [self.average[g]]

    def plan(self, step: int) -> None:
        """Say which step comes, 0 for the first of all runs."""
        self._number = step
        if not 0 <= step - self._first < len(self._coming):
            self._first, self._coming = step, self._planned(step)
        rates, weights = self._coming[step - self._first]
        self._rates.copy_(rates)
        self._keys[:, 1].fill_(step)
        self._weights.copy_(weights[:, None])

    def _planned(self, step: int) -> Tensor:
        """Rate and weight in the average of each head [n, 2, G] in the steps from this one on."""
        last = max(t.steps for t in self.trainings)
        numbers = range(step, max(step + 1, min(step + PLANNED, last)))
        rates = [[t.taking.rate(min(n, t.steps - 1)) for t in self.trainings] for n in numbers]
        weights = [[1 - min(t.config.train.ema, (1 + n) / (10 + n)) for t in self.trainings]
                   for n in numbers]  # fmt: skip
        both = torch.tensor([rates, weights], dtype=torch.float64)
        return sent(both.transpose(0, 1).contiguous(), self.device)

    def run(self, batch: Batch) -> None:
        """Take the step that was planned.

        Args:
            batch: as of one head with G (or 1, where all heads see the same clips) in front.
        """
        self.parameters.begin()
        logits = self.head(batch.tokens, batch.image, self._masks())
        numbers = self.trainings[0].config.train
        losses = stacked_loss(
            logits, batch.labels, self.head.valid, self.kind, batch.known, numbers
        )
        torch.autograd.backward(losses.sum())
        self.parameters.gather()
        if self._clips:
            norms = torch.linalg.vector_norm(self.parameters.grad, dim=1)
            self.parameters.grad.mul_((self._bounds / (norms + 1e-6)).clamp(max=1)[:, None])
        self.optimiser.step()
        if self.average is not None:
            self.average.lerp_(self.parameters.data, self._weights)
        self.losses.copy_(losses.detach())
        self.loss_sums += self.losses

    @torch.no_grad()
    def keep(self, heads: Sequence[int]) -> None:
        """Go on with some of the heads; the others keep the parameters that they have now."""
        gone = [t for g, t in enumerate(self.trainings) if g not in heads]
        self.parameters.keep(heads)
        index = torch.tensor(list(heads), dtype=torch.long, device=self.device)
        self.trainings = [self.trainings[g] for g in heads]
        self.losses, self.loss_sums = self.losses[index], self.loss_sums[index]
        self.average = None if self.average is None else self.average[index]
        for training in gone:
            self.optimiser.state.pop(training.flat.matrices, None)
            self.optimiser.state.pop(training.flat.vectors, None)
        groups = self.optimiser.param_groups
        self.optimiser.param_groups = [groups[2 * g + part] for g in heads for part in (0, 1)]
        if not heads:
            return
        self._lay_out()
        for number, group in enumerate(self.optimiser.param_groups):
            group["lr"] = self._rates[number // 2]

    def _masks(self) -> StackedMasks | None:
        """The dropout of every head, as it would draw it alone."""
        dropout = self.trainings[0].config.head.dropout
        if not drop_rate(dropout):
            return None
        made: list[Masks] = [
            CountedMasks(key, dropout)
            if self._graph
            else Masks(training.config.train.seed, self._number, dropout, self.device)
            for training, key in zip(self.trainings, self._keys, strict=True)
        ]
        return StackedMasks(made, self.head.classes)


def require_alike(trainings: Sequence[Training]) -> None:
    """Refuse runs that cannot be stacked.

    Raises:
        UsageError: with what differs.
    """
    kinds = [stack_kind(training) for training in trainings]
    differing = {key for kind in kinds for key in kind if kind[key] != kinds[0][key]}
    if differing:
        raise UsageError(f"stacked heads are alike in all but their rates, seeds, clips and "
                         f"classes: {', '.join(sorted(differing))} differ")  # fmt: skip


def stack_kind(training: Training) -> dict[str, object]:
    """What heads that are stacked have in common."""
    config, f = training.config, training.features
    head = config.head
    return {
        **{f"head.{name}": getattr(head, name) for name in head.__slots__},
        "width": training.model.width,
        "optim.name": config.optim.name,
        "average": training.average is not None,
        "batch": training.batch,
        "epoch_clips": config.train.epoch_clips,
        "loss": training.loss,
        **{f"train.{n}": getattr(config.train, n) for n in NUMBERS.get(training.loss, ())},
        "precision": training.choice.precision,
        "graph": training.choice.graph,
        "tokens": tuple(f.tokens.shape[1:]),
        "image": None if training.model.fuse_image is None or f.image is None
        else f.image.shape[1],
        "text": None if training.model.text is None else training.model.text.shape[1],
        "known": f.known is not None,
    }  # fmt: skip
