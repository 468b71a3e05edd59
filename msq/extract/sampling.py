"""Which frames of a clip are looked at: pure index arithmetic, no decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from msq.errors import UsageError

Sampling = Literal["uniform", "official"]


class FrameChoice(NamedTuple):
    """Which frames of a clip: `sample_indices` of one of `pieces` equal pieces of it.

    Attributes:
        frames: T.
        sampling: `uniform` or `official`.
        piece: from 0.
        pieces: of the clip's frames, in time; 1 is the whole clip.
        jitter: empty for segment centres, else T numbers in [0, 1): where in its segment each
            frame is taken.
    """

    frames: int
    sampling: str
    piece: int = 0
    pieces: int = 1
    jitter: tuple[float, ...] = ()

    def indices(self, length: int) -> npt.NDArray[np.int64]:
        """Int64 [T], ascending, of a clip of `length` frames.

        Piece i of N is made of the frames i n / N to (i + 1) n / N, rounded down, and of one frame
        at least.

        Raises:
            UsageError: an unknown sampling.
            ValueError: no frames, or numbers that cannot be.
        """
        if not 0 <= self.piece < self.pieces:
            raise ValueError(f"expected a piece below {self.pieces}, found {self.piece}")
        first = self.piece * length // self.pieces
        last = max((self.piece + 1) * length // self.pieces, first + 1)
        return first + sample_indices(last - first, self.frames, self.sampling, self.jitter)


def sample_indices(
    length: int, frames: int, policy: str = "uniform", jitter: Sequence[float] = ()
) -> npt.NDArray[np.int64]:
    """Indices of `frames` frames out of `length`, ascending; short clips repeat frames.

    `uniform` takes the middle of T equal pieces, `min(int((k + 0.5) * n / T), n - 1)`. `official`
    does what the authors' code does: piece borders and centres rounded down to whole frames, and
    for `n <= T` an evenly spaced `linspace`. The two differ by at most one frame for `n > T`.

    Args:
        length: frames in the clip (n), at least 1.
        frames: frames wanted (T), at least 1.
        policy: `uniform` or `official`.
        jitter: T numbers u in [0, 1) in the place of the middles: `int((k + u) * n / T)`, or
            `official` border + `int(u * width)`, where `n <= T` leaves nothing to choose.

    Returns:
        int64 array [T].

    Raises:
        UsageError: an unknown policy.
        ValueError: `length` or `frames` below 1, or another number of jitters than T.
    """
    if length < 1 or frames < 1:
        raise ValueError(f"expected at least one frame, found length={length}, frames={frames}")
    if len(jitter) not in (0, frames):
        raise ValueError(f"expected {frames} places in time, found {len(jitter)}")
    if policy not in get_args(Sampling):
        raise UsageError(
            f"frame sampling: expected one of {', '.join(get_args(Sampling))}; found {policy!r}"
        )
    places = np.asarray(jitter, dtype=np.float64)
    if policy == "uniform":
        if len(jitter):
            drawn = ((np.arange(frames) + places) * length / frames).astype(np.int64)
            return np.minimum(drawn, length - 1)
        # (k + 0.5) * n / T in whole numbers, so that no rounding of floats can move a frame.
        # Never above n - 1, since (k + 0.5) / T < 1.
        return np.arange(1, 2 * frames, 2, dtype=np.int64) * length // (2 * frames)
    if length <= frames:
        return np.linspace(0, length - 1, frames).astype(np.int64)
    ticks: npt.NDArray[np.int64] = np.linspace(0, length, frames + 1).astype(np.int64)
    widths = ticks[1:] - ticks[:-1]
    return ticks[:-1] + ((places * widths).astype(np.int64) if len(jitter) else widths // 2)
