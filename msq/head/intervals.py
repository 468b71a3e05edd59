"""Windows in which something is done -> intervals of time, as long as it goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def with_threshold(
    predictions: Iterable[Mapping[str, Any]], threshold: float | None
) -> list[dict[str, Any]]:
    """The predictions whose score is at least `threshold`; None keeps all."""
    return [dict(p) for p in predictions if threshold is None or p["score"] >= threshold]


def merged(segments: Iterable[Mapping[str, Any]], threshold: float) -> Iterator[dict[str, Any]]:
    """Windows of one label that meet or overlap, as one interval.

    A window counts where its score is at least `threshold`. A window that could not be read ends
    no interval, as long as the next one that counts meets the last one that did.

    Args:
        segments: in order of their starts, see `msq.head.predict_windows.scored_windows`.
        threshold: probability.

    Yields:
        `label`, `start`, `end` (seconds), `score` (the highest of its windows), `windows` (how
        many) and, where some were damaged, `degraded` (what the first of them says), in the order
        in which they end.
    """
    going: dict[str, dict[str, Any]] = {}
    for segment in segments:
        if segment["end"] is None:
            continue
        over = [one for one in going.values() if one["end"] < segment["start"]]
        for one in sorted(over, key=_end):
            yield going.pop(one["label"])
        for found in with_threshold(segment["predictions"], threshold):
            one = going.setdefault(
                found["label"],
                {
                    "label": found["label"],
                    "start": segment["start"],
                    "end": segment["end"],
                    "score": found["score"],
                    "windows": 0,
                },
            )
            one["end"] = max(one["end"], segment["end"])
            one["score"] = max(one["score"], found["score"])
            one["windows"] += 1
            if "degraded" in segment:
                one.setdefault("degraded", segment["degraded"])
    yield from sorted(going.values(), key=_end)


def _end(interval: Mapping[str, Any]) -> tuple[float, float, str]:
    return interval["end"], interval["start"], interval["label"]
