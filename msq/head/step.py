"""One training step: forward pass, backward pass, optimiser, average of the weights.

`plan` says which step comes; `run` takes it and asks nothing of the processor any more: the batch,
the learning rate, the weight of the average and, where the step is counted on the device, the key
of its dropout lie in tensors. So `run` can be recorded in a CUDA graph. What it leaves to be looked
at is in tensors too: `loss`, `loss_sum`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msq.config import RunConfig
from msq.errors import UsageError
from msq.head.attention_backend import attention_by
from msq.head.feeding import Batch
from msq.head.loss import head_loss
from msq.head.masks import CountedMasks, Masks, drop_rate, step_masks
from msq.head.model import MSQNet
from msq.head.optim import WeightAverage, build_optimiser
from msq.head.packed import PackedHead
from msq.head.packed_choice import StepChoice
from msq.head.packed_parameters import flat_parameters
from msq.head.schedule import learning_rate


class TrainingStep:
    """The step of a run, and what it changes.

    Args:
        model: the head, on the device to train on.
        choice: how to take the step.
        config: of the run.
        loss: as `msq.head.loss.loss_kind` has it; its numbers are those of `config`.
        steps: of the whole run.
        epoch_steps: of an epoch.
        counted: dropout from a key on the device, as a graph needs it; None does so where the
            choice is a graph. Other masks than without, on a CPU and on a GPU.

    Attributes:
        flat: the parameters.
        packed: the packed head; None where the plain one is trained.
        optimiser: of `flat`.
        average: of the weights, or None.
        loss: of the last step, 0-dimensional.
        loss_sum: of the steps since it was last set to zero.

    Raises:
        UsageError: a graph was chosen, and the model is not on a GPU.
    """

    def __init__(
        self,
        model: MSQNet,
        choice: StepChoice,
        config: RunConfig,
        loss: str,
        steps: int,
        epoch_steps: int,
        counted: bool | None = None,
    ) -> None:
        self.model, self.choice, self.config, self.kind = model, choice, config, loss
        self.steps, self.epoch_steps = steps, epoch_steps
        self.flat = flat_parameters(model, choice.precision)
        device = self.flat.data.device
        if choice.graph == "on" and device.type != "cuda":
            raise UsageError(
                f"the steps of this run are a CUDA graph (data.step.graph = on), and it is on "
                f"{device.type}: go on with it on a CUDA device, or start it anew"
            )
        self.packed = (
            PackedHead(
                model,
                precision=choice.precision,
                flat=self.flat,
                absorb=choice.absorb,
                kernels=choice.ops,
            )
            if choice.path == "packed"
            else None
        )
        graph = choice.graph == "on"
        # torch's fused optimiser takes a rate on the device in float32 alone; on a CPU it is
        # read as a double, and float64 keeps it as it is.
        wide = torch.float32 if device.type == "cuda" else torch.float64
        self._rate = torch.tensor(config.optim.lr, dtype=wide, device=device)
        self.optimiser = build_optimiser(self.flat, config.optim, self._rate, capturable=graph)
        self.average = self._averaged([self.flat.data])
        self.loss = torch.zeros((), device=device)
        self.loss_sum = torch.zeros((), device=device)
        self._counted = graph if counted is None else counted
        self._key = torch.tensor([config.train.seed, 0], device=device)
        self._number = 0
        self._masks: Masks | None = None

    def _averaged(self, weights: list[Tensor]) -> WeightAverage | None:
        ema = self.config.train.ema
        return WeightAverage(weights, ema) if ema else None

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(self.config.optim, step, self.steps, self.epoch_steps)

    def plan(self, step: int) -> None:
        """Say which step comes, 0 for the first of the run."""
        self._number = step
        self._rate.fill_(self.rate(step))
        self._key[1:].fill_(step)
        if self.average is not None:
            self.average.plan(step)

    def run(self, batch: Batch) -> None:
        """Take the step that was planned."""
        self.flat.begin()
        logits = self.logits(batch.tokens, batch.image)
        loss = head_loss(logits, batch.labels, self.kind, batch.known, self.config.train)
        torch.autograd.backward(loss)
        self.flat.gather()
        if self.config.optim.clip_grad:
            both = [self.flat.matrices, self.flat.vectors]
            torch.nn.utils.clip_grad_norm_(both, self.config.optim.clip_grad)
        self.optimiser.step()
        if self.average is not None:
            self.average.take()
        self.loss.copy_(loss.detach())
        self.loss_sum += self.loss

    def logits(self, tokens: Tensor, image: Tensor | None) -> Tensor:
        """Forward pass of the step planned, in float32 at the end; its dropout is the masks'."""
        masks = self._step_masks()
        if self.packed is not None:
            return self.packed(tokens, image, masks=masks)["logits"]
        low = self.choice.precision == "bf16"
        with (
            torch.autocast(tokens.device.type, torch.bfloat16, enabled=low),
            attention_by(self.choice.attention),
        ):
            logits: Tensor = self.model.eval()(tokens, image, masks=masks)["logits"]
        return logits.float() if low else logits

    def _step_masks(self) -> Masks | None:
        seed, dropout = self.config.train.seed, self.config.head.dropout
        if not self._counted:
            return step_masks(seed, self._number, dropout, self._key.device)
        return CountedMasks(self._key, dropout) if drop_rate(dropout) else None

    def optimiser_state(self) -> dict[str, object]:
        """For a checkpoint; the rate is a plain number there, and set again by `plan`."""
        state = self.optimiser.state_dict()
        for group in state["param_groups"]:
            group["lr"] = self.rate(max(self._number, 0))
        return state

    def load_optimiser(self, state: dict[str, object]) -> None:
        """Go on from an `optimiser_state`; a graph of the step has to be recorded anew."""
        self.optimiser.load_state_dict(state)
        for group in self.optimiser.param_groups:
            group["lr"], group["capturable"] = self._rate, self.choice.graph == "on"
