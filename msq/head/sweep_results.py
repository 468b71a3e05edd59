"""What finished trials come to: one line for each place in the table, mean and std over repeats.

Where trials differ in a *choice* only (a learning rate, say), the one with the best score on its
validation clips stands in the table; their test scores play no part in that.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msq import config as configuration
from msq.errors import UsageError
from msq.head.sweep_plan import Plan
from msq.head.trial import Trial

Outcomes = Mapping[str, Mapping[str, Any]]
CLIP = "CLIP similarity"


@dataclass(frozen=True)
class Line:
    """One place in the table.

    Attributes:
        row: axis -> value.
        trials: those that stand here, one for each repeat, with their outcomes.
        planned: how many repeats there should be.
        metrics: name -> `mean, std, values`; as fractions.
        baseline: whether nothing was trained for it.
    """

    row: Mapping[str, Any]
    trials: Sequence[tuple[Trial, Mapping[str, Any]]]
    planned: int
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    baseline: bool = False

    def common(self, key: str) -> Any:
        """What all trials here have under a key of their outcome; None where they differ."""
        found = {json.dumps(outcome.get(key), sort_keys=True) for _, outcome in self.trials}
        return json.loads(found.pop()) if len(found) == 1 else None


def lines(plan: Plan, outcomes: Outcomes) -> list[Line]:
    """Every place of the plan, in its order; without trials where none is done yet.

    Raises:
        UsageError: as `places`.
    """
    found = []
    for repeats in places(plan):
        standing = [best for group in repeats if (best := chosen(group, outcomes))]
        metrics = {}
        if standing:
            names = list(standing[0][1]["metrics"])
            metrics = {
                name: spread([outcome["metrics"].get(name) for _, outcome in standing])
                for name in names
            }
        found.append(Line(repeats[0][0].row, standing, len(repeats), metrics))
    return found


def places(plan: Plan) -> list[list[list[Trial]]]:
    """The trials of each place in the table, by repeat; those of one repeat differ in a choice.

    Raises:
        UsageError: two trials stand in one place, and no choice was asked for between them.
    """
    found: dict[str, dict[str, list[Trial]]] = {}
    for trial in plan.trials:
        found.setdefault(_key(trial.row), {}).setdefault(_key(trial.repeat), []).append(trial)
    for group in (group for repeats in found.values() for group in repeats.values()):
        if len({_key(trial.choice) for trial in group}) < len(group):
            ids = ", ".join(trial.id for trial in group)
            raise UsageError(
                f"sweep {plan.name}: expected one trial for each place in its table, found "
                f"{len(group)} at {group[0].name() or 'its only one'!r} (trials {ids}), and no "
                "choice between them; give each a name or an axis of its own and run the same "
                "command again: what is trained is kept"
            )
    return [list(repeats.values()) for repeats in found.values()]


def chosen(trials: Sequence[Trial], outcomes: Outcomes) -> tuple[Trial, Mapping[str, Any]] | None:
    """The trial with the best validation score among those that are done; None without any."""
    done = [(trial, outcomes[trial.id]) for trial in trials if trial.id in outcomes]
    if not done:
        return None
    if len(trials) == 1:
        return done[0]

    def validation(one: tuple[Trial, Mapping[str, Any]]) -> float:
        value = one[1]["training"]["best_val_score"]
        return -math.inf if value is None else float(value)

    return max(done, key=validation)  # the first of equals


def undecided(plan: Plan, outcomes: Outcomes) -> tuple[int, int]:
    """How many choices had no validation score to go by, and among how many that were begun.

    There the first value that is done stands in the table.
    """
    begun = []
    for group in (group for repeats in places(plan) for group in repeats if len(group) > 1):
        done = [outcomes[trial.id] for trial in group if trial.id in outcomes]
        if done:
            begun.append(all(one["training"]["best_val_score"] is None for one in done))
    return sum(begun), len(begun)


def baselines(found: Sequence[Line]) -> list[Line]:
    """A line of CLIP's own similarity for each set of class splits and features."""
    made: dict[str, Line] = {}
    for line in found:
        scores = [(t, o, o["detail"].get("clip_similarity")) for t, o in line.trials]
        if not scores or any(score is None for _, _, score in scores):
            continue
        config = configuration.to_dict(line.trials[0][0].config)
        heads = {key for part in ("head", "optim", "train") for key in config[part]} | {"setting"}
        row = {k: v for k, v in line.row.items() if k.rpartition(".")[2] not in heads}
        row |= {"queries" if "queries" in line.row else "head": CLIP}
        names = [k for k, v in scores[0][2].items() if isinstance(v, int | float)]
        metrics = {name: spread([score[name] for _, _, score in scores]) for name in names}
        made.setdefault(_key(row), Line(row, line.trials, line.planned, metrics, baseline=True))
    return list(made.values())


def early_stopping(plan: Plan, outcomes: Outcomes) -> dict[str, Any] | None:
    """What stopping early saved, and what it cost where the same trial also ran its full length.

    The learning rate follows the planned length, so a run that stops early is the beginning of the
    full one, bit for bit.

    Returns:
        None where no trial could stop early; else `trials, stopped` (counts), `epochs_planned,
        epochs_run, saved` (share of the epochs), `seconds_saved` (epochs not run, at the measured
        seconds per epoch), `pairs` (trials that also ran in full), and `cost` (metric -> mean,
        std, values of full minus stopped; None where one has no number), over the pairs.
    """
    able = [
        (trial, outcomes[trial.id])
        for trial in plan.trials
        if trial.config.train.patience and trial.id in outcomes
    ]
    if not able:
        return None
    full = {
        _without_patience(trial): outcomes[trial.id]
        for trial in plan.trials
        if not trial.config.train.patience and trial.id in outcomes
    }
    training = [outcome["training"] for _, outcome in able]
    left = [one["planned_epochs"] - one["epochs"] for one in training]
    planned, ran = (sum(one[key] for one in training) for key in ("planned_epochs", "epochs"))
    pairs = [(full[key], o) for t, o in able if (key := _without_patience(t)) in full]
    names = [k for k in ("unseen", "harmonic", "transfer", "map", "top1")
             if pairs and k in pairs[0][0]["metrics"]]  # fmt: skip
    return {
        "trials": len(able),
        "stopped": sum(x > 0 for x in left),
        "epochs_planned": planned,
        "epochs_run": ran,
        "saved": 1 - ran / planned,
        "seconds_saved": sum(
            x * one["seconds_per_epoch"] for x, one in zip(left, training, strict=True)
        ),
        "pairs": len(pairs),
        "cost": {
            name: spread([_cost(long["metrics"], short["metrics"], name) for long, short in pairs])
            for name in names
        },
    }


def _cost(
    full: Mapping[str, float | None], stopped: Mapping[str, float | None], name: str
) -> float | None:
    """Full minus stopped; None where either is no number, as without a label in the test clips."""
    long, short = full.get(name), stopped.get(name)
    return None if long is None or short is None else long - short


def _without_patience(trial: Trial) -> str:
    values = trial.to_dict()
    values["config"]["train"].pop("patience")
    hash_of = [None if one is None else one.hash for one in (trial.split, trial.actors)]
    return json.dumps([values["source"], values["config"], hash_of], sort_keys=True)


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """`mean`, sample standard deviation `std` (None for one value) and the `values`.

    Values that are not there (None, NaN) are listed and play no part in the mean.
    """
    there = [x for x in values if x is not None and not math.isnan(x)]
    std = statistics.stdev(there) if len(there) > 1 else None
    mean = statistics.fmean(there) if there else None
    return {"mean": mean, "std": std, "values": list(values)}


def _key(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)
