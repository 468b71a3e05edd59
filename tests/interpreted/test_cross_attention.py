from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from msq.head.absorbed import absorbed_attention
from msq.head.masks import Masks, Part, Site
from msq.head.packed_blocks import DropAddNorm
from msq.kernels.bits import mask_bits
from msq.kernels.cross_attention import (
    absorbed_cross_attention,
    columns,
    token_pieces,
    unsupported,
)
from msq.kernels.gpu import cross_attention as gpu
from msq.kernels.norm import kept

KEY = torch.tensor([5, 6])
RATE = 410
SCALE = 4096 / (4096 - RATE)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
HEADS, WIDTH = 2, 128
NAMES = ("x", "keys", "beta", "values", "out_bias", "weight", "bias")


def inputs(clips, queries, tokens, dtype=torch.float32, dropout=True, heads=HEADS, width=WIDTH):
    """The seven differentiable inputs, two masks, a gradient of the result."""
    generator = torch.Generator().manual_seed(clips * 1000 + queries * 40 + tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows, stack = (clips * queries, width), (clips, heads, tokens, width)
    tensors = [draw(*rows), draw(*stack) / width**0.5, draw(*stack[:3]), draw(*stack), draw(width)]
    tensors = [t.to(dtype) for t in tensors] + [draw(width), draw(width)]
    bits = residual = None
    if dropout:
        bits = mask_bits(KEY, 1, clips * heads * queries, tokens, RATE)
        residual = mask_bits(KEY, 2, *rows, RATE)
    return tensors, bits, residual, draw(*rows).to(dtype)


def expected(tensors, bits, residual, grad):
    """Token by token in float64, differentiated by torch."""
    leaves = [t.double().requires_grad_() for t in tensors]
    x, keys, beta, values, out_bias, weight, bias = leaves
    clips, _, tokens, width = keys.shape
    rows = x.view(clips, -1, width)
    scores = torch.einsum("bqd,bhtd->bhqt", rows, keys) + beta[:, :, None]
    p = scores.softmax(-1)
    if bits is not None:
        p = p * kept(bits, tokens).view(p.shape) * SCALE
    branch = (torch.einsum("bhqt,bhtd->bqd", p, values) + out_bias).flatten(0, 1)
    if residual is not None:
        branch = branch * kept(residual, width) * SCALE
    out = torch.nn.functional.layer_norm(x + branch, (width,), weight, bias, 1e-5)
    return out, torch.autograd.grad(out, leaves, grad.double())


def far(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.detach().double() - right.detach()).norm() / right.detach().norm())


def run(tensors, bits, residual, grad, triton=True):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    scale = SCALE if bits is not None else 1.0
    out = absorbed_cross_attention(*leaves, bits, residual, scale, triton=triton)
    return out, torch.autograd.grad(out, leaves, grad)


def check(clips, queries, tokens, dtype=torch.float32, dropout=True, **sizes) -> None:
    given = inputs(clips, queries, tokens, dtype, dropout, **sizes)
    out, found = run(*given)
    right, gradients = expected(*given)
    assert out.dtype == dtype
    assert far(out, right) < TOLERANCE[dtype]
    for name, a, b, source in zip(NAMES, found, gradients, given[0], strict=True):
        assert (a.dtype, a.shape) == (source.dtype, source.shape), name
        if tokens == 1 and name in ("keys", "beta"):
            assert a.abs().max() == 0, name  # a single token always has all the attention
        else:
            assert far(a, b) < TOLERANCE[dtype], name


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, True), (torch.float16, False)])
@pytest.mark.parametrize("tokens", [1, 8, 15, 16, 17, 31])
@pytest.mark.parametrize("queries", [101, 140, 157])
def test_kernels_against_float64(queries, tokens, dtype, dropout) -> None:
    check(1, queries, tokens, dtype, dropout)


@pytest.mark.parametrize("tokens", [3, 16, 17])
def test_kernels_against_float64_with_dropout_the_other_way_round(tokens: int) -> None:
    check(1, 101, tokens, torch.float32, dropout=False)
    check(1, 101, tokens, torch.float16, dropout=True)


