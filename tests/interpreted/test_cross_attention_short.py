from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from msq.head.masks import Masks, Part, Site
from msq.head.packed_blocks import CrossAttend
from msq.kernels.bits import mask_bits
from msq.kernels.cross_attention_short import cross_attention, unsupported
from msq.kernels.gpu import cross_attention_short as gpu
from msq.kernels.norm import kept

KEY = torch.tensor([5, 6])
RATE = 410
SCALE = 4096 / (4096 - RATE)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
HEADS, WIDTH = 2, 128


def inputs(clips, queries, tokens, dtype=torch.float32, dropout=True):
    generator = torch.Generator().manual_seed(clips * 1000 + queries * 40 + tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    q, kv, grad = (
        draw(clips * n, width)
        for n, width in ((queries, WIDTH), (tokens, 2 * WIDTH), (queries, WIDTH))
    )
    bits = mask_bits(KEY, 1, clips * HEADS * queries, tokens, RATE) if dropout else None
    return q, kv, bits, clips, grad


def by_head(rows: torch.Tensor, clips: int) -> torch.Tensor:
    return rows.view(clips, -1, HEADS, WIDTH // HEADS).transpose(1, 2)


def expected(q, kv, bits, clips, grad):
    """By torch's operations in float64 with an explicit mask, differentiated by torch."""
    leaves = [t.double().requires_grad_() for t in (q, kv)]
    k, v = (by_head(part.contiguous(), clips) for part in leaves[1].chunk(2, 1))
    p = (by_head(leaves[0], clips) @ k.transpose(2, 3) / (WIDTH // HEADS) ** 0.5).softmax(-1)
    if bits is not None:
        p = p * kept(bits, p.shape[-1]).view(p.shape) * SCALE
    out = (p @ v).transpose(1, 2).reshape(-1, WIDTH)
    return out, torch.autograd.grad(out, leaves, grad.double())


def far(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.detach().double() - right.detach()).norm() / right.detach().norm())


def run(q, kv, bits, clips, grad):
    leaves = [t.detach().clone().requires_grad_() for t in (q, kv)]
    scale = SCALE if bits is not None else 1.0
    out = cross_attention(*leaves, clips, HEADS, bits, scale, triton=True)
    return out, *torch.autograd.grad(out, leaves, grad)


def check(clips, queries, tokens, dtype=torch.float32, dropout=True) -> None:
    given = inputs(clips, queries, tokens, dtype, dropout)
    out, dq, dkv = run(*given)
    right, (of_q, of_kv) = expected(*given)
    assert out.dtype == dq.dtype == dkv.dtype == dtype
    assert far(out, right) < TOLERANCE[dtype]
    (dk, dv), (of_k, of_v) = dkv.chunk(2, 1), of_kv.chunk(2, 1)
    assert far(dv, of_v) < TOLERANCE[dtype]
    for a, b in ((dq, of_q), (dk, of_k)):
        if tokens == 1:
            assert a.abs().max() < 1e-5 * max(1, float(dv.abs().max()))
        else:
            assert far(a, b) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("tokens", [1, 8, 15, 16, 17, 31, 32])
@pytest.mark.parametrize("queries", [12, 20, 51])
def test_kernels_against_float64(queries, tokens, dropout, dtype) -> None:
    check(1, queries, tokens, dtype, dropout)


def test_several_clips_and_more_queries() -> None:
    check(3, 20, 17)
    check(3, 51, 16, dropout=False)
    check(2, 157, 17)


def test_outputs_that_hold_rubbish_before_are_wholly_written(monkeypatch) -> None:
    def nan(shape, dtype, device):
        return torch.full(tuple(shape), float("nan"), dtype=dtype, device=device)

    q, kv, bits, clips, grad = inputs(2, 20, 17)
    monkeypatch.setattr(torch, "empty", nan)
    out = gpu.launch_forward(q, kv, bits, clips, HEADS, SCALE)
    back = gpu.launch_backward(grad, q, kv, bits, clips, HEADS, SCALE)
    assert all(bool(v.isfinite().all()) for v in (out, *back))


def test_columns_of_the_product_for_all_layers() -> None:
    """They are read where they are, and their gradient goes where they were."""
    q, kv, bits, clips, grad = inputs(2, 20, 17)
    right, (_, of_kv) = expected(q, kv, bits, clips, grad)
    product = torch.randn(len(kv), 6 * WIDTH)
    product[:, 2 * WIDTH : 4 * WIDTH] = kv
    product.requires_grad_()
    queries = torch.randn(len(q), 3 * WIDTH)
    queries[:, WIDTH : 2 * WIDTH] = q
    mine, memory = queries[:, WIDTH : 2 * WIDTH], product[:, 2 * WIDTH : 4 * WIDTH]
    assert gpu._rows(mine) is mine
    assert gpu._rows(memory) is memory
    out = cross_attention(mine, memory, clips, HEADS, bits, SCALE, triton=True)
    assert far(out, right) < 1e-6
    found = torch.autograd.grad(out, product, grad)[0]
    assert far(found[:, 2 * WIDTH : 4 * WIDTH], of_kv) < 1e-6
    assert found[:, : 2 * WIDTH].abs().max() == found[:, 4 * WIDTH :].abs().max() == 0


def test_gradients_without_memory_of_their_own_and_inputs_with_gaps() -> None:
    q, kv, bits, clips, grad = inputs(2, 20, 17)
    right, gradients = expected(q, kv, bits, clips, torch.ones_like(grad))
    leaves = []
    for rows in (q, kv):
        wide = torch.zeros(len(rows), 2 * rows.shape[1])
        wide[:, ::2] = rows
        leaves.append(wide[:, ::2].detach().requires_grad_())
    out = cross_attention(*leaves, clips, HEADS, bits, SCALE, triton=True)
    assert far(out, right) < 1e-6
    found = torch.autograd.grad(out.sum(), leaves)  # its gradient has stride 0
    for a, b in zip(found, gradients, strict=True):
        assert far(a, b) < 1e-6
    transposed = torch.randn(WIDTH, 40).t()
    right, gradients = expected(q, kv, bits, clips, transposed)
    for a, b in zip(run(q, kv, bits, clips, transposed)[1:], gradients, strict=True):
        assert far(a, b) < 1e-6


def test_the_result_does_not_depend_on_the_tile(monkeypatch) -> None:
    given = inputs(1, 51, 17)
    wide = run(*given)
    before = gpu.find_tile
    asked = []

    def narrow_tile(op, *rest):
        asked.append(op)
        return replace(before(op, *rest), sizes={"ROWS": 16})

    monkeypatch.setattr(gpu, "find_tile", narrow_tile)
    for a, b in zip(wide, run(*given), strict=True):
        assert far(b, a.detach().double()) < 1e-6
    assert asked == ["cross_attention", "cross_attention_backward"]


def test_two_runs_give_the_same_bits() -> None:
    given = inputs(2, 51, 17, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(run(*given), run(*given), strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's own check
@pytest.mark.parametrize("triton", [False, True])
def test_the_op_is_sound_for_compilers(triton: bool) -> None:
    q, kv, bits, clips, _ = inputs(2, 12, 5)
    torch.library.opcheck(
        torch.ops.msq.cross_attention,
        (q.requires_grad_(), kv.requires_grad_(), bits, clips, HEADS, SCALE, triton),
    )


@pytest.mark.parametrize("dropout", [False, True])
def test_the_reference_has_the_right_gradients_in_float64(dropout: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, kv = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((10, 8), (6, 16))
    )
    bits = mask_bits(KEY, 0, 2 * 2 * 5, 3, 1000) if dropout else None
    scale = 4096 / 3096 if dropout else 1.0
    assert torch.autograd.gradcheck(lambda a, b: cross_attention(a, b, 2, 2, bits, scale), (q, kv))


def test_the_reference_is_the_piece_of_the_packed_head() -> None:
    """With the head's own masks, in value and in both gradients."""
    q, kv, _, clips, grad = (
        t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in inputs(2, 20, 17)
    )
    masks = Masks(3, 4, 0.1).at(Part.decoder, 1)
    bits = masks.masks.bits(Part.decoder, 1, Site.cross_probability, clips * HEADS * 20, 17)
    leaves = [q.requires_grad_(), kv.requires_grad_()]
    k, v = (by_head(part.contiguous(), clips) for part in kv.chunk(2, 1))
    right = CrossAttend.apply(by_head(q, clips), k, v, masks)
    found = cross_attention(q, kv, clips, HEADS, bits.view(torch.int32), masks.scale)
    assert far(found, right) < 1e-12
    for a, b in zip(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(right, leaves, grad),
        strict=True,
    ):
        assert far(a, b) < 1e-12


def test_what_does_not_fit_is_refused() -> None:
    q, kv, bits, clips, _ = inputs(2, 20, 17)
    with pytest.raises(ValueError, match="do not fit"):
        cross_attention(q[:-1], kv, clips, HEADS)
    with pytest.raises(ValueError, match="do not fit"):
        cross_attention(q, kv[:, :-2], clips, HEADS)
    with pytest.raises(ValueError, match="bits"):
        cross_attention(q, kv, clips, HEADS, bits[1:])
    assert "33 tokens" in unsupported(33, 64)
    assert "width 48" in unsupported(17, 48)
    assert unsupported(17, 64) == ""
