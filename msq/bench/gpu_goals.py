"""The goals that the kernels are held to, and what was reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msq.bench.end_to_end_goals import THEIRS, memory_over, over, share
from msq.bench.gpu_ffn import over_apart
from msq.bench.gpu_micro import BACKENDS, ratio
from msq.bench.gpu_parts import CHARADES_STEPS, SCORED
from msq.bench.gpu_stack import EAGER, times_faster
from msq.bench.gpu_timing import NotCaptured, median
from msq.head.flops import step_flops

Found = Mapping[str, Mapping[str, Any]]
Value = Callable[[Found], float | None]
STEP, WITHOUT = "step K=157 B=256 p=0.1", "step K=157 B=256 p=0"
OURS = ("packed", "kernels")


@dataclass(frozen=True, slots=True)
class Goal:
    """A number that can be missed.

    Attributes:
        text: what is to be reached.
        target: least, or most where `most`.
        value: from all results; None where what it needs was not measured.
        most: smaller is better.
        digits: shown.
    """

    text: str
    target: float
    value: Value
    most: bool = False
    digits: int = 2


def table(found: Found) -> list[tuple[str, str, str, str]]:
    """Rows (goal, target, reached, `yes`, `no`, `not measured` or why it is refused)."""
    rows = []
    for goal in GOALS:
        target = f"{'<=' if goal.most else '>='} {goal.target:g}"
        try:
            value = goal.value(found)
        except NotCaptured as error:
            rows.append((goal.text, target, "–", f"refused: {error}"))
            continue
        if value is None:
            rows.append((goal.text, target, "–", "not measured"))
            continue
        good = value <= goal.target if goal.most else value >= goal.target
        rows.append((goal.text, target, f"{value:.{goal.digits}f}", "yes" if good else "no"))
    return rows


def roofline(ceiling: float, bandwidth: float) -> float:
    """Seconds of a step at K = 157, B = 256 if every operation ran at its own limit.

    The absorbed form with the factorised layer's cost left in: per layer 758.7 GFLOP of products,
    and 34 passes over a [B K, D] tensor of bf16 and 953 MB of keys, values and scratch where bytes
    are the limit; 30 bytes a parameter for the optimiser, and 20 microseconds for the classifier.

    Args:
        ceiling: FLOP/s of a large product.
        bandwidth: bytes/s of a copy.
    """
    one_pass = 256 * 157 * 512 * 2
    layer = 758.7e9 / ceiling + (34 * one_pass + 953e6) / bandwidth
    return 6 * layer + 25.2e6 * 30 / bandwidth + 20e-6


def _ours(found: Found, name: str, sides: Sequence[str] = OURS) -> float | None:
    """Ms of the fastest of our sides; one that is no CUDA graph counts where none is one."""
    times, reasons = [], list[NotCaptured]()
    for side in sides:
        try:
            times.append(median(found, name, side))
        except NotCaptured as error:
            reasons.append(error)
    values = [value for value in times if value]
    if not values and reasons:
        raise reasons[0]
    return min(values) if values else None


def _over_ours(name: str, other: str, sides: Sequence[str] = OURS) -> Value:
    def value(found: Found) -> float | None:
        theirs, ours = median(found, name, other), _ours(found, name, sides)
        return theirs / ours if theirs and ours else None

    return value


def _mfu(found: Found) -> float | None:
    ours, limits = _ours(found, STEP), found.get("ceilings", {})
    if not ours or "bf16_flops" not in limits:
        return None
    return step_flops(256, 157, 17) / (1e-3 * ours) / float(limits["bf16_flops"])


def _of_roofline(found: Found) -> float | None:
    ours, limits = _ours(found, STEP), found.get("ceilings", {})
    if not ours or "bf16_flops" not in limits:
        return None
    least = roofline(float(limits["bf16_flops"]), float(limits["copy_bytes"]))
    return least / (1e-3 * ours)


def _epoch(found: Found) -> float | None:
    ours = _ours(found, STEP)
    return None if ours is None else CHARADES_STEPS * ours / 1e3


def _memory(found: Found) -> float | None:
    sides = found.get(STEP, {}).get("sides", {})
    ours = [sides[s]["peak_mb"] for s in OURS if "peak_mb" in sides.get(s, {})]
    theirs = sides.get("B1", {}).get("peak_mb")
    return min(ours) / theirs if ours and theirs else None


def _latency(*sides: str) -> Value:
    return lambda found: _ours(found, "inference B=1", sides)


def _norm(way: str, passes: float) -> Value:
    """Share of the copy's bandwidth; the backward pass is both ways less forward."""

    def value(found: Found) -> float | None:
        result, limits = found.get("kernel drop_add_norm", {}), found.get("ceilings", {})
        forward = median(found, "kernel drop_add_norm", "kernel, forward")
        both = median(found, "kernel drop_add_norm", "kernel, both ways")
        if not forward or not both or "copy_bytes" not in limits:
            return None
        ms = forward if way == "forward" else both - forward
        moved = float(result["bytes"]) * passes / 4
        return moved / (1e-3 * ms) / float(limits["copy_bytes"])

    return value


