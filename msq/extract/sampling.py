"""Which frames of a clip are looked at: pure index arithmetic, no decoding."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from msq.errors import UsageError

Sampling = Literal["uniform", "official"]


def sample_indices(length: int, frames: int, policy: str = "uniform") -> npt.NDArray[np.int64]:
    """Indices of `frames` frames out of `length`, ascending; short clips repeat frames.

    `uniform` takes the middle of T equal pieces, `min(int((k + 0.5) * n / T), n - 1)`. `official`
    does what the authors' code does: piece borders and centres rounded down to whole frames, and
    for `n <= T` an evenly spaced `linspace`. The two differ by at most one frame for `n > T`.

    Args:
        length: frames in the clip (n), at least 1.
        frames: frames wanted (T), at least 1.
        policy: `uniform` or `official`.

    Returns:
        int64 array [T].

    Raises:
        UsageError: an unknown policy.
        ValueError: `length` or `frames` below 1.
    """
    if length < 1 or frames < 1:
        raise ValueError(f"expected at least one frame, found length={length}, frames={frames}")
    if policy == "uniform":
        # (k + 0.5) * n / T in whole numbers, so that no rounding of floats can move a frame.
        # Never above n - 1, since (k + 0.5) / T < 1.
        return np.arange(1, 2 * frames, 2, dtype=np.int64) * length // (2 * frames)
    if policy == "official":
        if length <= frames:
            return np.linspace(0, length - 1, frames).astype(np.int64)
        ticks: npt.NDArray[np.int64] = np.linspace(0, length, frames + 1).astype(np.int64)
        return ticks[:-1] + (ticks[1:] - ticks[:-1]) // 2
    raise UsageError(
        f"frame sampling: expected one of {', '.join(get_args(Sampling))}; found {policy!r}"
    )
