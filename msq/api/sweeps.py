"""`msq.zero_shot`: a sweep over class splits, a call."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch

from msq.api.extraction import FilePath, Progress, refuse_worker_import
from msq.api.results import ZeroShotResult
from msq.config import Classifier, Queries
from msq.errors import MsqWarning
from msq.head.on_store import store_name
from msq.head.zeroshot_on_store import plan_on_store
from msq.report import sweeps
from msq.report import zero_shot as class_sweep
from msq.run_settings import Base, Overrides, require_options, run_settings
from msq.zeroshot_options import zero_shot_options

if TYPE_CHECKING:
    from msq.head.on_store import Store

_OF_RUNS = ("epochs", "patience", "seed")


class ZeroShotKeywords(TypedDict, total=False):
    """The options of `msq zero-shot`: fields of `ZeroShotOptions`, and keys of each run."""

    seen: str | float | Sequence[float]
    splits: int
    queries: str | Sequence[Queries]
    classifier: Classifier | None
    split_dir: FilePath | None
    class_order: bool
    seen_classes: FilePath | None
    actors: FilePath | None
    train_actors: str | Sequence[str] | None
    test_actors: str | Sequence[str] | None
    prompts: str | Sequence[str] | None
    text_encoders: str | Sequence[str] | None
    choose: Mapping[str, Sequence[Any]] | Sequence[str] | None
    epochs: int | None
    patience: int | None
    seed: int | None


def zero_shot(
    store: Store,
    out: FilePath | None = None,
    *,
    config: Base | None = None,
    overrides: Overrides | None = None,
    device: str = "auto",
    workers: int | None = None,
    threads: int | None = None,
    stack: int | None = None,
    scheduler: str | None = None,
    retry_failed: bool = False,
    progress: Progress = False,
    **options: Unpack[ZeroShotKeywords],
) -> ZeroShotResult:
    """Train on some classes, score on classes never trained, over class splits: `msq zero-shot`.

    Trials that are done in `out` are taken as they are, unfinished ones go on.

    Args:
        store: path or URL of a feature store, or one that `msq.open_store` opened.
        out: folder of the sweep; `runs/STORE-zero-shot` where it is None.
        config: of each run, as for `train_head`.
        overrides: likewise.
        device: `auto`, `cpu`, `cuda`, or `cuda:0,cuda:1` for a worker on each.
        workers: processes; one for each device where it is None. With one, this process trains.
        threads: of each; an equal share of the cores where it is None.
        stack: heads trained at once, at most; where it is None a measurement decides on a GPU,
            and it is 1 on a CPU.
        scheduler: `dask`, or the address of one.
        retry_failed: try trials again that failed.
        progress: True shows the bar of the command on stderr; a function is called with a dict
            after each trial (`done`, `total`, `name`, `outcome`) and nothing is shown.
        options: `seen` (percent: `[50, 75]`, `"10..90"`), `splits` of each share, `queries` (a
            mode, several, or `"all"`), `classifier`, `class_order`, `split_dir`, `seen_classes`,
            `actors` with `train_actors` and `test_actors`, `prompts`, `text_encoders`, `choose`
            (`{"optim.lr": [1e-3, 2e-3]}`), and `epochs`, `patience`, `seed` of each run.

    Returns:
        What `msq zero-shot --json` prints (`to_list()`), typed: a line for each share and query
        mode, with mean, sample standard deviation and values over the splits. Trials that failed,
        and splits that part classes with the same clips, are told by a `MsqWarning`.

    Raises:
        UsageError: unknown options or keys, shares that are no percentages, a classifier that has
            no weights for unseen classes, lists or actors that do not fit the store.
        StoreError: no store there, or it is damaged.
        SpecMismatch: another sweep is in `out`.
        MsqError: every trial failed; the first is named.
        KeyboardInterrupt: what is done is kept; the same call goes on.
    """
    refuse_worker_import("zero_shot")
    require_options(options, ZeroShotKeywords.__annotations__, "zero_shot")
    asked = zero_shot_options(options)
    settings = run_settings(config, overrides, {key: options.get(key) for key in _OF_RUNS})
    place = sweeps.Workplace.of(device, workers, threads, stack, scheduler)
    notes: list[str] = []
    before = torch.get_num_threads()
    try:
        plan = plan_on_store(store, settings, asked, threads=place.threads, say=notes.append)
        found = class_sweep.run(
            plan,
            Path(out) if out is not None else Path("runs") / f"{store_name(store)}-zero-shot",
            place,
            retry_failed=retry_failed,
            quiet=progress is not True,
            progress=None if isinstance(progress, bool) else progress,
        )
    finally:
        torch.set_num_threads(before)  # a sweep's process has the number that its plan says
    lines = [*notes, *class_sweep.leaks_in(found["results"]), *sweeps.failures_in(found)]
    if lines:
        warnings.warn("\n".join((str(found["sweep"]), *lines)), MsqWarning, stacklevel=2)
    return ZeroShotResult.of(found)
