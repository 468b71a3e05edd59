"""A device in words, for the first line of a command and of a run's log."""

from __future__ import annotations

from pathlib import Path

import torch

from msq.config import TrainConfig
from msq.head.packed_choice import choose_step
from msq.head.run import recorded_choice

GIB = 2**30


def in_words(device: str | torch.device, precision: str = "") -> str:
    """`cuda:0 (NVIDIA H200, 140 GiB), bf16`, or `cpu (2 threads), fp32`.

    Args:
        device: where something runs; `cuda` is the current one.
        precision: of its products, where it is to be named.
    """
    device = torch.device(device)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        about = torch.cuda.get_device_properties(index)
        words = f"cuda:{index} ({about.name}, {about.total_memory / GIB:.0f} GiB)"
    elif device.type == "cpu":
        threads = torch.get_num_threads()
        words = f"cpu ({threads} thread{'s' if threads > 1 else ''})"
    else:
        words = str(device)
    return f"{words}, {precision}" if precision else words


def step_in_words(config: TrainConfig, device: str | torch.device, out: Path | None = None) -> str:
    """The device, and the precision of the training steps there.

    Args:
        config: with the precision asked for.
        device: to train on.
        out: directory of a run that is gone on with: the precision is the recorded one.

    Raises:
        UsageError: as `choose_step`, or its configuration cannot be read.
    """
    choice = recorded_choice(out) or choose_step(config, device)
    with choice.in_threads():  # those that the steps will have
        return in_words(device, choice.precision)


def threads_in_words(*runs: Path) -> list[str]:
    """A line for each run that goes on with other threads than this process has.

    Args:
        runs: directories; those without an unfinished run are passed over.

    Raises:
        UsageError: the configuration of one cannot be read.
    """
    lines = []
    for run in runs:
        choice = None if (run / "result.json").exists() else recorded_choice(run)
        note = "" if choice is None else choice.other_threads()
        if note:
            lines.append(f"{run}: {note}")
    return lines
