"""Single operations on a GPU: the questions that the design of the kernels left open."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from msq.bench.gpu_timing import Run, Session, compare, median
from msq.bench.kernel_cases import RATE, SCALE, KernelCase, kernel_cases
from msq.head.masks import Masks, Part, Site
from msq.kernels.bits import mask_bits
from msq.kernels.cross_attention import absorbed_cross_attention, columns
from msq.kernels.tiles import find_tile

BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
LOOP = 10  # runs in one CUDA graph


def sizes(session: Session) -> tuple[int, int, int, int, int]:
    """B, K, S, D and H of the reference point."""
    return (2, 5, 3, 32, 2) if session.tiny else (256, 157, 17, 512, 8)


def matrix_products(session: Session) -> None:
    """How fast cuBLAS is at K = 512: every product of a decoder layer, in FLOP/s."""
    clips, queries, _, width, _ = sizes(session)
    m, found = clips * queries, {}
    for name, (n, k) in {
        "qkv": (3 * width, width), "out": (width, width),
        "expand": (4 * width, width), "contract": (width, 4 * width),
    }.items():  # fmt: skip
        x, w, g = (_draw(session, *s) for s in ((m, k), (n, k), (m, n)))
        timed = compare(
            session,
            {
                "forward": functools.partial(F.linear, x, w),
                "of the input": functools.partial(torch.mm, g, w),
                "of the weight": functools.partial(torch.mm, g.t(), x),
            },
            LOOP,
        )
        for way, value in timed.items():
            if "median" in value:
                value["flops"] = 2 * m * n * k / (1e-3 * value["median"])
            found[f"{name}, {way}"] = value
    session.add("matrix products", m=m, sides=found)


def triton_product(session: Session) -> None:
    """The product before the ReLU by Inductor's Triton template, and by cuBLAS."""
    import torch._inductor.config as inductor

    clips, queries, _, width, _ = sizes(session)
    x, w = _draw(session, clips * queries, width), _draw(session, 4 * width, width)
    runs: dict[str, Run] = {"cublas": functools.partial(F.linear, x, w)}
    if session.device == "cuda":
        with inductor.patch(max_autotune=True, max_autotune_gemm_backends="TRITON"):
            best = torch.compile(F.linear)
            best(x, w)
        runs["triton"] = functools.partial(best, x, w)
    session.add("triton product", sides=compare(session, runs, LOOP))


