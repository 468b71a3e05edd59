"""Numbers of the end-to-end step's results that goals are set for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msq.bench.gpu_end_to_end import result_name

OURS = ("msq", "msq kernel", "msq compiled", "msq kernel compiled")
THEIRS = ("HF", "HF compiled", "HF SDPA", "HF SDPA compiled")


def mfu(result: Mapping[str, Any], ceiling: float) -> float | None:
    """Share of a product's speed that the fastest of our sides reached; operations are exact."""
    best = fastest(result, OURS)
    return None if best is None else float(result["flops"]) / (1e-3 * best) / ceiling


def fastest(result: Mapping[str, Any], names: Iterable[str]) -> float | None:
    """Ms of the fastest of some sides."""
    sides = result.get("sides", {})
    times = [sides[name]["median"] for name in names if "median" in sides.get(name, {})]
    return min(times) if times else None


Value = Callable[[Mapping[str, Mapping[str, Any]]], float | None]


def over(frames: int, names: tuple[str, ...], ours: tuple[str, ...] = OURS) -> Value:
    """How many times as long the fastest of some sides takes as the fastest of ours."""

    def value(found: Mapping[str, Mapping[str, Any]]) -> float | None:
        result = found.get(result_name(frames), {})
        theirs, best = fastest(result, names), fastest(result, ours)
        return theirs / best if theirs and best else None

    return value


def share(frames: int) -> Value:
    """Share of the measured ceiling."""

    def value(found: Mapping[str, Mapping[str, Any]]) -> float | None:
        ceiling = found.get("ceilings", {}).get("bf16_flops")
        return mfu(found.get(result_name(frames), {}), float(ceiling)) if ceiling else None

    return value


def memory_over(frames: int, ours: str, theirs: str) -> Value:
    """Peak memory of one side over that of another."""

    def value(found: Mapping[str, Mapping[str, Any]]) -> float | None:
        sides = found.get(result_name(frames), {}).get("sides", {})
        a, b = (sides.get(name, {}).get("peak_mb") for name in (ours, theirs))
        return a / b if a and b else None

    return value
