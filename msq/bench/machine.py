"""What a number was measured on, without names of people or machines."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from msq import __version__


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, threads, versions, GPU, commit and date, as plain values.

    Args:
        device: `cpu` or `cuda`; the GPU is named only where it is used.
    """
    cuda = device.startswith("cuda")
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "msq": __version__,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def line(found: dict[str, Any]) -> str:
    """The same for people."""
    gpu = f"{found['gpu']}, " if found["gpu"] else ""
    return (
        f"{gpu}{found['processor']}, {found['cores']} cores, {found['threads']} threads; "
        f"Python {found['python']}, torch {found['torch']}, triton {found['triton'] or 'none'}; "
        f"msq {found['msq']}, commit {found['commit'] or 'unknown'}; {found['date']}"
    )


def processor() -> str:
    """The model of the processor where the system says it, else its architecture."""
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        for entry in listed.read_text(encoding="utf-8").splitlines():
            if entry.startswith("model name"):
                return entry.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit that msq is at, `+` where files differ from it; None outside a checkout."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        head = _git(folder, "rev-parse", "--short", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+" if changed else head


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "--no-optional-locks", *arguments],
        cwd=folder, capture_output=True, text=True, check=True, timeout=20,
    )  # fmt: skip
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
