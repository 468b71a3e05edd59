"""By what the epochs of a run are compared: scores of its validation clips."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from msq.errors import MsqError
from msq.head.evaluate import official_score
from msq.head.features import Features
from msq.head.metrics import ranking_scores
from msq.head.ranking import labelled, macro_ap


class Validation:
    """The validation clips of a run.

    Args:
        features: on the device to train on.
        rows: of these clips, of which there may be none.
        select_by: their score that chooses an epoch.
    """

    def __init__(
        self, features: Features, rows: Tensor, select_by: Literal["map", "official"]
    ) -> None:
        self._features, self._rows, self._select_by = features, rows, select_by
        known = None if features.known is None else features.known[rows]
        labels = features.labels[rows]
        self._ranked = labelled(labels, known).nonzero().flatten()
        self._labels = labels[self._ranked], None if known is None else known[self._ranked]

    @property
    def ranked_by(self) -> str:
        """What epochs are compared by: their scores on another scale say nothing."""
        if self._select_by == "official":
            return "official"
        return "logits" if self._features.task == "multilabel" else "log-softmax"

    def numbers(self, logits: Tensor) -> Tensor:
        """Their mAP and how many of their scores are NaN, [2] on the device; nothing waits for it.

        Args:
            logits: [n, K] of all of them.
        """
        scores = ranking_scores(logits[self._ranked], self._features.task)
        return macro_ap(scores, *self._labels)

    def scores(
        self, mean: float, bad: float, logits: Tensor, epoch: int
    ) -> tuple[float, dict[str, float]]:
        """The score that chooses an epoch, and what the history says of it.

        Args:
            mean: of `numbers`.
            bad: likewise.
            logits: [n, K] of all clips.
            epoch: for messages.

        Raises:
            MsqError: scores are NaN.
        """
        if bad:
            raise MsqError(f"epoch {epoch}: {bad:.0f} scores of the validation clips are NaN")
        if self._select_by == "map":
            return mean, {"val_map": mean}
        f, rows = self._features, self._rows
        known = None if f.known is None else f.known[rows]
        value = official_score(logits, f.labels[rows], f.task, known)
        return value, {"val_map": mean, "val_official": value}
