"""The plan of a sweep: every trial, where its features are, how to train them. Written first.

A sweep is a folder:

    SWEEP/plan.json                  what is to be done; every worker, on every machine, reads it
    SWEEP/trials/ID/run/             the trial's run directory, without state.pt when it is done
    SWEEP/trials/ID/outcome.json     written last: the trial is done, or failed and why
    SWEEP/claims/                    locks of the processes at work (`msq.head.sweep_claims`)
    SWEEP/results.json               what the finished trials come to, with table.md beside it

`ID` is the hash of what decides the trial's numbers, so that a plan can grow, shrink or be asked
for again, and no finished trial is ever mistaken for another or trained twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.config import FeatureConfig
from msq.errors import UsageError
from msq.head.json_file import write_json
from msq.head.trial import Trial

if TYPE_CHECKING:  # a plan and its outcomes are read without torch
    from msq.head.features import Features

FORMAT = 1


@dataclass(frozen=True)
class Source:
    """Where features come from.

    Attributes:
        store: path of the feature store; "" where the features are in memory only.
        identity: what they are, without any path: `Features.identity()`, or the settings of the
            extraction that makes them.
        extract: fields of the `ExtractRequest` that makes the store; None where it is there.
    """

    store: str
    identity: Mapping[str, Any]
    extract: Mapping[str, Any] | None = None

    @property
    def key(self) -> str:
        """16 hexadecimal digits over the identity."""
        text = json.dumps(self.identity, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def of(cls, features: Features, store: str = "") -> Source:
        """The source of features that are there."""
        return cls(store, {"features": features.identity()})


@dataclass(frozen=True)
class Plan:
    """What a sweep does.

    Attributes:
        name: of the sweep, for its tables.
        trials: all of them, each once.
        sources: key -> where features come from.
        engine: name in `msq.head.trials.ENGINES`, and why it was chosen.
        groups: ids of the trials that are trained together, in the order of work.
        threads: of each process; part of what makes a run end in the same bits again.
        table: how results are shown: `metrics, paper, by` (see `msq.head.sweep_results`).
    """

    name: str
    trials: Sequence[Trial]
    sources: Mapping[str, Source]
    engine: Mapping[str, str] = field(
        default_factory=lambda: {
            "name": "sequential",
            "why": "one head after another, on any device",
        }
    )
    groups: Sequence[Sequence[str]] = ()
    threads: int = 1
    table: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse trials that are the same; put each into a group of its own where none is given."""
        seen: dict[str, Trial] = {}
        for trial in self.trials:
            if trial.id in seen:
                raise UsageError(
                    f"sweep {self.name}: two trials are the same: {seen[trial.id].name()!r} and "
                    f"{trial.name()!r}; leave out the axis that changes nothing"
                )
            seen[trial.id] = trial
        if not seen:
            raise UsageError(f"sweep {self.name}: expected a trial, found none")
        if not self.groups:
            object.__setattr__(self, "groups", tuple((one,) for one in seen))

    def trial(self, identity: str) -> Trial:
        """The trial of this id."""
        return next(trial for trial in self.trials if trial.id == identity)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "format": FORMAT,
            "name": self.name,
            "engine": dict(self.engine),
            "threads": self.threads,
            "table": dict(self.table),
            "groups": [list(group) for group in self.groups],
            "sources": {key: dataclasses.asdict(one) for key, one in self.sources.items()},
            "trials": [trial.to_dict() for trial in self.trials],
        }


def read_plan(folder: Path) -> Plan:
    """The plan of a sweep.

    Raises:
        UsageError: no sweep is there, or its plan is damaged or of another version.
    """
    path = folder / "plan.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{folder}: expected the folder of a sweep, found no plan.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected the plan of a sweep; {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise UsageError(f"{path}: expected format {FORMAT}, found {found}: another version of msq "
                         "wrote it; choose another folder")  # fmt: skip
    plan = Plan(
        name=values["name"],
        trials=tuple(Trial.from_dict(one, str(path)) for one in values["trials"]),
        sources={key: Source(**one) for key, one in values["sources"].items()},
        engine=values["engine"],
        groups=tuple(tuple(group) for group in values["groups"]),
        threads=values["threads"],
        table=values["table"],
    )
    for one, trial in zip(values["trials"], plan.trials, strict=True):
        if one["id"] != trial.id:
            raise UsageError(f"{path}: trial {one['id']} was edited, or another version of msq "
                             f"planned it: its settings now give {trial.id}")  # fmt: skip
    return plan


def write_plan(folder: Path, plan: Plan) -> None:
    """Write `plan.json`; after a crash there is the old one or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "plan.json", plan.to_dict())


def feature_config(trial: Trial, text: Mapping[str, str | None]) -> FeatureConfig:
    """Which arrays of the store a trial reads; `text` names what its extraction wrote."""
    chosen = trial.config.features
    given: dict[str, Any] = {
        k: v for k, v in text.items() if v is not None and getattr(chosen, k) is None
    }
    return dataclasses.replace(chosen, **given)


def outcome_path(folder: Path, trial: str) -> Path:
    """Where the outcome of a trial is written."""
    return folder / "trials" / trial / "outcome.json"


def run_path(folder: Path, trial: str) -> Path:
    """The run directory of a trial."""
    return folder / "trials" / trial / "run"


def read_outcome(folder: Path, trial: str) -> dict[str, Any] | None:
    """The outcome of a trial; None before its end.

    Raises:
        UsageError: a damaged file.
    """
    path = outcome_path(folder, trial)
    try:
        outcome: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected the outcome of a trial; {error}; delete it, and the "
                         "trial is taken up again") from None  # fmt: skip
    return outcome


def write_outcome(folder: Path, outcome: Mapping[str, Any]) -> None:
    """Write the outcome of a trial, which ends it."""
    path = outcome_path(folder, str(outcome["id"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, outcome)


def summary(folder: Path, plan: Plan) -> dict[str, Any]:
    """`trials, done, failed, pending` (counts) and `failures[{id, name, error}]`."""
    outcomes = {trial.id: read_outcome(folder, trial.id) for trial in plan.trials}
    failures = [
        {"id": trial.id, "name": trial.name(), "error": outcome["error"]}
        for trial in plan.trials
        if (outcome := outcomes[trial.id]) is not None and outcome["status"] == "failed"
    ]
    done = sum(one is not None and one["status"] == "done" for one in outcomes.values())
    return {
        "trials": len(plan.trials),
        "done": done,
        "failed": len(failures),
        "pending": len(plan.trials) - done - len(failures),
        "failures": failures,
    }


def outcomes_of(folder: Path, plan: Plan) -> Mapping[str, dict[str, Any]]:
    """Id -> outcome of the trials that are done."""
    found = ((trial.id, read_outcome(folder, trial.id)) for trial in plan.trials)
    return {key: one for key, one in found if one is not None and one["status"] == "done"}
