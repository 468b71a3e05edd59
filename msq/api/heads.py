"""`msq.train_head` and `msq.evaluate`: stage two, a call each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

from msq.api.extraction import FilePath, Progress
from msq.api.results import HeadResult
from msq.head.on_store import evaluate_on_store, train_on_store
from msq.report import stage_two
from msq.run_settings import Base, HeadOptions, Overrides, require_options, run_settings

if TYPE_CHECKING:
    from msq.head.on_store import Store


def train_head(
    store: Store,
    out: FilePath | None = None,
    *,
    config: Base | None = None,
    overrides: Overrides | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress = False,
    **options: Unpack[HeadOptions],
) -> HeadResult:
    """Train a head on a feature store: `msq train-head`.

    The settings are, in this order, the defaults, `config`, then `overrides` and `options`: what
    `--config FILE`, `KEY=VALUE` and `--queries text` are in a shell. An unfinished run in `out`
    goes on where it stopped; a finished one is not trained again, and its result is returned.

    Args:
        store: path or URL of a feature store, or one that `msq.open_store` opened.
        out: the run directory; `runs/STORE` where it is None. Other settings need another one.
        config: a TOML file (`config.toml` of a run is one), the same as a dict of tables or of
            dotted keys, or a `msq.config.RunConfig`.
        overrides: `{"head.layers": 2, "optim.lr": 1e-3}`, or as typed: `["optim.lr=1e-3"]`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        overwrite: delete what an earlier run left in `out`.
        progress: True shows the bar of the command on stderr; a function is called with a dict
            after each epoch (`epoch`, `epochs`, `loss`, `lr`, `val_map`, `seconds`; of several
            partitions `partition`, too) and nothing is shown.
        options: those of the command that set a key: `queries`, `classifier`, `loss`, `protocol`,
            `epochs`, `seed`, `val` (share of the training clips), `partition`, `tensorboard`; None
            is not asked for.

    Returns:
        What `msq train-head --json` prints, typed: metrics of the test clips as fractions, average
        precision of each class, epochs, seconds.

    Raises:
        UsageError: an unknown key or option (names the nearest), a value of another type, a key
            with two values, a store without training clips, or a step that memory has no room for.
        StoreError: no store there, or it is damaged.
        SpecMismatch: another run is in `out`; the message holds the difference.
        MsqError: the loss or features are not finite; the clips are named.
        KeyboardInterrupt: the last checkpoint is kept; the same call goes on.
    """
    require_options(options, HeadOptions.__annotations__, "train_head")
    settings = run_settings(config, overrides, options)
    place = None if out is None else Path(out)
    if progress is True:
        result = stage_two.train(store, settings, place, device=device, overwrite=overwrite)
    else:
        result = train_on_store(
            store, settings, place, device=device, overwrite=overwrite, progress=progress or None
        )
    return HeadResult.of(result)


def evaluate(
    run: FilePath | HeadResult,
    store: Store,
    split: str = "test",
    *,
    device: str = "auto",
    export: FilePath | None = None,
    ensemble: Literal["none", "mean", "max"] = "none",
    test_views: str | None = None,
) -> HeadResult:
    """Score a trained head on a split of a store, under every protocol's metrics: `msq eval`.

    Args:
        run: directory of a finished run, or what `train_head` returned.
        store: a feature store that the same encoders made; path, URL, or opened.
        split: `train`, `val` or `test`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        export: a file for the scores, in the form of the official Charades scorer.
        ensemble: `mean` or `max` combine the probabilities over the test views of the store.
        test_views: which, such as `10x3`, where the store has several sets.

    Returns:
        What `msq eval --json` prints, typed; epochs and seconds are those of the training.

    Raises:
        UsageError: no finished run there, or no usable clip in that split.
        SpecMismatch: the store was made in another way than the features the head was trained on.
        StoreError: no store there, or it is damaged.
    """
    place = run.run if isinstance(run, HeadResult) else Path(os.fspath(run))
    return HeadResult.of(
        evaluate_on_store(
            place,
            store,
            split,
            device=device,
            export=None if export is None else Path(export),
            ensemble=ensemble,
            test_views=test_views,
        )
    )
