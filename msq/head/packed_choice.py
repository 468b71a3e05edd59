"""Which version of the head takes the training steps, and in which precision: decided once."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from msq.config import TrainConfig
from msq.errors import UsageError
from msq.head.kernel_choice import choose_kernels


@dataclass(frozen=True, slots=True)
class StepChoice:
    """What `train.path` and `train.precision` come to on a device.

    Attributes:
        path: `plain` (`msq.head.model`) or `packed` (`msq.head.packed`).
        precision: `fp32` or `bf16`.
        kernels: names of the operations that run a Triton kernel, sorted, between commas.
    """

    path: str
    precision: str
    kernels: str = ""

    def to_dict(self) -> dict[str, str]:
        """For `config.toml`, from which a resumed run takes it again."""
        return asdict(self)


def choose_step(
    config: TrainConfig,
    device: str | torch.device,
    *,
    keys: int | None = None,
    width: int = 0,
    heads: int = 1,
) -> StepChoice:
    """`auto` is the packed head, in bf16 on a GPU that has it and in float32 elsewhere.

    Args:
        config: with `path`, `precision` and `kernels`, each `auto` or what it is to be.
        device: to train on.
        keys: K, classes; without it no kernels are chosen.
        width: D.
        heads: H.

    Raises:
        UsageError: `kernels = triton` where they cannot run, or for the plain head.
    """
    precision = config.precision
    if precision == "auto":
        cuda = torch.device(device).type == "cuda"
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    path = "packed" if config.path == "auto" else config.path
    if path == "plain" and config.kernels == "triton":
        raise UsageError("train.kernels = triton: the plain head has no kernels; use path = packed")
    if path == "plain" or keys is None:
        return StepChoice(path, precision)
    device = torch.device(device)
    chosen = choose_kernels(
        config.kernels, device, precision, keys=keys, width=width, heads=heads
    )  # fmt: skip
    names = sorted(choice.op for choice in chosen if choice.path == "triton")
    return StepChoice(path, precision, ",".join(names))
