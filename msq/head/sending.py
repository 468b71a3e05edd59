"""Small tensors to a device without waiting for what runs there, and back in one go.

A plain `.to(device)` waits until the device has done all that stands before the copy: in a training
loop that is the step before, and the processor then has nothing prepared for the next one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def sent(values: Tensor, device: str | torch.device) -> Tensor:
    """The same values on a device; in its stream's order, and nothing waits for them.

    On a GPU they go through pinned memory, which torch keeps until they have arrived.

    Args:
        values: of any shape, in this machine's memory or on the device already.
        device: where they are needed.
    """
    device = torch.device(device)
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def copying_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of copies to a GPU beside its steps, one for all who copy there.

    Torch keeps memory for the stream that it was first taken for: with a stream for each of many
    it would keep as many times the memory.
    """
    return _of_copies(torch.cuda.current_device() if device.index is None else device.index)


@functools.lru_cache(maxsize=16)
def _of_copies(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def on_host(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Several lists of rows [n] in this machine's memory; what is on a device is read once."""
    if not parts or parts[0].device.type == "cpu":
        return parts
    return torch.split(torch.cat(list(parts)).cpu(), [len(part) for part in parts])


def brought(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers of a device in float64 in this machine's memory; they are waited for once.

    Args:
        named: tensors of any shape and dtype, all on one device.
    """
    flat = torch.cat([x.detach().double().flatten() for x in named.values()]).cpu()
    parts = torch.split(flat, [x.numel() for x in named.values()])
    return {name: part.view(x.shape) for (name, x), part in zip(named.items(), parts, strict=True)}
