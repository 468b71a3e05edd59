"""`msq zero-shot`: a sweep over class splits, from a store to a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from msq.config import Classifier, Queries, RunConfig
from msq.config_values import nearest
from msq.errors import UsageError
from msq.report import sweeps, terminal

if TYPE_CHECKING:
    from msq.head.actors import ActorSplit
    from msq.head.class_splits import ClassSplit
    from msq.head.features import Features
    from msq.head.sweep_plan import Plan
    from msq.head.zeroshot import Variant


def plan(
    store: Path,
    config: RunConfig,
    *,
    seen: str = "50,75",
    splits: int = 10,
    queries: str = "all",
    classifier: str | None = None,
    split_dir: Path | None = None,
    class_order: bool = False,
    seen_classes: Path | None = None,
    actors: Path | None = None,
    train_actors: str | None = None,
    test_actors: str | None = None,
    prompts: str | None = None,
    text_encoders: str | None = None,
    choose: Sequence[str] = (),
    threads: int = 1,
) -> Plan:
    """Every trial of the sweep; the store is read, nothing is trained.

    Raises:
        UsageError: shares that are no percentages, unknown queries, two kinds of splits at once,
            lists or actors that do not fit the store.
    """
    from msq.head.zeroshot import plan_zero_shot

    kinds = {"--split-dir": split_dir, "--class-order": class_order or None,
             "--seen-classes": seen_classes, "--actors": actors}  # fmt: skip
    given = [name for name, value in kinds.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)}: expected one of them, found both")
    if actors is None and (train_actors or test_actors):
        raise UsageError(
            "--train-actors and --test-actors go with --actors FILE, a table clip,actor"
        )
    modes = query_modes(queries)
    percent = sweeps.shares(seen)
    variants = _variants(store, config, prompts, text_encoders)
    features = variants[0].features
    return plan_zero_shot(
        variants,
        config,
        seen=percent,
        splits=splits,
        queries=modes,
        classifier=cast(Classifier | None, classifier),
        class_splits=_class_splits(features.classes, percent, split_dir, class_order, seen_classes),
        actors=None if actors is None else _actors(features, actors, train_actors, test_actors),
        choose=sweeps.choices(choose),
        threads=threads,
    )


def _variants(
    store: Path, config: RunConfig, prompts: str | None, text_encoders: str | None
) -> list[Variant]:
    """The store's features, once for each prompt and text encoder asked for."""
    import dataclasses

    from msq.extract.store import open_store
    from msq.head.features import configured_features
    from msq.head.sweep_plan import Source
    from msq.head.zeroshot import Variant

    opened = open_store(store)
    texts = _asked(text_encoders, list(opened.encoders("text")))
    found = []
    text: str | None
    prompt: str | None
    for text in texts or (config.features.text,):
        there = [] if text is None and prompts is None else list(opened.prompts(text))
        for prompt in _asked(prompts, there) or (config.features.prompt,):
            chosen = dataclasses.replace(config.features, text=text, prompt=prompt)
            features = configured_features(opened, chosen)
            row = ({"text": text} if texts else {}) | ({"prompt": prompt} if prompts else {})
            keys = [f"features.{key}" for key in row]
            source = Source.of(features, str(store.resolve()))
            found.append(Variant(features, source, row, keys))
    return found


def _asked(given: str | None, there: Sequence[str]) -> list[str]:
    """`a,b` or `all` of what is there; [] where nothing was asked for."""
    if given is None:
        return []
    names = list(there) if given == "all" else [x.strip() for x in given.split(",") if x.strip()]
    for name in names:
        if name not in there:
            raise UsageError(f"{name!r}: the store has no such one{nearest(name, there)}")
    return names


