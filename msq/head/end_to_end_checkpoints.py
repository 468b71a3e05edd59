"""Checkpoints of a run that several processes take part in."""

from __future__ import annotations

import time
from pathlib import Path

from msq.head.checkpoint import save_state
from msq.head.end_to_end_training import EndToEndTraining
from msq.head.run import RunDirectory
from msq.head.train import Checkpoints


class RankedCheckpoints(Checkpoints):
    """As `Checkpoints`; all processes put the state together, and the first one writes it.

    When is up to the first, since clocks differ.
    """

    training: EndToEndTraining

    def __init__(self, directory: RunDirectory, training: EndToEndTraining, seconds: float) -> None:
        super().__init__(directory, training, seconds)
        ranks = training.ranks
        self._kept = ranks.of_first(directory.path is not None)

    def save(self) -> None:
        """Write one now; all processes call it."""
        if not self._kept:
            return
        self.training.require_finite()
        began = time.perf_counter()
        state = self.training.state()
        path: Path | None = self.directory.path
        if path is not None:
            save_state(path / "state.pt", state)
        self.training.saved = self.training.step
        self.last = time.perf_counter()
        self.cost = self.last - began

    def save_if_due(self, epoch_done: bool) -> None:
        """Write one after an epoch where that is cheap, and whenever the last one is old."""
        if self._kept and self.training.ranks.agreed(self.due(epoch_done)):
            self.save()