def test_several_clips_and_more_heads() -> None:
    check(3, 20, 17)
    check(3, 70, 9, dropout=False)
    check(2, 33, 17, heads=8, width=256)
    check(2, 12, 12, heads=4)


@pytest.mark.parametrize("which", ["probabilities", "branch"])
def test_one_of_the_two_masks(which: str) -> None:
    tensors, bits, residual, grad = inputs(1, 20, 17)
    given = (bits, None) if which == "probabilities" else (None, residual)
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = absorbed_cross_attention(*leaves, *given, SCALE, triton=True)
    right, gradients = expected(tensors, *given, grad)
    assert far(out, right) < 1e-6
    for a, b in zip(torch.autograd.grad(out, leaves, grad), gradients, strict=True):
        assert far(a, b) < 1e-6


def test_the_head_as_it_is_used() -> None:
    """157 classes, 16 frames and the class token, 8 heads of 64."""
    check(1, 157, 17, heads=8, width=512)


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("tokens", range(1, 33))
def test_pieces_cover_the_tokens_with_powers_of_two(tokens: int, heads: int) -> None:
    first, second = token_pieces(tokens, heads)
    assert first & (first - 1) == second & (second - 1) == 0
    assert first * heads >= 16
    assert second == 0 or 16 <= second * heads < first * heads
    assert tokens <= first + second <= max(2 * tokens, 16 // heads, 1)
    assert first <= 32 or tokens > 32


def test_seventeen_tokens_are_not_padded_to_thirty_two() -> None:
    assert token_pieces(17, 8) == (16, 2)
    assert token_pieces(16, 8) == (16, 0)
    assert token_pieces(31, 8) == (32, 0)
    assert token_pieces(24, 8) == (16, 8)
    assert [columns(tokens, 8) for tokens in (16, 17, 31)] == [128, 144, 256]


def test_outputs_that_hold_rubbish_before_are_wholly_written(monkeypatch) -> None:
    def nan(*shape, dtype, device):
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    (x, keys, beta, values, *vectors), bits, residual, grad = inputs(2, 20, 17)
    monkeypatch.setattr(torch, "empty", nan)
    monkeypatch.setattr(
        torch, "empty_like", lambda x: nan(*x.shape, dtype=x.dtype, device=x.device)
    )
    found = gpu.launch_forward(x, keys, beta, values, *vectors, bits, residual, SCALE, 1e-5)
    back = gpu.launch_backward(grad, grad, x, keys, beta, values, bits, SCALE)
    assert all(bool(v.isfinite().all()) for v in (*found, *back))


def test_gradients_without_memory_of_their_own_and_inputs_with_gaps() -> None:
    tensors, bits, residual, grad = inputs(1, 20, 17)
    right, gradients = expected(tensors, bits, residual, torch.ones_like(grad))

    def with_gaps(t: torch.Tensor) -> torch.Tensor:
        wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2].detach().requires_grad_()

    leaves = [with_gaps(t) for t in tensors]
    out = absorbed_cross_attention(*leaves, bits, residual, SCALE, triton=True)
    assert far(out, right) < 1e-6
    found = torch.autograd.grad(out.sum(), leaves)  # its gradient has stride 0
    for name, a, b in zip(NAMES, found, gradients, strict=True):
        assert far(a, b) < 1e-6, name
    transposed = torch.randn(WIDTH, 20).t()
    found = run(tensors, bits, residual, transposed)[1]
    for a, b in zip(found, expected(tensors, bits, residual, transposed)[1], strict=True):
        assert far(a, b) < 1e-6


