"""From all tokens of a TimeSformer to the tokens that are stored."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from msq.errors import UsageError
from msq.extract.encoders.spec import Pooling

POOLINGS: tuple[Pooling, ...] = ("frame", "band", "patch")


def pooled_tokens(pooling: Pooling, frames: int, patches: int) -> int:
    """S, the number of tokens after pooling of T frames with N patches each."""
    return {"frame": 1 + frames, "band": frames, "patch": 1 + patches * frames}[pooling]


def pool(tokens: Tensor, frames: int, pooling: Pooling) -> Tensor:
    """Pools tokens in the order `[global, (n t)]`.

    Args:
        tokens: [B, 1 + N·T, D'].
        frames: T.
        pooling: `frame`: the global token, then per frame the mean of its patches (MSQNet, Eq. 3);
            S = 1 + T. `band`: adaptive average pooling of the whole sequence to T bins, as the
            authors' code does; with this token order each bin is a horizontal band of the image
            averaged over all frames, and there is no global token; S = T. `patch`: all tokens.

    Returns:
        [B, S, D'].

    Raises:
        UsageError: for an unknown pooling or a length that is not 1 + N·T.
    """
    b, length, d = tokens.shape
    if (length - 1) % frames:
        raise UsageError(f"pooling: {length} tokens are not 1 + N·T for T = {frames}")
    if pooling == "frame":
        per_frame = tokens[:, 1:].reshape(b, -1, frames, d).mean(dim=1)
        return torch.cat([tokens[:, :1], per_frame], dim=1)
    if pooling == "band":
        return F.adaptive_avg_pool1d(tokens.transpose(1, 2), frames).transpose(1, 2)
    if pooling == "patch":
        return tokens
    raise UsageError(f"pooling is one of {', '.join(POOLINGS)}, not {pooling!r}")
