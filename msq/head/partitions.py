"""One run for each official split of a dataset, and their mean, which is what the field reports.

HMDB51 and UCF101 have three splits of the same clips into training and test. A store made with
`split=all` holds them as partitions; `RUN/split1`, `RUN/split2`, … are ordinary runs.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from msq.config import RunConfig
from msq.errors import UsageError
from msq.head.evaluate import evaluate_run
from msq.head.features import StoreLike, configured_features
from msq.head.json_file import write_json
from msq.head.run import RunDirectory, clip_counts
from msq.head.run_result import read_result
from msq.head.train import train_head

ALL = "all"
Progress = Callable[[dict[str, Any]], None]


def partition_names(store: StoreLike) -> tuple[str, ...]:
    """The partitions of a store, in the dataset's order.

    Raises:
        UsageError: it has none.
    """
    found: Mapping[str, Sequence[str]] = getattr(store, "partitions", {})
    if not found:
        raise UsageError(
            f"store of {store.name}: --partition {ALL} needs one made with several official splits "
            "(msq extract --dataset hmdb51 or ucf101 --option split=all); this one has one split"
        )
    return tuple(found)


def train_partitions(
    store: StoreLike,
    config: RunConfig,
    out: Path,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Train a head on each partition of a store; finished ones are not trained again.

    Args:
        store: with partitions.
        config: of each run but for the partition.
        out: gets `config.toml`, `result.json` and a run directory for each partition.
        progress: called with the events of `train_head`, which then have a `partition`.
        overwrite: delete what other runs left there.
        device: where to train.

    Returns:
        What `merged` gives; the same stands in `result.json`.

    Raises:
        UsageError: the store has no partitions, or as `train_head`.
        SpecMismatch: a run of another configuration is in `out`.
    """
    everything = _with_partition(config, ALL)
    results: dict[str, dict[str, Any]] = {}
    for name in partition_names(store):
        features = configured_features(store, config.features, name)
        if not results:
            directory = RunDirectory(out, everything, features, overwrite)

        def report(event: dict[str, Any], name: str = name) -> None:
            if progress is not None:
                progress({**event, "partition": name})

        run = train_head(
            features,
            _with_partition(config, name),
            out / name,
            progress=report,
            overwrite=overwrite,
            device=device,
        )
        results[name] = run.result
        directory.log(f"{name}: mAP {_number(run.metrics['map']):.4f}")
    result = merged(str(out), results)
    write_json(out / "result.json", result)
    return result


def evaluate_partitions(
    run: Path,
    store: StoreLike,
    split: str = "test",
    device: str = "cpu",
    *,
    export: Path | None = None,
    ensemble: str = "none",
    test_views: str | None = None,
) -> dict[str, Any]:
    """Score each head of a run of `train_partitions` on its own partition of a store.

    Args:
        run: its directory.
        store: with the same partitions.
        split: `train`, `val` or `test`.
        device: where to compute.
        export: file name of the exported scores; `-PARTITION` goes before its suffix.
        ensemble: as in `evaluate_run`.
        test_views: likewise.

    Raises:
        UsageError: the store has no such partitions, or as `evaluate_run`.
    """
    results = {}
    for name in read_result(run)["partitions"]:
        file = None if export is None else export.with_stem(f"{export.stem}-{name}")
        results[name] = evaluate_run(
            run / name, store, split, device, export=file, ensemble=ensemble, test_views=test_views
        )
    result = merged(str(run), results)
    exports = {name: part["export"] for name, part in results.items() if "export" in part}
    return {**result, "exports": exports} if exports else result


def is_partitioned(run: Path) -> bool:
    """Whether a directory holds the runs of `train_partitions`, all finished."""
    file = run / "result.json"
    if (run / "head.safetensors").exists() or not file.is_file():
        return False
    return "partitions" in read_result(run)


def require_one_run(run: Path) -> None:
    """Refuse a directory of several runs.

    Raises:
        UsageError: it is one; the message names them.
    """
    if is_partitioned(run):
        names = ", ".join(str(run / name) for name in read_result(run)["partitions"])
        raise UsageError(f"{run}: expected one run, found one for each partition; name {names}")


def merged(run: str, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One result of several: means over the partitions.

    Returns:
        `metrics` (means; counts that agree stay whole), `spread` (the sample standard deviation of
        each metric that is no count, None for one partition), `partitions` {name: its metrics},
        `epochs`, `seconds` and `clips` (sums), `clips_by_partition` and, of training runs,
        `clips_by_split` {partition: its parts}, `partition` = `all`, and what the results agree
        on: `protocol, dataset, split, …`.
    """
    first = next(iter(results.values()))
    partitions = {name: dict(result["metrics"]) for name, result in results.items()}
    metrics: dict[str, Any] = {}
    spread: dict[str, float | None] = {}
    for key in first["metrics"]:
        if any(key not in part for part in partitions.values()):
            continue  # a run of before there was this metric
        values = [part[key] for part in partitions.values()]
        if all(isinstance(value, int) for value in values):
            metrics[key] = values[0] if len(set(values)) == 1 else statistics.fmean(values)
            continue
        numbers = [_number(value) for value in values]
        metrics[key] = statistics.fmean(numbers)
        finite = all(math.isfinite(x) for x in numbers)
        spread[key] = statistics.stdev(numbers) if finite and len(numbers) > 1 else None
    epochs = sum(result["epochs"] for result in results.values())
    seconds = sum(result["seconds"] for result in results.values())
    common = {
        key: value
        for key, value in first.items()
        if key not in ("clips", "clips_by_split", "coverage", "per_class", "fingerprint")
        and all(result.get(key) == value for result in results.values())
    }
    return {
        **common,
        "run": run,
        "partition": ALL,
        "metrics": metrics,
        "spread": spread,
        "partitions": partitions,
        "epochs": epochs,
        "seconds": seconds,
        "seconds_per_epoch": seconds / max(epochs, 1),
        **_counts(results),
        "coverage": "; ".join(f"{name}: {r['coverage']}" for name, r in results.items()),
    }


def _counts(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Clips scored in all, and apart; the parts of each partition where it was trained."""
    found = {name: clip_counts(result) for name, result in results.items()}
    parts = {name: c["clips_by_split"] for name, c in found.items() if "clips_by_split" in c}
    return {
        "clips": sum(counts["clips"] for counts in found.values()),
        "clips_by_partition": {name: counts["clips"] for name, counts in found.items()},
        **({"clips_by_split": parts} if parts else {}),
    }


def _with_partition(config: RunConfig, name: str) -> RunConfig:
    features = dataclasses.replace(config.features, partition=name)
    return dataclasses.replace(config, features=features)


def _number(value: float | None) -> float:
    """A metric of a result, which is null in a file where it was not a number."""
    return math.nan if value is None else float(value)
