"""The parts of the GPU benchmark, each under eight minutes, K = 157 first.

1: the training step at the reference point, with dropout and without. 2: single operations.
3: ten heads at once, inference, two runs alike, other shapes. 4: the encoders of stage one. 5 and
6: the end-to-end step, at 8 and at 16 frames.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from msq.bench.cases import worst_of
from msq.bench.clean_decoder import CleanDecoder
from msq.bench.compiled_gate import compiled_gate, within, within_autocast
from msq.bench.gpu_encoders import encoders
from msq.bench.gpu_end_to_end import end_to_end_step
from msq.bench.gpu_ffn import ffn_product
from msq.bench.gpu_micro import (
    attention_backends,
    cross_attention_forms,
    kernels,
    mask_bits_of_a_step,
    matrix_products,
    triton_product,
)
from msq.bench.gpu_smoke import loss_curve
from msq.bench.gpu_stack import heads_at_once
from msq.bench.gpu_steps import ALL, WITHOUT_DROPOUT, compiled, steps
from msq.bench.gpu_timing import Run, Session, ceilings, compare
from msq.bench.head_problem import Problem, Shape
from msq.bench.temporal_cases import temporal
from msq.bench.torch_sides import framework_forward
from msq.head.evaluate import score
from msq.head.features import Features
from msq.head.packed import PackedHead

MINUTES = 8
CHARADES_STEPS = 32  # 7,985 training clips in batches of 256
OTHERS = ((140, 256), (51, 256), (20, 64))  # K, B
CURVE_STEPS = 20
SCORED = "as msq scores"


def run_part(number: int, session: Session) -> None:
    """All of one part; what fails or has no time left is recorded as such."""
    session.attempt("ceilings", functools.partial(ceilings, session))
    PARTS[number](session)


def reference_step(session: Session) -> None:
    """Part 1."""
    for dropout in (0.1, 0.0):
        shape = _shape(session, 157, 256, dropout)
        work = functools.partial(steps, session, shape, ALL if dropout else WITHOUT_DROPOUT)
        session.attempt(_name(shape), work, needs=60)


def operations(session: Session) -> None:
    """Part 2."""
    for work in (
        attention_backends, kernels, matrix_products, mask_bits_of_a_step, cross_attention_forms,
        triton_product, ffn_product, temporal,
    ):  # fmt: skip
        session.attempt(work.__name__, functools.partial(work, session))


def the_rest(session: Session) -> None:
    """Part 3."""
    session.attempt("heads at once", functools.partial(heads_at_once, session), needs=60)
    for clips in (256, 1):
        work = functools.partial(inference, session, clips)
        session.attempt(f"inference B={clips}", work, needs=60)
    session.attempt("loss curve", functools.partial(curves, session))
    for classes, clips in OTHERS:
        shape = _shape(session, classes, clips, 0.1)
        wanted = ("packed", "kernels", "B2", "eager bf16")
        session.attempt(_name(shape), functools.partial(steps, session, shape, wanted), needs=60)


PARTS: dict[int, Callable[[Session], None]] = {
    1: reference_step, 2: operations, 3: the_rest, 4: encoders,
    5: functools.partial(end_to_end_step, frames=8),
    6: functools.partial(end_to_end_step, frames=16),
}  # fmt: skip


def inference(session: Session, clips: int) -> None:
    """Logits of the packed head, of it with kernels, and of the compiled clean decoder, in bf16.

    These are CUDA graphs. `as msq scores` is the call that validation, `eval` and `predict` make:
    in float32, its weights joined anew, launch by launch.
    """
    name = f"inference B={clips}"
    problem = Problem(_shape(session, 157, clips, 0.0), session.device)
    model, clean = problem.head().eval(), CleanDecoder(problem.head()).eval()
    heads = {"packed": PackedHead(model, precision="bf16", frozen=True)}
    names = problem.kernels("bf16")
    if names:
        heads["kernels"] = PackedHead(model, precision="bf16", frozen=True, kernels=names)

    def clean_logits() -> Tensor:
        found: Tensor = clean(problem.tokens, problem.image)
        return found

    eager, fast = (
        torch.no_grad()(framework_forward(form, device=problem.device, low=True, cache=False))
        for form in (clean_logits, compiled(clean_logits, problem.device))
    )

    def packed(head: PackedHead) -> Tensor:
        with torch.no_grad():
            return head(problem.tokens, problem.image)["logits"]

    as_scored = functools.partial(score, model, _features(problem), batch=clips)
    with torch.no_grad():
        right = model(problem.tokens, problem.image)["logits"]
    gate = worst_of([
        compiled_gate("B2", fast, eager, right, problem.loss, dropout=False, low=True),
        *(within_autocast(side, packed(head), eager(), right) for side, head in heads.items()),
        within(SCORED, as_scored(), right),
    ])  # fmt: skip
    facts = {"ok": gate.ok, "worst": gate.worst, "what": gate.what}
    runs: dict[str, Run] = {"B2": fast, SCORED: as_scored}
    runs |= {side: functools.partial(packed, head) for side, head in heads.items()}
    sides = compare(session, runs, eager=[SCORED]) if gate.ok else {}
    session.add(name, gate=facts, sides=sides)


def _features(problem: Problem) -> Features:
    """The clips of a problem as they lie in memory when a command scores them."""
    clips, classes = len(problem.tokens), problem.shape.classes
    return Features(
        name="random", task="multilabel", splits=("test",) * clips,
        classes=tuple(map(str, range(classes))), ids=tuple(map(str, range(clips))),
        tokens=problem.tokens, labels=problem.labels.to(torch.uint8), image=problem.image,
        text=problem.text.to(problem.device),
    )  # fmt: skip


def curves(session: Session) -> None:
    """Two runs of some training steps at the reference point, with kernels and without."""
    shape = _shape(session, 157, 256, 0.1)
    precision = "bf16" if session.device == "cuda" else "fp32"
    names = Problem(shape, session.device).kernels(precision)
    different, last = {}, {}
    for side, ops in {"packed": (), **({"kernels": names} if names else {})}.items():
        first, second = (
            loss_curve(Problem(shape, session.device), precision, CURVE_STEPS, ops)
            for _ in range(2)
        )
        different[side] = sum(a != b for a, b in zip(first, second, strict=True))
        last[side] = first[-1]
    session.add("loss curve", steps=CURVE_STEPS, different=sum(different.values()),
                different_by_side=different, last=last)  # fmt: skip


def _shape(session: Session, classes: int, clips: int, dropout: float) -> Shape:
    if session.tiny:
        return Shape(min(classes, 5), min(clips, 2), dropout, quick=True)
    return Shape(classes, clips, dropout)


def _name(shape: Shape) -> str:
    return f"step K={shape.classes} B={shape.clips} p={shape.dropout:g}"
