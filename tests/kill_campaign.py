"""Workers of one store killed at random moments; prints what came of it as JSON.

    python kill_campaign.py FOLDER KILLS DASK_KILLS SEED

Workers are forked from this process, which has imported everything: they are real processes that
run the real code, without the seconds of a start. Each store is filled by three workers, started as
`--devices` or as torchrun does it, and one after the other is killed; some are replaced, some
stores lose all of them at once. Then comes dask, whose own nannies replace what is killed.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from msq.extract import cluster, dask_cluster
from msq.extract.crew import Team
from msq.extract.request import ExtractRequest
from msq.extract.store_writer import StoreWriter

HERE = Path(__file__).parent
fakes = SimpleNamespace(**runpy.run_path(str(HERE / "fakes.py")))
encoders = SimpleNamespace(**runpy.run_path(str(HERE / "encoder_fixtures.py")))
CLIPS, WORKERS = 16, 3


def write_inputs(folder: Path) -> ExtractRequest:
    """A manifest of small videos, one of them broken, and the weights of a small encoder."""
    model = encoders.random_timesformer(encoders.TINY_TIMESFORMER)
    encoders.write_timesformer_folder(folder / "weights", model)
    data = fakes.make_dataset(folder / "v", CLIPS, broken=(5,))
    lines = [
        f'"{clip.path}","{";".join(data.classes[k] for k in clip.labels)}",{clip.split}'
        for clip in data.clips
    ]
    (folder / "clips.csv").write_text("\n".join(["path,labels,split", *lines]) + "\n")
    return ExtractRequest(
        manifest=folder / "clips.csv",
        video_encoder=f"local-dir:{folder / 'weights'}",
        image_encoder="none",
        device="cpu",
        shard=2,
        batch=2,
        workers=0,
    )


def log_commits(folder: Path) -> None:
    """From now on every commit that came to its end is a line of `STORE.log`."""
    commit = StoreWriter.commit

    def logged(self: StoreWriter, shard: int, *arguments: Any, **options: Any) -> int:
        written = commit(self, shard, *arguments, **options)
        with (folder / f"{self.path.name}.log").open("a") as file:
            file.write(f"{shard}\n")
        return written

    StoreWriter.commit = logged  # type: ignore[method-assign]


def start(request: ExtractRequest, mode: str, rank: int) -> int:
    """Fork one worker; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if mode == "torchrun":
            names = {"RANK": rank, "WORLD_SIZE": WORKERS, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in names.items()})
            cluster.run(request)
        else:
            request.work(None, Team(rank, WORKERS, WORKERS) if mode == "devices" else None)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, *, wait: bool = False) -> int | None:
    """A child's exit code, negative for a signal; None while it runs."""
    found, status = os.waitpid(child, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _at_work(out: Path, running: dict[int, int]) -> bool:
    """Whether one of them has still to leave the crew: it has a member's claim until then."""
    claims = out.with_name(f"{out.name}.claims")
    return any(True for child in running for _ in claims.glob(f"member-*-{child}-*"))


class Campaign:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.request = write_inputs(folder)
        self.request.extraction()  # all that is imported on the way is there for the children
        log_commits(folder)
        self.kills = {"devices": 0, "torchrun": 0, "dask": 0}
        self.stores = {"devices": 0, "torchrun": 0, "dask": 0}
        self.survived = 0
        self.places: set[int] = set()
        self.problems: list[str] = []
        self.expected: dict[str, str] = {}
        self.seconds = self._whole()

    def _whole(self) -> float:
        out = self.folder / "whole.zarr"
        began = time.perf_counter()
        code = ended(start(replace(self.request, out=out), "alone", 0), wait=True)
        seconds = time.perf_counter() - began
        assert code == 0, f"the uninterrupted run ended with {code}"
        self.expected = fakes.tree(out)
        return seconds

    def store(self, mode: str, kills: int) -> None:
        """Fill one store while workers of it are killed."""
        out = self.folder / f"{mode}-{self.stores[mode]}.zarr"
        request = replace(self.request, out=out)
        everyone = self.chance.random() < 0.3
        running = {start(request, mode, rank): rank for rank in range(WORKERS)}
        finished, followed = False, True
        while running:
            time.sleep(self.chance.uniform(0, 0.8 * self.seconds))
            finished |= self._reap(out, running)
            if not running or self.kills[mode] >= kills or finished:
                continue
            victims = list(running) if everyone else [self.chance.choice(list(running))]
            self.places.add(len(list(out.glob("status/*/c/*/0"))))
            for child in victims:
                os.kill(child, signal.SIGKILL)
                rank = running.pop(child)
                self.kills[mode] += ended(child, wait=True) == -signal.SIGKILL
                # Who leaves after it clears up behind it; one that had left before does not.
                followed = _at_work(out, running)
                if not everyone and self.chance.random() < 0.5:
                    running[start(request, mode, rank)] = rank
                    followed = True
            finished = self._reap(out, running) and bool(running)
        if finished and followed:  # those that lived have done it all
            self.survived += 1
        else:
            code = ended(start(request, "alone", 0), wait=True)
            self._expect(code == 0, f"{out.name}: the last run ended with {code}")
        self._check(out)
        self.stores[mode] += 1

    def _reap(self, out: Path, running: dict[int, int]) -> bool:
        """Take out the workers that came to their end; whether there were any."""
        codes = {child: ended(child) for child in running}
        for child, code in codes.items():
            if code is not None:
                self._expect(code == 0, f"{out.name}: a worker ended with {code}")
                del running[child]
        return any(code is not None for code in codes.values())

    def dask(self, kills: int) -> None:
        """Kill workers of local clusters, until so many are killed."""
        spy: dict[str, Any] = {}
        connect = dask_cluster._client

        @contextmanager
        def spied(request: ExtractRequest) -> Iterator[Any]:
            with connect(request) as client:
                spy["nannies"] = client.cluster.workers
                yield client
                spy.clear()

        dask_cluster._client = spied
        while self.kills["dask"] < kills and self.stores["dask"] < kills:
            out = self.folder / f"dask-{self.stores['dask']}.zarr"
            request = replace(
                self.request, out=out, scheduler="dask", devices="cpu:2", device="auto"
            )
            over = threading.Event()
            killer = threading.Thread(target=self._kill_nannies, args=(spy, kills, over))
            killer.start()
            try:
                result = cluster.run(request)
            finally:
                over.set()
                killer.join()
            self._expect(result.clips == CLIPS and result.failed == 1, f"{out.name}: {result}")
            self._check(out, logged=False)
            self.stores["dask"] += 1

    def _kill_nannies(self, spy: dict[str, Any], kills: int, over: threading.Event) -> None:
        while not over.wait(self.chance.uniform(0.05, 0.6)):
            found = [nanny.pid for nanny in dict(spy.get("nannies", {})).values()]
            if (found := [pid for pid in found if pid]) and self.kills["dask"] < kills:
                try:
                    os.kill(self.chance.choice(found), signal.SIGKILL)
                    self.kills["dask"] += 1
                except ProcessLookupError:
                    continue

    def _check(self, out: Path, *, logged: bool = True) -> None:
        found = fakes.tree(out)
        wrong = {k for k in {*found, *self.expected} if found.get(k) != self.expected.get(k)}
        self._expect(not wrong, f"{out.name}: other bytes in {sorted(wrong)[:5]}")
        claims = out.with_name(f"{out.name}.claims")
        left = sorted(p.name for p in claims.iterdir()) if claims.exists() else []
        self._expect(not claims.exists(), f"{out.name}: claims are left: {left}")
        if logged:
            shards = (self.folder / f"{out.name}.log").read_text().split()
            twice = {shard for shard in shards if shards.count(shard) > 1}
            self._expect(not twice, f"{out.name}: shards {twice} were made twice")
        shutil.rmtree(out)

    def _expect(self, true: bool, problem: str) -> None:
        if not true:
            self.problems.append(problem)


def main(folder: Path, kills: int, dask_kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    campaign = Campaign(folder, seed)
    for mode in ("devices", "torchrun"):
        while campaign.kills[mode] < (kills - dask_kills) // 2:
            campaign.store(mode, (kills - dask_kills) // 2)
    campaign.dask(dask_kills)
    told = ("kills", "stores", "survived", "problems")
    report = {name: getattr(campaign, name) for name in told}
    print(json.dumps({**report, "places": sorted(campaign.places), "whole": campaign.seconds}))


if __name__ == "__main__":
    import dask

    dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
    from distributed.utils import get_mp_context

    get_mp_context().set_forkserver_preload(["msq.extract.dask_cluster", "distributed", "torch"])
    main(Path(sys.argv[1]), *(int(text) for text in sys.argv[2:5]))
