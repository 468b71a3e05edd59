"""The five questions that the design of the kernels left open, answered from the GPU's results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msq.bench.gpu_goals import STEP, WITHOUT
from msq.bench.gpu_micro import ratio
from msq.bench.gpu_timing import NotCaptured, median

Found = Mapping[str, Mapping[str, Any]]
ASSUMED = 0.76  # share of the ceiling of products with 512 columns
NEAR = 0.6  # of a ceiling: what a kernel comes to that is held up by nothing else
CELL = 2  # bytes of a bf16 number


def answers(found: Found) -> list[str]:
    """Five lines, one for each question; where a result is missing the line says so."""
    lines = []
    for question, answer in QUESTIONS.items():
        try:
            text = answer(found)
        except NotCaptured as error:
            text = f"refused: {error}"
        lines.append(f"{question}: {text or 'not measured'}")
    return lines


def _random_numbers(found: Found) -> str:
    texts = []
    for side in ("B2", "B1"):
        with_p, without = median(found, STEP, side), median(found, WITHOUT, side)
        if with_p and without:
            texts.append(f"{side} {with_p - without:.2f} ms")
    if not texts:
        return ""
    return f"p = 0.1 less p = 0 is {', '.join(texts)}; under 1 ms the mask bits matter less"


def _cublas(found: Found) -> str:
    ceiling = found.get("ceilings", {}).get("bf16_flops")
    sides = found.get("matrix products", {}).get("sides", {})
    shares = {n: v["flops"] / ceiling for n, v in sides.items() if ceiling and "flops" in v}
    if not shares:
        return ""
    each = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
    mean = sum(shares.values()) / len(shares)
    return f"{mean:.2f} of the ceiling on average (assumed {ASSUMED}): {each}"


def _triton_product(found: Found) -> str:
    product = ratio(found.get("triton product", {}), "cublas", "triton")
    return "" if product is None else f"{product:.2f} of cuBLAS's speed"


def _absorbed(found: Found) -> str:
    """Shares of three ceilings that the forward kernel reaches: products, memory, cache.

    Every program reads all of K' and V' of its clip, which lie in the second-level cache.
    """
    name = "kernel absorbed_cross"
    limits, ms = found.get("ceilings", {}), median(found, name, "kernel, forward")
    result = found.get(name, {})
    if (
        not ms
        or "sizes" not in result
        or not {"bf16_flops", "copy_bytes", "cached_copy_bytes"} <= set(limits)
    ):
        return ""
    clips, queries, tokens, width, heads = result["sizes"]
    wide, rows, seconds = result["columns"], result["rows"], 1e-3 * ms
    moved = float(result["bytes"])
    again = clips * (-(-queries // rows)) * 2 * heads * tokens * width * CELL
    work = 4 * clips * queries * wide * width
    shares = {
        "the products' ceiling": work / seconds / limits["bf16_flops"],
        "the copy's": moved / seconds / limits["copy_bytes"],
        "a copy's inside the cache": (moved + again) / seconds / limits["cached_copy_bytes"],
    }
    most = max(shares, key=lambda limit: shares[limit])
    each = ", ".join(f"{share:.2f} of {limit}" for limit, share in shares.items())
    bound = f"bound by {most}" if shares[most] >= NEAR else f"by none of them (all below {NEAR})"
    return f"{each}: {bound}"


def _attention(found: Found) -> str:
    texts = []
    for name in (n for n in found if n.startswith("attention ") and n.endswith("p=0.1")):
        for way in ("forward", "both ways"):
            times = {
                side.rpartition(", ")[0]: ms
                for side in found[name].get("sides", {})
                if side.endswith(f", {way}") and (ms := median(found, name, side))
            }
            if times:
                best = min(times, key=lambda side: times[side])
                size = name.split()[1]
                texts.append(f"{size} {way}: {best}, {1e3 * times[best]:.0f} us")
    return "; ".join(texts)


QUESTIONS: dict[str, Callable[[Found], str]] = {
    "(i) what dropout costs the compiled step": _random_numbers,
    "(ii) cuBLAS with 512 columns": _cublas,
    "(iii) the product before the ReLU by Triton's template": _triton_product,
    "(iv) what the absorbed cross-attention is bound by": _absorbed,
    "(v) torch's fastest attention with dropout": _attention,
}
