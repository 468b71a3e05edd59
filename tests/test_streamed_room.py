"""Streamed tokens take memory beside the batch of a step, and the estimate counts it."""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from msq.errors import UsageError
from msq.head import memory
from msq.head.features import Features
from msq.head.memory import StepShape, scoring_bytes, step_bytes
from msq.head.stream import StreamedTokens
from msq.head.train import train_head
from msq.head.training import Training

toys = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_train.py"))))
CONFIG = ("train.batch=4", "train.epochs=3")


def streamed(features: Features, dtype: torch.dtype) -> Features:
    flat = features.tokens.to(dtype).contiguous().view(torch.uint8).flatten(1).numpy()

    def read(rows: Sequence[int], out: Any) -> None:
        np.take(flat, np.asarray(rows), axis=0, out=out)

    shape = (features.tokens.shape[1], features.tokens.shape[2])
    tokens = StreamedTokens(read, torch.arange(len(flat)), shape, dtype)
    return dataclasses.replace(features, tokens=tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_estimate_counts_the_buffers_that_are_read_into(dtype: torch.dtype) -> None:
    features, config = toys.toy(), toys.small(*CONFIG)
    there = streamed(features, dtype)
    training = Training(there, config)
    for _ in range(2 * training.epoch_steps):
        training._step()
    stream: Any = training.feed._streamed
    assert stream is not None
    lent = [stream._lent, *(x.buffer for x in stream._under_way), *(x for x, _ in stream._free)]
    held = sum(buffer.nbytes for buffer in lent)
    batch = held // len(lent)
    shape = StepShape.of(there, config, training.choice)
    plain = StepShape.of(features, config, training.choice)
    assert batch == 4 * shape.batch * shape.tokens * shape.token_width
    # The batch of the step is counted of tokens in memory too.
    assert step_bytes(shape) - step_bytes(plain) == held - batch > 0
    assert scoring_bytes(shape) - scoring_bytes(plain) == held - batch


def test_tokens_that_a_gpu_has_no_room_for_are_counted_as_they_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, config = toys.toy(), toys.small(*CONFIG)
    choice = Training(features, config).choice
    size = features.tokens.nbytes
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2 * size)
    assert StepShape.of(features, config, choice, "cuda").waiting == 0
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2 * size - 1)
    assert StepShape.of(features, config, choice, "cuda").waiting == 2 * 4
    assert StepShape.of(features, config, choice, "cpu").waiting == 0
    half = dataclasses.replace(features, tokens=features.tokens.half())
    monkeypatch.setattr(memory, "available_bytes", lambda device: size - 1)
    assert StepShape.of(half, config, choice, "cuda").waiting == 3 * 2
    for dtype, expected in ((torch.float16, 3 * 2), (torch.float32, 2 * 4)):
        from_disk = streamed(features, dtype)
        assert StepShape.of(from_disk, config, choice, "cuda").waiting == expected


def test_a_run_that_fits_but_for_the_batches_that_come_ahead_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    features, config = toys.toy(), toys.small(*CONFIG)
    choice = Training(features, config).choice
    plain = StepShape.of(features, config, choice)
    free = step_bytes(plain) + 12 * plain.parameters
    monkeypatch.setattr(memory, "available_bytes", lambda device: free)
    memory.require_room(plain, "cpu")
    with pytest.raises(UsageError, match="a training step of 4 clips"):
        train_head(streamed(features, torch.float16), config, tmp_path / "run")