def _class_splits(
    classes: Sequence[str],
    percent: Sequence[float],
    folder: Path | None,
    in_order: bool,
    seen: Path | None,
) -> list[ClassSplit] | None:
    """The splits from lists or in class order; None where they are drawn."""
    from msq.head.class_split_files import class_split_from_list, class_splits_from_folder
    from msq.head.class_splits import class_order_split

    if folder is not None:
        return class_splits_from_folder(classes, folder)
    if seen is not None:
        return [class_split_from_list(classes, seen)]
    return [class_order_split(classes, x / 100) for x in percent] if in_order else None


def _actors(
    features: Features, table: Path, train: str | None, test: str | None
) -> list[ActorSplit]:
    """The division that is asked for, or one for each actor held out."""
    from msq.head.actors import actor_split, leave_one_out, read_actors, shown_actors

    known = read_actors(table)
    if train is None and test is None:
        found, shown = leave_one_out(features, known), shown_actors(features, known)
        if len(found) < len(shown):
            terminal.say(
                f"note: {len(shown) - len(found)} of {len(shown)} actors are not held out: no test "
                "clip shows them alone, or no training clip only others"
            )
        return found
    if train is None:
        raise UsageError("--test-actors: expected --train-actors beside it, found none")
    sides = [[x.strip() for x in side.split(",") if x.strip()] if side else None
             for side in (train, test)]  # fmt: skip
    return [actor_split(features, known, sides[0] or [], sides[1])]


def query_modes(queries: str) -> tuple[Queries, ...]:
    """`all`, or names joined by commas.

    Raises:
        UsageError: a name that is none.
    """
    from msq.head.zeroshot import ALL_QUERIES

    if queries == "all":
        return ALL_QUERIES
    names = tuple(x.strip() for x in queries.split(","))
    unknown = [x for x in names if x not in ALL_QUERIES]
    if unknown:
        raise UsageError(f"--queries {unknown[0]!r}: expected {', '.join(ALL_QUERIES)} or all")
    return cast(tuple[Queries, ...], names)


def show(found: Mapping[str, Any], out: Path, *, json: bool = False) -> None:
    """The table, each split's own line, and a warning of every split that leaks."""
    results = found["results"]
    warn_of_leaks(results)
    if json:
        sweeps.say_failures(found)
        terminal.print_json(results)
        return
    header, rows = split_rows(results)
    if rows:
        terminal.table("each split: unseen only (%)", header, rows)
    sweeps.show(found, out)


def split_rows(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A row for each class split with its hash, a column for each kind of query."""
    modes = list(dict.fromkeys(_column(r) for r in results))
    rows: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for r in results:
        for run in r["runs"]:
            if run.get("hash"):
                key = (_share(r), str(run["split"]), run["source"], run["hash"][:12])
                rows.setdefault(key, {})[_column(r)] = run["unseen"]
    shown = [[*key, *(terminal.percent(values.get(mode)) for mode in modes)]
             for key, values in rows.items()]  # fmt: skip
    return ["", "split", "made by", "hash", *modes], shown


def _share(result: Mapping[str, Any]) -> str:
    """Its share of seen classes; "" where its splits have several, or nobody says."""
    seen = result.get("seen")
    return "" if seen is None else f"{seen} % seen"


def _column(result: Mapping[str, Any]) -> str:
    parts = [result["queries"], result.get("text"), result.get("prompt")]
    return ", ".join(str(x) for x in parts if x)


def warn_of_leaks(results: Sequence[Mapping[str, Any]]) -> None:
    """A line for each split that parts classes with the same clips."""
    shown = set()
    for result in results:
        for run in result["runs"]:
            for leak in run.get("leaks", ()):
                name = ", ".join(x for x in (_share(result), run["source"]) if x)
                if (name, leak["seen"], leak["unseen"]) not in shown:
                    shown.add((name, leak["seen"], leak["unseen"]))
                    terminal.say(
                        f"warning: split {name} leaks: {terminal.percent(leak['share'])} % of the "
                        f"clips of one of {leak['seen']} (seen) and {leak['unseen']} (unseen) are "
                        "the other's too"
                    )
