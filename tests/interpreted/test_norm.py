from __future__ import annotations

import pytest
import torch

from msq.kernels.bits import mask_bits
from msq.kernels.norm import drop_add_norm, kept

KEY = torch.tensor([1, 2])
RATE = 410
SCALE = 4096 / (4096 - RATE)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}


def inputs(rows: int, width: int, dtype: torch.dtype, dropout: bool):
    generator = torch.Generator().manual_seed(rows * width)
    x, y, grad = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(width, generator=generator) for _ in range(2))
    bits = mask_bits(KEY, 0, rows, width, RATE) if dropout else None
    return x, y, weight, bias, bits, grad


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def by_autograd(x, y, weight, bias, bits, grad):
    """The formula in float64, differentiated by torch."""
    leaves = [v.double().requires_grad_() for v in (x, y, weight, bias)]
    a, b, w, c = leaves
    branch = b if bits is None else b * kept(bits, b.shape[1]) * SCALE
    out = torch.nn.functional.layer_norm(a + branch, w.shape, w, c, 1e-5)
    return out, torch.autograd.grad(out, leaves, grad.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 512), (37, 512), (5, 20), (3, 1000), (9, 64)])
def test_kernel_and_gradients_against_float64(rows, width, dropout, dtype) -> None:
    x, y, weight, bias, bits, grad = inputs(rows, width, dtype, dropout)
    leaves = [v.clone().requires_grad_() for v in (x, y, weight, bias)]
    out = drop_add_norm(*leaves, bits, SCALE if dropout else 1.0, triton=True)
    found = torch.autograd.grad(out, leaves, grad)
    expected, gradients = by_autograd(x, y, weight, bias, bits, grad)
    assert out.dtype == dtype
    assert far(out, expected) < TOLERANCE[dtype]
    for name, a, b in zip(("x", "y", "weight", "bias"), found, gradients, strict=True):
        assert far(a, b) < TOLERANCE[dtype], name


def test_more_rows_than_programs(monkeypatch) -> None:
    """The backward pass then takes several groups in each program."""
    monkeypatch.setattr("msq.kernels.gpu.norm._PROGRAMS", 3)
    x, y, weight, bias, bits, grad = inputs(41, 64, torch.float32, True)
    leaves = [v.clone().requires_grad_() for v in (x, y, weight, bias)]
    found = torch.autograd.grad(drop_add_norm(*leaves, bits, SCALE, triton=True), leaves, grad)
    for a, b in zip(found, by_autograd(x, y, weight, bias, bits, grad)[1], strict=True):
        assert far(a, b) < 1e-6


def test_outputs_that_hold_rubbish_before_are_wholly_written(monkeypatch) -> None:
    def poisoned(x, **options):
        return torch.full(x.shape, float("nan"), dtype=options.get("dtype", x.dtype))

    x, y, weight, bias, bits, grad = inputs(7, 40, torch.float32, True)
    monkeypatch.setattr(torch, "empty_like", poisoned)
    monkeypatch.setattr(
        torch, "empty", lambda *shape, **o: torch.full(shape, float("nan"), dtype=o["dtype"])
    )
    from msq.kernels.gpu.norm import launch_backward, launch_forward

    out, h, mean, rstd = launch_forward(x, y, weight, bias, bits, SCALE, 1e-5)
    assert all(bool(v.isfinite().all()) for v in (out, h, mean, rstd))
    assert all(
        bool(v.isfinite().all()) for v in launch_backward(grad, h, mean, rstd, weight, bits, SCALE)
    )


def test_gradients_without_memory_of_their_own_and_rows_with_gaps() -> None:
    x, y, weight, bias, bits, _ = inputs(6, 64, torch.float32, True)
    expected, gradients = by_autograd(x, y, weight, bias, bits, torch.ones(6, 64))
    wide = torch.zeros(6, 128)
    wide[:, ::2] = x
    leaves = [v.clone().requires_grad_() for v in (x, y, weight, bias)]
    gaps = wide[:, ::2].detach().requires_grad_()
    out = drop_add_norm(gaps, *leaves[1:], bits, SCALE, triton=True)
    found = torch.autograd.grad(out.sum(), [gaps, *leaves[1:]])  # its gradient has stride 0
    assert far(out, expected) < 1e-6
    for a, b in zip(found, gradients, strict=True):
        assert far(a, b) < 1e-6


def test_two_runs_give_the_same_bits() -> None:
    x, y, weight, bias, bits, grad = inputs(33, 512, torch.float16, True)
    runs = []
    for _ in range(2):
        leaves = [v.clone().requires_grad_() for v in (x, y, weight, bias)]
        out = drop_add_norm(*leaves, bits, SCALE, triton=True)
        runs.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's own check
@pytest.mark.parametrize("triton", [False, True])
def test_the_op_is_sound_for_compilers(triton: bool) -> None:
    x, y, weight, bias, bits, _ = inputs(4, 40, torch.float32, True)
    leaves = [v.requires_grad_() for v in (x, y, weight, bias)]
    torch.library.opcheck(torch.ops.msq.drop_add_norm, (*leaves, bits, SCALE, 1e-5, triton))


def test_the_reference_has_the_right_gradients_in_float64() -> None:
    x, y, weight, bias, bits, _ = inputs(3, 20, torch.float64, True)
    leaves = [v.double().requires_grad_() for v in (x, y, weight, bias)]
    assert torch.autograd.gradcheck(lambda *v: drop_add_norm(*v, bits, SCALE), leaves)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, y, weight, bias, bits, _ = inputs(3, 40, torch.float32, True)
    with pytest.raises(ValueError, match="do not fit"):
        drop_add_norm(x, y[:2], weight, bias)
    with pytest.raises(ValueError, match="bits: expected int32"):
        drop_add_norm(x, y, weight, bias, bits[:, :1])
