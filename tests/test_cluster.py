"""Many workers on one store: who is who, work that is shared out, one result for all."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msq.errors import DatasetError, StoreError, UsageError
from msq.extract import cluster
from msq.extract.cluster import Place, parse_devices, place
from msq.extract.decode_pool import DecodeTask, decode_in_order
from msq.extract.pipeline import Team, extract
from msq.extract.request import ExtractRequest
from msq.extract.request_text import anchored, read_request, write_request
from msq.extract.shard_claims import Member, join_store
from msq.extract.shard_queue import Job, ShardQueue
from msq.extract.store_writer import StoreWriter
from msq.extract.views import CLEAN
from msq.head.device import in_words
from msq.report.stage_one import place as first_words

HERE = Path(__file__).parent
fakes = SimpleNamespace(**runpy.run_path(str(HERE / "fakes.py")))
encoders = SimpleNamespace(**runpy.run_path(str(HERE / "encoder_fixtures.py")))


class Slow(fakes.FakeEncoder):  # type: ignore[misc]
    """Waits for a signal before its second batch."""

    def __init__(self, go: threading.Event) -> None:
        super().__init__()
        self.go, self.began = go, threading.Event()

    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        if self.calls:
            self.began.set()
            assert self.go.wait(600)
        features: torch.Tensor = super().__call__(video)
        return features


def work(data: Any, out: Path, team: Team | None, video: Any = None, **options: Any) -> Any:
    video = video or fakes.FakeEncoder()
    return extract(data, out, video=video, image=None, workers=0, shard=2, team=team, **options)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every shard that is committed from now on."""
    commit, shards = StoreWriter.commit, []

    def logged(self: StoreWriter, shard: int, *arguments: Any, **options: Any) -> int:
        shards.append(shard)
        return commit(self, shard, *arguments, **options)

    monkeypatch.setattr(StoreWriter, "commit", logged)
    return shards


def test_three_workers_make_each_shard_once_and_the_bytes_of_one(
    tmp_path: Path, made: list[int]
) -> None:
    data = fakes.make_dataset(tmp_path / "v", 19, broken=(4,))
    work(data, tmp_path / "whole.zarr", None)
    made.clear()
    with ThreadPoolExecutor(3) as pool:
        teams = [Team(rank, 3, 3) for rank in range(3)]
        results = list(pool.map(lambda team: work(data, tmp_path / "s.zarr", team), teams))
    assert sorted(made) == list(range(10))
    assert fakes.tree(tmp_path / "s.zarr") == fakes.tree(tmp_path / "whole.zarr")
    assert {(r.clips, r.done, r.failed) for r in results} == {(19, 18, 1)}
    assert not (tmp_path / "s.zarr.claims").exists()


def test_others_make_what_a_slow_worker_has_not_begun(tmp_path: Path, made: list[int]) -> None:
    data = fakes.make_dataset(tmp_path / "v", 16)
    go = threading.Event()
    slow = Slow(go)
    out = tmp_path / "s.zarr"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(work, data, out, Team(0, 2), slow, batch=1)
        assert slow.began.wait(600)  # it is in the middle of its first shard
        half = out / "status" / ".0.4711.tmp"
        half.write_bytes(b"half")  # as of a file that it writes right now
        second = pool.submit(work, data, out, Team(1, 2), batch=1)
        end = time.monotonic() + 600
        while len(made) < 7 and time.monotonic() < end:
            time.sleep(0.01)
        assert sorted(made) == list(range(1, 8))
        assert half.exists()
        go.set()
        assert second.result().done == 16
        told = first.result()
    assert not half.exists()
    assert sorted(made) == list(range(8))
    assert [share["clips"] for share in told.shares] == [14]
    assert told.clips_per_second == pytest.approx(16 / told.seconds)


def test_a_team_decodes_failed_clips_again_once(tmp_path: Path, made: list[int]) -> None:
    data = fakes.make_dataset(tmp_path / "v", 12, broken=(1, 6, 7, 11))
    out = tmp_path / "s.zarr"
    work(data, out, None)
    for row in (1, 7):
        fakes.write_video(data.clips[row].path, row)
    made.clear()
    with ThreadPoolExecutor(3) as pool:
        teams = [Team(rank, 3, 3) for rank in range(3)]
        results = list(pool.map(lambda t: work(data, out, t, retry_failed=True), teams))
    assert sorted(made) == [0, 3]
    assert {r.failed for r in results} == {2}
    work(data, tmp_path / "new.zarr", None)
    assert fakes.tree(out) == fakes.tree(tmp_path / "new.zarr")


