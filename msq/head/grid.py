"""Grids: every combination of a grid file becomes a trial.

Features are extracted once for each distinct making, and shared by all trials that need them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msq import config as configuration
from msq.config import FeatureConfig, RunConfig
from msq.errors import UsageError
from msq.head.class_split_files import class_splits_from_folder
from msq.head.class_splits import ClassSplit, class_order_split, drawn_splits
from msq.head.features import configured_features
from msq.head.grid_file import Grid, Setting
from msq.head.grid_stores import (
    extraction_records,
    extraction_source,
    make_stores,
    read_classes,
    splits_of,
)
from msq.head.split_shares import numbered_by_share
from msq.head.sweep import prepare
from msq.head.sweep_claims import claim
from msq.head.sweep_plan import Plan, Source, outcome_path, write_outcome
from msq.head.sweep_workers import run_sweep
from msq.head.trial import Trial
from msq.head.trials import failure
from msq.head.zeroshot import zero_shot_classifier

# Where the features of a combination are, the class names where they matter, and whether there are
# validation clips; None where that was not looked up.
_Found = tuple[Source, tuple[str, ...], bool | None]
SHORT = {"zero_shot.seen": "seen"}


class _Sources:
    """Sources of a grid, each looked up once."""

    def __init__(self, grid: Grid, stores: Path) -> None:
        self.grid, self.stores = grid, stores
        self.found: dict[str, _Found] = {}

    def of(self, values: Mapping[str, Any], chosen: FeatureConfig) -> _Found:
        """What is known of the features of a combination."""
        settings = _extraction(values)
        key = repr((sorted(settings.items(), key=repr), chosen if self.grid.store else None))
        if key not in self.found:
            self.found[key] = self._look_up(settings, chosen)
        return self.found[key]

    def _look_up(self, settings: Mapping[str, Any], chosen: FeatureConfig) -> _Found:
        if self.grid.store is None:
            classes = read_classes(settings).classes if self.grid.zero_shot is not None else ()
            return extraction_source(settings, self.stores), tuple(classes), None
        from msq.extract.store import open_store

        path = Path(self.grid.store)
        features = configured_features(open_store(path), chosen)
        source = Source.of(features, str(path.resolve()))
        return source, features.classes, "val" in features.splits

    def require_validation(self, setting: Setting, config: RunConfig) -> None:
        """Refuse a choice that no validation clip can decide.

        Raises:
            UsageError: none is held out, and the features have none of their own.
        """
        if not setting.choice or config.train.val:
            return
        *_, validated = self.of(setting.values, config.features)
        if validated is None:
            validated = "val" in splits_of(_extraction(setting.values), config.features.partition)
        if not validated:
            raise UsageError(f"{self.grid.source}: choose needs validation clips, found "
                             "train.val = 0 and no clip of the split val")  # fmt: skip


def _extraction(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of stage one among the values of a combination."""
    return {key.partition(".")[2]: value for key, value in values.items()
            if key.startswith("extract.")}  # fmt: skip


def plan_grid(
    grid: Grid,
    stores: Path = Path("stores"),
    threads: int = 1,
    say: Callable[[str], None] | None = None,
) -> Plan:
    """Every trial of a grid. Stores that are there are read; nothing is extracted or trained.

    Args:
        grid: the file, read.
        stores: folder for the stores that extractions make.
        threads: of each process.
        say: called with a line on class lists that `zero_shot.seen` leaves out.

    Raises:
        UsageError: a value that its key cannot have, features that are not there, class splits that
            cannot be made, or two combinations that come to the same.
    """
    sources = _Sources(grid, stores)
    trials: list[Trial] = []
    notes: set[str] = set()  # the same for each setting
    for setting in grid.settings():
        config = _config(grid, setting)
        sources.require_validation(setting, config)
        source, classes, _ = sources.of(setting.values, config.features)
        for listed, number, split in _splits(grid, setting, classes, notes):
            repeat = {**setting.repeat, **({} if number is None else {"split": number})}
            trials.append(
                Trial(
                    source=source.key,
                    config=config,
                    split=split,
                    row={**listed, **_short(setting.row)},
                    repeat=_short(repeat),
                    choice=setting.choice,
                )
            )
    if say is not None:
        for note in sorted(notes):
            say(note)
    found = {source.key: source for source, *_ in sources.found.values()}
    order = {key: k for k, key in enumerate(found)}
    trials.sort(key=lambda trial: order[trial.source])
    table = {**grid.table, "paper": _paper(grid.table.get("paper", {}))}
    if grid.zero_shot is not None:
        table["by"] = table["by"] or ["seen"]
        table["metrics"] = table["metrics"] or [
            "unseen", "chance", "generalised_seen", "generalised_unseen", "harmonic"
        ]  # fmt: skip
    return Plan(grid.name, tuple(trials), found, threads=threads, table=table)


