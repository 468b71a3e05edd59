"""From one video's features, as they were stored, to the tokens of one clip.

    stored array --orient--> [T, N, D] --rows_inside--> rows of the cut --pieces--> [S, N, D]

T counts features in time, N tokens of one moment (1 but for layouts with an N), D is the width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msq.errors import UsageError
from msq.extract.array_file import FeatureError
from msq.extract.datasets.dataset import Clip

AUTO = "auto"
LAYOUT_HELP = "letters of the axes: D width, T time, N tokens kept, V H W averaged"
_LETTERS = re.compile(r"(?!.*(.).*\1)[DTNVHW]*D[DTNVHW]*")  # each at most once, D among them


@dataclass(frozen=True)
class Rate:
    """When the features of a video are.

    Attributes:
        seconds: from one feature to the next.
        offset: the centre of the first one, in seconds.
    """

    seconds: float
    offset: float

    def centres(self, count: int) -> NDArray[np.float64]:
        """Centre of each of `count` features, seconds `[T]`: offset + i * seconds."""
        return self.offset + self.seconds * np.arange(count, dtype=np.float64)


def parse_layout(layout: str) -> str:
    """`auto`, or the axes' letters in capitals.

    Raises:
        UsageError: other letters, one twice, or no D.
    """
    if layout.lower() == AUTO:
        return AUTO
    if not _LETTERS.fullmatch(layout.upper()):
        raise UsageError(f"--layout {layout!r}: expected auto, or {LAYOUT_HELP}; such as TD or TVD")
    return layout.upper()


def orient(values: NDArray[np.generic], layout: str, place: str) -> NDArray[np.float32]:
    """One video's array as `[T, N, D]` float32; V, H and W are averaged.

    Args:
        values: as stored.
        layout: letters of the axes, or `auto`: `[D]`, `[T, D]`, and these with axes of extent 1
            as pooling leaves them: `[1, T, D]`, `[T, 1, D]`, `[T, D, 1, 1]`, `[T, 1, 1, D]`,
            `[T, D, 1, 1, 1]`.
        place: where the array lies, for messages.

    Raises:
        FeatureError: another number of axes, a shape with several readings under `auto`, or no
            numbers.
    """
    if values.dtype.kind not in "fiu":
        raise FeatureError(f"{place}: expected an array of numbers, found dtype {values.dtype}")
    letters = _guess(values.shape, place) if layout == AUTO else layout
    if len(letters) != values.ndim:
        raise FeatureError(
            f"{place}: expected {len(letters)} axes (--layout {letters}), found shape "
            f"{values.shape}"
        )
    averaged = tuple(axis for axis, letter in enumerate(letters) if letter in "VHW")
    exact = values.mean(axis=averaged, dtype=np.float64) if averaged else values
    left = [letter for letter in letters if letter not in "VHW"]
    order = [left.index(letter) for letter in "TND" if letter in left]
    ordered = exact.transpose(order)
    missing = tuple(axis for axis, letter in enumerate("TND") if letter not in left)
    with np.errstate(over="ignore"):  # what does not fit is found to be infinite, and said so
        return np.ascontiguousarray(np.expand_dims(ordered, missing), dtype=np.float32)


def _guess(shape: tuple[int, ...], place: str) -> str:
    flat = {1: "D", 2: "TD"}.get(len(shape))
    if flat is not None:
        return flat
    for letters in ("VTD", "TVD", "TDHW", "THWD", "TDVHW"):
        fits = len(letters) == len(shape) and all(
            n == 1 for n, letter in zip(shape, letters, strict=True) if letter in "VHW"
        )
        if fits:
            return letters
    raise FeatureError(
        f"{place}: shape {shape} can be read in several ways; say which with --layout: "
        f"{LAYOUT_HELP}. For example TVD for crops of each moment, VTD for views of the whole "
        "video, TND to keep N tokens of each moment, VDTHW for what a 3-D CNN puts out"
    )


def rows_inside(clip: Clip, count: int, rate: Rate) -> NDArray[np.intp]:
    """Which features of a whole video belong to a clip.

    Those whose centre is in [start, end) and, where the clip shows some intervals only, inside one
    of them. A cut so short that no centre falls into it gets the feature nearest to its middle,
    provided that the features reach so far; each reaches as far around its centre as the first
    one's centre is from 0, and at least half a step.

    Returns:
        Row numbers, ascending; empty where the features do not reach.
    """
    centres = rate.centres(count)
    last = centres[-1] + max(rate.offset, rate.seconds / 2) if count else 0.0
    start = 0.0 if clip.start is None else clip.start
    end = last if clip.end is None else clip.end
    inside = (centres >= start) & (centres < end)
    if clip.keep:
        inside &= np.any([(lo < centres) & (centres < hi) for lo, hi in clip.keep], axis=0)
    elif count and not inside.any() and start < last and end > 0:
        inside[np.argmin(np.abs(centres - (start + min(end, last)) / 2))] = True
    return np.flatnonzero(inside)


def piece_rows(count: int, pieces: int) -> list[slice]:
    """Which of `count` features make each of S pieces.

    Piece j of S is the mean of features floor(j T / S) to ceil((j + 1) T / S) - 1, as adaptive
    average pooling cuts them; with fewer features than pieces it is feature floor((j + 1/2) T / S)
    alone.
    """
    if count < pieces:
        nearest = [(2 * j + 1) * count // (2 * pieces) for j in range(pieces)]
        return [slice(row, row + 1) for row in nearest]
    return [slice(j * count // pieces, -(-(j + 1) * count // pieces)) for j in range(pieces)]


def cut_into(values: NDArray[np.float32], pieces: int | None) -> NDArray[np.float32]:
    """`[T, ...]` -> `[S, ...]`, each piece the mean of its rows; unchanged without `pieces`."""
    if pieces is None:
        return values
    parts = (values[rows] for rows in piece_rows(len(values), pieces))
    means = [part.mean(axis=0, dtype=np.float64) for part in parts]
    return np.stack(means).astype(np.float32)


def to_tokens(
    values: NDArray[np.float32], pieces: int | None, global_token: bool
) -> NDArray[np.float32]:
    """The tokens of one clip.

    Args:
        values: `[T, N, D]`, the rows of the clip.
        pieces: cut time into so many; None keeps each feature.
        global_token: whether token 0 is the mean of all features.

    Returns:
        `[S, D]`, S = pieces * N, and one more with a global token.
    """
    tokens = cut_into(values, pieces).reshape(-1, values.shape[-1])
    if not global_token:
        return tokens
    return np.concatenate([mean_of(values)[None], tokens])


def mean_of(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean `[D]` of all features `[T, N, D]` of a clip."""
    mean: NDArray[np.float64] = values.mean(axis=(0, 1), dtype=np.float64)
    return mean.astype(np.float32)
