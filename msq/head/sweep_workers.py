"""More hands for a sweep: local processes, or dask workers. They share nothing but its folder.

Each worker claims trials by lock and writes their outcomes itself.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from msq.errors import MsqError
from msq.head.device_errors import DeviceFailed
from msq.head.sweep import SweepProgress, work
from msq.head.sweep_claims import at_work, claimed, owner
from msq.head.sweep_dask import run_dask
from msq.head.sweep_plan import Plan, outcome_path, read_plan, summary, write_outcome
from msq.head.sweep_progress import Teller
from msq.head.trials import failure

LOOK_SECONDS = 0.2
WAIT_SECONDS = 1.0
DEATHS = 3  # of workers at one group, which is then recorded as failed; dask has the same number
UNUSABLE = 69  # exit code of a worker whose device cannot be used (EX_UNAVAILABLE of sysexits.h)


def run_sweep(
    folder: Path,
    plan: Plan,
    *,
    workers: int = 1,
    devices: Sequence[str] = ("cpu",),
    scheduler: str | None = None,
    progress: SweepProgress | None = None,
) -> dict[str, Any]:
    """Do a prepared sweep to its end: here, with local processes, or through dask.

    Trials that other commands are at are waited for, and taken over if those die.

    Args:
        folder: of the sweep.
        plan: as `msq.head.sweep.prepare` gave it.
        workers: processes; 1 without a scheduler trains in this one.
        devices: where to train; worker i has `devices[i % len(devices)]`.
        scheduler: None, `dask` or an address.
        progress: called after each trial.

    Returns:
        As `msq.head.sweep_plan.summary`.

    Raises:
        DeviceFailed: no device is left that can be used; what is not done can be gone on with.
        MsqError: as `run_workers`.
        UsageError: as `run_dask`.
    """
    with at_work(folder):
        while summary(folder, plan)["pending"]:
            try:
                if not _unclaimed(folder, plan):
                    pass  # all that is left is in the hands of other commands
                elif scheduler is not None:
                    run_dask(folder, plan, scheduler, workers, devices, progress)
                elif workers > 1:
                    run_workers(folder, plan, workers, devices, progress)
                else:
                    work(folder, plan, device=devices[0], progress=progress)
            except DeviceFailed:
                if summary(folder, plan)["pending"]:
                    raise
            if summary(folder, plan)["pending"]:
                time.sleep(WAIT_SECONDS)
    return summary(folder, plan)


def _unclaimed(folder: Path, plan: Plan) -> bool:
    """Whether there is a group to be done that nobody is at."""
    return any(
        not claimed(folder, group[0])
        for group in plan.groups
        if not all(outcome_path(folder, one).exists() for one in group)
    )


def run_workers(
    folder: Path,
    plan: Plan,
    workers: int,
    devices: Sequence[str] = ("cpu",),
    progress: SweepProgress | None = None,
) -> None:
    """Work with so many local processes.

    A worker that dies is replaced, and its trial goes on where its last checkpoint stands (a group
    that is stacked begins again). Where a third worker dies at it, it is recorded as failed. One
    whose device cannot be used is not replaced, and what it left is done on the other devices.

    Args:
        folder: of the sweep, prepared.
        plan: of the sweep.
        workers: processes; worker i has `devices[i % len(devices)]`.
        devices: where to train.
        progress: as in `msq.head.sweep.work`.

    Raises:
        DeviceFailed: none of the devices can be used.
        MsqError: a third worker died before it had claimed a trial.
    """
    context = multiprocessing.get_context("spawn")
    teller = Teller(folder, plan, progress)

    def start(device: str) -> tuple[BaseProcess, str]:
        process = context.Process(target=_local_worker, args=(str(folder), device), daemon=True)
        process.start()
        return process, device

    running = {number: start(devices[number % len(devices)]) for number in range(workers)}
    deaths: Counter[str] = Counter()
    usable = list(devices)
    try:
        while running:
            time.sleep(LOOK_SECONDS)
            teller.tell()
            for number, (process, device) in list(running.items()):
                if process.exitcode is None:
                    continue
                del running[number]
                if process.exitcode == UNUSABLE:
                    usable = [one for one in usable if one != device]
                elif process.exitcode != 0:
                    _note_death(folder, plan, process, deaths)
                    running[number] = start(device)
            if not running and len(usable) < len(devices) and _unclaimed(folder, plan):
                running[0] = start(_first_of(usable, devices))  # what the others passed by
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()
    teller.tell()


def _first_of(usable: Sequence[str], devices: Sequence[str]) -> str:
    if not usable:
        raise DeviceFailed(
            f"--device {','.join(dict.fromkeys(devices))}: none of them can be used, the messages "
            "of the workers stand above; the same command with another --device goes on"
        )
    return usable[0]


def _note_death(folder: Path, plan: Plan, process: BaseProcess, deaths: Counter[str]) -> None:
    """Count the death of a worker for the trials it was at; their failure where it is the third."""
    for group in plan.groups:
        open_ones = [one for one in group if not outcome_path(folder, one).exists()]
        if not open_ones or owner(folder, group[0]) != process.pid:
            continue
        deaths[group[0]] += 1
        if deaths[group[0]] >= DEATHS:
            error = MsqError(f"{DEATHS} processes died at it, the last with exit code "
                             f"{process.exitcode}; was there enough memory?")  # fmt: skip
            for one in open_ones:
                write_outcome(folder, failure(one, error))
        return
    deaths[""] += 1  # it had no trial yet, or none any more
    if deaths[""] >= DEATHS:
        raise MsqError(
            f"{folder}: {DEATHS} worker processes ended before they had a trial, the last with "
            f"exit code {process.exitcode}; their messages stand above"
        )


def _local_worker(folder: str, device: str) -> None:
    """One process's share; ends when its parent does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(Path(folder), read_plan(Path(folder)), device=device)
    except DeviceFailed as error:
        sys.stderr.write(f"msq: {error}\n")
        sys.exit(UNUSABLE)
    except KeyboardInterrupt:
        os._exit(130)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # killed: nobody is left to tell
