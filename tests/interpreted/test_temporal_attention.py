from __future__ import annotations

import pytest
import torch

from msq.kernels.temporal_attention import temporal_attention, unsupported
from msq.kernels.tiles import Tile, find_tile

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
OPS = ("temporal_attention", "temporal_attention_backward")


def inputs(problems, frames, heads, dtype=torch.float32, width=64):
    generator = torch.Generator().manual_seed(problems * 1000 + frames)
    d = heads * width
    qkv = torch.randn(problems, frames, 3 * d, generator=generator).to(dtype)
    return qkv, torch.randn(problems, frames, d, generator=generator).to(dtype)


def expected(qkv, heads, grad):
    """By torch's own attention in float64 from the given numbers; result and gradient."""
    leaf = qkv.double().requires_grad_()
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in leaf.chunk(3, 2))
    p = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    out = (p @ v).transpose(1, 2).flatten(2)
    return out.detach(), torch.autograd.grad(out, leaf, grad.double())[0]


def far(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.detach().double() - right).norm() / right.norm())


def check(problems, frames, heads, dtype=torch.float32, width=64) -> None:
    qkv, grad = inputs(problems, frames, heads, dtype, width)
    leaf = qkv.clone().requires_grad_()
    out = temporal_attention(leaf, heads, triton=True)
    (found,) = torch.autograd.grad(out, leaf, grad)
    right, gradient = expected(qkv, heads, grad)
    assert far(out, right) < TOLERANCE[dtype]
    # q, k and v apart: an error in the small gradient of k would drown in that of v.
    for name, a, b in zip("qkv", found.chunk(3, 2), gradient.chunk(3, 2), strict=True):
        if frames == 1 and name != "v":
            assert a.abs().max() == 0  # one key has all the attention, whatever q and k are
        else:
            assert far(a, b) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("frames", [1, 8, 10, 12, 16, 17, 31, 32])
def test_kernels_against_float64(frames: int, dtype: torch.dtype) -> None:
    whole = problems_of_a_program(frames)
    check(whole + 1, frames, 1, dtype)  # a second program with one problem
    check(max(whole - 1, 1), frames, 12, dtype)


@pytest.mark.parametrize("frames", [48, 96])
def test_long_clips_have_a_block_of_their_own(frames: int) -> None:
    check(2, frames, 2)
    check(2, frames, 1, torch.float16)


@pytest.mark.parametrize("width", [16, 32])
def test_narrow_heads(width: int) -> None:
    check(9, 8, 3, width=width)


@pytest.mark.parametrize("op", OPS)
def test_a_block_holds_whole_problems_and_is_mostly_used(op: str) -> None:
    for frames in range(1, 129):
        block = find_tile(op, (9, 0), frames).sizes["BLOCK"]
        assert block >= max(frames, 16)  # tensor cores take 16 rows
        assert block & (block - 1) == 0
        assert block // frames * frames > block / 2, frames


def problems_of_a_program(frames: int) -> int:
    sizes = find_tile("temporal_attention", None, frames).sizes
    return sizes["BLOCKS"] * (sizes["BLOCK"] // frames)


def test_outputs_that_hold_rubbish_before_are_wholly_written(monkeypatch) -> None:
    from msq.kernels.gpu import temporal_attention as kernels

    def nan(*shape, dtype, device):
        sizes = shape[0] if len(shape) == 1 else shape
        return torch.full(tuple(sizes), float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", nan)
    for frames in (10, 12):
        qkv, grad = inputs(11, frames, 2)
        assert bool(kernels.launch_forward(qkv, 2).isfinite().all())
        assert bool(kernels.launch_backward(grad, qkv, 2).isfinite().all())


def test_nothing_is_written_beyond_the_last_row() -> None:
    from msq.kernels.gpu import temporal_attention as kernels

    qkv, _ = inputs(13, 10, 2)  # 3 problems a block, 12 a program: one is left
    guarded = torch.full((14, 10, 128), 7.0)
    tile = find_tile("temporal_attention", None, 10)
    kernels.forward[kernels._grid(qkv, 2, tile)](
        qkv, guarded, 130, 0.1, **kernels._constants(qkv, 2), **tile.launch()
    )
    assert bool((guarded[13] == 7).all() and (guarded[:13] != 7).all())


def test_gradients_without_memory_of_their_own_and_rows_with_gaps() -> None:
    qkv, grad = inputs(5, 12, 2)
    wide = torch.zeros(5, 12, 2 * qkv.shape[2])
    wide[..., ::2] = qkv
    gaps = wide[..., ::2].detach().requires_grad_()
    out = temporal_attention(gaps, 2, triton=True)
    for of_out in (torch.ones(()).expand_as(grad), grad[:, :1].expand_as(grad), grad.flip(0)):
        right, gradient = expected(qkv, 2, of_out)
        assert far(out, right) < 1e-6
        (found,) = torch.autograd.grad(out, gaps, of_out, retain_graph=True)
        assert far(found, gradient) < 1e-6
    turned = grad.transpose(0, 1).contiguous().transpose(0, 1)
    right, gradient = expected(qkv, 2, turned)
    assert far(torch.autograd.grad(out, gaps, turned)[0], gradient) < 1e-6


@pytest.mark.parametrize(("block", "blocks"), [(16, 1), (32, 2), (64, 1), (128, 1)])
def test_the_result_does_not_depend_on_the_tile(monkeypatch, block: int, blocks: int) -> None:
    from msq.kernels.gpu import temporal_attention as kernels

    tile = Tile("temporal_attention", "any", 32, {"BLOCK": block, "BLOCKS": blocks}, 4, 1)
    monkeypatch.setattr(kernels, "find_tile", lambda *_: tile)
    check(11, 12, 2)


def test_problems_of_one_block_do_not_see_each_other() -> None:
    qkv, _ = inputs(21, 8, 2)
    others = qkv.clone()
    others[:3] = 1e4
    found, beside = (temporal_attention(x, 2, triton=True)[3:] for x in (qkv, others))
    assert torch.equal(found, beside)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's own check
@pytest.mark.parametrize("triton", [False, True])
def test_the_ops_are_sound_for_compilers(triton: bool) -> None:
    qkv, grad = inputs(3, 10, 2, width=16)
    torch.library.opcheck(torch.ops.msq.temporal_attention_backward, (grad, qkv, 2, triton))
    torch.library.opcheck(torch.ops.msq.temporal_attention, (qkv.requires_grad_(), 2, triton))


def test_the_reference_has_the_right_gradients_in_float64() -> None:
    qkv = inputs(2, 3, 2, torch.float64, width=4)[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: temporal_attention(x, 2), qkv)


def test_the_reference_is_torch_s_own_attention() -> None:
    qkv, grad = inputs(5, 10, 3)
    leaf = qkv.clone().requires_grad_()
    out = temporal_attention(leaf, 3)
    right, gradient = expected(qkv, 3, grad)
    assert far(out, right) < 1e-6
    assert far(torch.autograd.grad(out, leaf, grad)[0], gradient) < 1e-6


def test_what_does_not_fit_is_refused() -> None:
    qkv, _ = inputs(2, 8, 2)
    with pytest.raises(ValueError, match="multiple of H"):
        temporal_attention(qkv, 5)
    with pytest.raises(ValueError, match="P, T, 3 D"):
        temporal_attention(qkv[0], 2)
    assert "129 frames" in unsupported(129, 64)
    assert "width 24" in unsupported(8, 24)
    assert unsupported(96, 64) == ""
