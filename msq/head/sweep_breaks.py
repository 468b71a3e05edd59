"""Trials at which a device broke: each time is noted beside the trial, and the third one ends it.

An error of a device is no trial's failure, yet a trial may break every device that it is given.
Without a count it would stand before all trials behind it for ever.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from msq.errors import MsqError
from msq.head.json_file import write_json
from msq.head.sweep_plan import outcome_path, write_outcome
from msq.head.trial import Trial
from msq.head.trials import failure

BREAKS = 3  # as many as deaths of workers


def breaks_path(folder: Path, trial: str) -> Path:
    """Where the errors of devices are noted that a trial met; gone when the trial is done."""
    return outcome_path(folder, trial).with_name("breaks.json")


def note_breaks(folder: Path, trials: Sequence[Trial], error: BaseException) -> str:
    """Note that a device broke while some trials were trained on it; their failure the third time.

    Args:
        folder: of the sweep.
        trials: of one group, claimed.
        error: what the device gave.

    Returns:
        What comes of it, for the message of the worker.
    """
    first = (str(error) or repr(error)).splitlines()[0]
    words, times = f"{type(error).__name__}: {first}", 0
    for trial in trials:
        path = breaks_path(folder, trial.id)
        found = [*_noted(path), words]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
        times = max(times, len(found))
        if len(found) >= BREAKS:
            last = MsqError(f"a device broke at it {len(found)} times, the last time with {words}")
            write_outcome(folder, failure(trial.id, last))
    name = f"trial {trials[0].id}" + f" and {len(trials) - 1} more" * (len(trials) > 1)
    if times >= BREAKS:
        return f"{name}: time {times} of {BREAKS}, a failure now; the same command does the others"
    return f"{name}: time {times} of {BREAKS}, then it is a failure; the same command tries again"


def _noted(path: Path) -> list[str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return []
    return found if isinstance(found, list) else []