def test_the_result_does_not_depend_on_the_tile(monkeypatch) -> None:
    given = inputs(1, 101, 17)
    wide = run(*given)
    before = gpu.find_tile
    asked = []

    def narrow_tile(op, *rest):
        asked.append(op)
        return replace(before(op, *rest), sizes={"ROWS": 16})

    monkeypatch.setattr(gpu, "find_tile", narrow_tile)
    narrow = run(*given)
    assert asked == ["absorbed_cross", "absorbed_cross_backward"]
    for a, b in zip((wide[0], *wide[1]), (narrow[0], *narrow[1]), strict=True):
        assert far(b, a.double()) < 1e-6


def test_two_runs_give_the_same_bits() -> None:
    given = inputs(2, 33, 17, torch.float16)
    first, second = run(*given), run(*given)
    for a, b in zip((first[0], *first[1]), (second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's own check
@pytest.mark.parametrize("triton", [False, True])
def test_the_op_is_sound_for_compilers(triton: bool) -> None:
    tensors, bits, residual, _ = inputs(2, 12, 3)
    leaves = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(
        torch.ops.msq.absorbed_cross, (*leaves, bits, residual, SCALE, 1e-5, triton)
    )


@pytest.mark.parametrize("dropout", [False, True])
def test_the_reference_has_the_right_gradients_in_float64(dropout: bool) -> None:
    tensors, bits, residual, _ = inputs(2, 5, 3, dropout=dropout, width=16)
    leaves = [t.double().requires_grad_() for t in tensors]
    scale = SCALE if dropout else 1.0
    assert torch.autograd.gradcheck(
        lambda *v: absorbed_cross_attention(*v, bits, residual, scale), leaves
    )


def test_the_reference_is_the_piece_of_the_packed_head() -> None:
    """With the head's own masks and projections, in value and in every gradient."""
    clips, queries, tokens, heads, d = 2, 20, 17, 4, 8
    width = heads * d
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, k, v = draw(clips * queries, width), *(draw(clips, tokens, heads, d) for _ in "kv")
    wq, bq, wo, bo = draw(width, width), draw(width), draw(width, width), draw(width)
    weight, bias = draw(width), draw(width)
    leaves = [x, k, v, wq, bq, wo, bo, weight, bias]
    masks = Masks(3, 4, 0.1).at(Part.decoder, 1)

    mixed = absorbed_attention(x.view(clips, queries, width), k, v, (wq, bq), (wo, bo), masks)
    right = DropAddNorm.apply(x, mixed.flatten(0, 1), weight, bias, masks, Site.cross_residual)

    def words(site: Site, rows: int, columns: int) -> torch.Tensor:
        return masks.masks.bits(Part.decoder, 1, site, rows, columns).view(torch.int32)

    keys = torch.einsum("bthd,hdw->bhtw", k, wq.view(heads, d, width)) / d**0.5
    beta = torch.einsum("bthd,hd->bht", k, bq.view(heads, d)) / d**0.5
    values = torch.einsum("bthd,whd->bhtw", v, wo.view(width, heads, d))
    found = absorbed_cross_attention(
        x, keys, beta, values, bo, weight, bias,
        words(Site.cross_probability, clips * heads * queries, tokens),
        words(Site.cross_residual, clips * queries, width), masks.scale,
    )  # fmt: skip
    assert far(found, right) < 1e-12
    grad = torch.randn(right.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(right, leaves, grad),
        strict=True,
    ):
        assert far(a, b) < 1e-12


def test_what_does_not_fit_is_refused() -> None:
    tensors, bits, residual, _ = inputs(2, 20, 3)
    with pytest.raises(ValueError, match=r"keys \[2, 2, 3, 128\].*do not fit"):
        absorbed_cross_attention(tensors[0][:-1], *tensors[1:])
    with pytest.raises(ValueError, match="do not fit"):
        absorbed_cross_attention(*tensors, bits[1:], residual)
    with pytest.raises(ValueError, match="do not fit"):
        absorbed_cross_attention(*tensors, bits, residual.long())
    assert "33 tokens" in unsupported(33, 4, 512)
    assert "6 heads" in unsupported(17, 6, 512)
    assert "256" in unsupported(32, 16, 512)
    assert "width 500" in unsupported(17, 8, 500)
    assert unsupported(17, 8, 512) == ""
