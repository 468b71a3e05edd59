"""Who answers the tuner: a GPU, or in a dry run a clock that is none."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from msq.bench.gpu_smoke import against_float64
from msq.bench.gpu_timing import Run, Session, compare
from msq.bench.kernel_cases import KernelCase, kernel_cases
from msq.bench.tune import Judge, Times
from msq.bench.tune_candidates import Bucket
from msq.head.absorbed import absorbed_attention
from msq.head.masks import Masks, Part, Site
from msq.head.packed_blocks import CrossAttend, DropAddNorm, FeedForward, SelfAttend, split_heads
from msq.head.packed_kernels import OPS, KernelBlocks
from msq.kernels.tiles import Tile, forced

GATE_CLIPS = 2
LOOP = 5  # runs in one CUDA graph


def fake_judge() -> Judge:
    """Every candidate is right; times are functions of names, the same in every run."""

    def milliseconds(name: str) -> Mapping[str, float]:
        median = 1 + zlib.crc32(name.encode()) % 1000 / 1000
        return {"median": median, "q25": 0.9 * median, "q75": 1.1 * median}

    def time(bucket: Bucket, sets: Mapping[str, Sequence[Tile]], both: bool) -> Times:
        return {name: milliseconds(f"{bucket} {name} {both}") for name in sets}

    def against(bucket: Bucket, tiles: Sequence[Tile]) -> Times:
        return {name: milliseconds(f"{bucket} {name}") for name in ("kernel", "packed")}

    return Judge(lambda *_: True, time, against)


def gpu_judge(session: Session) -> Judge:
    """By running it, in bfloat16 with dropout."""
    return Judge(
        functools.partial(_right, session),
        functools.partial(_time, session),
        functools.partial(_against, session),
    )


def _right(session: Session, bucket: Bucket, tiles: Sequence[Tile]) -> bool:
    """At most twice as far from float64 as plain PyTorch in the same precision."""
    case = _case(session, bucket, min(bucket.clips, GATE_CLIPS))
    with forced(*tiles):
        return against_float64(case, session.device == "cuda").ok


def _time(
    session: Session, bucket: Bucket, sets: Mapping[str, Sequence[Tile]], both: bool
) -> Times:
    case = _case(session, bucket, bucket.clips)
    runs: dict[str, Run] = {}
    for name, tiles in sets.items():
        runs[name] = functools.partial(_run_case, case, tiles, both, session.device == "cuda")
    return _only_timed(compare(session, runs, LOOP))


def _against(session: Session, bucket: Bucket, tiles: Sequence[Tile]) -> Times:
    """Both ways, with whatever products the two sides do not have in common."""
    leaves, forms = block(bucket, session.device, torch.bfloat16, triton=session.device == "cuda")
    with forced(*tiles):
        grad = torch.randn_like(forms["kernel"]().detach())

    def both_ways(form: Callable[[], Tensor]) -> object:
        with forced(*tiles):
            return torch.autograd.grad(form(), leaves, grad)

    runs = {name: functools.partial(both_ways, form) for name, form in forms.items()}
    return _only_timed(compare(session, runs, LOOP))


def _only_timed(found: Mapping[str, Mapping[str, Any]]) -> Times:
    return {name: times for name, times in found.items() if "median" in times}


def _case(session: Session, bucket: Bucket, clips: int) -> KernelCase:
    sizes = (clips, bucket.queries, bucket.tokens, bucket.width, bucket.heads)
    for case in kernel_cases(*sizes, torch.bfloat16, session.device):
        if case.op == bucket.op:
            return case
    raise KeyError(bucket.op)


def _run_case(case: KernelCase, tiles: Sequence[Tile], both: bool, triton: bool) -> object:
    with forced(*tiles):
        if not both:
            with torch.no_grad():
                return case.call(case.tensors, triton)
        leaves = [t.detach().requires_grad_() for t in case.tensors]
        return torch.autograd.grad(case.call(leaves, triton), leaves, case.grad)


def block(
    bucket: Bucket, device: str, dtype: torch.dtype, *, triton: bool
) -> tuple[list[Tensor], dict[str, Callable[[], Tensor]]]:
    """The piece of the packed head that an op belongs to: `kernel`, and what runs without it.

    Returns:
        What it is differentiated in, and the forms by name; all give the same numbers.
    """
    generator = torch.Generator().manual_seed(0)
    b, k, s, d, h = bucket.clips, bucket.queries, bucket.tokens, bucket.width, bucket.heads
    masks = Masks(0, 0, 0.1, device).at(Part.decoder)
    blocks = KernelBlocks(OPS, h, triton=triton)
    leaves: list[Tensor] = []

    def leaf(*shape: int, size: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        made = (size * torch.randn(*shape, generator=generator)).to(device, of).requires_grad_()
        leaves.append(made)
        return made

    def linear(out: int, into: int) -> tuple[Tensor, Tensor]:
        return leaf(out, into, size=into**-0.5), leaf(out)

    if bucket.op == "self_attention":
        packed = leaf(b * k, 3 * d)
        return leaves, {
            "kernel": lambda: blocks.self_attention(packed, b, masks),
            "packed": lambda: SelfAttend.apply(split_heads(packed, b, 3, h), masks),
        }
    x = leaf(b * k, d)
    if bucket.op == "relu_drop":
        expand, contract = linear(4 * d, d), linear(d, 4 * d)
        return leaves, {
            "kernel": lambda: blocks.feed_forward(x, expand, contract, masks),
            "packed": lambda: FeedForward.apply(x, *expand, *contract, masks),
        }
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    norm = (leaf(d, of=wide), leaf(d, of=wide))

    def after(y: Tensor) -> Tensor:
        out: Tensor = DropAddNorm.apply(x, y, *norm, masks, Site.cross_residual)
        return out

    if bucket.op == "drop_add_norm":
        y = leaf(b * k, d)
        return leaves, {
            "kernel": lambda: blocks.add_norm(x, y, norm, masks, Site.cross_residual),
            "packed": lambda: after(y),
        }
    query, out, kv = linear(d, d), linear(d, d), leaf(b * s, 2 * d)
    keys, values = kv.view(b, s, 2, h, d // h).unbind(2)

    def standard() -> Tensor:
        q = split_heads(F.linear(x, *query), b, 1, h)[0]
        mixed = CrossAttend.apply(q, keys.transpose(1, 2), values.transpose(1, 2), masks)
        return after(F.linear(mixed, *out))

    def absorbed() -> Tensor:
        y = absorbed_attention(x.view(b, k, d), keys, values, query, out, masks)
        return after(y.view(b * k, d))

    def short() -> Tensor:
        mixed = blocks.cross_attention(F.linear(x, *query), kv, b, masks)
        return after(F.linear(mixed, *out))

    def fused() -> Tensor:
        return blocks.absorbed_cross(x, keys, values, query, out, norm, masks)

    kernel = fused if bucket.op == "absorbed_cross" else short
    return leaves, {"kernel": kernel, "standard": standard, "absorbed": absorbed}
