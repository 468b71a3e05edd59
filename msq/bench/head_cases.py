"""The training step of a head: forward, backward and optimiser, in five forms.

`packed` is the step that `msq train-head` takes, without its clipping, its average of the weights
and its gathering of clips, which no other side has either; `plain` the readable head, eager;
`torch` the same head around `nn.TransformerDecoder` with the fastest attention backend of torch;
`compiled` what torch.compile makes of that, compared with it before it is timed; `authors` the
authors' procedure, 6 + 6 layers of `nn.Transformer` in float32 with the concatenation of labels and
image, against a packed head of the same shape. On a GPU `kernels` is the packed head with every
Triton kernel that it has.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from msq.bench.cases import Case, Gate, Prepared, Settings, Side, worst_of
from msq.bench.compiled_gate import compiled_gate
from msq.bench.head_problem import Problem, Shape, agreement, authors_or_torch
from msq.bench.torch_sides import (
    Step,
    TorchDecoder,
    fastest_backend,
    framework_forward,
    framework_step,
)
from msq.head.packed_choice import bf16_is_native

SHAPES = ((157, 16), (20, 64))  # K, B
QUICK_SHAPES = ((7, 4),)
DROPOUTS = (0.1, 0.0)


def cases(settings: Settings) -> Iterable[Case]:
    """For each number of classes: dropout and precision, then the authors' procedure."""
    sides = "packed, plain, torch" + (", compiled" if settings.compile else "")
    for classes, clips in QUICK_SHAPES if settings.quick else SHAPES:
        for dropout in DROPOUTS:
            shape = Shape(classes, clips, dropout, quick=settings.quick)
            for precision in ("fp32", "bf16"):
                slow = "" if settings.quick else _slow(precision, settings.device)
                emulated = ", bf16 emulated" if slow and settings.emulated else ""
                yield Case(
                    name=f"step K={classes} B={clips} p={dropout:g} {precision}",
                    compares=f"one training step of the decoder head: {sides}{emulated}",
                    base="packed",
                    unit="ms",
                    rounds=9,
                    prepare=functools.partial(_prepare, shape, precision),
                    not_here="" if settings.emulated else slow,
                )
        shape = Shape(classes, clips, DROPOUTS[0], official=True, quick=settings.quick)
        yield Case(
            name=f"step 6+6 K={classes} B={clips} p={DROPOUTS[0]:g} fp32",
            compares="one training step of the authors' 6 + 6 head: packed, plain, authors",
            base="packed",
            unit="ms",
            rounds=9,
            prepare=functools.partial(_prepare, shape, "fp32"),
        )


def _slow(precision: str, device: str) -> str:
    if precision == "fp32" or bf16_is_native(device):
        return ""
    return (
        "this processor has no bf16 products (AVX512-BF16, AMX); --emulated times emulated ones, "
        "which say nothing of processors that have them"
    )


@contextmanager
def _prepare(shape: Shape, precision: str, settings: Settings) -> Iterator[Prepared]:
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    with torch.random.fork_rng(devices=["cuda"] if settings.device == "cuda" else []):
        torch.manual_seed(0)
        problem, made = Problem(shape, settings.device), dict[str, Side]()
        prepared = Prepared(
            gate=lambda: _gate(problem, precision, settings, made, prepared.left_out),
            sides=lambda: _sides(problem, precision) | made,
            # A large product where it is emulated is no ceiling: a step can be faster than that.
            flops=None if _slow(precision, settings.device) else shape.flops,
            precision=precision,
        )
        yield prepared


def _gate(
    problem: Problem, precision: str, settings: Settings, made: dict[str, Side],
    left_out: dict[str, str],
) -> Gate:  # fmt: skip
    """Compares all forms; `compiled` is made here, for what is timed is what was compared."""
    shape, device = problem.shape, problem.device
    gates = [agreement(shape, device, precision)]
    kernels = problem.kernels(precision)
    if kernels:
        gates.append(agreement(shape, device, precision, kernels))
    if settings.compile and not problem.shape.official:
        try:
            side, gate = _compiled(problem, precision)
        except Exception as error:  # whatever the compiler of the machine says
            left_out["compiled"] = str(error).strip().splitlines()[0][:200]
        else:
            made["compiled"] = side
            gates.append(gate)
    return worst_of(gates)


def _compiled(problem: Problem, precision: str) -> tuple[Side, Gate]:
    """The step of torch's modules under torch.compile, and its logits beside theirs."""
    low, device = precision == "bf16", problem.device
    module = TorchDecoder(problem.head()).train()
    parameters, logits = list(module.parameters()), _calling(problem, module)
    with torch.no_grad():
        right = problem.head().eval()(problem.tokens, problem.image)["logits"]
    spare = TorchDecoder(problem.head()).train()
    backend, _ = fastest_backend(
        lambda b: framework_step(_calling(problem, spare), problem.loss, list(spare.parameters()),
                                 device=device, low=low, backend=b),
        device,
    )  # fmt: skip
    fast = torch.compile(logits, mode="max-autotune" if device == "cuda" else None)
    forward = functools.partial(framework_forward, device=device, low=low, backend=backend)
    gate = compiled_gate("compiled", forward(fast), forward(logits), right, problem.loss,
                         dropout=problem.shape.dropout > 0, low=low)  # fmt: skip
    step = framework_step(fast, problem.loss, parameters, device=device, low=low, backend=backend)
    return Side(step), gate


def _calling(problem: Problem, module: nn.Module) -> Callable[[], Tensor]:
    def logits() -> Tensor:
        found = module(problem.tokens, problem.image)
        chosen: Tensor = found["logits"] if isinstance(found, dict) else found
        return chosen

    return logits


def _sides(problem: Problem, precision: str) -> dict[str, Side]:
    low = precision == "bf16"
    step = functools.partial(framework_step, loss=problem.loss, device=problem.device, low=low)

    plain = problem.head().train()
    found: dict[str, Step] = {
        "packed": problem.packed_step(precision),
        "plain": step(_calling(problem, plain), parameters=list(plain.parameters())),
    }
    kernels = problem.kernels(precision)
    if kernels:
        found["kernels"] = problem.packed_step(precision, kernels)
    module = authors_or_torch(problem).train()
    parameters = list(module.parameters())
    if problem.shape.official:
        # As their code does: torch chooses the attention backend.
        found["authors"] = step(_calling(problem, module), parameters=parameters)
        return {name: Side(run) for name, run in found.items()}
    backend, _ = fastest_backend(
        lambda b: step(_calling(problem, module), parameters=parameters, backend=b), problem.device
    )
    found["torch"] = step(_calling(problem, module), parameters=parameters, backend=backend)
    return {name: Side(run) for name, run in found.items()}
