"""Which of the scored labels are handed out: the best, or those above a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from msq.errors import UsageError
from msq.head.intervals import with_threshold


class Best(NamedTuple):
    """How many labels of a clip or a window are kept.

    Attributes:
        top: at most so many; None for all.
        threshold: only those of this score or more; None for all.
    """

    top: int | None = None
    threshold: float | None = None

    def checked(self) -> Best:
        """The same.

        Raises:
            UsageError: a number of labels below one, or a threshold that is no probability.
        """
        if self.top is not None and self.top < 1:
            raise UsageError(f"top: expected a number of labels, 1 or more, found {self.top}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UsageError(f"threshold: expected a probability, 0 to 1, found {self.threshold:g}")
        return self

    def of(self, predictions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of `predictions` (`label`, `score`; highest first) that are kept."""
        return with_threshold(predictions[: self.top], self.threshold)


ALL = Best()
