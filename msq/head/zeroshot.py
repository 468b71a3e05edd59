"""Zero-shot sweeps: train on some classes, score on the others, over many class splits.

What is trained and scored is said in `msq.head.split_scores`; class splits are made in
`msq.head.class_splits`. The splits of a share are the same for every query mode.

Where no classifier is named, `text` and `multimodal` queries get the `text` classifier, which
learns faster and reaches further, and `vanilla` queries the `shared` one: with `text` they would be
told the unseen classes' words through the classifier, and their ablation would mean nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msq import config as configuration
from msq.config import Classifier, Queries, RunConfig
from msq.errors import MsqError, UsageError
from msq.head.actors import ActorSplit
from msq.head.class_splits import ClassSplit, class_split, drawn_splits
from msq.head.features import Features
from msq.head.json_file import jsonable
from msq.head.split_scores import evaluate_split, seen_features
from msq.head.split_shares import seen_percent, whole
from msq.head.sweep import SweepProgress, prepare, work
from msq.head.sweep_plan import Plan, Source, outcomes_of
from msq.head.sweep_results import spread
from msq.head.train import Progress
from msq.head.trial import Trial
from msq.head.trials import Resident, run_group
from msq.head.zeroshot_results import zero_shot_results

__all__ = [
    "ALL_QUERIES",
    "ClassSplit",
    "Variant",
    "class_split",
    "evaluate_split",
    "plan_zero_shot",
    "seen_features",
    "spread",
    "zero_shot",
    "zero_shot_classifier",
    "zero_shot_results",
]

ALL_QUERIES: tuple[Queries, ...] = ("vanilla", "text", "multimodal")


@dataclass(frozen=True)
class Variant:
    """One choice among the store's arrays: a text encoder, a prompt.

    Attributes:
        features: of all classes.
        source: where they come from.
        row: axis -> value, for the table; empty where there is one variant only.
        keys: the configuration's names of these arrays, such as `features.prompt`.
    """

    features: Features
    source: Source
    row: Mapping[str, Any] = field(default_factory=dict)
    keys: Sequence[str] = ()


def plan_zero_shot(
    variants: Sequence[Variant],
    config: RunConfig,
    *,
    seen: Sequence[float] = (50, 75),
    splits: int = 10,
    queries: Sequence[Queries] = ALL_QUERIES,
    classifier: Classifier | None = None,
    class_splits: Sequence[ClassSplit] | None = None,
    actors: Sequence[ActorSplit] | None = None,
    choose: Mapping[str, Sequence[Any]] | None = None,
    threads: int = 1,
) -> Plan:
    """Every trial of a zero-shot sweep.

    Args:
        variants: the features; those of one store have the same classes.
        config: of each run; its queries and classifier are replaced.
        seen: percent of classes seen.
        splits: how many splits of each share.
        queries: the modes to compare.
        classifier: `shared` or `text`; None chooses by the queries, see above.
        class_splits: use these in place of drawn ones; `seen` is then what they come to.
        actors: divisions of actors in place of class splits: all classes that training clips show
            are trained, and the clips of other actors are scored.
        choose: configuration key -> values, of which each trial's validation clips choose one.
        threads: of each process.

    Raises:
        UsageError: classifier `per-class`, which has no weights for unseen classes, protocol
            `official`, which has no other, a choice without validation clips, or nothing to do.
    """
    _refuse_per_class(config, classifier)
    first = variants[0].features
    choices = expand_choice(config, choose or {}, validated="val" in first.splits)
    divisions: list[tuple[dict[str, Any], ClassSplit | None, ActorSplit | None]] = []
    if actors is not None:
        divisions = [({"actors": "others"}, None, one) for one in actors]
    else:
        drawn = list(class_splits or ())
        if class_splits is None:
            drawn = [x for p in seen for x in drawn_splits(first.classes, p / 100, splits)]
        shares = (
            [x for x in seen for _ in range(splits)]
            if class_splits is None
            else [seen_percent(one) for one in drawn]
        )
        divisions = [({"seen": whole(x)}, one, None) for x, one in zip(shares, drawn, strict=True)]
    numbers: dict[str, int] = {}
    trials = []
    for row, split, actor in divisions:
        number = numbers[str(row)] = numbers.get(str(row), -1) + 1
        repeat = {"split": number} if actor is None else {"held out": ", ".join(actor.test)}
        for variant in variants:
            for mode in queries:
                for values, chosen in choices:
                    trials.append(
                        Trial(
                            source=variant.source.key,
                            config=_of_mode(chosen, mode, classifier, variant),
                            split=split,
                            actors=actor,
                            row={**row, **variant.row, "queries": mode},
                            repeat=repeat,
                            choice=values,
                        )
                    )
    return Plan(
        name=f"zero-shot {first.name}",
        trials=tuple(_by_source(trials)),
        sources={one.source.key: one.source for one in variants},
        threads=threads,
        table={"metrics": ["transfer", "same_actors"] if actors is not None else
               ["unseen", "chance", "generalised_seen", "generalised_unseen", "harmonic"],
               "by": ["seen"]},
    )  # fmt: skip


def _refuse_per_class(config: RunConfig, classifier: Classifier | None) -> None:
    if config.train.protocol == "official":
        raise UsageError("zero-shot: protocol official has classifier 'per-class', which has no "
                         "weights for classes never trained, and the authors' code evaluates none; "
                         "leave out --protocol official")  # fmt: skip
    if classifier == "per-class":
        raise UsageError("zero-shot: classifier 'per-class' has no weights for classes never "
                         "trained; use --classifier shared or --classifier text")  # fmt: skip


def expand_choice(
    config: RunConfig, choose: Mapping[str, Sequence[Any]], *, validated: bool
) -> list[tuple[dict[str, Any], RunConfig]]:
    """Each combination of the values to choose from, and the configuration that it makes.

    Args:
        config: of each run.
        choose: configuration key -> values.
        validated: whether the features have validation clips of their own; else `train.val` of the
            training clips are held out.

    Raises:
        UsageError: an unknown key, no value, or no validation clips to choose by.
    """
    made: list[tuple[dict[str, Any], RunConfig]] = [({}, config)]
    for key, values in choose.items():
        if not values:
            raise UsageError(f"choice {key}: expected a value, found none")
        made = [
            ({**taken, key: value}, configuration.override(so_far, [f"{key}={value}"]))
            for taken, so_far in made
            for value in values
        ]
    if choose and not validated and any(one.train.val == 0 for _, one in made):
        raise UsageError(f"choice {', '.join(choose)}: expected validation clips to choose by, "
                         "found train.val = 0 and no clip of the split val")  # fmt: skip
    return made


def _of_mode(
    config: RunConfig, mode: Queries, classifier: Classifier | None, variant: Variant
) -> RunConfig:
    head = dataclasses.replace(
        config.head, queries=mode, classifier=classifier or zero_shot_classifier(mode)
    )
    arrays = {key.partition(".")[2]: variant.row[key.partition(".")[2]] for key in variant.keys}
    return dataclasses.replace(
        config, head=head, features=dataclasses.replace(config.features, **arrays)
    )


def _by_source(trials: Sequence[Trial]) -> list[Trial]:
    """The same trials with those of one source together, so that it is read once."""
    order = {key: k for k, key in enumerate(dict.fromkeys(trial.source for trial in trials))}
    return sorted(trials, key=lambda trial: order[trial.source])


def zero_shot_classifier(queries: Queries) -> Classifier:
    """The classifier for a query mode where none is named; the reasons are at the top."""
    return "shared" if queries == "vanilla" else "text"


def zero_shot(
    features: Features,
    config: RunConfig,
    out: Path | None = None,
    *,
    seen: Sequence[float] = (50, 75),
    splits: int = 10,
    queries: Sequence[Queries] = ALL_QUERIES,
    classifier: Classifier | None = None,
    class_splits: Sequence[ClassSplit] | None = None,
    actors: Sequence[ActorSplit] | None = None,
    choose: Mapping[str, Sequence[Any]] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Sweep class splits in this process, on features in memory; see `plan_zero_shot`.

    Finished trials in `out` are taken as they are, an unfinished one goes on.

    Args:
        features: of all classes.
        config: of each run.
        out: folder of the sweep; None writes nothing.
        seen: as in `plan_zero_shot`, like all others up to `choose`.
        splits: likewise.
        queries: likewise.
        classifier: likewise.
        class_splits: likewise; those with equally many seen classes make one object.
        actors: likewise.
        choose: likewise.
        device: where to train.
        progress: called with a dict after each run: `event, seen, split, queries, unseen, seconds`.

    Returns:
        As `zero_shot_results`.

    Raises:
        UsageError: as `plan_zero_shot`.
        MsqError: every trial failed; without `out`, any did.
    """
    import torch

    plan = plan_zero_shot(
        [Variant(features, Source.of(features))], config, seen=seen, splits=splits,
        queries=queries, classifier=classifier, class_splits=class_splits, actors=actors,
        choose=choose, threads=torch.get_num_threads(),
    )  # fmt: skip

    def report(trial: Trial, outcome: Mapping[str, Any]) -> None:
        if progress is not None and outcome["status"] == "done":
            progress({"event": "run", **trial.row, **trial.repeat,
                      "unseen": outcome["metrics"].get("unseen"),
                      "seconds": outcome["training"]["seconds"]})  # fmt: skip

    if out is None:
        outcomes = run_in_memory(plan, features.to(device), device, report)
    else:
        plan = prepare(out, plan)
        told: SweepProgress = lambda event: report(plan.trial(event["id"]), event["outcome"])  # noqa: E731
        work(out, plan, lambda trial, source: features, device=device, progress=told)
        outcomes = dict(outcomes_of(out, plan))
    return zero_shot_results(plan, outcomes)


def run_in_memory(
    plan: Plan, features: Features, device: str, report: Any = None
) -> dict[str, dict[str, Any]]:
    """Outcomes of a plan of one source, nothing written; the first failure ends it.

    Raises:
        MsqError: what a trial failed of.
    """
    resident, outcomes = Resident(features), {}
    for group in plan.groups:
        trials = [plan.trial(one) for one in group]
        for trial, outcome in zip(
            trials,
            run_group(trials, resident, [None] * len(trials), engine=plan.engine["name"],
                      device=device),
            strict=True,
        ):  # fmt: skip
            if outcome["status"] == "failed":
                raise MsqError(f"{trial.name()}: {outcome['error']}")
            outcomes[trial.id] = jsonable(outcome)
            if report is not None:
                report(trial, outcome)
    return outcomes
