"""Which operations of the packed head run a Triton kernel: decided once, before the first step."""

from __future__ import annotations

import torch

from msq.kernels.dispatch import Choice, Kernels, resolve
from msq.kernels.norm import WIDEST
from msq.kernels.self_attention import unsupported


def choose_kernels(
    kernels: Kernels,
    device: torch.device,
    precision: str,
    *,
    keys: int,
    width: int,
    heads: int,
) -> tuple[Choice, ...]:
    """The version of each operation; `str` of each is a line for the log.

    Args:
        kernels: `auto`, `triton` or `reference`.
        device: to train on.
        precision: `fp32` or `bf16`.
        keys: K, classes.
        width: D.
        heads: H.

    Raises:
        UsageError: `triton` where a kernel cannot run.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    too_wide = f"rows of {width} (at most {WIDEST})" if width > WIDEST else ""
    return (
        resolve("drop_add_norm", device, dtype, width, kernels, too_wide),
        resolve("self_attention", device, dtype, keys, kernels, unsupported(keys, width // heads)),
    )
