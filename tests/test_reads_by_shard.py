"""What reading a shard opens: its own files alone, and each of them once."""

from __future__ import annotations

import os
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest

from msq.errors import StoreError
from msq.extract import one_file, shard, store_array
from msq.extract.export_formats import Rows
from msq.extract.location import locate
from msq.extract.row_reader import RowReader
from msq.extract.shard import encode_shard, read_rows
from msq.extract.store import open_store
from msq.extract.store_convert import convert_store, merge_stores
from msq.extract.store_repair import repair_store
from msq.extract.store_verify import verify_store
from msq.extract.store_writer import StoreWriter
from msq.extract.views import CLEAN

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("life_stores.py"))))
SIZE, WIDTH = 16, 8


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The commit records that stores open from now on."""
    read, found = store_array.read_chunk, []

    def counted(path: Path, expected: int) -> Any:
        found.append(path)
        return read(path, expected)

    monkeypatch.setattr(store_array, "read_chunk", counted)
    return found


def of_shards(path: Path, count: int, first: int = 0) -> Path:
    """A store of so many shards of two clips."""
    data = stores.dataset(2 * count, first)
    stores.fill(path, data, specs=(stores.VIDEO,), views=(CLEAN,), shard=2)
    return path


@pytest.mark.parametrize("what", ["convert", "merge", "export"])
def test_a_copy_opens_each_commit_record_a_few_times(
    tmp_path: Path, opened: list[Path], what: str
) -> None:
    count, new = 8, tmp_path / "new.zarr"
    path = of_shards(tmp_path / "a.zarr", count)
    opened.clear()
    if what == "convert":
        convert_store(path, new)
    elif what == "merge":
        merge_stores([path, of_shards(tmp_path / "b.zarr", 1, 2 * count)], new)
    else:
        assert sum(len(rows) for rows, _ in Rows(open_store(path), "fake-video", 0).parts())
    assert len(opened) <= 4 * (count + 1)


def test_status_of_some_rows_is_that_of_all_at_these(tmp_path: Path, opened: list[Path]) -> None:
    path = of_shards(tmp_path / "a.zarr", 5)
    (path / "status/fake-video/c/3/0").unlink()
    store = open_store(path)
    everything = store.status("fake-video")
    assert everything.tolist() == [1, 1, 2, 1, 1, 3, 0, 0, 1, 1]
    opened.clear()
    for rows in ([9, 2, 6, 2, -1], [], slice(1, 6), [5]):
        assert store.status("fake-video", rows=rows).tolist() == everything[rows].tolist()
    assert [file.parent.name for file in opened] == ["1", "4", "0", "1", "2", "2"]
    with pytest.raises(StoreError, match="row 10 asked for"):
        store.status("fake-video", rows=[10])


def shards() -> tuple[np.ndarray, bytes, bytes]:
    """Values, the shard where row 2 is missing, and the one with it: all later rows have moved."""
    values = np.random.default_rng(0).normal(size=(SIZE, WIDTH)).astype(np.float32)
    before = encode_shard(values, SIZE, present=np.arange(SIZE) != 2)
    return values, b"".join(before), b"".join(encode_shard(values, SIZE))


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Path], None]:
    """Makes one file take another's name as soon as that has been opened, in whichever way."""
    pending: dict[str, Path] = {}

    def after(opening: Any) -> Any:
        def open_then_replace(path: Any, *arguments: Any, **options: Any) -> Any:
            found = opening(path, *arguments, **options)
            if isinstance(path, str | Path) and (new := pending.pop(str(path), None)) is not None:
                new.replace(path)
            return found

        return open_then_replace

    monkeypatch.setattr(Path, "open", after(Path.open))
    monkeypatch.setattr(os, "open", after(os.open))
    monkeypatch.setattr(np, "fromfile", after(np.fromfile))
    return lambda path, new: pending.update({str(path): new})


@pytest.mark.parametrize("slots", [[5], [3, 4, 5, 6, 9]], ids=["parts", "whole"])
def test_rows_of_a_replaced_shard_are_not_read_by_the_old_index(
    tmp_path: Path, replaced: Any, slots: list[int]
) -> None:
    values, before, after = shards()
    path, new = tmp_path / "0", tmp_path / "new"
    path.write_bytes(before)
    new.write_bytes(after)
    replaced(path, new)
    out = np.empty((len(slots), 4 * WIDTH), dtype=np.uint8)
    read_rows(path, slots, SIZE, out, np.zeros(4 * WIDTH, np.uint8), str)
    assert not new.exists()
    assert np.array_equal(out.view(np.float32), values[slots])


def test_a_remote_shard_that_is_replaced_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    values, before, after = shards()
    files = fsspec.filesystem("memory")
    path = locate("memory://replaced/0")
    read, parts = one_file.read_part, []

    def counted(path: Any, start: int | None, stop: int | None) -> Any:
        parts.append(start)
        found = read(path, start, stop)
        if len(parts) == 1:
            files.pipe_file("/replaced/0", after)
        return found

    monkeypatch.setattr(one_file, "read_part", counted)
    for slots in ([5], [2], [3, 4, 5, 6, 9]):
        parts.clear()
        files.pipe_file("/replaced/0", before)
        out = np.empty((len(slots), 4 * WIDTH), dtype=np.uint8)
        read_rows(path, slots, SIZE, out, np.zeros(4 * WIDTH, np.uint8), str)
        assert np.array_equal(out.view(np.float32), values[slots])
    files.rm("/replaced", recursive=True)


