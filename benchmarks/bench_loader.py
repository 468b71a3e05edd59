"""Feeding stage two: `python benchmarks/bench_loader.py [--rounds 7] [--clips 200]`.

Two comparisons, each against the least that could be done, interleaved in one process:

- resident: a shuffled epoch of a Charades-sized token store (9,848 clips of 17 x 768 float16), the
  way a run gathers its batches, against a bare `index_select(out=)` of the same rows; and the time
  from opening the store to the first batch.
- streamed: shuffled batches of a patch-mode store (3,137 x 768 float16 a clip), every row verified
  and read ahead of the consumer, against `preadv` into one reused buffer without any check, both
  with the page cache of the store dropped first.

Values are compared before anything is timed; where they differ, no number is printed.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.encoders.spec import EncoderSpec
from msq.extract.store import FeatureStore, open_store
from msq.extract.store_writer import ShardRows, StoreWriter
from msq.head.features import load_features
from msq.head.stream import stream_tokens

BATCH = 16


def write_store(path: Path, clips: int, tokens: int, pooling: str) -> None:
    """A store of random features as `extract` lays it out."""
    spec = EncoderSpec(
        slug="video", kind="video", architecture="random", weights="random", sha256="0" * 64,
        frames=16, size=224, mean=(0.5,) * 3, std=(0.5,) * 3, pooling=pooling, precision="fp32",
        sampling="uniform", resize="torch", output="", tokens=tokens, channels=768,
    )  # fmt: skip
    rows = tuple(Clip(f"c{r}", Path(f"{r}.mp4"), None, None, (0,), "train") for r in range(clips))
    writer = StoreWriter(path, Dataset("random", ("a", "b"), "multilabel", rows, "map"))
    writer.add_encoder(spec)
    rng = np.random.default_rng(0)
    for shard in range(writer.shards):
        count = len(writer.rows(shard))
        values = rng.standard_normal((count, tokens, 768), dtype=np.float32).astype(np.float16)
        times, status = np.zeros((count, 16), np.float32), np.ones(count, np.uint8)
        writer.commit(shard, {"video": ShardRows(values, times, status)}, [])


def drop_cache(folder: Path) -> None:
    """The kernel forgets what it has read of the files below a folder."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def shuffled(clips: int, seed: int) -> list[torch.Tensor]:
    order = torch.randperm(clips, generator=torch.Generator().manual_seed(seed))
    return list(torch.split(order, BATCH))


def resident(folder: Path, clips: int, rounds: int) -> None:
    path = folder / "token.zarr"
    write_store(path, clips, 17, "frame")
    drop_cache(path)
    began = time.perf_counter()
    features = load_features(open_store(path), dtype=None)
    first = features.tokens[shuffled(clips, 0)[0]]
    opening = time.perf_counter() - began
    tokens, out = features.tokens, torch.empty(BATCH, *features.tokens.shape[1:], dtype=first.dtype)
    if not torch.equal(open_store(path).tokens(shuffled(clips, 0)[0]), first):
        sys.exit("the resident tokens are not the stored ones, so there is no speed to report")
    times: dict[str, list[float]] = {"gather": [], "bare": []}
    for turn in range(rounds):
        batches = [b for b in shuffled(clips, turn) if len(b) == BATCH]
        for side in random.sample(["gather", "bare"], 2):
            began = time.perf_counter()
            for rows in batches:
                _ = (
                    tokens[rows]
                    if side == "gather"
                    else torch.index_select(tokens, 0, rows, out=out)
                )
            times[side].append(time.perf_counter() - began)
    size = tokens.nbytes / 1e6
    print(f"first batch {opening:.2f} s after opening a cold store of {size:.0f} MB")
    report("resident epoch", times["gather"], times["bare"], size)


def bare_preadv(store: FeatureStore, batches: list[torch.Tensor], row_bytes: int) -> None:
    """Batches into one buffer with two threads, nothing checked, nothing kept."""
    buffer = np.empty((BATCH, row_bytes), dtype=np.uint8)

    def read(row: int, slot: np.ndarray) -> None:
        descriptor = os.open(store.path / f"tokens/video/c/{row}/0/0/0", os.O_RDONLY)
        os.preadv(descriptor, [slot.data], 0)
        os.close(descriptor)

    with ThreadPoolExecutor(2) as pool:
        for rows in batches:
            for _ in pool.map(read, rows.tolist(), buffer):
                pass


def streamed(folder: Path, clips: int, rounds: int) -> None:
    path = folder / "patch.zarr"
    write_store(path, clips, 3137, "patch")
    store = open_store(path)
    everything = torch.arange(clips)
    tokens = stream_tokens(store, everything, "video", 0)
    if not torch.equal(tokens[everything[-3:]], store.tokens(everything[-3:])):
        sys.exit("the streamed tokens are not the stored ones, so there is no speed to report")
    times: dict[str, list[float]] = {"stream": [], "preadv": []}
    for turn in range(rounds):
        batches = shuffled(clips, turn)
        for side in random.sample(["stream", "preadv"], 2):
            drop_cache(path)
            began = time.perf_counter()
            if side == "preadv":
                bare_preadv(store, batches, tokens.nbytes // clips)
            else:
                tokens.prefetch(batches[0])
                for here, after in zip(batches, [*batches[1:], None], strict=True):
                    if after is not None:
                        tokens.prefetch(after)
                    _ = tokens[here]
            times[side].append(time.perf_counter() - began)
    report("streamed epoch, cold", times["stream"], times["preadv"], tokens.nbytes / 1e6)


def report(name: str, ours: list[float], floor: list[float], megabytes: float) -> None:
    """MB/s of both sides and the share of the floor's speed that ours reaches, with quartiles."""
    shares = [b / a for a, b in zip(ours, floor, strict=True)]
    cells = [name, *(quartiles([megabytes / t for t in side], 0) for side in (ours, floor))]
    print("| " + " | ".join([*cells, quartiles(shares, 2)]) + " |")


def quartiles(values: list[float], digits: int) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clips", type=int, default=200, help="Of the patch-mode store.")
    parser.add_argument("--resident-clips", type=int, default=9848)
    options = parser.parse_args()
    random.seed(0)
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}; "
        f"{torch.get_num_threads()} threads; batches of {BATCH}; {options.rounds} rounds; "
        "median (quartiles)\n\n| what | msq MB/s | floor MB/s | share of the floor |\n|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        resident(Path(folder), options.resident_clips, options.rounds)
        streamed(Path(folder), options.clips, options.rounds)


if __name__ == "__main__":
    main()
