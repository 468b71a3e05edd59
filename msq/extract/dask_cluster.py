"""Workers on dask.distributed: it hands out shard numbers, and each worker does the rest itself.

A task is the request as text and a few numbers. The first task on a worker process reads the
dataset and loads the encoders, which stay for the next; what comes back are counts. Shards are
claimed as by all other workers, so that a task that runs twice does no harm.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.errors import MsqError, StoreError, UsageError
from msq.extract.claims import Holder, claims_folder
from msq.extract.cluster import parse_devices
from msq.extract.crew import Team
from msq.extract.extract_result import ExtractResult, add_stages
from msq.extract.extraction import Extraction
from msq.extract.request import ExtractRequest
from msq.extract.request_text import anchored, read_request, write_request

if TYPE_CHECKING:
    from distributed import Client

    from msq.extract.request import Progress

LOCAL = "dask"
SHARDS_AT_ONCE = 8  # of one task at most: within a task, decoding runs ahead
DEATHS = 1000  # of workers at one task of a local cluster, before dask gives it up
ROUNDS = 3  # without any shard more, before msq gives up
ANSWER = 30.0  # seconds that a scheduler has to answer

_resident: dict[str, Extraction] = {}  # of this worker process, ready to go on
_one = threading.Lock()  # dask may run several tasks of one worker at once; a GPU takes one


def run_on_dask(request: ExtractRequest, progress: Progress | None = None) -> ExtractResult:
    """Fill the store by workers of a local cluster, or of the scheduler at an address.

    Raises:
        UsageError: no scheduler answers at that address.
        MsqError: as `ExtractRequest.work`, or workers died again and again.
    """
    started = time.perf_counter()
    told: dict[str, dict[str, Any]] = {}  # worker process -> what it has said last
    made, store = 0, None
    try:
        with _client(request) as client:
            errand = _errand(request, client)
            look = _ask(client, _look, errand)
            store, done, total = look["store"], look["done"], look["clips"]
            for counts in _rounds(client, errand, look["missing"]):
                made += counts["made"]
                told[counts["worker"]] = counts
                rate = made / (time.perf_counter() - started)
                _tell(progress, min(done + made, total), total, rate, told)
            found = ExtractResult(**_ask(client, _result, errand))
    finally:
        if store is not None:
            _clear_claims(Path(store))
    seconds = time.perf_counter() - started
    said = dict.fromkeys(line for counts in told.values() for line in counts["warnings"])
    return replace(
        found,
        seconds=seconds,
        clips_per_second=made / seconds,
        stages=_stages(told) or found.stages,
        warnings=[*dict.fromkeys([*found.warnings, *said])],
    )


def _clear_claims(store: Path) -> None:
    """Clear away what workers left that were killed with the cluster.

    Only where this machine sees the folder, which workers elsewhere need alone: nothing is made
    here, and what cannot be cleared away is so by the next run, or by another machine's.
    """
    with suppress(OSError, StoreError):
        folder = claims_folder(store)
        if folder.is_dir():
            Holder(folder, "join").leave()


def _stages(told: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Rates of all workers together."""
    stages: dict[str, Any] = {}
    for counts in told.values():
        stages = add_stages(stages, counts["stages"])
    return stages


def _tell(
    progress: Progress | None, done: int, total: int, rate: float, told: dict[str, dict[str, Any]]
) -> None:
    if progress is None:
        return
    stages = _stages(told)
    encode = {f"encode {name}": value for name, value in stages.get("encode", {}).items()}
    rates = {name: stages.get(name) for name in ("decode", "write", "bottleneck")}
    progress(
        {
            "stage": "extract",
            "done": done,
            "total": total,
            "failed": sum(counts["failed"] for counts in told.values()),
            "clips_per_second": rate,
            "stages": {**rates, **encode},
            "seconds_left": (total - done) / rate if rate else None,
        }
    )


def _errand(request: ExtractRequest, client: Client) -> str:
    """All that a worker needs to know, as text."""
    hosts = Counter(worker["host"] for worker in client.scheduler_info()["workers"].values())
    devices = parse_devices(request.devices or "auto") if request.scheduler == LOCAL else []
    plain = anchored(replace(request, devices=None, scheduler=None, join=False))
    return json.dumps(
        {
            "run": uuid.uuid4().hex,
            "request": write_request(plain),
            "devices": devices if request.device == "auto" else [],
            "local": max(hosts.values(), default=1),
        }
    )