def test_a_remote_shard_that_is_replaced_before_its_index_is_read_is_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its size was that of the other object: the index is looked for at the wrong place."""
    values, before, after = shards()
    files = fsspec.filesystem("memory")
    path = locate("memory://replaced/1")
    read, parts = one_file.read_part, []

    def late(path: Any, start: int | None, stop: int | None) -> Any:
        parts.append(start)
        if len(parts) == 1:
            files.pipe_file("/replaced/1", after)
        return read(path, start, stop)

    monkeypatch.setattr(one_file, "read_part", late)
    files.pipe_file("/replaced/1", before)
    out = np.empty((1, 4 * WIDTH), dtype=np.uint8)
    read_rows(path, [5], SIZE, out, np.zeros(4 * WIDTH, np.uint8), str)
    assert np.array_equal(out.view(np.float32), values[[5]])
    files.pipe_file("/replaced/1", after[:-1])  # and one that is broken is an error
    with pytest.raises(StoreError, match="index"):
        read_rows(path, [5], SIZE, out, np.zeros(4 * WIDTH, np.uint8), str)
    files.rm("/replaced", recursive=True)


def test_a_reader_of_rows_takes_index_and_rows_from_one_file(tmp_path: Path, replaced: Any) -> None:
    data = stores.dataset(4)
    old, new = (tmp_path / name for name in ("old.zarr", "new.zarr"))
    for path, there in ((old, [1, 2, 1, 1]), (new, [1, 1, 1, 1])):
        writer = StoreWriter(path, data, shard=4)
        writer.add_encoder(stores.VIDEO)
        rows = stores.rows_of(stores.VIDEO, [0, 1, 2, 3], "float16")
        rows.status[:] = there
        failures = [stores.Failure(1, "ü/1 x", 2, "broken", "", "fake-video")] * (2 in there)
        writer.commit(0, {"fake-video": rows}, failures)
    expected = open_store(new).tokens([3])
    store = open_store(old)
    with store.token_reader(threads=0) as reader:
        assert isinstance(reader, RowReader)
        out = np.empty((1, reader.row_bytes), dtype=np.uint8)
        file = "tokens/fake-video/c/0/0/0/0"
        replaced(old / file, new / file)
        reader.read([3], out)
    assert not (new / file).exists()
    assert out.tobytes() == expected.numpy().tobytes()


@pytest.mark.parametrize("name", ["c/0", "c/0/0/0", "c/0/0/0/0/deep"])
def test_a_file_where_a_folder_belongs_is_a_missing_shard(tmp_path: Path, name: str) -> None:
    path, place = tmp_path / "c/0/0/0/0", tmp_path / name
    place.parent.mkdir(parents=True)
    place.write_bytes(b"")
    out = np.empty((1, 4 * WIDTH), dtype=np.uint8)
    for slots, size in (([0], 1), ([0], SIZE)):
        with pytest.raises(StoreError, match=r"clip '0': .*missing although"):
            read_rows(path, slots, size, out, out[0], str)
    with pytest.raises(StoreError, match="missing although"):
        shard.read_index(path, SIZE, WIDTH)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return stores.fill(tmp_path / "a.zarr", specs=(stores.VIDEO, stores.PATCH), views=(CLEAN,))


STRAYS = (
    *("tokens/fake-video/c/0/Thumbs.db", "tokens/fake-video/c/Thumbs.db"),
    *("tokens/fake-video/c/0/0/0/0.bak", "tokens/fake-video/c/00/0/0/0"),
    *("tokens/fake-patch/c/9/0/0/0", "time/fake-video/c/0/²/0", "status/fake-video/c/7/0"),
    *("status/fake-video/c/0/Thumbs.db", "status/fake-patch/c/0/1"),
)


@pytest.mark.parametrize("file", STRAYS)
def test_a_stray_file_among_the_chunks_is_named(whole: Path, file: str) -> None:
    assert verify_store(whole).ok
    (whole / file).parent.mkdir(parents=True, exist_ok=True)
    (whole / file).write_bytes(b"x")
    (problem,) = verify_store(whole).problems
    assert (problem.kind, problem.file) == ("stray", file)
    assert verify_store(whole).checked == 2 * 6


def test_repair_removes_chunks_of_no_clip_and_leaves_what_others_put_there(whole: Path) -> None:
    foreign, chunk = (
        whole / "tokens/fake-video/c/0/Thumbs.db",
        whole / "tokens/fake-patch/c/9/0/0/0",
    )
    chunk.parent.mkdir(parents=True)
    foreign.write_bytes(b"x")
    chunk.write_bytes(b"x")
    done = repair_store(whole)
    assert foreign.exists()
    assert not chunk.exists()
    assert [str(foreign) in line for line in done.left] == [True]
    assert done.redo == []


def test_a_file_instead_of_a_shards_folder_makes_the_shard_again(whole: Path) -> None:
    place = whole / "tokens/fake-video/c/0"
    shutil.rmtree(place)
    place.write_bytes(b"x")
    found = {(problem.kind, problem.shard) for problem in verify_store(whole).problems}
    assert found == {("data", 0), ("stray", -1)}
    done = repair_store(whole)
    assert [(redo["encoder"], redo["shard"]) for redo in done.redo] == [("fake-video", 0)]
    stores.fill(whole, specs=(stores.VIDEO, stores.PATCH), views=(CLEAN,))
    assert verify_store(whole).ok
