"""What every launch asks before it starts: its device, that device's generation, its pointers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def on_its_device(launch: Callable[P, T]) -> Callable[P, T]:
    """A launch during which the device of its first tensor is the current one.

    Triton launches on torch's current device, and an op written in Python does not change it: with
    tensors on `cuda:1` a kernel would run on `cuda:0`.
    """

    @functools.wraps(launch)
    def launched(*arguments: P.args, **options: P.kwargs) -> T:
        with torch.cuda.device_of(arguments[0]):
            return launch(*arguments, **options)

    return launched


def capability(x: Tensor) -> tuple[int, int] | None:
    """Compute capability of the device that holds `x`; None on the CPU (the interpreter)."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else None


def given(optional: Tensor | None, like: Tensor) -> Tensor:
    """`optional`, contiguous; where it is None `like`, a pointer that is never followed."""
    return like if optional is None else optional.contiguous()
