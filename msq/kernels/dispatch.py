"""Which version of an op runs: its Triton kernel, or the reference in PyTorch.

`auto` takes the kernel only where a measurement says that it is faster: a line of `tiles.json` for
this architecture, op and shape with `faster` true. `triton` insists and says why where that cannot
be; `reference` never compiles anything. The environment variable `MSQ_KERNELS` overrides `auto`.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from typing import Literal

import torch

from msq.errors import UsageError
from msq.kernels.tiles import find_tile

Kernels = Literal["auto", "triton", "reference"]
Path = Literal["triton", "reference"]
KERNELS: tuple[Kernels, ...] = ("auto", "triton", "reference")
OLDEST = (8, 0)  # compute capability; older devices have no bfloat16 matrix units
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for one op; `str` is the line for the log and the run's record.

    Attributes:
        op: name of the op.
        path: `triton` or `reference`.
        reason: why.
    """

    op: str
    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.path} ({self.reason})"


def interpreted() -> bool:
    """Whether Triton runs its kernels in the interpreter, on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.lru_cache(maxsize=256)
def resolve(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    keys: int,
    kernels: Kernels = "auto",
    unsupported: str = "",
) -> Choice:
    """Chooses the version of one op for one run; logged once for each combination.

    Args:
        op: name of the op, as in `tiles.json`.
        device: where the tensors are.
        dtype: of the activations.
        keys: the size that decides between tiles: K for attention, D for LayerNorm.
        kernels: `auto`, `triton` or `reference`.
        unsupported: why the kernel cannot take these shapes, empty where it can.

    Raises:
        UsageError: an unknown word, or `triton` where the kernel cannot run; the message says why.
    """
    if kernels not in KERNELS:
        raise UsageError(f"kernels is one of {', '.join(KERNELS)}, not {kernels!r}")
    if kernels == "auto":
        kernels = _from_environment()
    obstacle = unsupported or _obstacle(device, dtype) or _no_tile(op, device, keys)
    if kernels == "triton" and obstacle:
        raise UsageError(f"kernels = triton: {op} cannot run its kernel: {obstacle}; use auto")
    if kernels == "triton":
        choice = Choice(op, "triton", "asked for")
    elif kernels == "reference":
        choice = Choice(op, "reference", "asked for")
    elif obstacle:
        choice = Choice(op, "reference", obstacle)
    else:
        choice = _measured(op, device, keys)
    _log.info("%s", choice)
    return choice


def _from_environment() -> Kernels:
    value = os.environ.get("MSQ_KERNELS", "auto")
    for word in KERNELS:
        if value == word:
            return word
    raise UsageError(f"MSQ_KERNELS is one of {', '.join(KERNELS)}, not {value!r}")


def _obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why no Triton kernel can run there; empty where it can."""
    if interpreted():
        return "" if dtype != torch.bfloat16 else "the interpreter computes bfloat16 wrongly"
    if device.type != "cuda":
        return f"no CUDA device ({device.type})"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return "the device is older than compute capability 8.0"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels are for bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return ""


def _no_tile(op: str, device: torch.device, keys: int) -> str:
    """Why no tile is for so many keys; empty where there is one."""
    cuda = device.type == "cuda"
    try:
        find_tile(op, torch.cuda.get_device_capability(device) if cuda else None, keys)
    except KeyError as error:
        return str(error.args[0])
    return ""


def _measured(op: str, device: torch.device, keys: int) -> Choice:
    if device.type != "cuda":
        return Choice(op, "reference", "the interpreter is for tests")
    tile = find_tile(op, torch.cuda.get_device_capability(device), keys)
    if tile.ratio is None:
        return Choice(op, "reference", f"not measured on {tile.architecture}")
    path: Path = "triton" if tile.ratio > 1 else "reference"
    return Choice(op, path, f"measured {tile.ratio:.2f} x the reference on {tile.architecture}")
