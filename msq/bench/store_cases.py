"""Feeding stage two from a store, against the least that could be done.

- resident: a shuffled epoch of a Charades-sized token store (9,848 clips of 17 x 768 float16)
  through the feed of the training loop, as stored and as float32, which is what `msq train-head`
  takes, against a bare `index_select(out=)` of the same rows;
- first batch: from a store whose files the kernel has forgotten to the first batch that `msq
  train-head` takes, against reading the bytes of the same files without looking at them;
- streamed: shuffled batches of a patch-mode store (3,137 x 768 float16 a clip), every row verified
  and read ahead of the consumer, as stored and as float32, which is what the step of the head
  takes, against `preadv` by as many threads into one reused buffer without any check, all with the
  page cache of the store dropped first.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msq.bench.cases import Case, Gate, Prepared, Settings, Side, worst_of
from msq.config import FeatureConfig
from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.encoders.spec import EncoderSpec
from msq.extract.store import FeatureStore, open_store
from msq.extract.store_writer import ShardRows, StoreWriter
from msq.head.batches import Batches
from msq.head.features import Features, configured_features, load_features
from msq.head.feeding import Feed
from msq.head.stream import THREADS

BATCH = 16
WIDTH = 768
RESIDENT = FeatureConfig(feed="resident")


def cases(settings: Settings) -> Iterable[Case]:
    """The three of them."""
    yield Case(
        name="resident epoch",
        compares="a shuffled epoch through the feed, as stored and cast to float32, against a "
        "bare index_select(out=)",
        base="index_select",
        unit="MB/s",
        rounds=7,
        prepare=_resident,
    )
    yield Case(
        name="first batch",
        compares="opening a cold store up to the first batch, against reading its files",
        base="read",
        unit="ms",
        rounds=5,
        prepare=_first_batch,
    )
    yield Case(
        name="streamed epoch",
        compares="a shuffled epoch of a cold patch-mode store, verified and read ahead, as stored "
        "and as the float32 that a step takes, against preadv of as many threads without a check",
        base="preadv",
        unit="MB/s",
        rounds=7,
        prepare=_streamed,
    )


def write_store(path: Path, clips: int, tokens: int, pooling: str) -> None:
    """A store of random features as `extract` lays it out."""
    spec = EncoderSpec(
        slug="video", kind="video", architecture="random", weights="random", sha256="0" * 64,
        frames=16, size=224, mean=(0.5,) * 3, std=(0.5,) * 3, pooling=pooling, precision="fp32",
        sampling="uniform", resize="torch", output="", tokens=tokens, channels=WIDTH,
    )  # fmt: skip
    rows = tuple(Clip(f"c{r}", Path(f"{r}.mp4"), None, None, (0,), "train") for r in range(clips))
    writer = StoreWriter(path, Dataset("random", ("a", "b"), "multilabel", rows, "map"))
    writer.add_encoder(spec)
    rng = np.random.default_rng(0)
    for shard in range(writer.shards):
        count = len(writer.rows(shard))
        values = rng.standard_normal((count, tokens, WIDTH), dtype=np.float32).astype(np.float16)
        times, status = np.zeros((count, 16), np.float32), np.ones(count, np.uint8)
        writer.commit(shard, {"video": ShardRows(values, times, status)}, [])


def drop_cache(folder: Path) -> None:
    """The kernel forgets what it has read of the files below a folder."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _store(clips: int, tokens: int, pooling: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="msq-bench-") as folder:
        path = Path(folder) / "random.zarr"
        write_store(path, clips, tokens, pooling)
        yield path


def _feed(features: Features, dtype: torch.dtype) -> tuple[Feed, Batches]:
    batches = Batches(torch.arange(len(features.ids)), BATCH, 0, seed=0)
    return Feed(features, batches, 0, dtype), batches


def _equal(
    found: Tensor, store: FeatureStore, rows: Tensor, what: str, dtype: torch.dtype = torch.float16
) -> Gate:
    same = found.dtype == dtype and torch.equal(found, store.tokens(rows).to(dtype))
    return Gate(0.0 if same else 1.0, 0.0, f"{what}: every byte as it is in the store")


def _epochs(feed: Feed, batches: Batches) -> Callable[[], None]:
    """An epoch of the feed, another one each time."""
    count = iter(range(0, 2**31, batches.epoch_steps))

    def run() -> None:
        first = next(count)
        for step in range(first, first + batches.epoch_steps):
            feed.of(step)

    return run


