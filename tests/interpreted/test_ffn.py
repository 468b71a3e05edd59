from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from msq.head.masks import Masks, Part, Site
from msq.head.packed_blocks import FeedForward
from msq.kernels.bits import mask_bits
from msq.kernels.ffn import relu_drop
from msq.kernels.gpu import ffn as gpu
from msq.kernels.norm import kept

KEY = torch.tensor([5, 6])
RATE = 410
SCALE = 4096 / (4096 - RATE)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}


def inputs(rows, width, dtype=torch.float32, dropout=True):
    generator = torch.Generator().manual_seed(rows * 10000 + width)
    x, grad = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2))
    bias = torch.randn(width, generator=generator)
    return x, bias, mask_bits(KEY, 4, rows, width, RATE) if dropout else None, grad


def expected(x, bias, bits, grad):
    """In float64, differentiated by torch."""
    leaves = [t.double().requires_grad_() for t in (x, bias)]
    out = (leaves[0] + leaves[1]).relu()
    if bits is not None:
        out = out * kept(bits, x.shape[1]) * SCALE
    return out, torch.autograd.grad(out, leaves, grad.double())


def far(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.detach().double() - right.detach()).norm() / right.detach().norm())


def run(x, bias, bits, grad):
    leaves = [t.detach().clone().requires_grad_() for t in (x, bias)]
    out = relu_drop(*leaves, bits, SCALE if bits is not None else 1.0, triton=True)
    return out, *torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 2048), (37, 256), (50, 300), (33, 20), (70, 1000)])
def test_kernels_against_float64(rows, width, dropout, dtype) -> None:
    given = inputs(rows, width, dtype, dropout)
    out, dx, dbias = run(*given)
    right, (of_x, of_bias) = expected(*given)
    assert (out.dtype, dx.dtype, dbias.dtype) == (dtype, dtype, torch.float32)
    for a, b in ((out, right), (dx, of_x), (dbias, of_bias)):
        assert far(a, b) < TOLERANCE[dtype]
    assert torch.equal(out > 0, right > 0)


def test_a_bias_in_the_precision_of_the_rows() -> None:
    x, bias, bits, grad = inputs(40, 64, torch.float16)
    given = (x, bias.half(), bits, grad)
    out, dx, dbias = run(*given)
    assert dbias.dtype == torch.float16
    for a, b in zip((out, dx, dbias), (lambda o, g: (o, *g))(*expected(*given)), strict=True):
        assert far(a, b) < 1e-3


def test_more_rows_than_programs(monkeypatch) -> None:
    """The backward pass then takes several groups in each program."""
    monkeypatch.setattr(gpu, "_PROGRAMS", 3)
    given = inputs(130, 300)
    _, dx, dbias = run(*given)
    _, (of_x, of_bias) = expected(*given)
    assert far(dx, of_x) < 1e-6
    assert far(dbias, of_bias) < 1e-6


def test_outputs_that_hold_rubbish_before_are_wholly_written(monkeypatch) -> None:
    x, bias, bits, grad = inputs(37, 300)

    def nan(*shape, dtype=torch.float32, device="cpu"):
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", nan)
    monkeypatch.setattr(torch, "empty_like", lambda x: nan(*x.shape, dtype=x.dtype))
    out = gpu.launch_forward(x, bias, bits, SCALE)
    found = gpu.launch_backward(grad, out, bias, SCALE)
    assert all(bool(v.isfinite().all()) for v in (out, *found))


def test_what_is_no_number_stays_none() -> None:
    x, bias, _, _ = inputs(3, 40)
    x[1, 7] = float("nan")
    for triton in (False, True):
        out = relu_drop(x, bias, triton=triton)
        assert out[1, 7].isnan()
        assert int(out.isnan().sum()) == 1


def test_gradients_without_memory_of_their_own_and_inputs_with_gaps() -> None:
    x, bias, bits, grad = inputs(20, 300)
    right, gradients = expected(x, bias, bits, torch.ones_like(grad))
    wide = torch.zeros(20, 600)
    wide[:, ::2] = x
    spaced = torch.zeros(600)
    spaced[::2] = bias
    leaves = [wide[:, ::2].detach().requires_grad_(), spaced[::2].detach().requires_grad_()]
    out = relu_drop(*leaves, bits, SCALE, triton=True)
    assert far(out, right) < 1e-6
    for a, b in zip(torch.autograd.grad(out.sum(), leaves), gradients, strict=True):
        assert far(a, b) < 1e-6
    transposed = torch.randn(300, 20).t()
    gradients = expected(x, bias, bits, transposed)[1]
    for a, b in zip(run(x, bias, bits, transposed)[1:], gradients, strict=True):
        assert far(a, b) < 1e-6


def test_the_result_does_not_depend_on_the_tile(monkeypatch) -> None:
    given = inputs(50, 300)
    usual = run(*given)
    before = gpu.find_tile
    monkeypatch.setattr(
        gpu, "find_tile", lambda *a: replace(before(*a), sizes={"ROWS": 4, "COLS": 64})
    )
    other = run(*given)
    assert torch.equal(usual[0], other[0])
    assert torch.equal(usual[1], other[1])
    assert far(other[2], usual[2].double()) < 1e-6


def test_two_runs_give_the_same_bits() -> None:
    given = inputs(60, 300, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(run(*given), run(*given), strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's own check
@pytest.mark.parametrize("triton", [False, True])
def test_the_op_is_sound_for_compilers(triton: bool) -> None:
    x, bias, bits, _ = inputs(4, 40)
    leaves = (x.requires_grad_(), bias.requires_grad_())
    torch.library.opcheck(torch.ops.msq.relu_drop, (*leaves, bits, SCALE, triton))


def test_the_reference_has_the_right_gradients_in_float64() -> None:
    x, bias, bits, _ = inputs(5, 40)
    leaves = [t.double().requires_grad_() for t in (x, bias)]
    assert torch.autograd.gradcheck(lambda a, b: relu_drop(a, b, bits, SCALE), leaves)


def test_the_reference_is_the_piece_of_the_packed_head() -> None:
    """Between two products, with the head's own masks."""
    generator = torch.Generator().manual_seed(1)
    leaves = [
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((6, 8), (40, 8), (40,), (8, 40), (8,))
    ]
    x, w1, b1, w2, b2 = leaves
    masks = Masks(3, 4, 0.1).at(Part.decoder, 1)
    right = FeedForward.apply(x, w1, b1, w2, b2, masks)
    bits = masks.masks.bits(Part.decoder, 1, Site.hidden, 6, 40).view(torch.int32)
    found = relu_drop(x @ w1.t(), b1, bits, masks.scale) @ w2.t() + b2
    assert far(found, right) < 1e-12
    grad = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(right, leaves, grad),
        strict=True,
    ):
        assert far(a, b) < 1e-12


def test_what_does_not_fit_is_refused() -> None:
    x, bias, bits, _ = inputs(3, 40)
    with pytest.raises(ValueError, match="do not fit"):
        relu_drop(x, bias[:-1])
    with pytest.raises(ValueError, match=r"bits torch.int32 \[3, 1\] do not fit"):
        relu_drop(x, bias, bits[:, :1])
    with pytest.raises(ValueError, match="positive"):
        relu_drop(x, bias, bits, 0.0)
