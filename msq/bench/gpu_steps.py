"""The training step on a GPU beside its baselines, at one shape.

B0 is `nn.TransformerDecoder`, eager, in float32; B1 the same under torch.compile in bf16 with the
fastest attention backend; B2 the clean decoder (`msq.bench.clean_decoder`) under torch.compile,
with the same dropout. `packed` is the head of msq, `kernels` the same with every Triton kernel.
These four run as CUDA graphs; what the compiler made is compared with the module it made it of
before it is timed. Compiling may take minutes, or hang: what needs none is timed and written first,
and all sides are timed together anew whenever another one is ready.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from msq.bench.cases import Gate, Side, worst_of
from msq.bench.clean_decoder import CleanDecoder
from msq.bench.compiled_gate import compiled_gate
from msq.bench.gpu_timing import Run, Session, captured
from msq.bench.head_problem import TORCH_TOLERANCE, Problem, Shape, agreement
from msq.bench.runner import interleaved, quartiles
from msq.bench.torch_sides import TorchDecoder, fastest_backend, framework_forward, framework_step

CAPTURED = ("packed", "kernels", "B2", "B1")
COMPILED = ("B2", "B1")  # in the order of what they tell
ALL = (*CAPTURED, "eager bf16", "B0", "B0 TF32")
WITHOUT_DROPOUT = (*CAPTURED, "B0")


@dataclass(frozen=True, slots=True)
class Made:
    """A side that has not run yet.

    Attributes:
        run: its step.
        check: compares what a compiler made of it; None where none did.
    """

    run: Run
    check: Callable[[], Gate] | None = None


@dataclass(slots=True)
class Sides:
    """Those of one shape, as they become ready.

    Attributes:
        session: says where, and for how long.
        gates: of what was compared.
        ready: to be timed.
        found: what is known of each.
    """

    session: Session
    gates: list[Gate]
    ready: dict[str, Side] = field(default_factory=dict)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, make: Callable[[], Made]) -> None:
        """Make a side ready; what is wrong with it is a result like any other."""
        needs = 120.0 if name in COMPILED else 10.0
        if self.session.left() < needs and not self.session.tiny:
            self.found[name] = {"left_out": f"{self.session.left():.0f} s left"}
            return
        matmul = "high" if name == "B0 TF32" else "highest"
        before = functools.partial(torch.set_float32_matmul_precision, matmul)
        try:
            before()
            made = make()
            gate = None if made.check is None else made.check()
            if gate is not None:
                self.gates.append(gate)
            if gate is not None and not gate.ok:
                self.found[name] = {"error": f"not the same: {gate.what}: {gate.worst:.3g}, at "
                                    f"most {gate.tolerance:g}"}  # fmt: skip
                return
            run, self.found[name] = _ready(self.session.device, name, made.run)
        except Exception as error:  # a compiler's, or of memory
            text = str(error).strip() or repr(error)
            self.found[name] = {"error": text.splitlines()[0][:300]}
            return
        self.ready[name] = Side(run, before)

    def time(self) -> None:
        """All that are ready, interleaved."""
        for name, taken in interleaved(self.ready, self.session.rounds).items():
            self.found[name] |= quartiles([1e3 * t.wall for t in taken])
        torch.set_float32_matmul_precision("highest")


def steps(session: Session, shape: Shape, wanted: tuple[str, ...] = ALL) -> None:
    """Gates, then the step of every side wanted, interleaved; adds `step K=… B=… p=…`.

    The result is added once without what has to be compiled, and once for each of these; the last
    line of a name counts.
    """
    name = f"step K={shape.classes} B={shape.clips} p={shape.dropout:g}"
    problem = Problem(shape, session.device)
    with torch.no_grad():
        right = problem.head().eval()(problem.tokens, problem.image)["logits"]
    gate = _gate(problem, right)
    if not gate.ok:
        session.add(name, gate={"ok": False, "worst": gate.worst, "what": gate.what})
        return
    eager = TorchDecoder(problem.head()).train()
    backend, backends = fastest_backend(
        lambda b: _framework(problem, eager, True, b).run, session.device
    )
    makers = _makers(problem, eager, backend, right)
    sides = Sides(session, [gate])
    chosen = [side for side in wanted if side in makers]
    groups = [[s for s in chosen if s not in COMPILED], *([s] for s in COMPILED if s in chosen)]
    for group in groups:
        for side in group:
            sides.add(side, makers[side])
        if any(side in sides.ready for side in group):
            sides.time()
        worst = worst_of(sides.gates)
        session.add(
            name, gate={"ok": worst.ok, "worst": worst.worst, "what": worst.what},
            flops=shape.flops, backend=backend.name, backends=dict(backends),
            sides={side: dict(one) for side, one in sides.found.items()},
        )  # fmt: skip


def compiled(function: Callable[[], Tensor], device: str) -> Callable[[], Tensor]:
    """torch.compile at its best; on a CPU its tracing alone, for a dry run."""
    if device != "cuda":
        return torch.compile(function, backend="eager")
    return torch.compile(function, mode="max-autotune-no-cudagraphs")


def _makers(
    problem: Problem, eager: nn.Module, backend: SDPBackend, right: Tensor
) -> dict[str, Callable[[], Made]]:
    """What makes each side that there is on this device."""

    def by_compiler(name: str, kind: type[nn.Module]) -> Made:
        return _compiled(problem, name, kind(problem.head()), backend, right)

    def in_float32() -> Made:
        return _framework(problem, TorchDecoder(problem.head()), False, None)

    makers: dict[str, Callable[[], Made]] = {
        "packed": lambda: Made(problem.packed_step("bf16")),
        "B2": lambda: by_compiler("B2", CleanDecoder),
        "B1": lambda: by_compiler("B1", TorchDecoder),
        "eager bf16": lambda: _framework(problem, eager, True, backend),
        "B0": in_float32,
        "B0 TF32": in_float32,
    }
    kernels = problem.kernels("bf16")
    if kernels:
        makers["kernels"] = lambda: Made(problem.packed_step("bf16", kernels))
    return makers


def _ready(device: str, side: str, run: Run) -> tuple[Run, dict[str, Any]]:
    """The step in a CUDA graph where that goes, its peak memory and whether it is one."""
    found: dict[str, Any] = {}
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        found["peak_mb"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    # The eager baselines are what people run: not captured.
    ready, reason = captured(run, device) if side in CAPTURED else (run, "eager")
    return ready, {**found, "graph": reason}


def _framework(problem: Problem, module: nn.Module, low: bool, backend: SDPBackend | None) -> Made:
    """The step of a module, eager."""
    module.train()
    return Made(framework_step(
        _calling(problem, module), problem.loss, list(module.parameters()), device=problem.device,
        low=low, backend=backend,
    ))  # fmt: skip


def _compiled(
    problem: Problem, name: str, module: nn.Module, backend: SDPBackend, right: Tensor
) -> Made:
    """The step of a module under torch.compile in bf16, and the check of its forward pass."""
    module.train()
    capturable, logits = problem.device == "cuda", _calling(problem, module)
    fast = compiled(logits, problem.device)
    forward = functools.partial(framework_forward, device=problem.device, low=True,
                                backend=backend, cache=not capturable)  # fmt: skip
    step = framework_step(
        fast, problem.loss, list(module.parameters()), device=problem.device, low=True,
        backend=backend, capturable=capturable,
    )  # fmt: skip
    return Made(step, functools.partial(
        compiled_gate, name, forward(fast), forward(logits), right, problem.loss,
        dropout=problem.shape.dropout > 0, low=True,
    ))  # fmt: skip


def _calling(problem: Problem, module: nn.Module) -> Callable[[], Tensor]:
    def logits() -> Tensor:
        found: Tensor = module(problem.tokens, problem.image)
        return found

    return logits


def _gate(problem: Problem, right: Tensor) -> Gate:
    """Packed, with and without kernels, torch's decoder and the clean one against the plain."""
    shape, device = problem.shape, problem.device
    gates = [agreement(shape, device, p) for p in ("fp32", "bf16")]
    kernels = problem.kernels("bf16")
    if kernels:
        gates.append(agreement(shape, device, "bf16", kernels))
    with torch.no_grad():
        found = CleanDecoder(problem.head()).eval()(problem.tokens, problem.image)
    worst = float((found - right).abs().max() / right.abs().max())
    gates.append(Gate(worst, TORCH_TOLERANCE, "clean decoder and plain: logits without dropout"))
    return worst_of(gates)
