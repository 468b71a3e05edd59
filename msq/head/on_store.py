"""A head on a feature store, from the store to the result: trained, or scored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from msq.config import RunConfig
from msq.errors import UsageError
from msq.head.device import step_in_words, threads_in_words
from msq.head.evaluate import evaluate_run
from msq.head.features import configured_features
from msq.head.partitions import (
    ALL,
    evaluate_partitions,
    is_partitioned,
    partition_names,
    train_partitions,
)
from msq.head.train import train_head
from msq.head.training import Progress

if TYPE_CHECKING:
    from msq.extract.store import FeatureStore

    Store: TypeAlias = str | Path | FeatureStore


def train_on_store(
    store: Store,
    config: RunConfig,
    out: Path | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train a head on a store, or one for each of its partitions; goes on with what is there.

    Args:
        store: where it lies, or the store, opened.
        config: the run; `features.partition` = `all` is a run for each official split.
        out: the run directory; `runs/STORE` where it is None.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        overwrite: delete what an earlier run left there.
        progress: called with a dict after each epoch, see `msq.head.train.train_head`; of several
            partitions it has `partition`, the name, and `partitions`, all of them.
        say: told in a line what is trained on, and with what.

    Returns:
        What stands in `result.json`.

    Raises:
        MsqError: as `msq.extract.store.open_store` and `msq.head.train.train_head`.
    """
    from msq.extract.devices import resolve_device

    place = resolve_device(device)
    out = out or Path("runs") / store_name(store)
    if say is not None:
        say(f"training on {step_in_words(config.train, place, None if overwrite else out)}")
    opened = opened_store(store)
    several = config.features.partition == ALL
    names = partition_names(opened) if several else ()
    if say is not None and not overwrite:
        for line in threads_in_words(*((out / name for name in names) if several else (out,))):
            say(f"note: {line}")
    if several:

        def report(event: dict[str, Any]) -> None:
            if progress is not None:
                progress({**event, "partitions": names})

        return train_partitions(
            opened, config, out, progress=report, overwrite=overwrite, device=place
        )
    features = configured_features(opened, config.features)
    if say is not None:
        say(f"{opened.path if opened is store else store}: {features.coverage()}")
    run = train_head(
        features, config, out, progress=progress, overwrite=overwrite, device=place
    )  # fmt: skip
    return run.result


def evaluate_on_store(
    run: Path,
    store: Store,
    split: str = "test",
    *,
    device: str = "auto",
    export: Path | None = None,
    ensemble: str = "none",
    test_views: str | None = None,
) -> dict[str, Any]:
    """Score a run on a split of a store; a run of several partitions on each of them.

    Arguments, result and errors are those of `msq.head.evaluate.evaluate_run`; `device` is a name
    as `train_on_store` has it.
    """
    from msq.extract.devices import resolve_device

    if test_views is not None and ensemble == "none":
        raise UsageError("--test-views goes with --ensemble mean or max")
    opened, place = opened_store(store), resolve_device(device)
    score = evaluate_partitions if is_partitioned(run) else evaluate_run
    return score(
        run, opened, split, place, export=export, ensemble=ensemble, test_views=test_views
    )  # fmt: skip


def opened_store(store: Store) -> FeatureStore:
    """A store that was opened, or is now.

    Raises:
        StoreError: as `msq.extract.store.open_store`.
    """
    from msq.extract.store import open_store

    return open_store(store) if isinstance(store, str | Path) else store


def store_name(store: Store) -> str:
    """The name of its folder without suffix, for what is made of it."""
    return Path(str(store if isinstance(store, str | Path) else store.path)).stem
