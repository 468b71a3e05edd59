"""Timing two or more ways of doing one thing: interleaved, with medians, quartiles and ratios."""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def interleaved(
    cases: dict[str, Callable[[], None]], rounds: int, warm_up: int = 1, clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds of each case in each round; the order within a round is random.

    Args:
        cases: what to run.
        rounds: how often each.
        warm_up: rounds that are not counted.
        clock: `wall`, or `cpu` for the processor time of the process (on a busy machine).
    """
    # Asking for a GPU takes milliseconds where there is none: once, not in every round.
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    now = time.perf_counter if clock == "wall" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(warm_up + rounds):
        for name in random.sample(list(cases), len(cases)):
            synchronise()
            began = now()
            cases[name]()
            synchronise()
            if number >= warm_up:
                seconds[name].append(now() - began)
    return seconds


def quartiles(values: list[float], factor: float = 1.0, digits: int = 1) -> str:
    """`median (lower to upper quartile)`."""
    low, middle, high = (
        statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    )  # fmt: skip
    return " ".join([f"{middle * factor:.{digits}f}",
                     f"({low * factor:.{digits}f} to {high * factor:.{digits}f})"])  # fmt: skip


def ratio(slower: list[float], faster: list[float]) -> str:
    """Median and quartiles of the ratios within the rounds."""
    return quartiles([a / b for a, b in zip(slower, faster, strict=True)], digits=2)


def machine(device: str) -> str:
    """What it ran on, without names of people or machines."""
    name = platform.machine()
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    return (
        f"{name}, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )
