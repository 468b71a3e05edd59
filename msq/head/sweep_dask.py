"""A sweep through dask: its workers get the path of the sweep and ids of trials, never a tensor."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msq.errors import UsageError
from msq.head.device_errors import DeviceFailed
from msq.head.sweep import Loaded, SweepProgress, do_group, load_source
from msq.head.sweep_plan import Plan, outcome_path, read_plan, write_outcome
from msq.head.sweep_progress import Teller
from msq.head.trials import failure

PAUSE_SECONDS = 0.2  # before a group goes to another worker


def run_dask(
    folder: Path,
    plan: Plan,
    scheduler: str,
    workers: int,
    devices: Sequence[str] = ("cpu",),
    progress: SweepProgress | None = None,
) -> None:
    """Work through dask: `scheduler` is `dask` (a cluster of local processes) or an address.

    The workers of an address must see the sweep's folder and its stores under the same paths,
    whatever folder they run in. What one of them cannot do there is given to the others.

    Raises:
        UsageError: no scheduler answers at the address, or the name is none.
        DeviceFailed: no worker can do what is left, which stays to be done.
    """
    import distributed

    dask: Any = distributed

    folder = folder.resolve()
    teller = Teller(folder, plan, progress)
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
    try:
        with dask.Client(cluster or scheduler, timeout="20s") as client:
            _hand_out(client, dask.as_completed, folder, groups, devices, teller)
    except OSError as error:
        raise UsageError(f"--scheduler {scheduler}: no dask scheduler answers there; "
                         f"{error}") from None  # fmt: skip
    finally:
        if cluster is not None:
            cluster.close()
    teller.tell()


def _hand_out(
    client: Any, as_completed: Any, folder: Path, groups: list[list[str]], devices: Sequence[str],
    teller: Teller,
) -> None:  # fmt: skip
    """Have each group trained by a worker that can."""
    places = [devices[k % len(devices)] for k in range(len(groups))]
    # The task of a worker that is lost is handed out again, three times by default.
    futures = client.map(_dask_task, [str(folder)] * len(groups), groups, places, pure=False)
    given = {f.key: both for f, both in zip(futures, zip(groups, places, strict=True), strict=True)}
    unusable: set[tuple[str, str]] = set()  # worker and device
    stranded = ""
    completed = as_completed(futures)
    for future in completed:
        group, place = given.pop(future.key)
        if future.status == "error":
            for one in group:
                if not outcome_path(folder, one).exists():
                    write_outcome(folder, failure(one, future.exception()))
        elif future.status == "finished" and (refused := future.result()) is not None:
            unusable.add((refused[0], place))
            there = _able(list(client.nthreads()), [place, *devices], unusable)
            if there is None:
                stranded = refused[1]
                continue
            time.sleep(PAUSE_SECONDS)
            # Others may take it too: it must not wait for ever for workers that are gone.
            again = client.submit(_dask_task, str(folder), group, there[1], workers=there[0],
                                  allow_other_workers=True, pure=False)  # fmt: skip
            given[again.key] = group, there[1]
            completed.add(again)
        teller.tell()
    if stranded:
        raise DeviceFailed(f"no dask worker can do what is left of {folder}: {stranded}")


def _able(
    workers: Sequence[str], devices: Sequence[str], unusable: set[tuple[str, str]]
) -> tuple[list[str], str] | None:
    """The workers that may use one of the devices, and which; None without any."""
    for device in devices:
        found = [one for one in workers if (one, device) not in unusable]
        if found:
            return found, device
    return None


_ONE_AT_A_TIME = threading.Lock()  # torch has one random state for all threads of a process
_HERE: dict[str, Any] = {}  # what a dask worker keeps between two tasks


def _dask_task(folder: str, group: list[str], device: str) -> list[str] | None:
    """Train one group; else this worker's address, and why it cannot."""
    import distributed

    dask: Any = distributed

    with _ONE_AT_A_TIME:
        try:
            _train(Path(folder), group, device)
        except DeviceFailed as error:
            return [str(dask.get_worker().address), str(error)]
    return None


def _train(folder: Path, group: list[str], device: str) -> None:
    import torch

    try:
        written = (folder / "plan.json").stat().st_mtime_ns
    except OSError as error:
        raise DeviceFailed(f"{folder}: this worker does not see the sweep there; {error}") from None
    if _HERE.get("for") != (folder, device, written):
        _HERE.update({"for": (folder, device, written), "plan": read_plan(folder),
                      "loaded": Loaded(load_source, device)})  # fmt: skip
    plan = _HERE["plan"]
    store = plan.sources[plan.trial(group[0]).source].store
    if not Path(store).exists():
        raise DeviceFailed(f"{store}: this worker does not see the feature store there")
    torch.set_num_threads(plan.threads)
    do_group(folder, plan, group, _HERE["loaded"])
