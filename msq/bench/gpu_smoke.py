"""Is everything right on this GPU: the packed head, every kernel, compilers, two runs alike.

Nothing here is timed. Each check gives a `Gate`; a red one says what differs and by how much.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from msq.bench.cases import Gate
from msq.bench.graph_check import graph_is_the_step
from msq.bench.head_problem import FLOAT64_TOLERANCE, Problem, Shape, agreement
from msq.bench.kernel_cases import RATE, KernelCase, kernel_cases
from msq.bench.kernel_coverage import covered_ops, known_ops
from msq.bench.temporal_cases import smoke_cases
from msq.head.packed import PackedHead
from msq.kernels.bits import mask_bits

Check = tuple[str, Callable[[], Gate]]
ROUNDING = 2.0**-8  # of a bfloat16 result: what no implementation can do better


def checks(device: str, *, tiny: bool = False) -> Iterator[Check]:
    """All checks, by name.

    Args:
        device: `cuda`; on the CPU references stand for the kernels.
        tiny: small sizes, to see that everything runs.
    """
    triton = device == "cuda"
    for dropout in (0.1, 0.0):
        for absorb in (False, True):
            name = f"packed = plain in float64, p={dropout:g}, absorbed={absorb}"
            yield name, lambda p=dropout, a=absorb: packed_in_float64(device, p, a)  # type: ignore[misc]
        shape = Shape(7 if tiny else 157, 4, dropout, quick=tiny)
        for precision in ("fp32", "bf16"):
            name = f"packed head, {precision}, p={dropout:g}, K={shape.classes}"
            yield name, lambda s=shape, p=precision: agreement(s, device, p)  # type: ignore[misc]
        name = f"packed head with kernels, bf16, p={dropout:g}, K={shape.classes}"
        yield name, lambda s=shape: with_kernels(s, device)  # type: ignore[misc]
    yield "every op has a check", every_op_is_covered
    yield "mask bits", lambda: bits_are_the_reference_s(device, triton)
    width, heads = (64, 2) if tiny else (512, 8)
    low = torch.bfloat16
    first, second = (5, 7) if tiny else (157, 20)
    # The kernels of every K are compiled when they are met: the sizes that matter most come first.
    for queries, dropout_on in ((first, True), (first, False), (second, True)):
        for case in kernel_cases(2, queries, 17, width, heads, low, device, dropout_on):
            yield case.name, lambda c=case: against_float64(c, triton)  # type: ignore[misc]
    for case in kernel_cases(2, second, 17, width, heads, low, device):
        yield f"two runs alike: {case.name}", lambda c=case: same_bits(c, triton)  # type: ignore[misc]
        yield f"opcheck: {case.name}", lambda c=case: sound(c, triton)  # type: ignore[misc]
    temporal = smoke_cases(device, low, tiny=tiny)
    for case in temporal:
        yield case.name, lambda c=case: against_float64(c, triton)  # type: ignore[misc]
    yield f"two runs alike: {temporal[0].name}", lambda: same_bits(temporal[0], triton)
    yield f"opcheck: {temporal[0].name}", lambda: sound(temporal[0], triton)
    yield "two trainings alike", lambda: same_training(device, tiny=tiny)
    for dropout in (0.1, 0.0):
        for kernels in (False, True):
            name = f"CUDA graph = step as it is, p={dropout:g}, kernels={kernels}"
            yield (
                name,
                lambda p=dropout, k=kernels: graph_is_the_step(  # type: ignore[misc]
                    device, p, kernels=k, tiny=tiny
                ),
            )
    for queries in () if tiny else (12, 51, 101, 140):
        for case in kernel_cases(2, queries, 17, width, heads, low, device):
            yield case.name, lambda c=case: against_float64(c, triton)  # type: ignore[misc]


def packed_in_float64(device: str, dropout: float, absorb: bool) -> Gate:
    """Logits and gradients of both heads, in float64 on the same masks."""
    problem = Problem(Shape(7, 3, dropout, quick=True), device, torch.float64)
    model, masks = problem.head().eval(), problem.masks()
    found: list[list[Tensor]] = []
    packed = PackedHead(model, absorb=absorb)
    for forward in (model, packed):
        logits = forward(problem.tokens, problem.image, masks=masks)["logits"]
        gradients = torch.autograd.grad(problem.loss(logits), list(model.parameters()))
        found.append([logits.detach(), *gradients])
    largest = max(float(x.abs().max()) for x in found[0][1:])
    # The bias of the keys has no gradient: its rounding is measured against the largest of all.
    distances = [
        float((a - b).abs().max()) / max(float(b.abs().max()), 1e-3 * largest)
        for b, a in zip(*found, strict=True)
    ]
    return Gate(max(distances), FLOAT64_TOLERANCE, "logits and gradients, over the largest number")


def with_kernels(shape: Shape, device: str) -> Gate:
    """The packed head with every kernel that it has, against the plain one."""
    return agreement(shape, device, "bf16", Problem(shape, device).kernels("bf16"))


def bits_are_the_reference_s(device: str, triton: bool) -> Gate:
    """Kernel and reference, byte for byte, on several rates and sizes."""
    key, wrong = torch.tensor([7, 2**40 + 3], device=device), 0
    for rate in (1, 205, RATE, 2048, 4095):
        for rows, columns in ((1, 1), (7, 157), (640, 512)):
            ours = mask_bits(key, 4, rows, columns, rate, triton=triton)
            right = mask_bits(key.cpu(), 4, rows, columns, rate)
            wrong += int((ours.cpu() != right).sum())
    return Gate(float(wrong), 0.0, "words that differ from the reference on the CPU")


def against_float64(case: KernelCase, triton: bool) -> Gate:
    """Result and gradients: the kernel's error over that of plain PyTorch in the same precision."""
    wide = [t.double() for t in case.tensors]
    right = _run(case.plain, wide, case.grad.double())
    ours = _run(lambda given: case.call(given, triton), case.tensors, case.grad)
    torchs = _run(case.plain, case.tensors, case.grad)
    worst = 0.0
    for a, b, expected in zip(ours, torchs, right, strict=True):
        if float(expected.norm()) == 0:  # one key or token always has all the attention
            continue
        allowed = max(_far(b, expected), ROUNDING / 2)
        worst = max(worst, _far(a, expected) / allowed)
        if not bool(a.isfinite().all()):
            worst = float("inf")
    return Gate(worst, 2.0, "error against float64 over that of plain PyTorch")


