"""The device that `--device` names; all commands ask here, before anything is loaded."""

from __future__ import annotations

import re

from msq.errors import UsageError

_NAME = re.compile(r"cpu|cuda(?::(0|[1-9][0-9]*))?")


def resolve_device(name: str) -> str:
    """A device as torch names it: `auto` is CUDA where there is a device, else the CPU.

    Args:
        name: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: another name, or CUDA or its device N is not there. Nothing falls back
            silently.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if gpus else "cpu"
    match = _NAME.fullmatch(name)
    if match is None:
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N, found {name!r}")
    if name == "cpu":
        return name
    if not gpus:
        raise UsageError(f"--device {name}: expected a CUDA device, this machine has none")
    if match[1] and int(match[1]) >= gpus:
        there = ", ".join(f"cuda:{number}" for number in range(gpus))
        raise UsageError(
            f"--device {name}: expected one of {there}, the CUDA devices that are here"
        )
    return name
