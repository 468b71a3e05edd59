"""More hands for a sweep: local processes, or dask workers. They share nothing but its folder.

Each worker claims trials by lock and writes their outcomes itself; what goes through dask is the
path of the sweep and the ids of trials, never a tensor.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from msq.errors import MsqError, UsageError
from msq.head.sweep import Loaded, SweepProgress, do_group, load_source, summary, work
from msq.head.sweep_claims import at_work, claimed, owner
from msq.head.sweep_plan import Plan, outcome_path, read_outcome, read_plan, write_outcome
from msq.head.trials import failure

LOOK_SECONDS = 0.2
WAIT_SECONDS = 1.0
DEATHS = 3  # of workers at one group, which is then recorded as failed; dask has the same number


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
        As `msq.head.sweep.summary`.
    """
    with at_work(folder):
        while summary(folder, plan)["pending"]:
            if not _unclaimed(folder, plan):
                pass  # all that is left is in the hands of other commands
            elif scheduler is not None:
                run_dask(folder, plan, scheduler, workers, devices, progress)
            elif workers > 1:
                run_workers(folder, plan, workers, devices, progress)
            else:
                work(folder, plan, device=devices[0], progress=progress)
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
    that is stacked begins again). Where a third worker dies at it, it is recorded as failed.

    Args:
        folder: of the sweep, prepared.
        plan: of the sweep.
        workers: processes; worker i has `devices[i % len(devices)]`.
        devices: where to train.
        progress: as in `msq.head.sweep.work`.

    Raises:
        MsqError: a third worker died before it had claimed a trial.
    """
    context = multiprocessing.get_context("spawn")
    teller = _Teller(folder, plan, progress)

    def start(number: int) -> BaseProcess:
        device = devices[number % len(devices)]
        process = context.Process(target=_local_worker, args=(str(folder), device), daemon=True)
        process.start()
        return process

    running = {number: start(number) for number in range(workers)}
    deaths: Counter[str] = Counter()
    try:
        while running:
            time.sleep(LOOK_SECONDS)
            teller.tell()
            for number, process in list(running.items()):
                if process.exitcode is None:
                    continue
                del running[number]
                if process.exitcode != 0:
                    _note_death(folder, plan, process, deaths)
                    running[number] = start(number)
    finally:
        for process in running.values():
            process.terminate()
            process.join()
    teller.tell()


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
    except KeyboardInterrupt:
        os._exit(130)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # killed: nobody is left to tell


class _Teller:
    """Reports trials that other processes finished."""

    def __init__(self, folder: Path, plan: Plan, progress: SweepProgress | None) -> None:
        self.folder, self.plan, self.progress = folder, plan, progress
        self.told = {t.id for t in plan.trials if outcome_path(folder, t.id).exists()}

    def tell(self) -> None:
        """Report what is new."""
        for trial in self.plan.trials:
            if trial.id in self.told or not outcome_path(self.folder, trial.id).exists():
                continue
            self.told.add(trial.id)
            if self.progress is not None:
                self.progress({"event": "trial", "done": len(self.told),
                               "total": len(self.plan.trials), "id": trial.id,
                               "name": trial.name(),
                               "outcome": read_outcome(self.folder, trial.id)})  # fmt: skip


def run_dask(
    folder: Path,
    plan: Plan,
    scheduler: str,
    workers: int,
    devices: Sequence[str] = ("cpu",),
    progress: SweepProgress | None = None,
) -> None:
    """Work through dask: `scheduler` is `dask` (a cluster of local processes) or an address.

    The workers of an address must see the sweep's folder and its stores under the same paths.

    Raises:
        UsageError: no scheduler answers at the address, or the name is none.
    """
    import distributed

    dask: Any = distributed

    teller = _Teller(folder, plan, progress)
    if scheduler == "dask":
        cluster = dask.LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None
        )
    elif "://" in scheduler:
        cluster = None
    else:
        raise UsageError(f"--scheduler {scheduler}: expected dask, or an address such as "
                         "tcp://host:8786")  # fmt: skip
    groups = [list(g) for g in plan.groups
              if not all(outcome_path(folder, one).exists() for one in g)]  # fmt: skip
    places = [devices[k % len(devices)] for k in range(len(groups))]
    try:
        with dask.Client(cluster or scheduler, timeout="20s") as client:
            # The task of a worker that is lost is handed out again, three times by default.
            futures = client.map(
                _dask_task, [str(folder)] * len(groups), groups, places, pure=False
            )
            for future in dask.as_completed(futures):
                if future.status == "error":
                    for one in groups[futures.index(future)]:
                        if not outcome_path(folder, one).exists():
                            write_outcome(folder, failure(one, future.exception()))
                teller.tell()
    except OSError as error:
        raise UsageError(f"--scheduler {scheduler}: no dask scheduler answers there; "
                         f"{error}") from None  # fmt: skip
    finally:
        if cluster is not None:
            cluster.close()
    teller.tell()


_ONE_AT_A_TIME = threading.Lock()  # torch has one random state for all threads of a process
_HERE: dict[str, Any] = {}  # what a dask worker keeps between two tasks


def _dask_task(folder: str, group: list[str], device: str) -> list[list[str]]:
    """Train one group; `[id, status]` of each trial."""
    import torch

    with _ONE_AT_A_TIME:
        written = (Path(folder) / "plan.json").stat().st_mtime_ns
        if _HERE.get("for") != (folder, device, written):
            _HERE.update({"for": (folder, device, written), "plan": read_plan(Path(folder)),
                          "loaded": Loaded(load_source, device)})  # fmt: skip
        plan = _HERE["plan"]
        torch.set_num_threads(plan.threads)
        do_group(Path(folder), plan, group, _HERE["loaded"])
    outcomes = [(one, read_outcome(Path(folder), one)) for one in group]
    return [[one, "claimed" if found is None else found["status"]] for one, found in outcomes]