@contextmanager
def _client(request: ExtractRequest) -> Iterator[Client]:
    """A client of the scheduler asked for; one made here ends with it."""
    import dask
    from distributed import Client, LocalCluster

    if request.scheduler == LOCAL:
        devices = parse_devices(request.devices or "auto")
        settings = {
            "distributed.worker.daemon": False,  # workers have decode processes of their own
            "distributed.scheduler.allowed-failures": DEATHS,
        }
        with (
            dask.config.set(settings),
            LocalCluster(
                n_workers=len(devices),
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                memory_limit=0,
            ) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            client.wait_for_workers(len(devices), timeout=10 * ANSWER)
            yield client
        return
    if request.devices is not None:
        raise UsageError(
            f"--devices with --scheduler {request.scheduler}: that cluster's workers have their "
            "devices already (CUDA_VISIBLE_DEVICES); expected --device or neither"
        )
    try:
        client = Client(request.scheduler, timeout=ANSWER, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise UsageError(
            f"--scheduler {request.scheduler}: expected dask, or the address of a scheduler that "
            f"runs, such as tcp://HOST:8786; found: {error}"
        ) from None
    with client:
        yield client


def _ask(client: Client, work: Any, *arguments: Any) -> Any:
    return client.submit(work, *arguments, pure=False).result()


def _rounds(client: Client, errand: str, missing: list[int]) -> Iterator[dict[str, Any]]:
    """Hand out shards until none is missing, and give each task's counts."""
    fruitless = 0
    while missing:
        yield from _round(client, errand, missing)
        before, missing = len(missing), _ask(client, _look, errand)["missing"]
        fruitless = 0 if len(missing) < before else fruitless + 1
        if fruitless == ROUNDS:
            raise MsqError(
                f"dask: {before} shards are not done after {ROUNDS} rounds without progress; "
                "expected workers that live, see their logs"
            )


def _round(client: Client, errand: str, shards: Sequence[int]) -> Iterator[dict[str, Any]]:
    from distributed import KilledWorker, as_completed

    workers = max(1, len(client.scheduler_info()["workers"]))
    tasks = [client.submit(_fill, errand, part, pure=False) for part in _parts(shards, workers)]
    try:
        for future in as_completed(tasks, loop=client.loop):
            try:
                yield future.result()
            except KilledWorker:
                continue  # the next round looks at what is left
    finally:
        client.cancel(tasks)


def _parts(shards: Sequence[int], workers: int) -> Iterator[list[int]]:
    """Large parts first and single shards last, so that workers come to an end together."""
    left = list(shards)
    while left:
        size = max(1, min(SHARDS_AT_ONCE, len(left) // (2 * workers)))
        yield left[:size]
        del left[:size]


def _look(errand: str) -> dict[str, Any]:
    """On a worker: prepare the store, and say what is missing."""
    with _one, _extraction(errand) as job, job.joined():
        missing = job.missing()
        clips = len(job.dataset.clips)
        rows = sum(min(job.shard, clips - shard * job.shard) for shard in missing)
        store = str(job.out.resolve())
        return {"store": store, "missing": missing, "clips": clips, "done": clips - rows}


def _fill(errand: str, shards: Sequence[int]) -> dict[str, Any]:
    """On a worker: make these shards, and say how many clips and how fast."""
    with _one, _extraction(errand) as job, job.joined() as member:
        made = job.fill(member, shards)
        worker = f"{platform.node()} {os.getpid()}"
        return {"worker": worker, "made": made, **job.told()}


def _result(errand: str) -> dict[str, Any]:
    """On a worker: what the store has come to."""
    request = read_request(json.loads(errand)["request"])
    with _one, _extraction(errand) as job, job.joined() as member:
        return request.noted(job.dataset, job.result(member)).to_dict()


@contextmanager
def _extraction(errand: str) -> Iterator[Extraction]:
    """This run's, with the dataset and the encoders as the first task has loaded them."""
    if errand not in _resident:
        _resident.clear()  # one run's encoders are enough for a device's memory
        told = json.loads(errand)
        request = read_request(told["request"])
        if multiprocessing.current_process().daemon and request.workers != 0:
            raise UsageError(
                "dask worker: its process may not start decode processes; expected "
                "DASK_DISTRIBUTED__WORKER__DAEMON=False where it is started, or --workers 0"
            )
        if told["devices"]:
            from distributed import get_worker

            number = int(get_worker().name)
            request = replace(request, device=told["devices"][number % len(told["devices"])])
        _resident[errand] = request.extraction(None, Team(None, 1, told["local"]))
    yield _resident[errand]
