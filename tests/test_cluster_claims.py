"""Claims on a store: one owner each, free when it dies, taken over once, on one machine or many."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from msq.errors import StoreError
from msq.extract import claim_files
from msq.extract.atomic import write_file
from msq.extract.claims import MEMBER, WRITER, Holder, claim_store, claims_folder
from msq.extract.shard_claims import Member, join_store

REPOSITORY = Path(__file__).parents[1]
HOLD = """
import pathlib, sys, time
from msq.extract.shard_claims import join_store
with join_store(pathlib.Path(sys.argv[1]), {"batch": 8}) as member:
    with member.preparing():
        pass
    assert member.reserve(3) and member.take(3)
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def worker(store: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that makes shard 3 of a store."""
    command = [sys.executable, "-c", HOLD, str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def many_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holder is on a machine of its own, and no lock reaches from one to the other."""
    numbers = iter(range(1000))
    monkeypatch.setattr(claim_files, "machine", lambda: f"machine{next(numbers)}")
    monkeypatch.setattr(claim_files, "lock", lambda descriptor, kind: None)


def age(holder: Holder, seconds: float) -> None:
    """Make a holder look as if it had not been touched for so long."""
    past = os.stat(holder._own.path).st_mtime - seconds
    os.utime(holder._own.path, (past, past))


def test_a_killed_worker_loses_its_shard_at_once(tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    with worker(store) as other, join_store(store, {"batch": 8}) as member:
        with member.preparing() as first:
            assert not first
        assert member.others() == 1
        assert not member.is_free(3)
        assert not member.reserve(3)
        assert not member.take(3)
        assert member.take(4)
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert member.is_free(3)
        assert member.take(3)
        assert member.keeps(3)
        assert member.others() == 0
        member.release(3)
        assert not member.keeps(3)
    assert list(tmp_path.iterdir()) == []


def test_a_reserved_shard_can_be_taken_by_another_but_not_once_it_is_begun(tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    with join_store(store, {}) as one, join_store(store, {}) as two:
        assert one.reserve(1)
        assert not two.reserve(1)
        assert two.take(1)
        assert not one.take(1)
        one.release(1)
        assert two.keeps(1)
        two.release(1)
        assert one.take(1)


def half_written(store: Path) -> Path:
    """What a worker leaves that was killed while it wrote a chunk."""
    path = store / "tokens" / "c" / ".0.17-00ff00ff.tmp"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    return path


def test_of_two_workers_that_leave_at_once_one_clears_up_behind_a_killed_one(
    tmp_path: Path,
) -> None:
    store = tmp_path / "a.zarr"
    left = half_written(store)
    with join_store(store, {}) as one, join_store(store, {}) as two:
        for member in (one, two):
            with member.preparing():
                pass
        one.leave()
        assert left.exists()  # the other is still at work, and it might be its file
        assert two.others() == 0
        two.leave()
        assert not left.exists()


def test_who_leaves_while_another_looks_whether_it_is_the_last_waits_and_looks_itself(
    tmp_path: Path,
) -> None:
    store = tmp_path / "a.zarr"
    left = half_written(store)
    with join_store(store, {}) as member, Holder(claims_folder(store), "join") as other:
        with member.preparing():
            pass
        assert other.claim(WRITER)
        leaving = threading.Thread(target=member.leave)
        leaving.start()
        leaving.join(0.1)
        assert leaving.is_alive()
        assert left.exists()
        other.release(WRITER)
        leaving.join()
        assert not left.exists()


def test_who_leaves_touches_nothing_while_the_whole_store_is_written(tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    left = half_written(store)
    with join_store(store, {}) as member:
        with member.preparing():
            pass
        member._holder.release(f"{MEMBER}-{member._holder.token}")
        with claim_store(store):
            member.leave()
            assert left.exists()


def test_whoever_would_be_alone_is_told_who_is_there_and_how_to_help(tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    with worker(store) as other:
        words = rf"process {other.pid} is writing this store \(on .*--join"
        with (
            join_store(store, {"batch": 8}, alone=True) as member,
            pytest.raises(StoreError, match=words),
            member.preparing(),
        ):
            pass
        with pytest.raises(StoreError, match=f"process {other.pid} is"), claim_store(store):
            pass
        with (
            join_store(store, {"batch": 4}) as member,
            pytest.raises(StoreError, match="another request:\n  batch: expected 8, found 4"),
            member.preparing(),
        ):
            pass


def test_no_worker_joins_while_the_whole_store_is_written(tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    with (
        claim_store(store),
        join_store(store, {}) as member,
        pytest.raises(StoreError, match="is writing this store"),
        member.preparing(),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("many_machines")
def test_a_claim_of_another_machine_is_dead_when_it_is_not_touched_any_more(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    with Holder(folder, "join") as one, Holder(folder, "join") as two, Holder(folder, "join"):
        assert one.claim("shard-1")
        age(one, claim_files.AGE - 5)
        assert not two.claim("shard-1")
        age(one, claim_files.AGE + 5)
        assert two.claim("shard-1")
        assert two.keeps("shard-1")
        os.utime(one._own.path)  # its machine wakes up
        assert not one.keeps("shard-1")
        assert two.keeps("shard-1")
        one.release("shard-1")
        assert two.keeps("shard-1")
        assert not one.claim("shard-1")
    assert not folder.exists()


@pytest.mark.usefixtures("many_machines")
def test_one_of_many_takes_a_dead_claim_over(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    dead, several = Holder(folder, "join"), [Holder(folder, "join") for _ in range(8)]
    with ThreadPoolExecutor(len(several)) as pool:
        for name in [f"shard-{k}" for k in range(40)]:
            age(dead, 0)
            assert dead.claim(name)
            age(dead, claim_files.AGE + 5)
            start = threading.Barrier(len(several))

            def attempt(holder: Holder, name: str = name, start: threading.Barrier = start) -> bool:
                start.wait()
                return holder.claim(name)

            assert sum(pool.map(attempt, several)) <= 1
            assert sum(holder.keeps(name) for holder in [*several, dead]) <= 1
            assert any(holder.keeps(name) or holder.claim(name) for holder in several)
    for holder in [dead, *several]:
        holder.leave()
    assert not folder.exists()


def test_a_file_system_without_hard_links_has_claims_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    folder = tmp_path / "claims"
    with Holder(folder, "join") as one, Holder(folder, "join") as two:
        assert one.claim("shard-1")
        assert not two.claim("shard-1")
        assert one.keeps("shard-1")
        one.release("shard-1")
        assert two.claim("shard-1")
    assert not folder.exists()


def test_a_deleted_folder_of_claims_is_an_error_that_says_so(tmp_path: Path) -> None:
    with Holder(tmp_path / "claims", "join") as holder:
        holder._own.path.unlink()
        with pytest.raises(StoreError, match="deleted while the process was at work"):
            holder.claim("shard-1")


def test_a_full_disk_is_reported_with_the_file_of_claims(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Holder(tmp_path / "claims", "join") as holder:
        member = Member(tmp_path / "a.zarr", holder, {}, alone=False)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            with pytest.raises(OSError, match="File too large") as share:
                member.share({"clips": 1})
            with pytest.raises(OSError, match="File too large") as process:
                Holder(tmp_path / "others", "join")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "claims/share-" in str(share.value.filename)
    assert "others/process-" in str(process.value.filename)
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file_leave_one_whole_content(tmp_path: Path) -> None:
    path, content = tmp_path / "c" / "0", os.urandom(1 << 18)
    pieces = [content[k : k + 4096] for k in range(0, len(content), 4096)]
    write_file(path, pieces)
    done = threading.Event()
    torn: list[int] = []

    def read() -> None:
        while not done.is_set():
            if path.read_bytes() != content:
                torn.append(path.stat().st_size)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: write_file(path, pieces), range(60)))
    finally:
        done.set()
        reader.join()
    assert torn == []
    assert [p.name for p in path.parent.iterdir()] == ["0"]
