"""Running a sweep: plan first, then trial by trial; done ones are skipped, failures recorded.

Killed with -9, a sweep is started again by the same command: finished trials stand as they are, the
trial in the middle goes on from its last checkpoint with the same bits (as `train_head` does), and
the rest follows. A trial that fails is recorded with its error and hides no other. An error of the
device is no trial's failure, but for the third at the same trial: it ends the worker, and others
take up what it left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from msq.errors import MsqError, UsageError
from msq.head.device_errors import DeviceFailed, device_failed, is_of_device
from msq.head.event_file import require_tensorboard
from msq.head.features import Features, configured_features
from msq.head.sweep_breaks import breaks_path, note_breaks
from msq.head.sweep_claims import at_work, claim
from msq.head.sweep_plan import (
    Plan,
    Source,
    feature_config,
    outcome_path,
    read_outcome,
    read_plan,
    run_path,
    write_outcome,
    write_plan,
)
from msq.head.trial import Trial
from msq.head.trials import Resident, failure, run_group

# Called after each trial with `event, done, total, id, name, outcome`.
SweepProgress = Callable[[dict[str, Any]], None]
Load = Callable[[Trial, Source], Features]


@dataclass
class Loaded:
    """The features of the source used last, in memory; a worker goes through source by source.

    Attributes:
        load: gives the features of a trial.
        device: where they live.
        broke: whether the device broke at the trial before: it may be the device that is at fault
            for what follows in this process.
    """

    load: Load
    device: str
    broke: bool = False
    key: str = ""
    resident: Resident | None = None
    problem: Exception | None = field(default=None)

    def of(self, trial: Trial, plan: Plan) -> Resident:
        """The features of a trial.

        Raises:
            Exception: whatever the source gave; tried once for all its trials.
            DeviceFailed: they cannot be brought to the device.
        """
        if self.key != trial.source:
            self.key, self.resident, self.problem = "", None, None
            try:
                source = plan.sources[trial.source]
                features = self.load(trial, source)
                require_planned(features, source)
                self.resident = Resident(self._moved(features))
            except DeviceFailed:
                raise
            except Exception as error:
                self.problem = error
            self.key = trial.source
        if self.resident is None:
            raise self.problem or MsqError(f"no features for trial {trial.id}")
        return self.resident

    def _moved(self, features: Features) -> Features:
        try:
            return features.to(self.device)
        except MsqError:  # of the features: an array that does not fit, a value that is not finite
            raise
        except Exception as error:
            raise device_failed(self.device, error) from error


def require_planned(features: Features, source: Source) -> None:
    """Refuse a store that is another one than when the sweep was planned.

    Raises:
        MsqError: with what differs.
    """
    expected = source.identity.get("features")
    if expected is None:
        return
    found = features.identity()
    differing = [key for key in {*expected, *found} if expected.get(key) != found.get(key)]
    if differing:
        raise MsqError(
            f"{source.store or features.name}: the features are not those that the sweep was "
            f"planned for; {', '.join(sorted(differing))} differ; choose another folder"
        )


def load_source(trial: Trial, source: Source) -> Features:
    """The features of a trial from its store."""
    from msq.extract.store import open_store
    from msq.head.grid_stores import text_names

    names = {} if source.extract is None else text_names(Path(source.store), source.extract)
    return configured_features(open_store(Path(source.store)), feature_config(trial, names))


def prepare(
    folder: Path,
    plan: Plan,
    *,
    retry_failed: bool = False,
    engine: Callable[[Plan], Plan] | None = None,
) -> Plan:
    """Write the plan, unless it is there, and clear failures that are to be tried again.

    Args:
        folder: of the sweep.
        plan: to be done.
        retry_failed: try trials again that failed.
        engine: gives a plan that is new here its engine and groups, before it is written
            (`msq.head.stack_plan.choose_engine`).

    Returns:
        The plan in force: the stored one where it has the same trials, whose engine and number of
        threads go on as they began.

    Raises:
        MsqError: another process works on another plan there.
        UsageError: a folder with other things in it, or trials that ask for TensorBoard, which is
            not there.
    """
    require_tensorboard(any(trial.config.train.tensorboard for trial in plan.trials))
    stored = read_plan(folder) if (folder / "plan.json").exists() else None
    if stored is None and folder.is_dir() and any(x.name != "claims" for x in folder.iterdir()):
        raise UsageError(f"{folder}: expected an empty or new folder, or a sweep; found files but "
                         "no plan.json")  # fmt: skip
    if stored is not None and _same(stored, plan):
        plan = stored
    else:
        with at_work(folder, alone=True):
            plan = plan if engine is None else engine(plan)
            write_plan(folder, plan)
    if retry_failed:
        for trial in plan.trials:
            with claim(folder, trial.id) as mine:
                outcome = read_outcome(folder, trial.id) if mine else None
                if outcome is not None and outcome["status"] == "failed":
                    breaks_path(folder, trial.id).unlink(missing_ok=True)
                    outcome_path(folder, trial.id).unlink()
    return plan


def _same(stored: Plan, plan: Plan) -> bool:
    """Whether two plans ask for the same; engine and threads are the first one's affair.

    Earlier versions wrote a store as it was typed, so that paths are compared whole.
    """
    return _asked(stored) == _asked(plan)


def _asked(plan: Plan) -> list[Any]:
    values = plan.to_dict()
    for source in values["sources"].values():
        source["store"] = source["store"] and str(Path(source["store"]).resolve())
    return [values[key] for key in ("name", "table", "sources", "trials")]


def work(
    folder: Path,
    plan: Plan,
    load: Load = load_source,
    *,
    device: str = "cpu",
    progress: SweepProgress | None = None,
) -> None:
    """Do what nobody else does, until every trial is done, failed, or claimed by another worker.

    Raises:
        DeviceFailed: nothing can be done on the device; what is left is as it was.
    """
    loaded = Loaded(load, device)
    torch.set_num_threads(plan.threads)
    with at_work(folder):
        for group in plan.groups:
            do_group(folder, plan, group, loaded, progress)


def do_group(
    folder: Path,
    plan: Plan,
    group: Any,
    loaded: Loaded,
    progress: SweepProgress | None = None,
) -> bool:
    """Train and score the trials of one group that have no outcome yet.

    The checkpoint of a trial that is done goes, most of what its run takes: nothing reads it again.

    Returns:
        False where another process is at it.

    Raises:
        DeviceFailed: nothing can be done on the device; no outcome is written, but where a device
            broke at these trials for the third time.
    """
    if all(outcome_path(folder, one).exists() for one in group):
        return True
    with claim(folder, group[0]) as mine:
        if not mine:
            return False
        trials = [plan.trial(one) for one in group if not outcome_path(folder, one).exists()]
        for outcome in _outcomes(folder, plan, trials, loaded):
            write_outcome(folder, outcome)
            if outcome["status"] == "done":
                (run_path(folder, outcome["id"]) / "state.pt").unlink(missing_ok=True)
                breaks_path(folder, outcome["id"]).unlink(missing_ok=True)
            if progress is not None:
                trial = plan.trial(outcome["id"])
                done = sum(outcome_path(folder, one.id).exists() for one in plan.trials)
                progress({"event": "trial", "done": done, "total": len(plan.trials),
                          "id": trial.id, "name": trial.name(), "outcome": outcome})  # fmt: skip
    return True


def _outcomes(
    folder: Path, plan: Plan, trials: list[Trial], loaded: Loaded
) -> list[dict[str, Any]]:
    """The outcomes of some trials, whatever happens to them.

    Raises:
        DeviceFailed: something happened to the device.
    """
    if not trials:
        return []
    runs = [run_path(folder, trial.id) for trial in trials]
    try:
        resident = loaded.of(trials[0], plan)
    except DeviceFailed:
        raise
    except Exception as error:
        if is_of_device(error):
            raise device_failed(loaded.device, error) from error
        return [failure(trial.id, error) for trial in trials]
    try:
        outcomes = run_group(trials, resident, runs, engine=plan.engine["name"],
                             device=loaded.device)  # fmt: skip
    except Exception as error:
        if not is_of_device(error):
            return [failure(trial.id, error) for trial in trials]
        failed = error if isinstance(error, DeviceFailed) else device_failed(loaded.device, error)
        if loaded.broke:
            raise failed from error
        loaded.broke = True
        cause = failed.__cause__ or error
        raise DeviceFailed(f"{failed}; {note_breaks(folder, trials, cause)}") from error
    loaded.broke = False
    return outcomes