def test_workers_that_disagree_do_not_work_together(tmp_path: Path) -> None:
    data = fakes.make_dataset(tmp_path / "v", 6)
    go = threading.Event()
    slow = Slow(go)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(work, data, tmp_path / "s.zarr", None, slow, batch=1)
        assert slow.began.wait(600)
        try:
            with pytest.raises(StoreError, match=r"batch: expected 1, found 2"):
                work(data, tmp_path / "s.zarr", Team(), batch=2)
            with pytest.raises(StoreError, match=r"is writing this store .*--join"):
                work(data, tmp_path / "s.zarr", None, batch=1)
            with pytest.raises(UsageError, match="expected a folder that all workers share"):
                work(data, Path("memory://s.zarr"), Team())
        finally:
            go.set()
        assert first.result().done == 6


class Shards:
    """Six shards of two clips, what is left of them, and queues over them."""

    def __init__(self) -> None:
        self.left = set(range(6))

    def queue(self, member: Member | None, ahead: int = 1) -> ShardQueue:
        def plan(shard: int, parts: Any) -> Job:
            return Job(shard, [list(parts)], 2)

        def tasks(job: Job) -> list[DecodeTask]:
            rows = (2 * job.shard, 2 * job.shard + 1)
            return [DecodeTask(row, Path("x"), None, None, ()) for row in rows]

        def left(shard: int) -> list[Any]:
            return [("fake-video", CLEAN)] if shard in self.left else []

        return ShardQueue(range(6), left, plan, tasks, member, ahead)


def decoded(queue: ShardQueue) -> list[int]:
    """Rows that a worker would decode now."""
    return [task.row for task in queue]


def test_a_worker_alone_decodes_as_far_ahead_as_there_is_memory() -> None:
    shards = Shards()
    queue = shards.queue(None)
    assert decoded(queue) == list(range(12))
    assert [job.shard for job in iter(queue.next_job, None)] == list(range(6))


def test_what_is_reserved_and_not_begun_goes_to_who_has_nothing_else(tmp_path: Path) -> None:
    shards, store = Shards(), tmp_path / "s.zarr"
    with join_store(store, {}) as one, join_store(store, {}) as two:
        slow, fast = shards.queue(one), shards.queue(two)
        job = slow.next_job()
        assert job is not None
        assert slow.begin(job)
        assert decoded(slow) == [0, 1, 2, 3]  # one shard ahead, and no more
        made = []
        while (other := fast.next_job()) is not None:
            assert fast.begin(other)
            made.append(other.shard)
            shards.left.remove(other.shard)
            fast.finish(other, done=True)
        assert made == [2, 3, 4, 5, 1]
        assert fast.unfinished  # the slow one is in the middle of shard 0
        shards.left.remove(0)
        slow.finish(job, done=True)
        ahead = slow.next_job()
        assert ahead is not None
        assert (ahead.shard, slow.begin(ahead)) == (1, False)
        assert slow.next_job() is None
        assert fast.next_job() is None
        assert not slow.unfinished
        assert not fast.unfinished


def test_a_shard_that_was_finished_meanwhile_is_not_begun(tmp_path: Path) -> None:
    shards, store = Shards(), tmp_path / "s.zarr"
    with join_store(store, {}) as member:
        queue = shards.queue(member)
        job = queue.next_job()
        assert job is not None
        shards.left.remove(job.shard)
        assert not queue.begin(job)
        assert member.reserve(job.shard)  # it was given up


def test_a_lost_shard_is_open_again(tmp_path: Path) -> None:
    shards, store = Shards(), tmp_path / "s.zarr"
    with join_store(store, {}) as member:
        queue = shards.queue(member)
        job = queue.next_job()
        assert job is not None
        assert queue.begin(job)
        queue.finish(job, done=False)
        shards.left = {job.shard}
        again = queue.next_job()
        assert again is not None
        assert again.shard == job.shard


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_has_nothing_now_may_have_more_later(tmp_path: Path, workers: int) -> None:
    data = fakes.make_dataset(tmp_path / "v", 4)
    waiting: list[int] = [0, 1]

    class Source:
        def __iter__(self) -> Source:
            return self

        def __next__(self) -> DecodeTask:
            if not waiting:
                raise StopIteration
            row = waiting.pop(0)
            return DecodeTask(row, data.clips[row].path, None, None, ())

    stream = decode_in_order(Source(), workers)
    rows = [next(stream).row, next(stream).row]
    waiting += [2, 3]
    rows += [result.row for result in stream]
    assert rows == [0, 1, 2, 3]


