"""Tokens batch by batch, wherever they lie: in memory, on disk, or still to be encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msq.head.encoded_tokens import EncodedTokens
from msq.head.memory import fits
from msq.head.sending import on_host
from msq.head.stream import StreamedTokens


def with_next(
    tokens: Tensor | StreamedTokens | EncodedTokens, parts: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each of several lists of rows with its tokens, which are valid until the next.

    Streamed ones are read ahead, beside what others have begun to read of them.
    """
    if isinstance(tokens, EncodedTokens):
        yield from tokens.batches(parts)
        return
    if not isinstance(tokens, StreamedTokens):
        for part in parts:
            yield part, tokens[part]
        return
    own = tokens.to()
    places = on_host(parts)
    try:
        for i, part in enumerate(parts):
            for later in places[i : i + own.ahead]:
                own.prefetch(later)
            yield part, own.lend(places[i])
    finally:
        own.close()


def placed(
    tokens: Tensor | StreamedTokens | EncodedTokens, device: str | torch.device
) -> Tensor | StreamedTokens | EncodedTokens:
    """Tokens on a device; on a GPU that has no room for them they come batch by batch."""
    device = torch.device(device)
    if isinstance(tokens, EncodedTokens):
        return tokens  # they are made where the encoder is
    if isinstance(tokens, StreamedTokens) or device.type != "cuda" or tokens.is_cuda:
        return tokens.to(device)
    if fits(tokens.nbytes, device):
        return tokens.to(device)
    flat = tokens.contiguous().view(torch.uint8).flatten(1).numpy()

    def read(rows: Sequence[int], out: NDArray[np.uint8]) -> None:
        np.take(flat, np.asarray(rows), axis=0, out=out)

    shape = (tokens.shape[1], tokens.shape[2])
    return StreamedTokens(read, torch.arange(len(tokens)), shape, tokens.dtype, device=device)
