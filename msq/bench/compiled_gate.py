"""Whether a compiled forward pass gives what the same module gives eagerly, before it is timed.

Without dropout the two are the same to rounding. With it each draws numbers of its own, so what is
compared is the mean loss of some draws: within what chance allows, or within one percent, which is
more than bf16 makes of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from torch import Tensor

from msq.bench.cases import Gate

Forward = Callable[[], Tensor]

TOLERANCE = 1e-4  # of logits in float32, of the largest one
BF16_TOLERANCE = 2.0  # times the error of the eager form
DRAWS = 8
DEVIATIONS = 6.0  # of the difference of two means
LOSS_TOLERANCE = 1e-2


def compiled_gate(
    name: str,
    compiled: Forward,
    eager: Forward,
    right: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    dropout: bool,
    low: bool,
) -> Gate:
    """The logits of a compiled module beside those of the module itself.

    Args:
        name: of the side.
        compiled: its forward pass as it is timed, gradients asked for.
        eager: that of the module, in the same precision.
        right: logits [B, K] without dropout, in float32.
        loss: of logits.
        dropout: whether both drop numbers.
        low: both are in bf16.
    """
    if dropout:
        ours, theirs = ([float(loss(form()).detach()) for _ in range(DRAWS)]
                        for form in (compiled, eager))  # fmt: skip
        worst = _beyond_chance(ours, theirs)
        return Gate(worst, 1.0, f"{name}, compiled and eager: mean loss of {DRAWS} draws of the "
                    "dropout, over what chance or one percent allow")  # fmt: skip
    if not low:
        return within(f"{name}, compiled,", compiled(), right)
    return within_autocast(f"{name}, compiled,", compiled(), eager(), right)


def within(name: str, found: Tensor, right: Tensor) -> Gate:
    """Logits [B, K] in float32 beside the right ones."""
    what = f"{name} and plain: logits without dropout, largest difference over the largest"
    return Gate(_far(found, right, math.inf), TOLERANCE, what)


def within_autocast(name: str, found: Tensor, eager: Tensor, right: Tensor) -> Gate:
    """Logits [B, K] in bf16: their error over that of an eager form under autocast."""
    allowed = max(_far(eager, right, 2), 2.0**-9)
    return Gate(_far(found, right, 2) / allowed, BF16_TOLERANCE, f"{name} in bf16: error of the "
                "logits without dropout over that of the eager form")  # fmt: skip


def _beyond_chance(ours: list[float], theirs: list[float]) -> float:
    """Difference of two means over what it may be; not finite where a loss is not."""
    if not all(math.isfinite(value) for value in (*ours, *theirs)):
        return math.inf
    spread = sum(statistics.variance(values) / len(values) for values in (ours, theirs))
    expected = statistics.mean(theirs)
    allowed = max(DEVIATIONS * math.sqrt(spread), LOSS_TOLERANCE * abs(expected))
    return abs(statistics.mean(ours) - expected) / allowed


def _far(found: Tensor, right: Tensor, order: float) -> float:
    """A norm of the difference over that of what is right."""
    apart = (found.detach().to(right.dtype) - right).flatten()
    return float(apart.norm(p=order) / right.norm(p=order))
