"""Sentences beside a table of results: leaks, choices, what early stopping saved and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msq.head.sweep_plan import Plan
from msq.head.sweep_results import Line, Outcomes, early_stopping, undecided
from msq.report import terminal


def early_stop_words(saved: Mapping[str, Any]) -> str:
    """The sentence; no times are in it, so that two tables of one sweep are the same.

    Args:
        saved: as `msq.head.sweep_results.early_stopping` gives it.
    """
    words = (
        f"early stopping: {saved['stopped']} of {saved['trials']} trials stopped, "
        f"{terminal.percent(saved['saved'])} % of their epochs saved"
    )
    if not saved["pairs"]:
        return words + "; its cost is not known (add train.patience = 0 to the grid)"
    costs = ", ".join(f"{name} {terminal.spread(one['mean'], one['std'])}"
                      for name, one in saved["cost"].items())  # fmt: skip
    return f"{words}; full length minus stopped, {saved['pairs']} pairs: {costs} points"


def leaking_splits(found: Sequence[Line]) -> list[str]:
    """That some class splits part classes with the same clips."""
    details = [o["detail"] for line in found for _, o in line.trials if "leaks" in o["detail"]]
    splits = {one["split_hash"] for one in details}
    leaking = {one["split_hash"] for one in details if one["leaks"]}
    if not leaking:
        return []
    pairs = {" and ".join(sorted((leak["seen"], leak["unseen"])))
             for one in details for leak in one["leaks"]}  # fmt: skip
    return [f"{len(leaking)} of {len(splits)} class splits part classes that have the same clips "
            f"({', '.join(sorted(pairs))}): what they call unseen was trained on"]  # fmt: skip


def blind_choices(plan: Plan, outcomes: Outcomes) -> list[str]:
    """That choices were asked for, and no validation clip had anything to say."""
    blind, begun = undecided(plan, outcomes)
    if not blind:
        return []
    return [f"{_choices(plan)}: in {blind} of {begun} places and repeats no trial has a validation "
            "score (no validation clip shows a class), so nothing was chosen there: the first "
            "value stands in the table"]  # fmt: skip


def _choices(plan: Plan) -> str:
    """The axes that validation clips are to decide."""
    return ", ".join(sorted({axis for trial in plan.trials for axis in trial.choice}))


def decided_by_validation(plan: Plan, outcomes: Outcomes) -> list[str]:
    """What validation clips decided: choices, and when training stopped."""
    notes = []
    rivals = [trial for trial in plan.trials if trial.choice]
    blind, begun = undecided(plan, outcomes)
    if rivals and (blind < begun or not begun):
        missing = sum(trial.id not in outcomes for trial in rivals)
        among = f" among those done; {missing} of {len(rivals)} trials are missing" * bool(missing)
        notes.append(f"{_choices(plan)} chosen by validation clips, in each repeat{among}")
    saved = early_stopping(plan, outcomes)
    return notes if saved is None else [*notes, early_stop_words(saved)]
