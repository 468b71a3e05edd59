"""What a run of stage one came to, and how fast its stages were."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ExtractResult:
    """What a run of `extract` came to; earlier runs on the same store are included in the counts.

    Attributes:
        store: path of the store.
        clips: rows, `done + failed`.
        done: rows that can be read for every encoder and view of the request (status 1 or 3).
        failed: rows with status 2 for at least one of them.
        skipped: items that the dataset left out because they cannot be used.
        left_out: items that it left out by its own rules; see `Dataset.regular`.
        seconds: duration of this run.
        clips_per_second: rows made in this run per second.
        stages: frames per second of `decode`, of `encode` by encoder, of `write` (None where a
            stage had nothing to do), and `bottleneck`, the stage that took longest;
            `cpu_seconds` of processor time in all processes, `busy_seconds` of each stage.
        failures: the failed rows: `row, clip, status, reason, message, encoders`, and `views`
            where it is not the clean view alone.
        degraded: likewise, rows that decoded only in part and were kept.
        skipped_items: `item, reason` of each skipped item.
        left_out_items: likewise of those left out by rule.
        kept: changes that the policy `keep` made; they count among no other number.
        kept_items: `item, change` of each.
        unknown_words: class -> words that the text encoder does not know.
        warnings: what else the user should know, one line each.
        views: what was asked of each clip; `clean` first.
        smaller_batches: shard -> clips of one forward pass, where memory was too short for the
            batch that was asked for.
        shares: of each other worker that helped: `host, pid, clips, failed, seconds,
            clips_per_second, stages, warnings`; their clips and rates are part of those above.
    """

    store: str
    clips: int
    done: int
    failed: int
    skipped: int
    seconds: float
    clips_per_second: float
    stages: dict[str, Any]
    failures: list[dict[str, Any]]
    degraded: list[dict[str, Any]]
    skipped_items: list[dict[str, str]]
    unknown_words: dict[str, list[str]]
    warnings: list[str]
    left_out: int = 0
    left_out_items: list[dict[str, str]] = field(default_factory=list)
    kept: int = 0
    kept_items: list[dict[str, str]] = field(default_factory=list)
    views: list[str] = field(default_factory=lambda: ["clean"])
    smaller_batches: dict[str, int] = field(default_factory=dict)
    shares: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return asdict(self)


@dataclass
class Stages:
    """Frames and seconds of each stage.

    Attributes:
        workers: decode processes.
        frames: stage -> frames it has done.
        seconds: stage -> how long it was busy; those of all decode processes added up.
        worker_cpu: seconds of processor time of the decode processes.
    """

    workers: int
    frames: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    worker_cpu: float = 0.0

    def __post_init__(self) -> None:
        """The processor time of this process counts from here on."""
        self._cpu = time.process_time()

    def add(self, stage: str, frames: int, seconds: float, worker_cpu: float = 0.0) -> None:
        """Count frames that a stage has done, and the time it took."""
        self.frames[stage] = self.frames.get(stage, 0) + frames
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self.worker_cpu += worker_cpu

    @property
    def cpu(self) -> float:
        """Seconds of processor time of this process and its decode processes so far."""
        return time.process_time() - self._cpu + self.worker_cpu

    def rate(self, stage: str) -> float | None:
        """Frames per second of a stage; None where it had nothing to do."""
        seconds = self._wall(stage)
        return self.frames[stage] / seconds if seconds > 0 else None

    def rates(self) -> dict[str, float | str | None]:
        """Frames per second of each stage so far, and the `bottleneck`."""
        known = [stage for stage in self.seconds if self._wall(stage) > 0]
        slowest = max(known, key=self._wall) if known else None
        return {**{stage: self.rate(stage) for stage in known}, "bottleneck": slowest}

    def summary(self, encoders: Sequence[str]) -> dict[str, Any]:
        """The same as `ExtractResult.stages` holds it."""
        rates = self.rates()
        return {
            "decode": rates.get("decode"),
            "encode": {slug: rates.get(f"encode {slug}") for slug in encoders},
            "write": rates.get("write"),
            "bottleneck": rates["bottleneck"],
            "cpu_seconds": self.cpu,
            "busy_seconds": {stage: self._wall(stage) for stage in self.seconds},
        }

    def _wall(self, stage: str) -> float:
        seconds = self.seconds.get(stage, 0.0)
        return seconds / max(1, self.workers) if stage == "decode" else seconds


def add_stages(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The stages of two workers together, as `Stages.summary` gives them: all numbers are added.

    The bottleneck is the stage that took longest in both.
    """
    both: dict[str, Any] = _sum(one, other)
    if busy := both.get("busy_seconds"):
        both["bottleneck"] = max(busy, key=busy.get)
    return both


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return {key: _sum(one.get(key), other.get(key)) for key in dict.fromkeys([*one, *other])}
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one + other
    return other if one is None else one
