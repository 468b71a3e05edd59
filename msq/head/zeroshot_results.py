"""What a zero-shot sweep comes to, as documented JSON."""

from __future__ import annotations

from typing import Any

from msq.head.sweep_plan import Plan
from msq.head.sweep_results import Line, Outcomes, baselines, lines


def zero_shot_results(plan: Plan, outcomes: Outcomes) -> list[dict[str, Any]]:
    """What a zero-shot sweep comes to.

    Returns:
        One object per place in the table, that is per (seen, queries): `seen` (percent), `splits`
        (how many are done), `queries`, `protocol`, `classifier`, `unseen` {map or top1: mean, std,
        values}, `generalised` {seen, unseen, harmonic} (means over splits), `generalised_splits`
        (the same with std and values), `seen_only`, `chance`, `clip_similarity` (the same numbers
        of CLIP without training; None where the store has no such pair), `leaking_splits` (how
        many), and `runs` with hash, source, lists, leaks and per-class AP of each split. With
        divisions of actors `transfer` and `same_actors` stand in place of these.
        std is the sample standard deviation, None for one value.
    """
    found = [line for line in lines(plan, outcomes) if line.trials]
    clip = {_without_queries(line): line for line in baselines(found)}
    return [_object(line, clip.get(_without_queries(line))) for line in found]


def _without_queries(line: Line) -> str:
    return str({k: v for k, v in line.row.items() if k != "queries"})


def _object(line: Line, clip: Line | None) -> dict[str, Any]:
    """One object of the result; see `zero_shot_results`."""
    outcome = line.trials[0][1]
    metric = "map" if outcome["task"] == "multilabel" else "top1"
    common = {
        **line.row,
        "splits": len(line.trials),
        "splits_planned": line.planned,
        **{key: line.common(key) for key in ("queries", "classifier", "protocol", "dataset",
                                             "variant", "partition", "views")},
    }  # fmt: skip
    if "transfer" in line.metrics:
        numbers: dict[str, Any] = {
            key: {metric: line.metrics[key]} for key in ("transfer", "same_actors")
        }
    else:
        numbers = _numbers(line, metric)
        numbers["seen_only"] = {metric: line.metrics["seen"]}
        numbers["clip_similarity"] = None if clip is None else _numbers(clip, metric)
        numbers["leaking_splits"] = sum(bool(o["detail"]["leaks"]) for _, o in line.trials)
    runs = []
    for trial, one in line.trials:
        detail = {k: v for k, v in one["detail"].items() if k not in ("clip_similarity",)}
        runs.append({**trial.repeat, "trial": trial.id, "hash": detail.pop("split_hash", None),
                     **detail, **one["metrics"], "chosen": dict(trial.choice),
                     "epochs": one["training"]["epochs"],
                     "seconds": one["training"]["seconds"]})  # fmt: skip
    return {**common, **numbers, "runs": runs}


def _numbers(line: Line, metric: str) -> dict[str, Any]:
    general = {key: line.metrics[name] for key, name in
               (("seen", "generalised_seen"), ("unseen", "generalised_unseen"),
                ("harmonic", "harmonic"))}  # fmt: skip
    return {
        "unseen": {metric: line.metrics["unseen"]},
        "generalised": {key: value["mean"] for key, value in general.items()},
        "generalised_splits": general,
        "chance": line.metrics["chance"],
    }
