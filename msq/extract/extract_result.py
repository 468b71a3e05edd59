"""What a run of stage one came to, and how fast its stages were."""

from __future__ import annotations

from collections.abc import Sequence
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
            stage had nothing to do), and `bottleneck`, the stage that took longest.
        failures: the failed rows: `row, clip, status, reason, message, encoders`, and `views`
            where it is not the clean view alone.
        degraded: likewise, rows that decoded only in part and were kept.
        skipped_items: `item, reason` of each skipped item.
        left_out_items: likewise of those left out by rule.
        unknown_words: class -> words that the text encoder does not know.
        warnings: what else the user should know, one line each.
        views: what was asked of each clip; `clean` first.
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
    views: list[str] = field(default_factory=lambda: ["clean"])

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return asdict(self)


@dataclass
class Stages:
    """Frames and seconds of each stage."""

    workers: int
    frames: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, frames: int, seconds: float) -> None:
        """Count frames that a stage has done, and the time it took."""
        self.frames[stage] = self.frames.get(stage, 0) + frames
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

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
        }

    def _wall(self, stage: str) -> float:
        seconds = self.seconds.get(stage, 0.0)
        return seconds / max(1, self.workers) if stage == "decode" else seconds
