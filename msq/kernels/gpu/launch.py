"""What every launch asks before it starts: the device's generation, and pointers that exist."""

from __future__ import annotations

import torch
from torch import Tensor


def capability(x: Tensor) -> tuple[int, int] | None:
    """Compute capability of the device that holds `x`; None on the CPU (the interpreter)."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else None


def given(optional: Tensor | None, like: Tensor) -> Tensor:
    """`optional`, contiguous; where it is None `like`, a pointer that is never followed."""
    return like if optional is None else optional.contiguous()
