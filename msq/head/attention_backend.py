"""Which backend of torch's attention runs: chosen once, before the first step, and recorded.

Stage two asks torch for attention in one case: the plain head without dropout. (With dropout its
probabilities are multiplied by masks that are data, and the packed head has attention of its own.)
On a GPU the backends are timed at the sizes of the run. On a CPU nothing is timed, so that two runs
take the same one and end with the same bits: the fused one in float32, torch's plain products in
bf16, where the fused one took two to three times as long (`docs/log.md`).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

NAMES: Mapping[str, SDPBackend] = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
ROUNDS = 10


class AttentionChoice(NamedTuple):
    """What was chosen; `str` is the line for the log.

    Attributes:
        name: a key of `NAMES`.
        seconds: of forward and backward pass with each that can run; empty where none was timed.
    """

    name: str
    seconds: Mapping[str, float]

    def __str__(self) -> str:
        times = ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in self.seconds.items())
        return f"{self.name} ({times or 'by the rule for this kind of device'})"


def usable_backends(device: torch.device) -> dict[str, SDPBackend]:
    """Those that torch has for a kind of device; one of them may still refuse certain sizes."""
    both = ("math", "flash")
    return {n: b for n, b in NAMES.items() if device.type == "cuda" or n in both}


def attention_by(name: str) -> AbstractContextManager[None]:
    """A context in which torch's attention runs by this backend.

    Where it refuses an input, as the fused ones refuse some sizes, the plain products run. ""
    leaves the choice to torch.
    """
    if not name:
        return nullcontext()
    chosen: AbstractContextManager[None] = sdpa_kernel(
        list(dict.fromkeys((NAMES[name], SDPBackend.MATH))), set_priority=True
    )
    return chosen


def choose_attention(
    device: torch.device,
    precision: str,
    *,
    clips: int,
    queries: int,
    tokens: int,
    heads: int,
    width: int,
) -> AttentionChoice:
    """The fastest backend for one decoder layer, self-attention and cross-attention together.

    Args:
        device: to train on.
        precision: `fp32` or `bf16`.
        clips: B.
        queries: K.
        tokens: S.
        heads: H.
        width: D.
    """
    if device.type != "cuda":
        return AttentionChoice("math" if precision == "bf16" else "flash", {})
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    made = [
        torch.randn(clips, heads, length, width // heads, device=device, dtype=dtype)
        for length in (queries, queries, tokens)
    ]
    query, key, memory = (x.requires_grad_() for x in made)

    def layer() -> None:
        for other in (key, memory):
            mixed = F.scaled_dot_product_attention(query, other, other)
            torch.autograd.grad(mixed, (query, other), mixed.detach())

    return fastest(usable_backends(device), layer, device)


def fastest(
    backends: Mapping[str, SDPBackend],
    run: Callable[[], object],
    device: torch.device,
    rounds: int = ROUNDS,
) -> AttentionChoice:
    """Of several backends the one with which `run` takes least; those that refuse it are left out.

    Args:
        backends: by name.
        run: calls torch's attention.
        device: where it does.
        rounds: how often each runs, one after the other; the shortest time counts.
    """
    seconds: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name in backends if turn == 0 else tuple(seconds):
            took = _timed(backends[name], run, device)
            if took is not None:  # the first turn warms up
                seconds[name] = took if turn < 2 else min(seconds[name], took)
    return AttentionChoice(min(seconds, key=lambda name: seconds[name]), seconds)


def _timed(backend: SDPBackend, run: Callable[[], object], device: torch.device) -> float | None:
    """Seconds of one run; None where the backend refuses it."""
    try:
        with warnings.catch_warnings(), sdpa_kernel(backend):
            warnings.simplefilter("ignore")  # why a backend cannot be used
            _wait(device)
            began = time.perf_counter()
            run()
            _wait(device)
            return time.perf_counter() - began
    except RuntimeError:  # "No available kernel"
        return None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