def attention_backends(session: Session) -> None:
    """Every backend of torch's attention at K x K and K x S, with dropout and without."""
    clips, queries, tokens, width, heads = sizes(session)
    for keys in (queries, tokens):
        for p in (0.1, 0.0):
            q = _draw(session, clips, heads, queries, width // heads).requires_grad_()
            k, v = (
                _draw(session, clips, heads, keys, width // heads).requires_grad_()
                for _ in range(2)
            )
            runs: dict[str, Run] = {}
            for name, backend in BACKENDS.items():
                runs[f"{name}, forward"] = functools.partial(_attend, q, k, v, p, backend, False)
                runs[f"{name}, both ways"] = functools.partial(_attend, q, k, v, p, backend, True)
            session.add(f"attention {queries}x{keys} p={p:g}", sides=compare(session, runs, LOOP))


def kernels(session: Session) -> None:
    """Every op: kernel, reference and plain PyTorch, forward and both ways; bytes per second."""
    made = kernel_cases(*sizes(session), torch.bfloat16, session.device)
    for case in made:
        runs: dict[str, Run] = {}
        forms: dict[str, Callable[[Any], Tensor]] = {
            "kernel": functools.partial(case.call, triton=session.device == "cuda"),  # type: ignore[call-arg]
            "reference": functools.partial(case.call, triton=False),  # type: ignore[call-arg]
            "plain": case.plain,
        }
        for name, form in forms.items():
            runs[f"{name}, forward"] = functools.partial(_forward, case, form)
            runs[f"{name}, both ways"] = functools.partial(_both_ways, case, form)
        timed = compare(session, runs, LOOP)
        for value in timed.values():
            if "median" in value:
                value["bytes_per_s"] = case.bytes / (1e-3 * value["median"])
        more = _tiled(session) if case.op == "absorbed_cross" else {}
        session.add(f"kernel {case.name.split(' B=')[0]}", bytes=case.bytes, sides=timed, **more)


def _tiled(session: Session) -> dict[str, Any]:
    """Sizes of the absorbed cross-attention, with its columns of scores and rows of a program."""
    size = sizes(session)
    wide = columns(size[2], size[4])
    generation = torch.cuda.get_device_capability() if session.device == "cuda" else None
    tile = find_tile("absorbed_cross", generation, wide)
    return {"sizes": size, "columns": wide, "rows": tile.sizes["ROWS"]}


def mask_bits_of_a_step(session: Session) -> None:
    """All decisions of a step: six layers, six places."""
    clips, queries, tokens, width, heads = sizes(session)
    rows = clips * queries
    key = torch.tensor([1, 2], device=session.device)
    places = [
        (clips * heads * queries, queries), (rows, width), (clips * heads * queries, tokens),
        (rows, width), (rows, 4 * width), (rows, width),
    ]  # as `Site` lists them  # fmt: skip
    triton = session.device == "cuda"

    def kernel() -> None:
        for layer in range(6):
            for site, (lines, across) in enumerate(places):
                mask_bits(key, 8 * layer + site, lines, across, RATE, triton=triton)

    def of_the_head() -> None:
        masks = Masks(1, 2, 0.1, session.device)
        for layer in range(6):
            for site, (lines, across) in zip(Site, places, strict=True):
                masks.bits(Part.decoder, layer, site, lines, across)

    found = compare(session, {"kernel": kernel})
    found |= compare(session, {"packed head": of_the_head}, capture=False)
    decisions = 6 * sum(lines * columns for lines, columns in places)
    session.add("mask bits", decisions=decisions, sides=found)


def cross_attention_forms(session: Session) -> None:
    """From k and v to the next LayerNorm: compiled standard form, absorbed form with its kernel."""
    clips, queries, tokens, width, heads = sizes(session)
    rows, d = clips * queries, width // heads
    x = _draw(session, clips, queries, width).requires_grad_()
    k, v = (_draw(session, clips, tokens, heads, d).requires_grad_() for _ in range(2))
    wq, wo = (_draw(session, width, width, size=width**-0.5).requires_grad_() for _ in range(2))
    bq, bo, weight, bias = (_draw(session, width).requires_grad_() for _ in range(4))
    key = torch.tensor([1, 2], device=session.device)
    of_p = mask_bits(key, 1, clips * heads * queries, tokens, RATE)
    of_y = mask_bits(key, 2, rows, width, RATE)
    leaves, grad = [x, k, v, wq, wo, bq, bo, weight, bias], _draw(session, rows, width)

    def standard() -> Tensor:
        q = F.linear(x, wq, bq).view(clips, queries, heads, d).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            q, k.transpose(1, 2), v.transpose(1, 2), dropout_p=0.1
        )
        y = F.linear(mixed.transpose(1, 2).flatten(2), wo, bo)
        return F.layer_norm(x + F.dropout(y, 0.1), (width,), weight, bias).flatten(0, 1)

    def absorbed() -> Tensor:
        by_head = (k.permute(2, 0, 1, 3).reshape(heads, -1, d) * d**-0.5,
                   v.permute(2, 0, 1, 3).reshape(heads, -1, d))  # fmt: skip
        wide = (torch.bmm(by_head[0], wq.view(heads, d, width)),
                torch.bmm(by_head[1], wo.view(width, heads, d).permute(1, 2, 0)))  # fmt: skip
        keys, values = (
            t.view(heads, clips, tokens, width).transpose(0, 1).contiguous() for t in wide
        )
        beta = torch.bmm(by_head[0], bq.view(heads, d, 1)).view(heads, clips, tokens)
        return absorbed_cross_attention(
            x.flatten(0, 1), keys, beta.transpose(0, 1).contiguous(), values, bo,
            weight.float(), bias.float(), of_p, of_y, SCALE, triton=session.device == "cuda",
        )  # fmt: skip

    mode = {"backend": "eager"} if session.device == "cpu" else {}
    forms = {"standard": torch.compile(standard, **mode), "absorbed": absorbed}  # type: ignore[call-overload]
    runs: dict[str, Run] = {}
    for name, form in forms.items():
        runs[f"{name}, forward"] = functools.partial(_quietly, form)
        runs[f"{name}, both ways"] = functools.partial(_differentiated, form, leaves, grad)
    session.add("cross-attention", sides=compare(session, runs, LOOP))


def ratio(found: Mapping[str, Any], slower: str, faster: str) -> float | None:
    """How many times as long the first takes, where both were timed alike."""
    a, b = (median({"": found}, "", side) for side in (slower, faster))
    return a / b if a and b else None


def _draw(session: Session, *shape: int, size: float = 1.0) -> Tensor:
    return (size * torch.randn(*shape, device=session.device)).to(torch.bfloat16)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, p: float, backend: SDPBackend, backward: bool
) -> object:
    with sdpa_kernel(backend), torch.set_grad_enabled(backward):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return torch.autograd.grad(out, (q, k, v), out.detach()) if backward else out


def _forward(case: KernelCase, form: Callable[[Any], Tensor]) -> object:
    with torch.no_grad():
        return form(case.tensors)


def _both_ways(case: KernelCase, form: Callable[[Any], Tensor]) -> object:
    leaves = [t.detach().requires_grad_() for t in case.tensors]
    return torch.autograd.grad(form(leaves), leaves, case.grad)


def _quietly(form: Callable[[], Tensor]) -> object:
    with torch.no_grad():
        return form()


def _differentiated(form: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> object:
    return torch.autograd.grad(form(), leaves, grad)
