"""Tokens that are made when they are asked for: clips are decoded, and encoded as they are now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from msq.head.sending import on_host

AT_ONCE = 8  # clips of one forward pass, as in stage one

# Lists of clip numbers -> for each of them uint8 [n, T, 3, h, w] on the encoder's device, in order.
ReadFrames = Callable[[Iterable[Sequence[int]]], Iterator[Tensor]]


class EncodedTokens:
    """Tokens [N, S, D'] of N clips by an encoder that is being trained.

    Args:
        frames: decodes clips, ahead of who asks.
        encode: uint8 [n, T, 3, h, w] -> tokens [n, S, D'], float32, without gradients.
        clips: numbers of the N clips, as `frames` knows them.
        row: (S, D').
        device: of the encoder.
    """

    def __init__(
        self,
        frames: ReadFrames,
        encode: Callable[[Tensor], Tensor],
        clips: Sequence[int],
        row: tuple[int, int],
        device: torch.device,
    ) -> None:
        self._frames, self._encode, self._clips = frames, encode, list(clips)
        self.shape = torch.Size((len(self._clips), *row))
        self.device, self.dtype = device, torch.float32

    def __len__(self) -> int:
        """N."""
        return len(self._clips)

    @property
    def nbytes(self) -> int:
        """Bytes that all tokens would take."""
        return self.shape.numel() * self.dtype.itemsize

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Tokens [n, S, D'] of some clips."""
        for _, tokens in self.batches([rows]):
            return tokens
        raise AssertionError("one list of rows gives one batch")

    def batches(self, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each of several lists of rows with its tokens; later clips are decoded meanwhile."""
        chunks = [list(torch.split(part, AT_ONCE)) for part in on_host(parts)]
        frames = self._frames(
            [self._clips[row] for row in chunk.tolist()] for part in chunks for chunk in part
        )
        for part, cut in zip(parts, chunks, strict=True):
            if not part.numel():
                yield part, torch.zeros(0, *self.shape[1:], device=self.device)
                continue
            yield part, torch.cat([self._encode(next(frames)) for _ in cut])

    def select(self, rows: Tensor) -> EncodedTokens:
        """The same for some clips, in the order given."""
        clips = [self._clips[row] for row in rows.tolist()]
        row = (self.shape[1], self.shape[2])
        return EncodedTokens(self._frames, self._encode, clips, row, self.device)
