"""Faults put into every kind of file of a store: results are right, or refused by name."""

from __future__ import annotations

import errno
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from msq.errors import MsqError, StoreError
from msq.extract import atomic
from msq.extract.location import locate
from msq.extract.store import open_store
from msq.extract.store_export import export_store
from msq.extract.store_repair import repair_store
from msq.extract.store_verify import verify_store
from msq.extract.store_writer import StoreWriter

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("life_stores.py"))))
tree = stores.fakes.tree


def kind_of(file: str) -> str:
    """A file's kind: its path with every number replaced, so that a new kind shows by itself."""
    return re.sub(r"(?<=/)\d+(?=/|$|\.json)", "N", file)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stores.fill(tmp_path_factory.mktemp("whole") / "a.zarr")


@pytest.fixture
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk is what takes the time where many stores are written."""
    monkeypatch.setattr(atomic.os, "fsync", lambda descriptor: None)


SMALL = {"views": stores.VIEWS[:1], "shard": 4}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kinds of files, and fewer of each."""
    return stores.fill(tmp_path_factory.mktemp("small") / "a.zarr", **SMALL)


def one_of_each_kind(store: Path) -> list[str]:
    kinds: dict[str, str] = {}
    for file in tree(store):
        kinds.setdefault(kind_of(file), file)
    return list(kinds.values())


