"""What a training step is fed: its clips' features and labels, gathered into buffers it keeps.

The buffers are overwritten by the next step, so that no step allocates and every step of a size
sees the same addresses (a captured CUDA graph needs that).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from msq.head.batches import Batches
from msq.head.features import Features
from msq.head.stream import StreamedTokens


class Batch(NamedTuple):
    """One step's clips; valid until the next is asked for.

    Attributes:
        rows: [B] of the features.
        tokens: [B, S, D'] in the feed's dtype.
        image: [B, D''] likewise, or None.
        labels: [B, K] uint8.
        known: [B, K] uint8, 0 where a label is not known; None where all are.
    """

    rows: Tensor
    tokens: Tensor
    image: Tensor | None
    labels: Tensor
    known: Tensor | None


class Feed:
    """Batches of resident features by an index gather, of streamed ones by reading ahead.

    Args:
        features: on the device to train on.
        batches: which rows each step takes.
        seed: of the run, which draws the views that clips are shown in.
        dtype: of tokens and image features.
        end: the step after the last: it is not read ahead, nor what comes after it.
    """

    def __init__(
        self,
        features: Features,
        batches: Batches,
        seed: int,
        dtype: torch.dtype = torch.float32,
        end: int | None = None,
    ) -> None:
        self._features, self._batches, self._seed, self._dtype = features, batches, seed, dtype
        self._end = end
        self._streamed: StreamedTokens | None = None
        if isinstance(features.tokens, StreamedTokens):
            tokens = features.tokens
            self._streamed = tokens if tokens.dtype == dtype else tokens.to(dtype=dtype)
            self._planned = batches.to("cpu")  # row numbers to read by: nothing waits for a GPU
        self._buffers: dict[str, Tensor] = {}

    def of(self, step: int) -> Batch:
        """The clips of one step; those of the next begin to be read where they are on disk."""
        rows = self._batches.of(step)
        tokens, image = self._shown(rows, step)
        labels, known = self._features.labels, self._features.known
        return Batch(
            rows,
            tokens,
            image,
            self._gather("labels", labels, rows, labels.dtype),
            None if known is None else self._gather("known", known, rows, known.dtype),
        )

    def _shown(self, rows: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Tokens and image features that a step sees of its clips."""
        features, dtype = self._features, self._dtype
        if features.train_views is not None:
            tokens, image = features.train_views.of(rows, self._seed, step)
            return tokens.to(dtype), None if image is None else image.to(dtype)
        if isinstance(features.tokens, Tensor):
            tokens = self._gather("tokens", features.tokens, rows, dtype)
        else:
            assert self._streamed is not None
            ahead = step + self._streamed.ahead
            for later in range(step, ahead if self._end is None else min(ahead, self._end)):
                self._streamed.prefetch(self._planned.of(later))  # read while this step runs
            tokens = self._streamed.lend(self._planned.of(step))
        image = features.image
        return tokens, None if image is None else self._gather("image", image, rows, dtype)

    def _gather(self, name: str, values: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of a resident tensor in a buffer of this name."""
        out = self._buffer(name, values, len(rows), values.dtype)
        torch.index_select(values, 0, rows, out=out)
        if dtype == values.dtype:
            return out
        return self._buffer(f"{name} cast", values, len(rows), dtype).copy_(out)

    def _buffer(self, name: str, like: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        found = self._buffers.get(name)
        if found is None or len(found) < count:
            found = torch.empty((count, *like.shape[1:]), dtype=dtype, device=like.device)
            self._buffers[name] = found
        return found[:count]