def _attention(way: str) -> Value:
    def value(found: Found) -> float | None:
        theirs: dict[str, list[float | None]] = {}
        ours = {}
        for ways in ("forward", "both ways"):
            theirs[ways] = [median(found, "attention 157x157 p=0.1", f"{b}, {ways}")
                            for b in BACKENDS]  # fmt: skip
            ours[ways] = median(found, "kernel self_attention", f"kernel, {ways}")
        forward = [v for v in theirs["forward"] if v]
        if way == "forward":
            return min(forward) / ours["forward"] if forward and ours["forward"] else None
        pairs = zip(theirs["both ways"], theirs["forward"], strict=True)
        backward = [both - one for both, one in pairs if both and one]
        if not backward or not ours["both ways"] or not ours["forward"]:
            return None
        return min(backward) / (ours["both ways"] - ours["forward"])

    return value


def _cross(way: str) -> Value:
    def value(found: Found) -> float | None:
        return ratio(found.get("cross-attention", {}), f"standard, {way}", f"absorbed, {way}")

    return value


def _temporal(found: Found) -> float | None:
    value = found.get("temporal attention T=16", {}).get("over_best_of_torch", {}).get("forward")
    return None if value is None else float(value)


def _differing(found: Found) -> float | None:
    value = found.get("loss curve", {}).get("different")
    return None if value is None else float(value)


def _encoder_mfu(name: str) -> Value:
    """Share of the ceiling of the faster of eager and compiled."""

    def value(found: Found) -> float | None:
        sides, limits = found.get(name, {}).get("sides", {}), found.get("ceilings", {})
        speeds = [float(side["flops"]) for side in sides.values() if "flops" in side]
        if not speeds or "bf16_flops" not in limits:
            return None
        return max(speeds) / float(limits["bf16_flops"])

    return value


GOALS = (
    Goal("step p=0.1, times faster than B1", 1.4, _over_ours(STEP, "B1")),
    Goal("step p=0.1, times faster than B2", 1.2, _over_ours(STEP, "B2")),
    Goal(
        "step p=0.1, kernels, times faster than B2: below it they are rejected",
        1.1,
        _over_ours(STEP, "B2", ("kernels",)),
    ),
    Goal("step p=0, times faster than B2", 1.12, _over_ours(WITHOUT, "B2")),
    Goal("step, times faster than B0", 8, _over_ours(STEP, "B0")),
    Goal("step, times faster than B0 with TF32", 3, _over_ours(STEP, "B0 TF32")),
    Goal("step, times faster than eager bf16", 2, _over_ours(STEP, "eager bf16")),
    Goal("share of the measured ceiling (MFU)", 0.5, _mfu),
    Goal("share of the per-operation roofline", 0.65, _of_roofline),
    Goal(
        "inference B=256 as msq scores, times faster than B2",
        1.2,
        _over_ours("inference B=256", "B2", (SCORED,)),
    ),
    Goal(
        "inference B=256 in bf16 and a CUDA graph (no command), times faster than B2",
        1.2,
        _over_ours("inference B=256", "B2"),
    ),
    Goal("inference B=1 as msq scores, ms", 0.3, _latency(SCORED), most=True),
    Goal(
        "inference B=1 in bf16 and a CUDA graph (no command), ms", 0.3, _latency(*OURS), most=True
    ),
    Goal("10 heads K=20 B=64 at once, times faster than in turn", 1.8, times_faster),
    Goal(
        "10 heads K=20 B=64 at once, times faster than in turn without CUDA graphs",
        6,
        lambda f: times_faster(f, EAGER),
    ),
    Goal("epoch of Charades' size, s", 0.48, _epoch, most=True),
    Goal("LayerNorm forward, share of the copy's bandwidth", 0.8, _norm("forward", 4)),
    Goal("LayerNorm backward, share of the copy's bandwidth", 0.75, _norm("backward", 5)),
    Goal("mask bits of a step, ms", 0.35, lambda f: median(f, "mask bits", "kernel"), most=True),
    Goal("self-attention forward, times faster than torch's best", 1.2, _attention("forward")),
    Goal("self-attention backward, times faster than torch's best", 1.3, _attention("backward")),
    Goal("absorbed cross-attention forward, times the compiled", 1.5, _cross("forward")),
    Goal("absorbed cross-attention both ways, times the compiled", 1.25, _cross("both ways")),
    Goal("attention over time T=16, times faster than torch's best", 1.0, _temporal),
    Goal("first product and epilogue in one, over apart", 0.92, over_apart, most=True),
    Goal("peak memory, over B1", 0.75, _memory, most=True),
    Goal("TimeSformer-B at T=16, share of the ceiling", 0.5, _encoder_mfu("encoder TimeSformer-B")),
    Goal("ViT-B/16 at T=16, share of the ceiling", 0.5, _encoder_mfu("encoder ViT-B/16")),
    Goal("end-to-end step T=8, share of the ceiling (MFU)", 0.45, share(8)),
    Goal("end-to-end step T=16, share of the ceiling (MFU)", 0.45, share(16)),
    Goal("end-to-end step T=8, times faster than HF, eager", 1.0, over(8, ("HF",), ("msq",))),
    Goal("end-to-end step T=16, times faster than HF, eager", 1.0, over(16, ("HF",), ("msq",))),
    Goal("end-to-end step T=8, times faster than HF's best", 1.0, over(8, THEIRS)),
    Goal("end-to-end step T=16, times faster than HF's best", 1.0, over(16, THEIRS)),
    Goal(
        "end-to-end step T=8, peak memory over HF SDPA",
        1.0,
        memory_over(8, "msq", "HF SDPA"),
        most=True,
    ),
    Goal(
        "end-to-end step T=16, peak memory over HF SDPA",
        1.0,
        memory_over(16, "msq", "HF SDPA"),
        most=True,
    ),
    Goal("losses that differ between two runs", 0, _differing, most=True, digits=0),
)
