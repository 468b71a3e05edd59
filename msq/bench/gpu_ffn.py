"""Is the first product of the FFN with its epilogue in Triton worth it: against cuBLAS and a pass.

The kernel is kept only where it takes at most 0.92 of the time of the two together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import msq.kernels.ffn
import msq.kernels.ffn_product  # noqa: F401 - registers the ops
from msq.bench.gpu_micro import LOOP, sizes
from msq.bench.gpu_timing import Run, Session, compare, median
from msq.bench.kernel_cases import RATE, SCALE
from msq.kernels.bits import mask_bits

NAME = "ffn product"
ERROR = 2.0  # at most that of the two apart, against float64, times this


def ffn_product(session: Session) -> None:
    """Product and epilogue in one and apart, forward and backward, after a check of the numbers."""
    clips, queries, _, width, _ = sizes(session)
    rows = clips * queries

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(*shape, device=session.device)).to(torch.bfloat16)

    x, grad, bias = draw(rows, width), draw(rows, width), draw(4 * width)
    w1, w2 = (draw(*s, size=width**-0.5) for s in ((4 * width, width), (width, 4 * width)))
    key = torch.tensor([1, 2], device=session.device)
    bits = mask_bits(key, 4, rows, 4 * width, RATE)
    hidden = _apart(x, w1, bias, bits, False)
    triton = session.device == "cuda"
    forms: dict[str, Callable[[], Any]] = {
        "apart, forward": functools.partial(_apart, x, w1, bias, bits, triton),
        "in one, forward": functools.partial(_in_one, x, w1, bias, bits, triton),
        "apart, backward": functools.partial(_apart_back, grad, w2, hidden, bias, triton),
        "in one, backward": functools.partial(_in_one_back, grad, w2, hidden, bias, triton),
    }
    error = _errors(forms, x, w1, bias, bits, grad, w2, hidden)
    right = all(error[f"in one, {way}"] <= ERROR * error[f"apart, {way}"] for way in _WAYS)
    runs: dict[str, Run] = dict(forms)
    session.add(
        NAME, errors=error, right=right, sides=compare(session, runs, LOOP) if right else {}
    )


def over_apart(found: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The worse of both directions: time in one over time apart; None where not measured."""
    ratios = []
    for way in _WAYS:
        one, two = (median(found, NAME, f"{side}, {way}") for side in ("in one", "apart"))
        if not one or not two:
            return None
        ratios.append(one / two)
    return float(max(ratios))


_WAYS = ("forward", "backward")


def _apart(x: Tensor, w1: Tensor, bias: Tensor, bits: Tensor, triton: bool) -> Tensor:
    out: Tensor = torch.ops.msq.relu_drop(torch.mm(x, w1.t()), bias, bits, SCALE, triton)
    return out


def _in_one(x: Tensor, w1: Tensor, bias: Tensor, bits: Tensor, triton: bool) -> Tensor:
    out: Tensor = torch.ops.msq.ffn_product(x, w1, bias, bits, SCALE, triton)
    return out


def _apart_back(grad: Tensor, w2: Tensor, hidden: Tensor, bias: Tensor, triton: bool) -> Tensor:
    dx: Tensor = torch.ops.msq.relu_drop_backward(torch.mm(grad, w2), hidden, bias, SCALE, triton)[
        0
    ]
    return dx


def _in_one_back(grad: Tensor, w2: Tensor, hidden: Tensor, bias: Tensor, triton: bool) -> Tensor:
    dx: Tensor = torch.ops.msq.ffn_product_backward(grad, w2, hidden, bias, SCALE, triton)[0]
    return dx


def _errors(
    forms: Mapping[str, Callable[[], Any]], x: Tensor, w1: Tensor, bias: Tensor, bits: Tensor,
    grad: Tensor, w2: Tensor, hidden: Tensor,
) -> dict[str, float]:  # fmt: skip
    """Relative L2 distance of each from float64."""
    right = {
        "forward": _in_one(x.double(), w1.double(), bias.double(), bits, False),
        "backward": _in_one_back(grad.double(), w2.double(), hidden.double(), bias.double(), False),
    }
    found = {}
    for name, form in forms.items():
        expected = right[name.rpartition(" ")[2]]
        found[name] = float((form().double() - expected).norm() / expected.norm())
    return found
