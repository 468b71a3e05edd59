"""The training step on a GPU beside its baselines, at one shape.

B0 is `nn.TransformerDecoder`, eager, in float32; B1 the same under torch.compile in bf16 with the
fastest attention backend; B2 the clean decoder (`msq.bench.clean_decoder`) under torch.compile,
with the same dropout. `packed` is the head of msq, `kernels` the same with every Triton kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from msq.bench.cases import Gate, Side, worst_of
from msq.bench.clean_decoder import CleanDecoder
from msq.bench.gpu_timing import Run, Session, captured
from msq.bench.head_problem import TORCH_TOLERANCE, Problem, Shape, agreement
from msq.bench.runner import interleaved, quartiles
from msq.bench.torch_sides import TorchDecoder, fastest_backend, framework_step

COMPILED = ("packed", "kernels", "B2", "B1")
ALL = (*COMPILED, "eager bf16", "B0", "B0 TF32")


def steps(session: Session, shape: Shape, wanted: tuple[str, ...] = ALL) -> None:
    """Gates, then the step of every side wanted, interleaved; adds `step K=… B=… p=…`."""
    name = f"step K={shape.classes} B={shape.clips} p={shape.dropout:g}"
    problem = Problem(shape, session.device)
    gate = _gate(problem)
    if not gate.ok:
        session.add(name, gate={"ok": False, "worst": gate.worst, "what": gate.what})
        return
    eager = TorchDecoder(problem.head()).train()
    backend, backends = fastest_backend(
        lambda b: _framework(problem, eager, True, b, False), session.device
    )
    makers: dict[str, Callable[[], Run]] = {
        "packed": lambda: problem.packed_step("bf16"),
        "B2": lambda: _framework(problem, CleanDecoder(problem.head()), True, backend, True),
        "B1": lambda: _framework(problem, TorchDecoder(problem.head()), True, backend, True),
        "eager bf16": lambda: _framework(problem, eager, True, backend, False),
        "B0": lambda: _framework(problem, TorchDecoder(problem.head()), False, None, False),
        "B0 TF32": lambda: _framework(problem, TorchDecoder(problem.head()), False, None, False),
    }
    kernels = problem.kernels("bf16")
    if kernels:
        makers["kernels"] = lambda: problem.packed_step("bf16", kernels)
    sides: dict[str, Side] = {}
    found: dict[str, dict[str, Any]] = {}
    for side in [s for s in wanted if s in makers]:
        needs = 120.0 if side in ("B1", "B2") else 10.0
        if session.left() < needs and not session.tiny:
            found[side] = {"left_out": f"{session.left():.0f} s left"}
            continue
        try:
            sides[side], found[side] = _ready(session, side, makers[side])
        except Exception as error:  # a compiler's, or of memory
            found[side] = {"error": str(error).strip().splitlines()[0][:300]}
    for side, taken in interleaved(sides, session.rounds).items():
        found[side] |= quartiles([1e3 * t.wall for t in taken])
    torch.set_float32_matmul_precision("highest")
    session.add(
        name, gate={"ok": True, "worst": gate.worst, "what": gate.what}, flops=shape.flops,
        backend=backend.name, backends=dict(backends), sides=found,
    )  # fmt: skip


def compiled(function: Callable[[], Tensor], device: str) -> Callable[[], Tensor]:
    """torch.compile at its best; on a CPU its tracing alone, for a dry run."""
    if device != "cuda":
        return torch.compile(function, backend="eager")
    return torch.compile(function, mode="max-autotune-no-cudagraphs")


def _ready(session: Session, side: str, maker: Callable[[], Run]) -> tuple[Side, dict[str, Any]]:
    """The step in a CUDA graph where that goes, its peak memory and whether it is one."""
    matmul = "high" if side == "B0 TF32" else "highest"
    before = functools.partial(torch.set_float32_matmul_precision, matmul)
    before()
    run, found = maker(), {}
    run()
    if session.device == "cuda":
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        found["peak_mb"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    # The eager baselines are what people run: not captured.
    graph = side in ("packed", "kernels", "B1", "B2")
    ready, reason = captured(run, session.device) if graph else (run, "eager")
    return Side(ready, before), {**found, "graph": reason}


def _framework(
    problem: Problem, module: nn.Module, low: bool, backend: SDPBackend | None, compile: bool
) -> Run:
    module.train()

    def logits() -> Tensor:
        found: Tensor = module(problem.tokens, problem.image)
        return found

    return framework_step(
        compiled(logits, problem.device) if compile else logits,
        problem.loss, list(module.parameters()), device=problem.device, low=low,
        backend=backend, capturable=compile and problem.device == "cuda",
    )  # fmt: skip


def _gate(problem: Problem) -> Gate:
    """Packed, with and without kernels, torch's decoder and the clean one against the plain."""
    shape, device = problem.shape, problem.device
    gates = [agreement(shape, device, p) for p in ("fp32", "bf16")]
    kernels = problem.kernels("bf16")
    if kernels:
        gates.append(agreement(shape, device, "bf16", kernels))
    with torch.no_grad():
        expected = problem.head().eval()(problem.tokens, problem.image)["logits"]
        found = CleanDecoder(problem.head()).eval()(problem.tokens, problem.image)
    worst = float((found - expected).abs().max() / expected.abs().max())
    gates.append(Gate(worst, TORCH_TOLERANCE, "clean decoder and plain: logits without dropout"))
    return worst_of(gates)
