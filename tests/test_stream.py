from __future__ import annotations

import os
import runpy
import threading
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from msq.errors import StoreError, UsageError
from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.store import open_store
from msq.extract.store_writer import ShardRows, StoreWriter
from msq.head import stream
from msq.head.batches import Batches
from msq.head.features import Features
from msq.head.feeding import Feed
from msq.head.stream import StreamedTokens, stream_tokens
from msq.head.token_batches import with_next

fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))
ROWS = 11
ALL = torch.arange(ROWS)


def write(path: Path, pooling: str, dtype: str = "float16") -> torch.Tensor:
    """A store of 11 rows, row 3 all zeros (which a shard leaves out); returns its tokens."""
    spec = replace(fakes.SPEC, pooling=pooling)
    clips = tuple(Clip(f"c{r}", Path(f"{r}.mp4"), None, None, (0,), "train") for r in range(ROWS))
    data = Dataset("toy", ("run",), "multilabel", clips, "map")
    values = torch.randn(ROWS, 5, 6, generator=torch.Generator().manual_seed(0))
    values[3] = 0
    stored = values.to(getattr(torch, dtype))
    disk = stored.view(torch.uint16) if dtype == "bfloat16" else stored
    writer = StoreWriter(path, data, store_dtype=dtype, shard=4)
    writer.add_encoder(spec)
    for shard in range(writer.shards):
        rows = writer.rows(shard)
        times = np.zeros((len(rows), spec.frames), dtype=np.float32)
        status = np.ones(len(rows), dtype=np.uint8)
        part = disk[rows.start : rows.stop].numpy()
        writer.commit(shard, {spec.slug: ShardRows(part, times, status)}, [])
    return stored