def test_the_place_of_a_process_is_what_its_launcher_says() -> None:
    assert place({}) is None
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert place(torchrun) == Place(5, 8, 1, 4)
    assert place(torchrun | {"RANK": "0", "WORLD_SIZE": "1"}) is None
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "6", "SLURM_LOCALID": "1"}
    assert place(slurm | {"SLURM_STEP_TASKS_PER_NODE": "2(x3)"}) == Place(3, 6, 1, 2)
    assert place(slurm | {"SLURM_CPUS_PER_TASK": "8"}) == Place(3, 6, 1, 1)
    assert place(slurm | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    with pytest.raises(UsageError, match="WORLD_SIZE: expected a number, found 'two'"):
        place({"RANK": "0", "WORLD_SIZE": "two"})
    with pytest.raises(UsageError, match="expected a rank from 0 to 1, found 2"):
        place({"RANK": "2", "WORLD_SIZE": "2"})


def test_devices_are_named_counted_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_devices("auto") == ["cpu"]
    assert parse_devices("3") == parse_devices("cpu:3") == ["cpu"] * 3
    with pytest.raises(UsageError, match="found 0 CUDA devices"):
        parse_devices("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_devices("auto") == parse_devices("2") == ["cuda:0", "cuda:1"]
    assert parse_devices("cuda:1,cuda:0") == ["cuda:1", "cuda:0"]
    for wrong in ("3", "cuda:2", "0", "tpu", "cpu:0", ""):
        with pytest.raises(UsageError, match="--devices"):
            parse_devices(wrong)


def test_a_request_survives_the_way_to_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a {}\n")
    request = ExtractRequest(
        manifest=Path("clips.csv"),
        out=Path("s.zarr"),
        video_encoder="local-dir:weights",
        image_encoder="ViT-B-16/openai",
        prompts=("a {}", "prompts.txt", "clip"),
        mean=(0.5, 0.5, 0.5),
        test_views="2x3",
    )
    assert read_request(write_request(request)) == request
    there = anchored(request)
    assert there.manifest == tmp_path / "clips.csv"
    assert there.out == tmp_path / "s.zarr"
    assert there.video_encoder == f"local-dir:{tmp_path / 'weights'}"
    assert there.image_encoder == "ViT-B-16/openai"
    assert tuple(there.prompts) == ("a {}", str(tmp_path / "prompts.txt"), "clip")
    assert read_request(write_request(there)) == there


def test_a_class_file_below_the_root_is_the_same_for_workers_in_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--classes` is looked for in the working folder, then below the dataset's root."""
    root, elsewhere = tmp_path / "lists", tmp_path / "elsewhere"
    elsewhere.mkdir()
    root.mkdir()
    (root / "train.csv").write_text("a.mp4 1\n")
    (root / "order.txt").write_text("eat\nrun\n")
    (root / "m.csv").write_text("path,labels,split\na.mp4,run,train\n")
    monkeypatch.chdir(tmp_path)
    named = {"dataset": "kinetics", "root": Path("lists"), "classes": Path("order.txt")}
    listed = {**named, "dataset": "manifest", "root": Path("lists/m.csv")}
    for given in (named, listed):
        request = ExtractRequest(**given)
        expected = request.read_dataset()
        assert expected.classes == ("eat", "run")
        text = write_request(anchored(request))
        # A file of that name where a worker runs is not the one that was meant.
        (elsewhere / "order.txt").write_text("run\neat\n")
        monkeypatch.chdir(elsewhere)
        assert read_request(text).classes == root / "order.txt"
        assert read_request(text).read_dataset().clip_list_hash() == expected.clip_list_hash()
        assert read_request(text).read_dataset().classes == expected.classes
        monkeypatch.chdir(tmp_path)
    (tmp_path / "order.txt").write_text("run\neat\n")  # the working folder goes first
    assert anchored(ExtractRequest(**named)).classes == tmp_path / "order.txt"
    assert ExtractRequest(**named).read_dataset().classes == ("run", "eat")
    lost = ExtractRequest(**{**named, "classes": Path("none.txt")})
    with pytest.raises(DatasetError, match=r"lists/none\.txt: expected a text file"):
        lost.read_dataset()
    with pytest.raises(DatasetError, match=r"lists/none\.txt: expected a text file"):
        read_request(write_request(anchored(lost))).read_dataset()


def test_the_first_line_under_a_launcher_speaks_for_all_and_says_which_device_is_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = in_words("cpu", "fp32")
    assert first_words(ExtractRequest(manifest=Path("x.csv"), device="cpu")) == here
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    request = ExtractRequest(manifest=Path("x.csv"), device="cpu")
    assert first_words(request) == f"4 processes, each on cpu; rank 0: {here}"
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("msq.head.device.in_words", lambda device, _: chosen.append(device) or "X")
    words = first_words(ExtractRequest(manifest=Path("x.csv")))
    assert words == "4 processes, each on the device of its local rank; rank 0: X"
    assert chosen == ["cuda:1"]  # that of the first process, wherever its launcher put it


def test_options_that_do_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--device or --devices"):
        cluster.run(ExtractRequest(manifest=Path("x.csv"), device="cpu", devices="2"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--devices under a launcher"):
        cluster.run(ExtractRequest(manifest=Path("x.csv"), devices="2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 8 videos, one of them broken, and the weights of a small encoder."""
    found = tmp_path_factory.mktemp("cluster")
    model = encoders.random_timesformer(encoders.TINY_TIMESFORMER)
    encoders.write_timesformer_folder(found / "weights", model)
    data = fakes.make_dataset(found / "v", 8, broken=(5,))
    lines = [f'"{clip.path}",,train' for clip in data.clips]
    (found / "clips.csv").write_text("\n".join(["path,labels,split", *lines]) + "\n")
    (found / "classes.txt").write_text("run\n")
    return found


def start(folder: Path, out: Path, *flags: str, **variables: int) -> subprocess.Popen[str]:
    """`msq extract --json`, in shards of two clips."""
    command = "extract --json --manifest clips.csv --classes classes.txt --image-encoder none "
    command += "--video-encoder local-dir:weights --shard 2 --workers 0 --out"
    return subprocess.Popen(
        [sys.executable, "-m", "msq", *command.split(), str(out), *flags],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(HERE.parent),
            "OMP_NUM_THREADS": "1",
            **{name: str(value) for name, value in variables.items()},
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_workers_on_devices_and_under_a_launcher_print_one_result(
    folder: Path, tmp_path: Path
) -> None:
    here = start(folder, tmp_path / "here.zarr", "--devices", "cpu:2")
    names = [{"RANK": k, "WORLD_SIZE": 2, "LOCAL_RANK": k, "LOCAL_WORLD_SIZE": 2} for k in (0, 1)]
    ranks = [start(folder, tmp_path / "ranks.zarr", **variables) for variables in names]
    for process, store in ((here, "here.zarr"), (ranks[0], "ranks.zarr")):
        out, words = process.communicate(timeout=900)
        assert process.returncode == 3, words
        found = json.loads(out)
        assert (found["clips"], found["done"], found["failed"]) == (8, 7, 1)
        assert found["store"] == str(tmp_path / store)
    assert ranks[1].communicate(timeout=900)[0] == ""
    assert ranks[1].returncode == 0
    assert fakes.tree(tmp_path / "here.zarr") == fakes.tree(tmp_path / "ranks.zarr")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here.zarr", "ranks.zarr"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_workers_and_leaves_a_store_to_go_on_with(
    folder: Path, tmp_path: Path, number: int
) -> None:
    out, shown = tmp_path / "s.zarr", sorted((folder / "v").iterdir())
    lines = [f'{i},"{shown[i % len(shown)]}",,train' for i in range(600)]  # seconds of work
    (folder / "many.csv").write_text("\n".join(["id,path,labels,split", *lines]) + "\n")
    process = start(folder, out, "--devices", "cpu:2", "--manifest", "many.csv")
    while not Path(f"{out}.claims").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    printed, words = process.communicate(timeout=900)
    assert process.returncode == 130, words
    assert printed == ""
    assert "run again to go on" in words
    assert not Path(f"{out}.claims").exists()
    assert not list(out.rglob("*.tmp"))