def places(length: int) -> list[int]:
    """First, last, and some between; others for every length."""
    return sorted({0, length // 3, 2 * length // 3, length - 5})


def damaged(store: Path, file: str, change: Callable[[bytes], bytes | None]) -> bytes:
    before = (store / file).read_bytes()
    after = change(before)
    if after is None:
        (store / file).unlink()
    else:
        (store / file).write_bytes(after)
    return before


def test_a_store_has_the_kinds_of_files_that_are_known(whole: Path) -> None:
    # What fails here is new: see that the tests below hold for it, then add it.
    kinds = {kind_of(file) for file in tree(whole)}
    arrays = {f"{g}/{s}" for s in ("fake-video", "fake-patch") for g in ("tokens", "time")}
    arrays |= {"image/fake-image", "time/fake-image"}
    chunks = {f"{a}/c/N/N/N" + "/N" * a.startswith("tokens") for a in arrays}
    status = {f"status/{s}" for s in ("fake-video", "fake-image", "fake-patch")}
    small = {"clip", "split", "partition/split1"}
    matrices = {"label", "label_known", "text/fake-text/plain", "text/fake-text/photo"}
    groups = {"", "tokens", "image", "time", "status", "text", "text/fake-text", "partition"}
    metadata = {*arrays, *status, *small, *matrices, *groups, "failures"}
    assert kinds == {
        *(f"{name}/zarr.json".lstrip("/") for name in metadata),
        *chunks,
        *(f"{name}/c/N/N" for name in (*status, *matrices)),
        *(f"{name}/c/N" for name in small),
        "failures/N.json",
    }


def test_a_flipped_byte_is_harmless_or_refused_by_name_and_verify_finds_it(
    small: Path, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(small, tmp_path / "a.zarr"))
    right = stores.content(open_store(whole))
    tried = refused = 0
    for file in one_of_each_kind(whole):
        length = (whole / file).stat().st_size
        for place in places(length):

            def flip(content: bytes, at: int = place) -> bytes:
                changed = bytearray(content)
                changed[at] ^= 0x11 if changed[at] in b" \n" else 0x01
                return bytes(changed)

            before = damaged(whole, file, flip)
            try:
                found, said = verify_store(whole), outcome(whole)
                hits = [p for p in found.problems if file in str(p) or file.startswith(p.file)]
                # A note is enough where all can be read: a flip in the record of the layout.
                noted = said == right and any(file in note for note in found.notes)
                assert hits or noted, (file, place)
                assert said == right or names(said, file), (file, place, said)
                refused += isinstance(said, MsqError)
                tried += 1
            finally:
                (whole / file).write_bytes(before)
    assert verify_store(whole).ok
    # Only groups and the empty array of failures are never read.
    assert refused > 0.75 * tried


def outcome(store: Path) -> Any:
    """All that the store says, or the error that refused it."""
    try:
        return stores.content(open_store(store))
    except MsqError as error:
        return error


def names(said: Any, file: str) -> bool:
    """Whether an error names the file, or the array that it is of."""
    return isinstance(said, MsqError) and file.split("/c/")[0] in str(said)


@pytest.mark.parametrize("fault", ["cut", "gone"])
def test_files_cut_or_gone_are_refused_and_repair_brings_back_the_same_bytes(
    small: Path, tmp_path: Path, fault: str, no_flush: None
) -> None:
    right, content = tree(small), stores.content(open_store(small))
    changes: dict[str, Callable[[bytes], bytes | None]] = {
        "cut": lambda content: content[: len(content) // 2],
        "gone": lambda content: None,
    }
    store = Path(shutil.copytree(small, tmp_path / "a.zarr"))
    for file in one_of_each_kind(small):
        damaged(store, file, changes[fault])
        if (fault, file) != ("gone", "zarr.json"):  # then there is no store to look at
            assert not verify_store(store).ok, file
            said = outcome(store)
            # Without a record or a list of failures there are fewer rows, without the metadata of
            # its features an encoder less; nothing that is still there is wrong.
            fewer = file.startswith(("status/", "failures/")) or (
                fault == "gone" and isinstance(said, dict) and said.items() <= content.items()
            )
            assert said == content or names(said, file) or fewer, (file, said)
            repair_store(store)
        stores.fill(store, **SMALL)
        assert tree(store) == right, (file, fault)


def test_repair_of_flipped_bytes_ends_in_the_same_bytes(
    small: Path, tmp_path: Path, no_flush: None
) -> None:
    right = tree(small)
    store = Path(shutil.copytree(small, tmp_path / "a.zarr"))
    for file in one_of_each_kind(small):
        middle = (store / file).stat().st_size // 2
        damaged(store, file, lambda c, m=middle: c[:m] + bytes([c[m] ^ 1]) + c[m + 1 :])
        before = tree(store)
        planned = repair_store(store, dry_run=True)
        assert tree(store) == before  # a dry run touches nothing
        done = repair_store(store)
        assert (planned.actions, planned.redo) == (done.actions, done.redo)
        assert done.actions, file
        stores.fill(store, **SMALL)
        assert tree(store) == right, file


def test_chunks_of_which_nothing_says_what_made_them_are_never_taken(
    whole: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "a.zarr"))
    for group in ("tokens", "time", "status"):
        (store / group / "fake-video/zarr.json").unlink()
    (store / "text/fake-text/plain/zarr.json").unlink()
    other = replace(stores.VIDEO, sha256="1" * 64)
    with pytest.raises(StoreError, match=r"status/fake-video/c: commit records without"):
        stores.fill(store, specs=(other,))
    writer = StoreWriter(store, stores.dataset(), shard=3)
    assert not writer.has_text(stores.TEXT, "plain", "{}")
    values = np.ones((3, stores.TEXT.channels), dtype=np.float32)
    writer.add_text(stores.TEXT, "plain", "{}", {}, values)
    assert open_store(store).text("fake-text", "plain").eq(1).all()
    repair_store(store)
    writer.add_encoder(other)
    assert len(open_store(store).ok_rows(["fake-video"])) == 0


def failing_write(code: int, call: int) -> Callable[[int, Any], int]:
    """`os.write`, except that its n-th call and all after it fail."""
    count = 0
    real = os.write

    def write(descriptor: int, data: Any) -> int:
        nonlocal count
        count += 1
        if count >= call:
            raise OSError(code, os.strerror(code))
        return real(descriptor, data)

    return write


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_write_error_names_the_file_and_a_later_run_ends_in_the_same_bytes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, no_flush: None
) -> None:
    for call in (1, 25, 90):
        store = tmp_path / f"{call}.zarr"
        with monkeypatch.context() as patch:
            patch.setattr(atomic.os, "write", failing_write(code, call))
            with pytest.raises(OSError, match=re.escape(str(store))) as caught:
                stores.fill(store)
        assert caught.value.errno == code
        assert not list(store.rglob("*.tmp"))
        if (store / "zarr.json").exists() and (store / "clip/c/0").exists():
            read = open_store(store)
            for slug in read.encoders("image"):
                read.image(read.ok_rows([slug]), slug)  # rows that are there are whole
        stores.fill(store)
        assert tree(store) == tree(whole)


def test_an_error_at_flush_or_rename_leaves_nothing_behind(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    stores.fill(tmp_path / "a.zarr", specs=())
    before = tree(tmp_path / "a.zarr")
    for name, place in (("fsync", atomic.os), ("replace", Path)):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail)
            with pytest.raises(OSError, match="Input/output"):
                stores.fill(tmp_path / "a.zarr")
        assert tree(tmp_path / "a.zarr") == before
    stores.fill(tmp_path / "a.zarr")
    assert tree(tmp_path / "a.zarr") == tree(whole)


def test_short_writes_are_asked_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(atomic.os, "write", lambda fd, data: real(fd, bytes(data[:7])))
    stores.fill(tmp_path / "a.zarr")
    assert tree(tmp_path / "a.zarr") == tree(whole)


def test_a_file_size_limit_of_the_system_is_reported_with_the_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the kernel itself writes short, then fails with EFBIG."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    script = (
        "from pathlib import Path; from msq.extract.atomic import write_file; import sys\n"
        "write_file(Path(sys.argv[1]), [b'x' * 90]); write_file(Path(sys.argv[2]), [b'y' * 500])"
    )
    small, large = tmp_path / "small", tmp_path / "large"
    ended = subprocess.run(
        [sys.executable, "-c", script, small, large],
        capture_output=True, text=True, preexec_fn=limited, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert f"File too large: '{large}'" in ended.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("name", ["f.h5", "f.npz", "f.safetensors", "f", "f.zarr.zip"])
def test_an_export_that_does_not_fit_names_what_was_to_be_written(
    whole: Path, tmp_path: Path, name: str
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as refused:
            export_store(whole, tmp_path / name, encoder="fake-video")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(refused.value.filename).startswith(str(tmp_path / name))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    tried = shutil.which("mount") and subprocess.run(mount, capture_output=True, check=False)
    if not tried or tried.returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_is_really_full_and_then_is_not(small_disk: Path, whole: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 200_000)
    with pytest.raises(OSError, match=r"No space left.*a\.zarr"):
        stores.fill(small_disk / "a.zarr")
    ballast.unlink()
    stores.fill(small_disk / "a.zarr") if _fits(small_disk, whole) else None
    assert not list(small_disk.rglob("*.tmp"))


def _fits(disk: Path, whole: Path) -> bool:
    blocks = sum(-(-p.stat().st_size // 4096) for p in whole.rglob("*") if p.is_file())
    return blocks * 4096 < shutil.disk_usage(disk).free


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Path]:
    """A store in whose folders nothing may be written."""
    store = stores.fill(tmp_path / "a.zarr", specs=(stores.VIDEO,))
    folders = [store, *(p for p in store.rglob("*") if p.is_dir())]
    root = os.geteuid() == 0
    if not root:
        for folder in folders:
            folder.chmod(0o555)
    elif not _immutable(folders, "+i"):
        pytest.skip("root may write everywhere, and chattr does not work here")
    yield store
    if root:
        _immutable(folders, "-i")
    for folder in folders:
        folder.chmod(0o755)


def _immutable(folders: list[Path], flag: str) -> bool:
    if shutil.which("chattr") is None:
        return False
    return (
        subprocess.run(["chattr", flag, *folders], capture_output=True, check=False).returncode == 0
    )


def test_permission_denied_names_the_file_and_the_store_is_still_read(frozen: Path) -> None:
    before = stores.content(open_store(frozen))
    with pytest.raises(PermissionError, match=r"a\.zarr"):
        stores.fill(frozen)
    assert stores.content(open_store(frozen)) == before
    assert verify_store(frozen).ok


def test_the_command_line_says_what_happened(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "a.zarr"
    shutil.copytree(whole, store)
    damaged(store, "status/fake-video/c/1/0", lambda content: content[:-1])
    from msq.cli import main

    for arguments, code in (
        (["store", "verify", str(store)], 4),
        (["store", "repair", str(store), "--dry-run"], 0),
        (["store", "verify", str(store)], 4),
        (["store", "repair", str(store)], 0),
        (["store", "verify", str(store)], 4),  # files without a record, until they are made again
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == code
        assert (
            "status/fake-video/c/1/0" in capsys.readouterr().err
            or code == 0
            or (arguments[1] == "verify")
        )
    stores.fill(store)
    assert tree(store) == tree(whole)
    assert verify_store(locate(store)).ok
