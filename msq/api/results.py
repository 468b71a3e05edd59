"""What stage two came to, typed; `to_dict` and `to_list` are what the commands' `--json` prints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msq.report.terminal import json_text


@dataclass(frozen=True, eq=False)
class HeadResult:
    """A head that was trained, or scored.

    Attributes:
        run: its run directory, for `msq.load_head`.
        protocol: `paper` or `official`.
        split: the one that was scored.
        metrics: name -> fraction 0 to 1, or count; NaN where it is not a number. Means over the
            partitions, where there are several.
        per_class: class -> average precision, NaN where no clip shows it; empty for the mean of
            several partitions.
        clips: scored.
        epochs: trained; None for a head that another loop trained.
        seconds: of the training.
        seconds_per_epoch: likewise.
        document: all of it, as in `result.json` and docs/metrics.md; null is None there.
    """

    run: Path
    protocol: str
    split: str
    metrics: dict[str, float]
    per_class: dict[str, float] = field(repr=False)
    clips: int
    epochs: int | None
    seconds: float | None
    seconds_per_epoch: float | None
    document: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> HeadResult:
        """From the contents of `result.json`, or of what `msq eval` found."""
        found: dict[str, Any] = json.loads(json_text(result))
        keys = ("protocol", "split", "clips", "epochs", "seconds", "seconds_per_epoch")
        return cls(
            run=Path(found["run"]),
            metrics=_numbers(found["metrics"]),
            per_class=_numbers(found.get("per_class", {})),
            document=found,
            **{key: found[key] for key in keys},
        )

    def to_dict(self) -> dict[str, Any]:
        """What `msq train-head --json` or `msq eval --json` prints."""
        return self.document


@dataclass(frozen=True)
class Spread:
    """A number over several class splits.

    Attributes:
        mean: of the values.
        std: their sample standard deviation; NaN for one value.
        values: fractions 0 to 1, one for each split.
    """

    mean: float
    std: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Spread:
        """From `mean`, `std`, `values`."""
        values = tuple(map(_number, found["values"]))
        return cls(_number(found["mean"]), _number(found["std"]), values)


@dataclass(frozen=True, eq=False)
class ZeroShotLine:
    """One kind of head at one share of seen classes, over its class splits.

    Attributes:
        seen: percent of classes trained; None where actors are held out, not classes.
        queries: mode of the head.
        classifier: of the head.
        splits: how many are done.
        metric: what the numbers are: `map`, or `top1` for `singlelabel`.
        unseen: of the classes never trained, alone; of the actors held out, where those are.
        generalised: means over the splits, all classes in one ranking: `seen`, `unseen`,
            `harmonic`; empty where actors are held out.
        document: all of it, each split's run among it; see `msq.head.zeroshot_results`.
    """

    seen: float | None
    queries: str
    classifier: str
    splits: int
    metric: str
    unseen: Spread
    generalised: dict[str, float]
    document: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, found: dict[str, Any]) -> ZeroShotLine:
        """From one object of the JSON document."""
        ((metric, numbers),) = (found["unseen"] if "unseen" in found else found["transfer"]).items()
        return cls(
            seen=found.get("seen"),
            queries=found["queries"],
            classifier=found["classifier"],
            splits=found["splits"],
            metric=metric,
            unseen=Spread.of(numbers),
            generalised=_numbers(found.get("generalised", {})),
            document=found,
        )


@dataclass(frozen=True, eq=False)
class ZeroShotResult:
    """A zero-shot sweep.

    Attributes:
        sweep: its folder, with `results.json`, `table.md`, `table.csv`, `per_class.csv`.
        lines: one for each place in the table, that is for each share and query mode.
        trials: planned.
        done: trained and scored, in earlier calls too.
        failed: trials that failed.
        failures: `id, name, error` of each.
        document: all of `results.json`.
    """

    sweep: Path
    lines: tuple[ZeroShotLine, ...]
    trials: int
    done: int
    failed: int
    failures: list[dict[str, Any]]
    document: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> ZeroShotResult:
        """From the contents of `results.json`."""
        document: dict[str, Any] = json.loads(json_text(found))
        keys = ("trials", "done", "failed", "failures")
        return cls(
            sweep=Path(document["sweep"]),
            lines=tuple(ZeroShotLine.of(line) for line in document["results"]),
            document=document,
            **{key: document[key] for key in keys},
        )

    def to_list(self) -> list[dict[str, Any]]:
        """What `msq zero-shot --json` prints."""
        return [line.document for line in self.lines]


def _number(value: float | None) -> float:
    """A number of a JSON document, which has null for NaN."""
    return math.nan if value is None else value


def _numbers(found: Mapping[str, float | None]) -> dict[str, float]:
    return {name: _number(value) for name, value in found.items()}
