"""Attention over time of a video encoder: the op as a case, and its time against torch's attention.

All forms go from the packed result of the linear layer [P, T, 3 D] to [P, T, D], so that what each
has to copy on the way is in its time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from msq.bench.gpu_timing import Run, Session, compare
from msq.bench.kernel_cases import KernelCase
from msq.kernels.temporal_attention import temporal_attention

OPS = ("temporal_attention", "temporal_attention_backward")
PLACES = 196  # of TimeSformer-B: 14 x 14 patches
CLIPS = 32
FRAMES = (8, 16)
LOOP = 5  # runs in one CUDA graph
GATE_PROBLEMS = 1001  # in float64 beside it; ends within a tile


def temporal_case(
    problems: int, frames: int, heads: int, head_width: int, dtype: torch.dtype, device: str
) -> KernelCase:
    """Attention over time within each of some problems."""
    width = heads * head_width
    generator = torch.Generator().manual_seed(problems * 1000 + frames)
    qkv = torch.randn(problems, frames, 3 * width, generator=generator).to(device, dtype)
    grad = torch.randn(problems, frames, width, generator=generator).to(device, dtype)

    def plain(given: Sequence[Tensor]) -> Tensor:
        q, k, v = _split(given[0], heads)
        p = (q @ k.transpose(-1, -2) / math.sqrt(head_width)).softmax(-1)
        return (p @ v).transpose(1, 2).flatten(2)

    return KernelCase(
        f"temporal_attention P={problems} T={frames}", "temporal_attention", OPS, (qkv,),
        lambda given, triton: temporal_attention(given[0], heads, triton=triton),
        plain, grad, 4 * grad.numel() * grad.element_size(),
    )  # fmt: skip


def smoke_cases(device: str, dtype: torch.dtype, *, tiny: bool) -> list[KernelCase]:
    """Every tile that a public TimeSformer meets, with a last program that is not full."""
    heads, width, problems = (2, 16, 5) if tiny else (12, 64, PLACES + 1)
    return [temporal_case(problems, t, heads, width, dtype, device) for t in (8, 10, 16, 32, 96)]


def temporal(session: Session) -> None:
    """Kernel, reference, each backend of torch's attention and plain products, both ways."""
    from msq.bench.gpu_smoke import against_float64

    clips, places, heads, width = (2, 3, 2, 16) if session.tiny else (CLIPS, PLACES, 12, 64)
    triton = session.device == "cuda"
    for frames in FRAMES:
        few = min(GATE_PROBLEMS, clips * places)
        gate = against_float64(
            temporal_case(few, frames, heads, width, torch.bfloat16, session.device), triton
        )
        shown = {"ok": gate.ok, "worst": gate.worst, "tolerance": gate.tolerance}
        if not gate.ok:
            session.add(f"temporal attention T={frames}", gate=shown)
            continue
        case = temporal_case(clips * places, frames, heads, width, torch.bfloat16, session.device)
        forms: dict[str, Callable[[Any], Tensor]] = {
            "kernel": lambda given, case=case: case.call(given, triton),  # type: ignore[misc]
            "reference": lambda given, case=case: case.call(given, False),  # type: ignore[misc]
            "naive": case.plain,
        }
        for backend in (
            SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
        ):  # fmt: skip
            forms[f"torch {backend.name.split('_')[0].lower()}"] = functools.partial(
                _of_torch, backend, heads
            )
        runs: dict[str, Run] = {}
        for name, form in forms.items():
            runs[f"{name}, forward"] = functools.partial(_forward, case, form)
            runs[f"{name}, both ways"] = functools.partial(_both_ways, case, form)
        timed = compare(session, runs, LOOP)
        best = {way: _of_best(timed, way) for way in ("forward", "both ways")}
        session.add(
            f"temporal attention T={frames}", problems=clips * places, heads=heads,
            head_width=width, bytes=case.bytes, sides=timed, over_best_of_torch=best,
            gate=shown,
        )  # fmt: skip


def _of_best(timed: dict[str, dict[str, Any]], way: str) -> float | None:
    """How many times as long torch's fastest backend takes as the kernel."""
    times = [
        value["median"]
        for name, value in timed.items()
        if name.startswith("torch ") and name.endswith(f", {way}") and "median" in value
    ]
    own = timed[f"kernel, {way}"].get("median")
    return min(times) / own if times and own else None


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    split = qkv.view(*qkv.shape[:2], 3, heads, -1)
    q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _of_torch(backend: SDPBackend, heads: int, given: Sequence[Tensor]) -> Tensor:
    """As the encoder calls it."""
    q, k, v = _split(given[0], heads)
    with sdpa_kernel(backend):
        attended = F.scaled_dot_product_attention(q, k, v)
    return attended.transpose(1, 2).reshape(*given[0].shape[:2], -1)


def _forward(case: KernelCase, form: Callable[[Any], Tensor]) -> object:
    with torch.no_grad():
        return form(case.tensors)


def _both_ways(case: KernelCase, form: Callable[[Any], Tensor]) -> object:
    leaves = [t.detach().requires_grad_() for t in case.tensors]
    return torch.autograd.grad(form(leaves), leaves, case.grad)
