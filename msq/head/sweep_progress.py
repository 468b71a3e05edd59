"""Progress of trials that other processes finish, seen in the folder of the sweep."""

from __future__ import annotations

from pathlib import Path

from msq.head.sweep import SweepProgress
from msq.head.sweep_plan import Plan, outcome_path, read_outcome


class Teller:
    """Reports each trial once that has ended since this was made.

    Args:
        folder: of the sweep.
        plan: of it.
        progress: called as in `msq.head.sweep.work`; None reports nothing.
    """

    def __init__(self, folder: Path, plan: Plan, progress: SweepProgress | None) -> None:
        self.folder, self.plan, self.progress = folder, plan, progress
        self.told = {t.id for t in plan.trials if outcome_path(folder, t.id).exists()}

    def tell(self) -> None:
        """Report what is new."""
        for trial in self.plan.trials:
            if trial.id in self.told or not outcome_path(self.folder, trial.id).exists():
                continue
            self.told.add(trial.id)
            if self.progress is not None:
                self.progress({"event": "trial", "done": len(self.told),
                               "total": len(self.plan.trials), "id": trial.id,
                               "name": trial.name(),
                               "outcome": read_outcome(self.folder, trial.id)})  # fmt: skip
