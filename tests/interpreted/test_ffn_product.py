from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from msq.head.masks import Masks, Part, Site
from msq.head.packed_blocks import FeedForward
from msq.kernels import dispatch
from msq.kernels.bits import mask_bits
from msq.kernels.ffn_product import feed_forward, product_relu_drop
from msq.kernels.gpu import ffn_product as gpu
from msq.kernels.norm import kept

KEY = torch.tensor([5, 6])
RATE = 410
SCALE = 4096 / (4096 - RATE)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
NAMES = ("y", "dx", "dw1", "db1", "dw2", "db2")


def inputs(rows, width, hidden, dtype=torch.float32, dropout=True):
    """The five tensors of a network, bits, and a gradient."""
    generator = torch.Generator().manual_seed(rows * 10000 + hidden)

    def draw(*shape, size=1.0):
        return (size * torch.randn(*shape, generator=generator)).to(dtype)

    tensors = (
        draw(rows, width), draw(hidden, width, size=width**-0.5), draw(hidden),
        draw(width, hidden, size=hidden**-0.5), draw(width),
    )  # fmt: skip
    bits = mask_bits(KEY, 4, rows, hidden, RATE) if dropout else None
    return tensors, bits, draw(rows, width)


def first_half(x, w1, b1, bits):
    """In the precision of what is given."""
    hidden = (x @ w1.t() + b1).relu()
    return hidden if bits is None else hidden * kept(bits, hidden.shape[1]) * SCALE


def far(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.detach().double() - right.detach()).norm() / right.detach().norm())


def halves(tensors, bits, grad):
    """Both kernels alone against float64: hidden, dx1 and db1, found and right.

    The right backward pass is gated by the hidden layer that was stored, as it is defined.
    """
    x, w1, b1, w2, _ = tensors
    scale = 1.0 if bits is None else SCALE
    hidden = product_relu_drop(x, w1, b1, bits, scale, triton=True)
    found = torch.ops.msq.ffn_product_backward(grad, w2, hidden, b1, scale, True)
    right = first_half(x.double(), w1.double(), b1.double(), bits)
    before = (grad.double() @ w2.double()) * (hidden > 0) * scale
    return (hidden, *found), (right, before, before.sum(0))


# B = 1 and B = 3 clips of K queries; M and F that are no multiple of a tile; D of a chunk.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize(
    ("rows", "width", "hidden"), [(157, 64, 256), (3 * 51, 40, 300), (1, 32, 20), (20, 512, 512)]
)
def test_kernels_against_float64(rows, width, hidden, dropout, dtype) -> None:
    found, right = halves(*inputs(rows, width, hidden, dtype, dropout))
    assert [t.dtype for t in found] == [dtype] * 3
    for a, b in zip(found, right, strict=True):
        assert far(a, b) < TOLERANCE[dtype]


@pytest.mark.parametrize("dropout", [True, False])
def test_the_whole_network_and_every_gradient_against_float64(dropout) -> None:
    tensors, bits, grad = inputs(3 * 20, 48, 200, dropout=dropout)
    leaves = [t.requires_grad_() for t in tensors]
    out = feed_forward(*leaves, bits, SCALE if dropout else 1.0, triton=True)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    right = first_half(*wide[:3], bits) @ wide[3].t() + wide[4]
    found = (out, *torch.autograd.grad(out, leaves, grad))
    expected = (right, *torch.autograd.grad(right, wide, grad.double()))
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert far(a, b) < 1e-6, name


def test_the_first_product_alone_has_its_gradients() -> None:
    tensors, bits, _ = inputs(50, 40, 100)
    grad = torch.randn(50, 100, generator=torch.Generator().manual_seed(3))
    leaves = [t.requires_grad_() for t in tensors[:3]]
    out = product_relu_drop(*leaves, bits, SCALE, triton=True)
    wide = [t.detach().double().requires_grad_() for t in tensors[:3]]
    right = torch.autograd.grad(first_half(*wide, bits), wide, grad.double())
    for a, b in zip(torch.autograd.grad(out, leaves, grad), right, strict=True):
        assert far(a, b) < 1e-6


def test_outputs_that_hold_rubbish_before_are_wholly_written(monkeypatch) -> None:
    (x, w1, b1, w2, _), bits, grad = inputs(137, 40, 300)

    def nan(*shape, dtype=torch.float32, device="cpu"):
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", nan)
    hidden = gpu.launch_forward(x, w1, b1, bits, SCALE)
    found = gpu.launch_backward(grad, w2, hidden, b1, SCALE)
    assert all(bool(v.isfinite().all()) for v in (hidden, *found))


def test_nothing_outside_the_outputs_is_written(monkeypatch) -> None:
    (x, w1, b1, w2, _), bits, grad = inputs(137, 40, 300)
    whole = []

    def inner(*shape, dtype=torch.float32, device="cpu"):
        count = torch.Size(shape).numel()
        whole.append((torch.full((count + 80000,), 7.0, dtype=dtype, device=device), count))
        return whole[-1][0][40000 : 40000 + count].view(shape)

    monkeypatch.setattr(torch, "empty", inner)
    hidden = gpu.launch_forward(x, w1, b1, bits, SCALE)
    gpu.launch_backward(grad, w2, hidden, b1, SCALE)
    assert len(whole) == 3
    for memory, count in whole:
        assert bool((memory[:40000] == 7).all())
        assert bool((memory[40000 + count :] == 7).all())


