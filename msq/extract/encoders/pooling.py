"""From all tokens of a video encoder to the tokens that are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from msq.errors import UsageError
from msq.extract.encoders.spec import Pooling

POOLINGS: tuple[Pooling, ...] = ("frame", "band", "patch")


@dataclass(frozen=True)
class TokenOrder:
    """What the tokens of a model's sequence stand for.

    Attributes:
        steps: places in time, t: T for models that keep every frame, T/2 for tubelets of two
            frames, whatever a 3-D network leaves of T.
        time_major: all places of one step stand together, `(t n)`, as in VideoMAE; otherwise all
            steps of one place, `(n t)`, as in TimeSformer.
        global_token: the sequence begins with a global token; otherwise the mean of all tokens
            takes its place after pooling.
    """

    steps: int
    time_major: bool = False
    global_token: bool = True


def pooled_tokens(
    pooling: Pooling, frames: int, patches: int, order: TokenOrder | None = None
) -> int:
    """S, the number of tokens after pooling.

    Args:
        pooling: `frame`, `band` or `patch`.
        frames: T.
        patches: N, places of one step.
        order: of the model's tokens; None for TimeSformer's.
    """
    steps = frames if order is None else order.steps
    return {"frame": 1 + steps, "band": frames, "patch": 1 + patches * steps}[pooling]


def pool(tokens: Tensor, frames: int, pooling: Pooling, order: TokenOrder | None = None) -> Tensor:
    """Pools all tokens of a model.

    Args:
        tokens: [B, 1 + N·t, D'] with a global token, [B, N·t, D'] without.
        frames: T.
        pooling: `frame`: the global token, then per step the mean of its N places (MSQNet, Eq. 3);
            S = 1 + t. `band`: adaptive average pooling of the model's own sequence to T bins, as
            the authors' code does with any encoder; with TimeSformer's order each bin is a
            horizontal band of the image averaged over all frames, with a time-major order a part
            of one step or of neighbouring ones; there is no global token; S = T. `patch`: all
            tokens in the model's own order; S = 1 + N·t.
        order: of the tokens; None is TimeSformer's, `[global, (n t)]` with t = T.

    Returns:
        [B, S, D'].

    Raises:
        UsageError: for an unknown pooling or a length that does not fit the order.
    """
    order = order or TokenOrder(frames)
    b, length, d = tokens.shape
    if (length - order.global_token) % order.steps:
        expected = f"{'1 + ' if order.global_token else ''}N·t for t = {order.steps}"
        raise UsageError(f"pooling: {length} tokens are not {expected}")
    if pooling == "band":
        return F.adaptive_avg_pool1d(tokens.transpose(1, 2), frames).transpose(1, 2)
    if pooling not in POOLINGS:
        raise UsageError(f"pooling is one of {', '.join(POOLINGS)}, not {pooling!r}")
    places = tokens[:, 1:] if order.global_token else tokens
    first = tokens[:, :1] if order.global_token else tokens.mean(dim=1, keepdim=True)
    if pooling == "frame":
        if order.time_major:
            places = places.reshape(b, order.steps, -1, d).mean(dim=2)
        else:
            places = places.reshape(b, -1, order.steps, d).mean(dim=1)
    elif order.global_token:
        return tokens
    return torch.cat([first, places], dim=1)