@contextmanager
def _resident(settings: Settings) -> Iterator[Prepared]:
    with _store(*((100, 5) if settings.quick else (9848, 17)), "frame") as path:
        store = open_store(path)
        features = configured_features(store, RESIDENT)
        tokens = features.tokens
        assert isinstance(tokens, Tensor)
        feed, batches = _feed(features, tokens.dtype)
        out = torch.empty(BATCH, *tokens.shape[1:], dtype=tokens.dtype)
        turn = iter(range(0, 2**31, batches.epoch_steps))

        def bare() -> None:
            first = next(turn)
            for step in range(first, first + batches.epoch_steps):
                torch.index_select(tokens, 0, batches.of(step), out=out)

        yield Prepared(
            gate=lambda: _equal(feed.of(1).tokens, store, batches.of(1), "a batch of the feed"),
            sides=lambda: {
                "index_select": Side(bare),
                "feed": Side(_epochs(feed, batches)),
                "feed to float32": Side(_epochs(*_feed(features, torch.float32))),
            },
            megabytes=batches.epoch_steps * BATCH * tokens[0].nbytes / 1e6,
        )


@contextmanager
def _first_batch(settings: Settings) -> Iterator[Prepared]:
    with _store(*((100, 5) if settings.quick else (9848, 17)), "frame") as path:

        def first() -> tuple[Tensor, Tensor]:
            features = configured_features(open_store(path), RESIDENT)
            batch = _feed(features, torch.float32)[0].of(0)
            return batch.tokens, batch.rows

        def read() -> None:
            buffer = bytearray(1 << 20)
            for file in path.rglob("*"):
                if file.is_file():
                    with file.open("rb", buffering=0) as handle:
                        while handle.readinto(buffer):
                            pass

        def gate() -> Gate:
            found, rows = first()
            return _equal(found, open_store(path), rows, "the first batch", torch.float32)

        forget = functools.partial(drop_cache, path)
        yield Prepared(gate, lambda: {"read": Side(read, forget), "msq": Side(first, forget)})


@contextmanager
def _streamed(settings: Settings) -> Iterator[Prepared]:
    with _store(*((32, 33) if settings.quick else (200, 3137)), "patch") as path:
        store = open_store(path)
        kinds = {"feed": torch.float16, "feed to float32": torch.float32}
        found = {
            name: load_features(store, dtype=dtype, feed="stream") for name, dtype in kinds.items()
        }
        batches = _feed(found["feed"], torch.float16)[1]
        row = int(np.prod(found["feed"].tokens.shape[1:])) * 2
        turn = iter(range(0, 2**31, batches.epoch_steps))
        forget = functools.partial(drop_cache, path)

        def epoch() -> range:
            first = next(turn)
            return range(first, first + batches.epoch_steps)

        def bare() -> None:
            bare_preadv(store, [batches.of(step) for step in epoch()], row)

        def fed(name: str) -> None:
            steps = epoch()
            feed = Feed(found[name], batches, 0, kinds[name], end=steps.stop)
            for step in steps:
                feed.of(step)

        def gate() -> Gate:
            rows, what = batches.of(1), "a streamed batch, as stored and as float32"
            feeds = ((_feed(found[name], dtype)[0], dtype) for name, dtype in kinds.items())
            return worst_of(_equal(f.of(1).tokens, store, rows, what, dtype) for f, dtype in feeds)

        yield Prepared(
            gate=gate,
            sides=lambda: {
                "preadv": Side(bare, forget),
                **{name: Side(functools.partial(fed, name), forget) for name in kinds},
            },
            megabytes=batches.epoch_steps * BATCH * row / 1e6,
        )


def bare_preadv(store: FeatureStore, batches: list[Tensor], row_bytes: int) -> None:
    """Batches into one buffer with as many threads, nothing checked, nothing kept."""
    buffer = np.empty((BATCH, row_bytes), dtype=np.uint8)

    def read(row: int, slot: NDArray[np.uint8]) -> None:
        descriptor = os.open(store.path / f"tokens/video/c/{row}/0/0/0", os.O_RDONLY)
        os.preadv(descriptor, [slot.data], 0)
        os.close(descriptor)

    with ThreadPoolExecutor(THREADS) as pool:
        for rows in batches:
            for _ in pool.map(read, rows.tolist(), buffer):
                pass