def _config(grid: Grid, setting: Setting) -> RunConfig:
    """The configuration of one combination."""
    values = {
        key: value
        for key, value in setting.values.items()
        if key.partition(".")[0] in ("head", "optim", "train", "features")
    }
    tables: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    config = configuration.from_dict(tables, grid.source)
    if grid.zero_shot is None:
        return config
    kind = grid.zero_shot.get("classifier", values.get("head.classifier"))
    head = dataclasses.replace(
        config.head, classifier=kind or zero_shot_classifier(config.head.queries)
    )
    if config.train.protocol == "official" or head.classifier == "per-class":
        raise UsageError(f"{grid.source}: zero_shot: classifier per-class and protocol official "
                         "have no weights for classes never trained")  # fmt: skip
    return dataclasses.replace(config, head=head)


def _splits(
    grid: Grid, setting: Setting, classes: tuple[str, ...], notes: set[str]
) -> list[tuple[dict[str, float], int | None, ClassSplit | None]]:
    """The class splits of one combination; those of lists with their row, and numbered within.

    Lists that are left out are added to the notes.
    """
    if grid.zero_shot is None:
        return [({}, None, None)]
    if "split_dir" in grid.zero_shot:
        lists = class_splits_from_folder(classes, Path(grid.zero_shot["split_dir"]))
        shares = grid.zero_shot.get("seen")
        wanted = shares if shares is None or isinstance(shares, list) else [shares]
        found = numbered_by_share(lists, wanted, grid.source)
        if len(found) < len(lists):
            notes.add(
                f"warning: {grid.source}: {len(lists) - len(found)} of {len(lists)} class lists of "
                f"{grid.zero_shot['split_dir']} are left out: other shares than zero_shot.seen"
            )
        return [({"seen": share}, number, split) for share, number, split in found]
    share = setting.values["zero_shot.seen"] / 100
    if grid.zero_shot.get("class_order"):
        return [({}, None, class_order_split(classes, share))]
    number = setting.values["split"]
    return [({}, None, drawn_splits(classes, share, number + 1)[number])]


def _short(values: Mapping[str, Any]) -> dict[str, Any]:
    """The names that a table has: the last part of each key, where no two agree in it."""
    ends = [SHORT.get(key, key.rpartition(".")[2]) for key in values]
    return {
        end if ends.count(end) == 1 else key: value
        for (key, value), end in zip(values.items(), ends, strict=True)
    }


def _paper(paper: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's numbers, their places named as the table's."""
    rows = [{**_short({k: v for k, v in row.items() if k != "value"}), "value": row["value"]}
            for row in paper.get("rows", ())]  # fmt: skip
    return {**paper, "rows": rows} if paper else {}


def run_grid(
    plan: Plan,
    out: Path,
    *,
    retry_failed: bool = False,
    engine: Callable[[Plan], Plan] | None = None,
    extracting: Callable[[str, dict[str, Any]], None] | None = None,
    **how: Any,
) -> tuple[Plan, dict[str, Any]]:
    """Plan, extract, train, to the end; what is done already is not done again.

    Args:
        plan: from `plan_grid`.
        out: folder of the sweep.
        retry_failed: try trials again that failed.
        engine: as in `msq.head.sweep.prepare`.
        extracting: as `progress` of `make_stores`.
        how: as `msq.head.sweep_workers.run_sweep` takes.

    Returns:
        The plan in force and the summary of `run_sweep`, with `stores`: what stage one said of each
        store that it made, now or earlier (`extraction_records`). A store that could not be made is
        the failure of its trials, and of no other.
    """
    problems: dict[str, Exception] | None = None

    def extracted(new: Plan) -> Plan:
        nonlocal problems
        problems = make_stores(new, _needed(out, new), extracting)
        return new if engine is None else engine(new)

    # On a GPU the engine is chosen by a measurement, which needs features.
    first = any(device.startswith("cuda") for device in how.get("devices", ()))
    plan = prepare(out, plan, retry_failed=retry_failed, engine=extracted if first else engine)
    if problems is None:
        problems = make_stores(plan, _needed(out, plan), extracting)
    for key, problem in problems.items():
        for trial in plan.trials:
            with claim(out, trial.id) as mine:
                if mine and trial.source == key and not outcome_path(out, trial.id).exists():
                    write_outcome(out, failure(trial.id, problem))
    summary = run_sweep(out, plan, **how)
    return plan, {**summary, "stores": extraction_records(plan)}


def _needed(out: Path, plan: Plan) -> set[str]:
    """Keys of the sources of trials that have no outcome yet."""
    return {t.source for t in plan.trials if not outcome_path(out, t.id).exists()}
