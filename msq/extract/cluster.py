"""Where the workers of one extraction run: here, on several devices, under a launcher, on dask.

A worker is a process with encoders of its own. Nobody hands out clips: each worker reads the
request and takes the next shard that is free (see `claims`), so that it makes no difference who
started whom, or who is still alive.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from msq.errors import MsqError, UsageError

if TYPE_CHECKING:
    from msq.extract.extract_result import ExtractResult
    from msq.extract.request import ExtractRequest
    from msq.extract.shard_run import Progress

PARTING = 1.0  # seconds that a worker has to end when all is done
PATIENCE = 10.0  # seconds that a worker has to drop its shard before it is killed
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Place:
    """This process among those that a launcher started; all numbers count processes."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place by the variables of torchrun or Slurm; None where it is alone.

    Raises:
        UsageError: variables that are no numbers, or do not fit together.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world = (_number(environment, name) for name in _TORCHRUN[:2])
        local_rank = _number(environment, "LOCAL_RANK", 0)
        local_world = _number(environment, "LOCAL_WORLD_SIZE", 1)
    elif "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment:
        rank = _number(environment, "SLURM_PROCID")
        # Those of the step: a batch script that does not use srun is one process of one.
        tasks = "SLURM_STEP_NUM_TASKS"
        world = _number(environment, tasks if tasks in environment else "SLURM_NTASKS")
        local_rank = _number(environment, "SLURM_LOCALID", 0)
        local_world = _slurm_local_world(environment, local_rank, world)
    else:
        return None
    if not (0 <= rank < world and local_rank >= 0):
        raise UsageError(
            f"launcher: expected a rank from 0 to {world - 1}, found {rank} (local {local_rank})"
        )
    return Place(rank, world, local_rank, max(1, local_world)) if world > 1 else None


def leads() -> bool:
    """Whether this process speaks for all: it prints the result."""
    spot = place()
    return spot is None or spot.rank == 0


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UsageError(f"environment variable {name}: expected a number, found {text!r}")
    return int(text)


def _slurm_local_world(environment: Mapping[str, str], local_rank: int, world: int) -> int:
    """Tasks that share this process's cores: none where Slurm has bound each to its own."""
    if "SLURM_CPUS_PER_TASK" in environment:
        return 1
    shown = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts = [int(count) for count in re.findall(r"(?:^|,)(\d+)", shown)]
    return min(world, max([local_rank + 1, *counts]))


def parse_devices(text: str) -> list[str]:
    """`cuda:0,cuda:1`, `cpu:4` (four workers), `3` (three GPUs, or workers), `auto` -> devices.

    Raises:
        UsageError: no such devices.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        return [f"cuda:{k}" for k in range(gpus)] or ["cpu"]
    if text.isdecimal() and int(text) > 0:
        if 0 < gpus < int(text):
            raise UsageError(f"--devices {text}: expected at most {gpus}, the GPUs of this machine")
        return [f"cuda:{k}" if gpus else "cpu" for k in range(int(text))]
    found = []
    for name in text.split(","):
        match = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", name.strip())
        number = 0 if match is None else int(match[2] or (match[1] == "cpu"))
        if match is None or (match[1] == "cpu" and not number):
            raise UsageError(
                f"--devices {text}: expected auto, a number, cpu:N or cuda:A,cuda:B; found {name!r}"
            )
        if match[1] == "cuda" and number >= gpus:
            raise UsageError(f"--devices {text}: found {gpus} CUDA devices, and no cuda:{number}")
        found += ["cpu"] * number if match[1] == "cpu" else [f"cuda:{number}"]
    return found


def run(request: ExtractRequest, progress: Progress | None = None) -> ExtractResult:
    """Run a request where it asks for; the first worker gives the result of all.

    Raises:
        UsageError: options that do not go together.
        MsqError: as `ExtractRequest.work`.
        KeyboardInterrupt: also by SIGTERM, as schedulers send it; the store is consistent.
    """
    from msq.extract.crew import Team

    spot = place()
    asked = [name for name in ("devices", "scheduler") if getattr(request, name) is not None]
    if spot is not None and asked:
        raise UsageError(
            f"--{asked[0]} under a launcher (RANK or SLURM_PROCID is set): expected one of them; "
            "the launcher starts the workers already"
        )
    if request.devices is not None and request.device != "auto":
        raise UsageError("expected --device or --devices, found both")
    with terminated_as_interrupted():
        if spot is not None:
            device = own_device(request.device, spot.local_rank)
            team = Team(spot.rank, spot.world, spot.local_world)
            return replace(request, device=device).work(progress, team)
        if request.scheduler is not None:
            from msq.extract.dask_cluster import run_on_dask

            return run_on_dask(request, progress)
        if request.devices is not None:
            return _run_here(request, parse_devices(request.devices), progress)
        return request.work(progress, Team() if request.join else None)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM is handled as Ctrl-C is: drop the shard under way, leave the store consistent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def own_device(device: str, local_rank: int) -> str:
    """The GPU of a process that a launcher started, where it may choose one."""
    import torch

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{local_rank % torch.cuda.device_count()}"


def _run_here(
    request: ExtractRequest, devices: Sequence[str], progress: Progress | None
) -> ExtractResult:
    """This process works on the first device, and children of it on the others."""
    from msq.extract.crew import Team
    from msq.extract.request_text import write_request

    plain = replace(request, devices=None, device=devices[0])
    if len(devices) == 1:
        return plain.work(progress, Team() if request.join else None)
    context = multiprocessing.get_context("spawn")
    children = []
    for rank, device in enumerate(devices[1:], start=1):
        text = write_request(replace(plain, device=device))
        name = f"worker {rank} on {device}"
        children.append(context.Process(target=_work, args=(text, rank, len(devices)), name=name))
    lost: list[str] = []
    try:
        for child in children:
            child.start()
        result = plain.work(progress, Team(0, len(devices), len(devices)))
        for child in children:
            child.join(PARTING)  # all shards are done, and so are they, if they have begun
        lost = [
            f"{child.name} ended early (exit code {child.exitcode}); the others made its shards"
            for child in children
            if child.exitcode
        ]
    finally:
        _end([child for child in children if child.pid is not None])
    return replace(result, warnings=[*result.warnings, *lost])


def _end(children: Sequence[BaseProcess]) -> None:
    """End the workers that are still there; each drops what it is at."""
    for child in children:
        child.terminate()
    end = time.monotonic() + PATIENCE
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
        if child.is_alive():
            child.kill()
            child.join()


def _work(text: str, rank: int, world: int) -> None:
    """A child's part; its result is the store's, and the first worker tells it."""
    from msq.extract.crew import Team
    from msq.extract.decode_pool import die_with_parent
    from msq.extract.request_text import read_request

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the first worker passes it on
    die_with_parent()
    request = read_request(text)
    try:
        with terminated_as_interrupted():
            request.work(None, Team(rank, world, world))
    except MsqError as error:
        sys.stderr.write(f"msq: worker {rank} on {request.device}: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
