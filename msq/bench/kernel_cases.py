"""Every op of `msq.kernels` with inputs of a chosen size, and what it computes in plain PyTorch.

The plain form runs in any precision: in float64 it is what is right, in bfloat16 it is how wrong
PyTorch is itself, and so the measure for the kernel.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import msq.kernels
from msq.kernels.bits import mask_bits
from msq.kernels.cross_attention import absorbed_cross_attention
from msq.kernels.cross_attention_short import cross_attention
from msq.kernels.ffn import relu_drop
from msq.kernels.ffn_product import feed_forward
from msq.kernels.norm import drop_add_norm, kept
from msq.kernels.self_attention import self_attention

RATE = 410
SCALE = 4096 / (4096 - RATE)


@dataclass(frozen=True, slots=True)
class KernelCase:
    """One op on inputs of one size.

    Attributes:
        name: for people.
        op: as the table of tiles names it.
        ops: names in `torch.ops.msq` that it calls, backward included.
        tensors: what it is differentiated in.
        call: the op; True runs the kernel, False the reference.
        plain: the same from torch's own functions.
        grad: of the result.
        bytes: that forward has to read and write at least.
    """

    name: str
    op: str
    ops: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    call: Callable[[Any, bool], Tensor]
    plain: Callable[[Any], Tensor]
    grad: Tensor
    bytes: int = 0


def known_ops() -> set[str]:
    """Names of all ops that importing `msq.kernels` registers, `msq::` left off."""
    for module in pkgutil.iter_modules(msq.kernels.__path__, "msq.kernels."):
        if not module.ispkg:
            importlib.import_module(module.name)
    registered: Any = torch._C._dispatch_get_all_op_names()
    names = {str(name).split(".")[0] for name in registered}
    return {name.removeprefix("msq::") for name in names if name.startswith("msq::")}


def covered_ops() -> set[str]:
    """Those that the cases and the check of the mask bits exercise."""
    from msq.bench.temporal_cases import temporal_case

    tiny = (
        *kernel_cases(1, 2, 2, 32, 2, torch.float32, "cpu"),
        temporal_case(2, 2, 2, 16, torch.float32, "cpu"),
    )
    return {"mask_bits", *(op for case in tiny for op in case.ops)}


def kernel_cases(
    clips: int,
    queries: int,
    tokens: int,
    width: int,
    heads: int,
    dtype: torch.dtype,
    device: str,
    dropout: bool = True,
) -> Iterator[KernelCase]:
    """The differentiable ops as one decoder layer uses them.

    Args:
        clips: B.
        queries: K.
        tokens: S.
        width: D.
        heads: H.
        dtype: of the rows.
        device: of everything.
        dropout: with mask bits.
    """
    generator = torch.Generator().manual_seed(clips * 1000 + queries)

    def draw(*shape: int, size: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (size * torch.randn(*shape, generator=generator)).to(device, of)

    def bits(site: int, rows: int, columns: int) -> Tensor | None:
        key = torch.tensor([5, 6], device=device)
        return mask_bits(key, site, rows, columns, RATE) if dropout else None

    rows, scale = clips * queries, SCALE if dropout else 1.0
    vectors = (draw(width, of=torch.float32), draw(width, of=torch.float32))
    residual = bits(1, rows, width)
    two = (draw(rows, width), draw(rows, width), *vectors)
    grad = draw(rows, width)
    cell = torch.empty(0, dtype=dtype).element_size()
    where = f"B={clips} K={queries}{'' if dropout else ', no dropout'}"

    def dropped(x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return x
        return x * (kept(mask, x.shape[-1]).view(x.shape).to(x.dtype) * scale)

    def plain_norm(given: Sequence[Tensor]) -> Tensor:
        x, y, weight, bias = given
        h = x + dropped(y, residual)
        return F.layer_norm(h, (width,), weight.to(h.dtype), bias.to(h.dtype), 1e-5)

    yield KernelCase(
        f"drop_add_norm {where}", "drop_add_norm", ("drop_add_norm", "drop_add_norm_backward"), two,
        lambda given, triton: drop_add_norm(
            given[0], given[1], given[2], given[3], residual, scale, triton=triton
        ),
        plain_norm, grad, 4 * rows * width * cell,
    )  # fmt: skip

    of_self = bits(2, clips * heads * queries, queries)

    def plain_self(given: Sequence[Tensor], factorised: bool) -> Tensor:
        qkv = given[0].view(-1, queries, 3 * width)
        if factorised:
            added = given[1].view(clips, 1, 3, width)
            zero = torch.zeros_like(added[:, :, :1])
            added = torch.cat([added[:, :, :1], zero, added[:, :, 2:]], dim=2)
            qkv = qkv + added.reshape(clips, 1, 3 * width)
        split = qkv.view(clips, queries, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        q, k, v = split.unbind(0)
        p = (q @ k.transpose(-1, -2) / (width // heads) ** 0.5).softmax(-1)
        p = dropped(p.reshape(-1, queries), of_self).view(p.shape)
        return (p @ v).transpose(1, 2).reshape(rows, width)

    both = ("self_attention", "self_attention_backward")
    yield KernelCase(
        f"self_attention {where}", "self_attention", both, (draw(rows, 3 * width),),
        lambda given, triton: self_attention(
            given[0], clips, heads, of_self, scale, triton=triton
        ),
        lambda given: plain_self(given, False), grad, 4 * rows * width * cell,
    )  # fmt: skip
    yield KernelCase(
        f"self_attention, factorised {where}", "self_attention", both,
        (draw(queries, 3 * width), draw(clips, 3 * width)),
        lambda given, triton: self_attention(
            given[0], clips, heads, of_self, scale, clip=given[1], triton=triton
        ),
        lambda given: plain_self(given, True), grad, rows * width * cell,
    )  # fmt: skip

    of_cross = bits(3, clips * heads * queries, tokens)
    stack = (clips, heads, tokens, width)
    seven = (
        draw(rows, width), draw(*stack, size=width**-0.5), draw(*stack[:3]), draw(*stack),
        draw(width), *vectors,
    )  # fmt: skip

    def plain_cross(given: Sequence[Tensor]) -> Tensor:
        x, keys, beta, values, out_bias, weight, bias = given
        scores = x.view(clips, queries, width) @ keys.flatten(1, 2).transpose(1, 2)
        p = (scores.view(clips, queries, heads, tokens) + beta[:, None]).softmax(-1)
        if of_cross is not None:
            keep = kept(of_cross, tokens).view(clips, heads, queries, tokens).transpose(1, 2)
            p = p * (keep.to(p.dtype) * scale)
        y = (p.flatten(2) @ values.flatten(1, 2) + out_bias).flatten(0, 1)
        h = x + dropped(y, residual)
        return F.layer_norm(h, (width,), weight.to(h.dtype), bias.to(h.dtype), 1e-5)

    yield KernelCase(
        f"absorbed_cross {where}", "absorbed_cross",
        ("absorbed_cross", "absorbed_cross_backward", "drop_add_norm_backward"), seven,
        lambda given, triton: absorbed_cross_attention(
            given[0], given[1], given[2], given[3], given[4], given[5], given[6], of_cross,
            residual, scale, triton=triton,
        ),
        plain_cross, grad, 3 * rows * width * cell + 2 * seven[1].numel() * cell,
    )  # fmt: skip

    short = (draw(rows, width), draw(clips * tokens, 2 * width))

    def plain_short(given: Sequence[Tensor]) -> Tensor:
        q, kv = given
        split = q.view(clips, queries, heads, width // heads).transpose(1, 2)
        both = kv.view(clips, tokens, 2, heads, width // heads).permute(2, 0, 3, 1, 4)
        k, v = both.unbind(0)
        p = (split @ k.transpose(-1, -2) / (width // heads) ** 0.5).softmax(-1)
        p = dropped(p.reshape(-1, tokens), of_cross).view(p.shape)
        return (p @ v).transpose(1, 2).reshape(rows, width)

    yield KernelCase(
        f"cross_attention {where}", "cross_attention",
        ("cross_attention", "cross_attention_backward"), short,
        lambda given, triton: cross_attention(
            given[0], given[1], clips, heads, of_cross, scale, triton=triton
        ),
        plain_short, grad, 2 * rows * width * cell + short[1].numel() * cell,
    )  # fmt: skip

    hidden = (draw(rows, 4 * width), draw(4 * width))
    of_hidden = bits(4, rows, 4 * width)
    yield KernelCase(
        f"relu_drop {where}", "relu_drop", ("relu_drop", "relu_drop_backward"), hidden,
        lambda given, triton: relu_drop(given[0], given[1], of_hidden, scale, triton=triton),
        lambda given: dropped((given[0] + given[1]).relu(), of_hidden),
        draw(rows, 4 * width), 8 * rows * width * cell,
    )  # fmt: skip

    five = (
        draw(rows, width), draw(4 * width, width, size=width**-0.5), draw(4 * width),
        draw(width, 4 * width, size=width**-0.5), draw(width),
    )  # fmt: skip

    def plain_feed_forward(given: Sequence[Tensor]) -> Tensor:
        x, w1, b1, w2, b2 = given
        return F.linear(dropped(F.linear(x, w1, b1).relu(), of_hidden), w2, b2)

    yield KernelCase(
        f"ffn_product {where}", "ffn_product",
        ("ffn_product", "ffn_product_backward"), five,
        lambda given, triton: feed_forward(
            given[0], given[1], given[2], given[3], given[4], of_hidden, scale, triton=triton
        ),
        plain_feed_forward, draw(rows, width), 10 * rows * width * cell + 8 * width**2 * cell,
    )  # fmt: skip
