"""How much memory there is for features, and whether they stay on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

Feed = Literal["auto", "resident", "stream"]
SHARE = 0.5  # of what is available may be features; the rest is for the training itself
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: str | torch.device) -> int:
    """Bytes that can still be had: of the GPU, or of this machine within its group's limit."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found = 1024 * int(line.split()[1])
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        found = found if limit == "max" else min(found, int(limit) - used)
    except (OSError, ValueError):
        pass  # another system, or no group: what was found so far is what is known
    return max(found, 0)


def fits(size: int, device: str | torch.device) -> bool:
    """Whether so many bytes of features may be resident on a device."""
    return size <= SHARE * available_bytes(device)
