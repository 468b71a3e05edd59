"""When frames are shown, in seconds on the player's clock, and the cut that a clip makes there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.stream import VideoStream

from msq.errors import UsageError
from msq.extract.packets import UndecodableVideo, guesses_times, time_origin

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Cut:
    """The part `start <= time < end` of a video; None is open.

    Attributes:
        start: seconds.
        end: seconds.
        keep: open intervals in seconds; of the part, only frames inside one of them are left.
            Empty leaves all.
    """

    start: float | None
    end: float | None
    keep: tuple[tuple[float, float], ...] = ()

    @property
    def whole(self) -> bool:
        """True where nothing is cut away."""
        return self.start is None and self.end is None and not self.keep

    def inside(self, times: Seconds, path: Path) -> npt.NDArray[np.int64]:
        """Indices of the frames in the cut, at least one, ascending.

        Args:
            times: float64 [n] of all frames, NaN where unknown.
            path: the video, for messages.

        Raises:
            UndecodableVideo: no frame lies in the cut, or times are needed and unknown.
        """
        return Moments(times, path).inside(self)

    def __str__(self) -> str:
        start = "the beginning" if self.start is None else f"{self.start:g} s"
        only = f", of which {len(self.keep)} intervals are kept" if self.keep else ""
        return f"{start} to {'the end' if self.end is None else f'{self.end:g} s'}{only}"


class Moments:
    """When the frames of a video are shown, so that each of many cuts is found by bisection.

    Args:
        times: float64 [n] of all frames, NaN where unknown.
        path: the video, for messages.
    """

    def __init__(self, times: Seconds, path: Path) -> None:
        self._path, self._times = path, times
        self._unknown = bool(np.isnan(times).any())
        ordered = self._unknown or bool((times[1:] >= times[:-1]).all())
        # A decoder shows frames in their order; in a damaged file times may go back all the same.
        self._order = None if ordered else np.argsort(times, kind="stable")
        self._sorted = times if self._order is None else times[self._order]

    def inside(self, cut: Cut) -> npt.NDArray[np.int64]:
        """Indices of the frames in a cut, at least one, ascending.

        Raises:
            UndecodableVideo: no frame lies in the cut, or times are needed and unknown.
        """
        if cut.whole:
            return np.arange(len(self._times))
        if self._unknown:
            raise UndecodableVideo(
                self._path,
                f"expected frames with times, to cut {cut}; found a video without time stamps "
                "(remux it into a container, or give frame folders their frame rate)",
            )
        low = -math.inf if cut.start is None else cut.start
        high = math.inf if cut.end is None else cut.end
        first, last = np.searchsorted(self._sorted, [low, high])  # low <= time < high
        chosen: npt.NDArray[np.int64] = (
            np.arange(first, last) if self._order is None else np.sort(self._order[first:last])
        )
        chosen = chosen[kept(self._times[chosen], cut.keep)]
        if not len(chosen):
            raise UndecodableVideo(
                self._path,
                f"expected at least one frame in the cut {cut}; found none (frames are shown from "
                f"{self._sorted[0]:.3f} to {self._sorted[-1]:.3f} s)",
            )
        return chosen


def kept(times: Seconds, keep: Sequence[tuple[float, float]]) -> npt.NDArray[np.bool_]:
    """Which frames lie inside one of some open intervals; all of them where there are none.

    Args:
        times: float64 [n], seconds.
        keep: (start, end) in seconds; one that ends before it starts holds no frame.

    Returns:
        bool [n].
    """
    if not keep:
        return np.ones(len(times), dtype=np.bool_)
    inside = np.zeros(len(times), dtype=np.bool_)
    for start, end in keep:
        inside |= (times > start) & (times < end)
    return inside


class Clock:
    """Presentation times -> seconds on the player's clock."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._base = stream.time_base or Fraction(0)
        self._origin = time_origin(container, stream)
        self._guessed = guesses_times(container)

    def seconds(self, stamps: list[int | None]) -> Seconds:
        """float64 [n]; NaN where a frame has no time."""
        known = [pts for pts in stamps if pts is not None]
        if self._guessed and known and len(known) == len(stamps):
            # AVI numbers its chunks: with packed B frames the numbers are right as a set and
            # attached to the wrong frames, shifted by the decoder's delay.
            known.sort()
            return np.array([float((pts - known[0]) * self._base) for pts in known])
        # pts * base - origin in whole numbers, divided once: the same bits as with fractions, which
        # take longer for a long video than its resizing does.
        base, origin = self._base, self._origin
        factor, below = base.numerator * origin.denominator, base.denominator * origin.denominator
        less = origin.numerator * base.denominator
        return np.array(
            [math.nan if pts is None else (pts * factor - less) / below for pts in stamps],
            dtype=np.float64,
        )


def require_rate(fps: float | None) -> None:
    """Refuse what is no frame rate.

    Raises:
        UsageError: not a positive, finite number.
    """
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise UsageError(f"fps: expected a positive number of frames per second, found {fps:g}")


def folder_times(length: int, fps: float | None) -> Seconds:
    """Seconds [length] of a frame folder's pictures; NaN without a frame rate."""
    return np.full(length, math.nan) if fps is None else np.arange(length) / fps
