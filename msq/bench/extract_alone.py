"""Clips decoded, then encoded, without a pipeline: by one thread, or by a process on every core.

The second is the most that the cores give when all of them are busy: processes that share nothing
but the machine's caches, its memory and its clock.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch

from msq.bench.random_encoders import image_encoder, video_encoder
from msq.extract.datasets.dataset import Dataset
from msq.extract.decode_pool import DecodeTask, Picture, cores, decode, die_with_parent
from msq.extract.encoders.timesformer_config import TimeSformerConfig
from msq.extract.shard_builder import FrameEncoder, encode

BATCH = 4


def alone(data: Dataset, encoders: Sequence[FrameEncoder]) -> list[list[torch.Tensor]]:
    """Every clip decoded, then encoded, by one thread: per encoder the features of each clip."""
    pictures = tuple(dict.fromkeys(Picture.of(encoder.spec) for encoder in encoders))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found: list[list[torch.Tensor]] = [[] for _ in encoders]
        for first in range(0, len(data.clips), BATCH):
            rows = range(first, min(first + BATCH, len(data.clips)))
            window = [decode(DecodeTask(r, data.clips[r].path, None, None, pictures)) for r in rows]
            for features, encoder in zip(found, encoders, strict=True):
                which = pictures.index(Picture.of(encoder.spec))
                features += encode(encoder, [clip.frames[which] for clip in window])
        return found
    finally:
        torch.set_num_threads(before)


@contextmanager
def alone_on_every_core(data: Dataset, config: TimeSformerConfig) -> Iterator[Callable[[], None]]:
    """Work that takes all clips through `alone`, each process its share; they have started.

    Args:
        data: the clips.
        config: of the video encoder; the image encoder has the same shape.
    """
    count = cores()
    shares = [dataclasses.replace(data, clips=data.clips[first::count]) for first in range(count)]
    pool = ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(config,)
    )

    def work() -> None:
        for future in [pool.submit(_take, share) for share in shares]:
            future.result()

    try:
        for future in [pool.submit(_take, share) for share in shares]:
            future.result()  # starts a process for each
        yield work
    finally:
        pool.shutdown(cancel_futures=True)


_encoders: tuple[FrameEncoder, ...] = ()  # of a process of the pool


def _begin(config: TimeSformerConfig) -> None:
    global _encoders
    torch.set_num_threads(1)
    die_with_parent()
    _encoders = video_encoder(config), image_encoder(config)


def _take(data: Dataset) -> None:
    alone(data, _encoders)