def same_bits(case: KernelCase, triton: bool) -> Gate:
    """Two runs of forward and backward."""
    first, second = (
        _run(lambda given: case.call(given, triton), case.tensors, case.grad) for _ in range(2)
    )
    different = sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return Gate(float(different), 0.0, "tensors that differ in a bit")


def sound(case: KernelCase, triton: bool) -> Gate:
    """`torch.library.opcheck` of what one call runs: schema, fake, autograd, AOT."""
    seen: list[tuple[torch._ops.OpOverload, tuple[object, ...]]] = []
    with _Recorder(seen):
        _run(lambda given: case.call(given, triton), case.tensors, case.grad)
    failed = []
    for op, arguments in seen:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = torch.library.opcheck(op, arguments, raise_exception=False)
        failed += [f"{op}: {name}" for name, state in result.items() if state != "SUCCESS"]
    return Gate(float(len(failed)), 0.0, "; ".join(failed) or f"failures in {len(seen)} ops")


def every_op_is_covered() -> Gate:
    """An op without a check would pass unseen."""
    missing = sorted(known_ops() - covered_ops())
    return Gate(float(len(missing)), 0.0, f"ops without a check: {', '.join(missing) or 'none'}")


def same_training(device: str, *, tiny: bool, steps: int = 5) -> Gate:
    """Losses of two runs of the packed head, with kernels and without, bit for bit."""
    shape = Shape(7 if tiny else 157, 4 if tiny else 32, 0.1, quick=tiny)
    precision = "bf16" if device == "cuda" else "fp32"
    names = Problem(shape, device).kernels(precision)
    different = 0
    for kernels in dict.fromkeys([(), names]):
        curves = [loss_curve(Problem(shape, device), precision, steps, kernels) for _ in range(2)]
        different += sum(a != b for a, b in zip(*curves, strict=True))
    return Gate(float(different), 0.0, f"losses of {steps} steps that differ")


def loss_curve(
    problem: Problem, precision: str, steps: int, kernels: tuple[str, ...] = ()
) -> list[float]:
    """Losses of the packed head in training."""
    step = problem.packed_step(precision, kernels, rate=1e-4)
    found = [step() for _ in range(steps)]
    return [float(loss) for loss in found]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the ops of msq that run, with their arguments."""

    def __init__(self, seen: list[tuple[torch._ops.OpOverload, tuple[object, ...]]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "msq" and all(func != op for op, _ in self.seen):
            leaves = not func._opname.endswith("_backward")
            self.seen.append((func, tuple(_copied(a, leaves) for a in args)))
        return func(*args, **(kwargs or {}))


def _run(
    form: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor], grad: Tensor
) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = form(leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def _copied(argument: object, leaf: bool) -> object:
    if not isinstance(argument, Tensor):
        return argument
    return argument.detach().clone().requires_grad_(leaf and argument.is_floating_point())


def _far(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