@pytest.mark.parametrize("pooling", ["patch", "frame"], ids=["a file a row", "sharded"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_streamed_rows_are_the_stored_ones_in_any_order(
    tmp_path: Path, pooling: str, dtype: str, threads: int
) -> None:
    stored = write(tmp_path / "a.zarr", pooling, dtype)
    tokens = stream_tokens(open_store(tmp_path / "a.zarr"), ALL, "fake-video", 0, threads)
    assert tokens.shape == (ROWS, 5, 6)
    assert tokens.nbytes == stored.nbytes
    order = torch.tensor([10, 0, 3, 3, 7, 1])
    assert torch.equal(tokens[order], stored[order])
    wide = tokens.to(dtype=torch.float32)
    wide.prefetch(order)
    assert torch.equal(wide[order], stored[order].float())
    some = tokens.select(torch.tensor([4, 2, 9]))
    assert torch.equal(some[torch.tensor([2, 0])], stored[[9, 4]])


def test_what_was_read_ahead_serves_and_a_changed_plan_does_no_harm(tmp_path: Path) -> None:
    stored = write(tmp_path / "a.zarr", "patch")
    reader = open_store(tmp_path / "a.zarr").token_reader("fake-video")
    asked: list[list[int]] = []

    def read(rows, out) -> None:
        asked.append(list(rows))
        reader.read(rows, out)

    tokens = StreamedTokens(read, ALL, (5, 6), torch.float16, ahead=2)
    plan = [torch.tensor([r, r + 1]) for r in range(0, 8, 2)]
    kept = []
    for step, rows in enumerate(plan):
        for later in plan[step + 1 : step + 2]:
            tokens.prefetch(later)
        if step == 0:
            assert torch.equal(tokens[plan[1]], stored[plan[1]])  # the one read ahead
        kept.append((rows, tokens[rows]))
    assert all(torch.equal(given, stored[rows]) for rows, given in kept)  # none overwritten
    assert asked.count([2, 3]) == 2  # once read ahead and used, once asked for again
    tokens.prefetch(plan[0])
    assert torch.equal(tokens[plan[3]], stored[plan[3]])
    assert torch.equal(tokens[plan[0]], stored[plan[0]])
    for _ in range(2):
        for rows in plan:
            tokens.prefetch(rows)
    assert [reading.rows for reading in tokens._under_way] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("pooling", ["patch", "frame"])
def test_a_damaged_or_missing_row_is_named(tmp_path: Path, pooling: str) -> None:
    write(tmp_path / "a.zarr", pooling)
    folder = tmp_path / "a.zarr/tokens/fake-video/c"
    file = folder / ("9/0/0/0" if pooling == "patch" else "2/0/0/0")
    content = bytearray(file.read_bytes())
    content[60 if pooling == "frame" else 0] ^= 1  # of row 8 in the shard, of row 9 alone
    file.write_bytes(content)
    tokens = stream_tokens(open_store(tmp_path / "a.zarr"), ALL, "fake-video", 0)
    row = 9 if pooling == "patch" else 8
    tokens.prefetch(torch.tensor([0, row]))
    with pytest.raises(StoreError, match=f"clip 'c{row}'.*checksum wrong"):
        tokens[torch.tensor([0, row])]
    assert tokens[torch.tensor([0])].shape == (1, 5, 6)
    os.truncate(file, 20)
    tokens = stream_tokens(open_store(tmp_path / "a.zarr"), ALL, "fake-video", 0)
    with pytest.raises(StoreError, match=f"clip 'c{row}'"):
        tokens[torch.tensor([row])]
    file.unlink()
    tokens = stream_tokens(open_store(tmp_path / "a.zarr"), ALL, "fake-video", 0)
    with pytest.raises(StoreError, match=f"clip 'c{row}'.*missing"):
        tokens[torch.tensor([row])]


def test_only_stores_that_msq_laid_out_are_streamed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="feature store on disk"):
        stream_tokens(object(), ALL, "fake-video", 0)
    write(tmp_path / "a.zarr", "patch")
    meta = tmp_path / "a.zarr/tokens/fake-video/zarr.json"
    meta.write_text(
        meta.read_text().replace('"chunk_shape": [\n        1,', '"chunk_shape": [\n        2,')
    )
    with pytest.raises(StoreError, match="cannot be streamed"):
        stream_tokens(open_store(tmp_path / "a.zarr"), ALL, "fake-video", 0)


def test_many_files_are_open_only_for_a_while(tmp_path: Path) -> None:
    write(tmp_path / "a.zarr", "patch")
    with open_store(tmp_path / "a.zarr").token_reader("fake-video", threads=2) as reader:
        out = np.empty((200, reader.row_bytes), dtype=np.uint8)
        reader.read([r % ROWS for r in range(200)], out)
        assert (out[:ROWS] == out[ROWS : 2 * ROWS]).all()
        assert len(reader._files) == ROWS
    assert not reader._files


def counting(values: torch.Tensor, asked: list[int]):
    """Reads rows of a tensor as if it were a store, noting them."""
    flat = values.view(torch.uint8).flatten(1).numpy()

    def read(rows, out) -> None:
        asked.extend(rows)
        np.take(flat, np.asarray(rows), axis=0, out=out)

    return read


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_lent_batches_use_the_same_memory_again_and_own_ones_do_not(dtype: torch.dtype) -> None:
    values = torch.randn(64, 5, 6).half()
    tokens = StreamedTokens(counting(values, []), torch.arange(64), (5, 6), torch.float16, dtype)
    plan, places = torch.arange(64).split(8), set()
    for i, rows in enumerate(plan):
        lent = tokens.lend(rows)
        for later in plan[i + 1 : i + 1 + tokens.ahead]:
            tokens.prefetch(later)
        for reading in tokens._under_way:
            wait(reading.parts)
        assert torch.equal(lent, values[rows].to(dtype))
        places.add(lent.data_ptr())
    assert len(places) <= tokens.ahead + 1
    kept = [tokens[rows] for rows in plan]
    assert all(torch.equal(x, values[rows].to(dtype)) for x, rows in zip(kept, plan, strict=True))


def test_widening_by_one_thread_is_what_torch_does() -> None:
    source = torch.randn(3, 23_457).half()
    target = torch.empty(3, 23_457)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        stream._widen(source, target)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(target, source.float())


def feeding(read, rows: int, batch: int, end: int | None) -> Feed:
    tokens = StreamedTokens(read, torch.arange(rows), (5, 6), torch.float16, torch.float32)
    features = Features(
        name="t", task="multilabel", classes=("a",), ids=tuple(map(str, range(rows))),
        splits=("train",) * rows, tokens=tokens, labels=torch.ones(rows, 1, dtype=torch.uint8),
    )  # fmt: skip
    return Feed(features, Batches(torch.arange(rows), batch, 0, seed=0), 0, end=end)


def test_the_next_batch_is_read_while_a_step_runs_and_none_after_the_last() -> None:
    values, asked = torch.randn(12, 5, 6).half(), list[int]()
    plan = Batches(torch.arange(12), 4, 0, seed=0)
    begun, go = threading.Event(), threading.Event()
    give = counting(values, asked)

    def read(rows, out) -> None:
        if rows[0] in plan.of(1).tolist():
            begun.set()
            assert go.wait(30)
        give(rows, out)

    feed = feeding(read, 12, 4, end=2)
    first = feed.of(0)  # although the next cannot be finished
    assert torch.equal(first.tokens, values[plan.of(0)].float())
    assert begun.wait(30)
    go.set()
    assert torch.equal(feed.of(1).tokens, values[plan.of(1)].float())
    assert feed._streamed is not None
    feed._streamed.close()
    assert sorted(asked) == sorted(torch.cat([plan.of(0), plan.of(1)]).tolist())


def test_rows_of_a_batch_are_read_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_PART", 1)  # each row for itself
    values, together = torch.randn(8, 5, 6).half(), threading.Barrier(2)
    give = counting(values, [])

    def read(rows, out) -> None:
        together.wait(30)  # breaks where no second thread comes
        give(rows, out)

    feed = feeding(read, 8, 4, end=1)
    batch = feed.of(0)
    assert torch.equal(batch.tokens, values[batch.rows].float())


def test_scoring_leaves_alone_what_training_has_begun_to_read() -> None:
    values, asked = torch.randn(12, 5, 6).half(), list[int]()
    tokens = StreamedTokens(counting(values, asked), torch.arange(12), (5, 6), torch.float16)
    tokens.prefetch(torch.tensor([0, 1]))
    parts = torch.arange(4, 12).split(2)
    for part, found in with_next(tokens, parts):
        assert torch.equal(found, values[part])
    assert torch.equal(tokens.lend(torch.tensor([0, 1])), values[:2])
    assert sorted(asked) == [0, 1, *range(4, 12)]


def labelled_store(path: Path) -> None:
    """40 clips of 4 classes with tokens that tell them apart, in shards of 8."""
    data_clips = tuple(
        Clip(f"c{r}", Path(f"{r}.mp4"), None, None, (r % 4,), "train" if r < 28 else "test")
        for r in range(40)
    )
    data = Dataset("toy", ("a", "b", "c", "d"), "multilabel", data_clips, "map")
    values = torch.randn(40, 5, 6, generator=torch.Generator().manual_seed(1))
    values[:, :, 0] += torch.arange(40)[:, None] % 4
    spec = replace(fakes.SPEC, pooling="patch")
    writer = StoreWriter(path, data, shard=8)
    writer.add_encoder(spec)
    for shard in range(writer.shards):
        rows = writer.rows(shard)
        times = np.zeros((len(rows), spec.frames), dtype=np.float32)
        part = values[rows.start : rows.stop].half().numpy()
        writer.commit(shard, {spec.slug: ShardRows(part, times, np.ones(len(rows), np.uint8))}, [])


def small_run(feed: str):
    from msq.config import from_dict

    head = {"queries": "vanilla", "width": 16, "heads": 2, "layers": 1}
    train = {"epochs": 2, "batch": 8, "val": 0.2}
    return from_dict({"head": head, "train": train, "features": {"feed": feed}})


def test_a_head_trained_from_disk_is_the_one_trained_from_memory(tmp_path: Path) -> None:
    from msq.head.features import configured_features
    from msq.head.train import train_head

    labelled_store(tmp_path / "a.zarr")
    store = open_store(tmp_path / "a.zarr")
    results = {}
    for feed in ("resident", "stream"):
        config = small_run(feed)
        features = configured_features(store, config.features)
        assert isinstance(features.tokens, StreamedTokens) == (feed == "stream")
        assert features.tokens.shape == (40, 5, 6)
        results[feed] = train_head(features, config, tmp_path / feed)
    for a, b in zip(*(r.model.state_dict().values() for r in results.values()), strict=True):
        assert torch.equal(a, b)
    assert results["stream"].result["metrics"] == results["resident"].result["metrics"]
    # A run that was stopped in the middle of an epoch goes on to the same bytes.
    features = configured_features(store, small_run("stream").features)
    for stop in (2, None):
        train_head(features, small_run("stream"), tmp_path / "halves", stop_after=stop)
    names = ("stream", "halves")
    whole, halves = ((tmp_path / n / "head.safetensors").read_bytes() for n in names)
    assert whole == halves


def test_what_does_not_fit_is_left_on_disk(tmp_path: Path, monkeypatch) -> None:
    from msq.head import memory
    from msq.head.features import load_features

    labelled_store(tmp_path / "a.zarr")
    store = open_store(tmp_path / "a.zarr")
    size = 40 * 5 * 6 * 4
    assert memory.available_bytes("cpu") > 2**20
    assert isinstance(load_features(store).tokens, torch.Tensor)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2 * size)
    assert isinstance(load_features(store).tokens, torch.Tensor)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2 * size - 1)
    left = load_features(store)
    assert isinstance(left.tokens, StreamedTokens)
    assert left.tokens.dtype == torch.float32
    assert torch.equal(left.tokens[torch.tensor([5, 1])], store.tokens([5, 1]).float())
    part = left.select(rows=torch.tensor([7, 8]), columns=[0, 2])
    assert torch.equal(part.tokens[torch.tensor([1])], store.tokens([8]).float())
    assert isinstance(load_features(store, feed="resident").tokens, torch.Tensor)


def test_baselines_and_leaks_read_streamed_tokens_in_parts(tmp_path: Path) -> None:
    from msq.head.baselines import averaged
    from msq.head.class_leaks import clip_labels
    from msq.head.features import load_features

    labelled_store(tmp_path / "a.zarr")
    store = open_store(tmp_path / "a.zarr")
    there, left = (load_features(store, feed=feed) for feed in ("resident", "stream"))
    assert torch.equal(averaged(there), averaged(left))
    single = [replace(x, task="singlelabel") for x in (there, left)]
    assert torch.equal(clip_labels(single[0]), clip_labels(single[1]))
