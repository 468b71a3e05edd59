"""Trials trained and scored: one after another, or several at once, by one of the engines."""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msq.config import RunConfig
from msq.errors import MsqError, UsageError
from msq.head.actor_scores import actor_features, evaluate_actors
from msq.head.class_leaks import Leak, clip_labels, coinciding_classes, leaks
from msq.head.class_splits import ClassSplit
from msq.head.device_errors import device_failed, is_of_device
from msq.head.features import Features
from msq.head.run import RunResult, clip_counts, recorded_choice
from msq.head.split_scores import (
    clip_baseline,
    evaluate_split,
    require_test_clips,
    seen_features,
)
from msq.head.train import train_head
from msq.head.trial import Trial

EpochProgress = Callable[[dict[str, Any]], None]


class Resident:
    """Features in memory, and what is found out about them once for all trials.

    Args:
        features: of all classes and clips, on the device to train on.
    """

    def __init__(self, features: Features) -> None:
        self.features = features

    @functools.cached_property
    def coinciding(self) -> list[Leak]:
        """Pairs of classes that have the same clips."""
        return coinciding_classes(clip_labels(self.features), self.features.classes)


@dataclass(frozen=True)
class Job:
    """What an engine is given of a trial: it trains, and knows nothing of tables.

    Attributes:
        features: what this head may see: its classes, its clips.
        config: of the run.
        run: its run directory; None writes nothing.
    """

    features: Features
    config: RunConfig
    run: Path | None


# Trains a group of jobs, in one go or one after another, and gives a result or the error for each,
# in their order. An engine that cannot go on with a half-done group starts it again whole.
Engine = Callable[[Sequence[Job], str, EpochProgress | None], list[RunResult | Exception]]


def train_sequentially(
    jobs: Sequence[Job], device: str, progress: EpochProgress | None = None
) -> list[RunResult | Exception]:
    """The engine that is always there: one head after another, each resumed to the bit.

    One that was begun on a GPU, with steps that this device cannot take, is trained anew.
    """
    results: list[RunResult | Exception] = []
    for job in jobs:
        try:
            results.append(
                train_head(job.features, job.config, job.run, progress=progress, device=device,
                           overwrite=_is_stranded(job.run, device))
            )  # fmt: skip
        except Exception as error:
            results.append(error)
    return results


def _is_stranded(run: Path | None, device: str) -> bool:
    """Whether a half-done run cannot go on here; its folder is the trial's own."""
    if run is None or (run / "result.json").exists():
        return False
    choice = recorded_choice(run)
    return choice is not None and bool(choice.missing(torch.device(device)))


def train_at_once(
    jobs: Sequence[Job], device: str, progress: EpochProgress | None = None
) -> list[RunResult | Exception]:
    """The engine `stacked` (`msq.head.stack_engine`)."""
    from msq.head.stack_engine import train_stacked  # which imports this module

    return train_stacked(jobs, device, progress)


ENGINES: dict[str, Engine] = {"sequential": train_sequentially, "stacked": train_at_once}


def run_group(
    trials: Sequence[Trial],
    resident: Resident,
    runs: Sequence[Path | None],
    *,
    engine: str = "sequential",
    device: str = "cpu",
    progress: EpochProgress | None = None,
) -> list[dict[str, Any]]:
    """Train a group of trials on the same features and score each once.

    Args:
        trials: of one source.
        resident: the features of all classes and clips.
        runs: a run directory for each.
        engine: a name in `ENGINES`.
        device: where to train.
        progress: called after each epoch.

    Returns:
        An outcome for each: `id, status` (`done` or `failed`), and where done `kind, protocol,
        task, dataset, split` (whose clips were scored), `metrics` (fractions), `detail`,
        `training` (epochs, seconds, what validation chose), else `error` and `error_type`.

    Raises:
        DeviceFailed: the device failed, and so would whatever else is tried on it.
    """
    began = time.perf_counter()
    barred = {k: error for k, trial in enumerate(trials)
              if (error := _barred(trial, resident.features)) is not None}  # fmt: skip
    jobs = [Job(shown(trial, resident.features), trial.config, run)
            for k, (trial, run) in enumerate(zip(trials, runs, strict=True))
            if k not in barred]  # fmt: skip
    trained = iter(ENGINES[engine](jobs, device, progress) if jobs else ())
    found = [barred[k] if k in barred else next(trained) for k in range(len(trials))]
    outcomes = []
    for trial, result in zip(trials, found, strict=True):
        try:
            if isinstance(result, Exception):
                raise result
            outcome = scored(trial, resident, result)
        except Exception as error:
            if is_of_device(error):
                raise device_failed(device, error) from error
            outcome = failure(trial.id, error)
        outcome["seconds"] = (time.perf_counter() - began) / len(trials)
        outcomes.append(outcome)
    return outcomes


def _barred(trial: Trial, features: Features) -> UsageError | None:
    """Why a trial could not be scored once it is trained, where that is known before."""
    try:
        if trial.split is not None:
            require_test_clips(features, trial.split)
    except UsageError as error:
        return error
    return None


def shown(trial: Trial, features: Features) -> Features:
    """What training of a trial may see."""
    if trial.actors is not None:
        return actor_features(features, trial.actors)
    return features if trial.split is None else seen_features(features, trial.split)


def scored(trial: Trial, resident: Resident, trained: RunResult) -> dict[str, Any]:
    """The outcome of a trained trial; the test clips are looked at here and nowhere else."""
    features, result = resident.features, trained.result
    if trial.split is not None:
        detail = {
            **evaluate_split(trained.model, features, trial.split),
            **split_facts(trial.split),
        }
        detail["leaks"] = [leak._asdict() for leak in leaks(trial.split, resident.coinciding)]
        detail["clip_similarity"] = clip_baseline(features, trial.split)
    elif trial.actors is not None:
        detail = evaluate_actors(trained.model, features, trial.actors)
    else:
        detail = {**result["metrics"], "per_class": result["per_class"]}
    metrics = {k: v for k, v in detail.items() if isinstance(v, float | int) and k != "seed"}
    split = result["split"] if trial.kind == "train" else "test"
    return {
        "id": trial.id,
        "status": "done",
        "kind": trial.kind,
        "task": features.task,
        "split": split,
        **{key: result[key] for key in ("protocol", "dataset", "variant", "partition", "views",
                                        "queries", "classifier", "protocol_changes")},
        "metrics": metrics,
        "detail": {k: v for k, v in detail.items() if k not in metrics},
        "training": {
            "planned_epochs": trial.config.train.epochs,
            **{key: result[key] for key in ("epochs", "seconds", "seconds_per_epoch", "best_epoch",
                                            "best_val_score", "selected_by", "step")},
            **clip_counts(result),
        },
    }  # fmt: skip


def split_facts(split: ClassSplit) -> dict[str, Any]:
    """Which classes, for the result."""
    return {"split_hash": split.hash, "seed": split.seed, "source": split.source,
            "seen_classes": list(split.seen), "unseen_classes": list(split.unseen)}  # fmt: skip


def failure(trial: str, error: BaseException) -> dict[str, Any]:
    """The outcome of a trial that came to nothing; a traceback where msq did not expect it."""
    outcome = {"id": trial, "status": "failed", "error_type": type(error).__name__,
               "error": str(error) or repr(error)}  # fmt: skip
    if not isinstance(error, MsqError):
        outcome["traceback"] = "".join(traceback.format_exception(error))
    return outcome