def test_what_is_no_number_stays_none() -> None:
    (x, w1, b1, *_), _, _ = inputs(3, 40, 64)
    x[1, 7] = float("nan")
    for triton in (False, True):
        out = product_relu_drop(x, w1, b1, triton=triton)
        assert bool(out[1].isnan().all())
        assert int(out.isnan().sum()) == 64


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with gaps between them."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 9.0)
    wide[..., ::2] = tensor
    return wide[..., ::2].detach().requires_grad_()


def test_gradients_without_memory_of_their_own_and_inputs_with_gaps() -> None:
    tensors, bits, _ = inputs(20, 40, 300)
    wide = [t.double().requires_grad_() for t in tensors]
    right = first_half(*wide[:3], bits) @ wide[3].t() + wide[4]
    leaves = [spread(t) for t in tensors]
    out = feed_forward(*leaves, bits, SCALE, triton=True)
    assert far(out, right) < 1e-6
    for grad in (torch.ones(1).expand(20, 40), torch.randn(40, 20).t()):
        expected = torch.autograd.grad(right, wide, grad.double(), retain_graph=True)
        found = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        for name, a, b in zip(NAMES[1:], found, expected, strict=True):
            assert far(a, b) < 1e-6, name


def test_the_result_does_not_depend_on_the_tile(monkeypatch) -> None:
    given = inputs(140, 64, 170)
    usual, _ = halves(*given)
    before = gpu.find_tile
    small = {"ROWS": 64, "COLS": 64, "DEPTH": 64}
    monkeypatch.setattr(gpu, "find_tile", lambda *a: replace(before(*a), sizes=small))
    other, _ = halves(*given)
    for a, b in zip(usual, other, strict=True):
        assert far(a, b.double()) < 1e-6


def test_two_runs_give_the_same_bits() -> None:
    given = inputs(150, 64, 300, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(halves(*given)[0], halves(*given)[0], strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's own check
@pytest.mark.parametrize("triton", [False, True])
def test_the_ops_are_sound_for_compilers(triton: bool) -> None:
    (x, w1, b1, w2, _), bits, grad = inputs(4, 32, 40)
    leaves = [t.clone().requires_grad_() for t in (x, w1, b1)]
    torch.library.opcheck(torch.ops.msq.ffn_product, (*leaves, bits, SCALE, triton))
    hidden = product_relu_drop(x, w1, b1, bits, SCALE)
    given = (grad, w2, hidden, b1, SCALE, triton)
    torch.library.opcheck(torch.ops.msq.ffn_product_backward, given)


def test_the_references_have_the_right_gradients_in_float64() -> None:
    tensors, bits, _ = inputs(3, 8, 40)
    leaves = [t.double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *a: feed_forward(*a, bits, SCALE), leaves)
    assert torch.autograd.gradcheck(lambda *a: product_relu_drop(*a, bits, SCALE), leaves[:3])


def test_the_reference_is_the_piece_of_the_packed_head() -> None:
    tensors, _, grad = inputs(6, 8, 40)
    leaves = [t.double().requires_grad_() for t in tensors]
    masks = Masks(3, 4, 0.1).at(Part.decoder, 1)
    bits = masks.masks.bits(Part.decoder, 1, Site.hidden, 6, 40).view(torch.int32)
    right = FeedForward.apply(*leaves, masks)
    found = feed_forward(*leaves, bits, masks.scale)
    assert far(found, right) < 1e-12
    for a, b in zip(
        torch.autograd.grad(found, leaves, grad.double()),
        torch.autograd.grad(right, leaves, grad.double()),
        strict=True,
    ):
        assert far(a, b) < 1e-12


def test_it_is_never_taken_unmeasured(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    choice = dispatch.resolve.__wrapped__(
        "ffn_product", torch.device("cuda"), torch.bfloat16, 2048, "auto"
    )
    assert choice.path == "reference"
    assert "not measured" in choice.reason


def test_what_does_not_fit_is_refused() -> None:
    (x, w1, b1, w2, b2), bits, _ = inputs(3, 32, 40)
    with pytest.raises(ValueError, match="do not fit"):
        product_relu_drop(x, w1[:, :-1], b1)
    with pytest.raises(ValueError, match=r"weight torch.float16 .* do not fit"):
        product_relu_drop(x, w1.half(), b1)
    with pytest.raises(ValueError, match=r"bits torch.int32 \[3, 1\] do not fit"):
        product_relu_drop(x, w1, b1, bits[:, :1])
    with pytest.raises(ValueError, match="positive"):
        product_relu_drop(x, w1, b1, bits, 0.0)
    with pytest.raises(ValueError, match=r"w2 torch.float32 \[40, 32\]"):
        feed_forward(x, w1, b1, w2.t(), b2)
