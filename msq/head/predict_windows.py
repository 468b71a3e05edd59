"""A long video as a row of windows: which there are, and what is done in each."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from msq.errors import UsageError, VideoError

if TYPE_CHECKING:
    from msq.extract.encode import Encoded
    from msq.extract.video_survey import Survey

Score = Callable[[Sequence[Sequence[Tensor]]], list[list[dict[str, Any]]]]
Progress = Callable[[int, int, str], None]

_SHORTEST = 0.001  # seconds; file formats tell times apart by no less
_MOST = 100_000  # windows of one video: more than an hour has frames
_DIGITS = 6  # of a border in seconds: no frame falls between two windows that meet
_AT_ONCE = 8  # windows whose features are scored together


class Window(NamedTuple):
    """The part `start <= time < end` of a video, seconds.

    `since` is when the frame was shown that is still seen, where none is shown anew in the window.
    """

    start: float
    end: float
    since: float | None = None


@dataclass(frozen=True)
class Windows:
    """A window of `length` seconds from every `every` seconds on.

    Attributes:
        every: seconds from one start to the next.
        length: seconds; more than `every` overlaps, less leaves gaps.
    """

    every: float
    length: float

    @classmethod
    def asked(cls, every: float | None, window: float | None) -> Windows | None:
        """As a caller asks for them: None for no windows at all.

        Raises:
            UsageError: a length without `every`, or numbers below a millisecond.
        """
        if every is None:
            if window is not None:
                raise UsageError("--window says how long each window is: expected --every SECONDS "
                                 "with it, how often one begins")  # fmt: skip
            return None
        for name, seconds in (("--every", every), ("--window", window)):
            if seconds is not None and not (math.isfinite(seconds) and seconds >= _SHORTEST):
                raise UsageError(
                    f"{name}: expected at least {_SHORTEST} seconds, found {seconds:g}"
                )
        return cls(every, every if window is None else window)

    def of(self, times: NDArray[np.float64]) -> list[Window]:
        """The windows of a video, up to the one in which its last frame is shown first.

        The last frame counts as shown for as long as frames are in the middle: no container need
        say how long a video is.

        Args:
            times: float64 [n] at which frames are shown, none of them unknown.

        Raises:
            UsageError: there would be more than a hundred thousand.
        """
        shown = np.sort(times)
        last = float(shown[-1])
        steps = np.diff(shown)
        over = last + float(np.median(steps[steps > 0])) if (steps > 0).any() else math.inf
        windows, count = [], math.floor(max(last, 0.0) / self.every) + 1
        if round(count * self.every, _DIGITS) <= last:  # 0.3 / 0.1 is less than 3
            count += 1
        if count > _MOST:
            raise UsageError(
                f"--every {self.every:g}: expected at most {_MOST} windows, found {count} in "
                f"{last:.0f} s of video; let them begin less often (or remux the video, where it "
                "is not that long)"
            )
        for k in range(count):
            start = round(k * self.every, _DIGITS)
            end = round(k * self.every + self.length, _DIGITS)
            before, inside = np.searchsorted(shown, [start, end])
            since = float(shown[before - 1]) if before == inside and before else None
            windows.append(Window(start, round(min(end, over), _DIGITS), since))
        return windows


def scored_windows(
    video: Survey,
    windows: Windows,
    encoders: Sequence[Any],
    score: Score,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """What is done in each window of a video, in order, each as soon as all before it are done.

    Args:
        video: see `msq.extract.video_survey.survey`.
        windows: which.
        encoders: see `msq.extract.encode.encode_cuts`.
        score: features of n clips, per clip one tensor for each encoder, to n lists of predictions.
        progress: told of windows done, of how many, and the video's name.

    Yields:
        Per window `start`, `end` (seconds; None where the video cannot be cut: it has no times, or
        there would be too many windows, and then nothing follows) and `predictions`;
        `error` where it has none; `degraded` where the video is damaged; `shown_since` where no
        frame begins in the window, and the one before it was taken.
    """
    from msq.extract.timeline import Cut

    if np.isnan(video.times).any():
        reason = ("expected frames with times, to cut the video into windows; found a video "
                  "without time stamps (remux it into a container, or give a folder of frames its "
                  "frame rate by --fps)")  # fmt: skip
        yield {"start": 0.0, "end": None, "predictions": [], "error": reason}
        return
    try:
        listed = windows.of(video.times)
    except UsageError as error:  # of this video: others may be shorter
        reason = f"{video.path}: {error}"
        yield {"start": 0.0, "end": None, "predictions": [], "error": reason}
        return
    cuts = [Cut(w.start if w.since is None else w.since, w.end) for w in listed]
    done, following = 0, 0
    early: dict[int, dict[str, Any]] = {}  # done, and wait for windows before them
    with closing(_batches(video, cuts, encoders)) as batches:
        for batch in batches:
            good = [found.features for _, found in batch if not isinstance(found, VideoError)]
            scored = iter(score(good) if good else [])
            for place, found in batch:
                predictions = [] if isinstance(found, VideoError) else next(scored)
                early[place] = _segment(listed[place], found, predictions)
            done += len(batch)
            if progress is not None:
                progress(done, len(cuts), Path(video.path).name)
            while following in early:
                yield early.pop(following)
                following += 1


def _segment(
    window: Window, found: Encoded | VideoError, predictions: list[dict[str, Any]]
) -> dict[str, Any]:
    """A window with what became of it."""
    segment: dict[str, Any] = {
        "start": window.start, "end": window.end, "predictions": predictions
    }  # fmt: skip
    if window.since is not None:
        segment["shown_since"] = window.since
    if isinstance(found, VideoError):
        segment["error"] = str(getattr(found, "reason", found))
    elif found.degraded is not None:
        segment["degraded"] = found.degraded
    return segment


def _batches(
    video: Survey, cuts: Sequence[Any], encoders: Sequence[Any]
) -> Generator[list[tuple[int, Encoded | VideoError]], None, None]:
    """Every window once; those that a file can no longer give have its error."""
    from msq.extract.encode import encode_cuts

    left = set(range(len(cuts)))
    batch: list[tuple[int, Encoded | VideoError]] = []
    try:
        with closing(encode_cuts(video, cuts, encoders)) as encoded:
            for place, found in encoded:
                left.discard(place)
                batch.append((place, found))
                if len(batch) == _AT_ONCE:
                    yield batch
                    batch = []
    except VideoError as error:
        batch += [(place, error) for place in sorted(left)]
    if batch:
        yield batch
