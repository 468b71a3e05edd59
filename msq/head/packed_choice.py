"""Which version of the head takes the training steps, and in which precision: decided once."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from msq.config import TrainConfig


@dataclass(frozen=True, slots=True)
class StepChoice:
    """What `train.path` and `train.precision` come to on a device.

    Attributes:
        path: `plain` (`msq.head.model`) or `packed` (`msq.head.packed`).
        precision: `fp32` or `bf16`.
    """

    path: str
    precision: str

    def to_dict(self) -> dict[str, str]:
        """For `config.toml`, from which a resumed run takes it again."""
        return asdict(self)


def choose_step(config: TrainConfig, device: str | torch.device) -> StepChoice:
    """`auto` is the packed head, in bf16 on a GPU that has it and in float32 elsewhere.

    Args:
        config: with `path` and `precision`, each `auto` or what it is to be.
        device: to train on.
    """
    precision = config.precision
    if precision == "auto":
        cuda = torch.device(device).type == "cuda"
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    return StepChoice("packed" if config.path == "auto" else config.path, precision)
