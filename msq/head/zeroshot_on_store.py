"""A zero-shot sweep on a feature store: what is asked for in words, made a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msq.config import RunConfig
from msq.config_values import nearest
from msq.errors import UsageError
from msq.head.actors import ActorSplit, actor_split, leave_one_out, read_actors, shown_actors
from msq.head.class_split_files import class_split_from_list, class_splits_from_folder
from msq.head.class_splits import ClassSplit, class_order_split
from msq.head.features import Features, configured_features
from msq.head.on_store import opened_store
from msq.head.sweep_plan import Plan, Source
from msq.head.zeroshot import Variant, plan_zero_shot
from msq.zeroshot_options import ALL, ZeroShotOptions

if TYPE_CHECKING:
    from msq.head.on_store import Store


def plan_on_store(
    store: Store,
    config: RunConfig,
    asked: ZeroShotOptions,
    *,
    threads: int = 1,
    say: Callable[[str], None] | None = None,
) -> Plan:
    """Every trial of the sweep; the store is read, nothing is trained.

    Args:
        store: where it lies, or the store, opened.
        config: of each run; its queries and classifier are replaced.
        asked: which splits and heads.
        threads: of each process.
        say: told in a line which actors are not held out.

    Raises:
        UsageError: lists or actors that do not fit the store, or as `plan_zero_shot`.
        StoreError: as `msq.extract.store.open_store`.
    """
    variants = _variants(store, config, asked.prompts, asked.text_encoders)
    features = variants[0].features
    return plan_zero_shot(
        variants,
        config,
        seen=asked.seen,
        splits=asked.splits,
        queries=asked.queries,
        classifier=asked.classifier,
        class_splits=_class_splits(features.classes, asked),
        actors=_actors(features, asked, say),
        choose=asked.choose,
        threads=threads,
    )


def _variants(
    store: Store,
    config: RunConfig,
    prompts: Sequence[str] | None,
    text_encoders: Sequence[str] | None,
) -> list[Variant]:
    """The store's features, once for each prompt and text encoder asked for."""
    opened = opened_store(store)
    place = str(opened.path.resolve() if opened is store else Path(str(store)).resolve())
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
            source = Source.of(features, place)
            found.append(Variant(features, source, row, keys))
    return found


def _asked(given: Sequence[str] | None, there: Sequence[str]) -> list[str]:
    """The names given, or `all` of what is there; [] where nothing was asked for."""
    if given is None:
        return []
    names = list(there) if tuple(given) == (ALL,) else list(given)
    for name in names:
        if name not in there:
            raise UsageError(f"{name!r}: the store has no such one{nearest(name, there)}")
    return names


def _class_splits(classes: Sequence[str], asked: ZeroShotOptions) -> list[ClassSplit] | None:
    """The splits from lists or in class order; None where they are drawn."""
    if asked.split_dir is not None:
        return class_splits_from_folder(classes, asked.split_dir)
    if asked.seen_classes is not None:
        return [class_split_from_list(classes, asked.seen_classes)]
    if asked.class_order:
        return [class_order_split(classes, share / 100) for share in asked.seen]
    return None


def _actors(
    features: Features, asked: ZeroShotOptions, say: Callable[[str], None] | None
) -> list[ActorSplit] | None:
    """The division that is asked for, or one for each actor held out; None without actors."""
    if asked.actors is None:
        return None
    known = read_actors(asked.actors)
    if asked.train_actors is None and asked.test_actors is None:
        found, shown = leave_one_out(features, known), shown_actors(features, known)
        if len(found) < len(shown) and say is not None:
            say(
                f"note: {len(shown) - len(found)} of {len(shown)} actors are not held out: no test "
                "clip shows them alone, or no training clip only others"
            )
        return found
    if asked.train_actors is None:
        raise UsageError("--test-actors: expected --train-actors beside it, found none")
    others = None if asked.test_actors is None else list(asked.test_actors)
    return [actor_split(features, known, list(asked.train_actors), others)]
