from __future__ import annotations

import pytest
import torch

from msq.kernels.bits import mask_bits
from msq.kernels.gpu.self_attention import key_pieces
from msq.kernels.norm import kept
from msq.kernels.self_attention import self_attention, unsupported

KEY = torch.tensor([5, 6])
RATE = 410
SCALE = 4096 / (4096 - RATE)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
HEADS, WIDTH = 2, 128


def inputs(clips, keys, dtype=torch.float32, *, dropout=True, factorised=False, groups=0):
    generator = torch.Generator().manual_seed(clips * 1000 + keys)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows = keys if factorised else clips * keys
    qkv, grad = draw(rows, 3 * WIDTH), draw(clips * keys, WIDTH)
    clip = draw(clips, 3 * WIDTH) if factorised else None
    bits = mask_bits(KEY, 1, clips * HEADS * keys, keys, RATE) if dropout else None
    valid = None
    if groups:
        valid = (torch.rand(groups, keys, generator=generator) < 0.6).to(torch.uint8)
        valid[:, 0] = 1
    return qkv, clip, bits, valid, grad


def expected(qkv, clip, bits, valid, clips, grad):
    """By torch's own attention in float64 from the given numbers, with an explicit mask."""
    leaves = [x.double().requires_grad_() for x in (qkv, clip) if x is not None]
    rows = leaves[0]
    if clip is not None:
        rows = (rows[None] + leaves[1][:, None]).flatten(0, 1)
    q, k, v = (
        part.view(clips, -1, HEADS, WIDTH // HEADS).transpose(1, 2) for part in rows.chunk(3, 1)
    )
    scores = q @ k.transpose(2, 3) / (WIDTH // HEADS) ** 0.5
    if valid is not None:
        of_clip = valid.repeat_interleave(clips // len(valid), 0).bool()
        scores = scores.masked_fill(~of_clip[:, None, None], -torch.inf)
    p = scores.softmax(-1)
    if bits is not None:
        p = p * kept(bits, p.shape[-1]).view(p.shape) * SCALE
    out = (p @ v).transpose(1, 2).reshape(-1, WIDTH)
    return out, torch.autograd.grad(out, leaves, grad.double())


def far(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.detach().double() - right.detach()).norm() / right.detach().norm())


def check(clips, keys, dtype=torch.float32, **options) -> None:
    qkv, clip, bits, valid, grad = inputs(clips, keys, dtype, **options)
    leaves = [x.clone().requires_grad_() for x in (qkv, clip) if x is not None]
    out = self_attention(
        leaves[0], clips, HEADS, bits, SCALE if bits is not None else 1.0,
        clip=leaves[1] if clip is not None else None, valid=valid, triton=True,
    )  # fmt: skip
    found = torch.autograd.grad(out, leaves, grad)
    right, gradients = expected(qkv, clip, bits, valid, clips, grad)
    assert far(out, right) < TOLERANCE[dtype]
    for a, b in zip(found, gradients, strict=True):
        # q, k and v apart: an error in the small gradient of k would drown in that of v.
        for part, (x, y) in enumerate(zip(a.chunk(3, 1), b.chunk(3, 1), strict=True)):
            if clip is not None and part == 1 and b is gradients[-1]:
                assert x.abs().max() == 0  # exactly, where autograd finds rounding
            else:
                assert far(x, y) < TOLERANCE[dtype], "qkv"[part]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("keys", [12, 20, 51, 101, 140, 157])
def test_kernels_against_float64(keys: int, dropout: bool, dtype: torch.dtype) -> None:
    check(1, keys, dtype, dropout=dropout)


def test_several_clips_factorised_and_masked() -> None:
    check(3, 20)
    check(3, 33, factorised=True)
    check(1, 157, factorised=True)
    check(3, 51, factorised=True, dropout=False, dtype=torch.float16)
    check(4, 20, groups=2)
    check(3, 45, groups=3, factorised=True)


@pytest.mark.parametrize("keys", range(1, 257, 5))
def test_pieces_cover_the_keys_with_powers_of_two(keys: int) -> None:
    first, second = key_pieces(keys)
    assert first + second >= keys
    assert first & (first - 1) == 0
    assert second & (second - 1) == 0
    assert first >= 16
    assert second == 0 or (second >= 16 and second < first and first % 32 == 0)


def test_outputs_that_hold_rubbish_before_are_wholly_written(monkeypatch) -> None:
    from msq.kernels.gpu import self_attention as kernels

    qkv, _, bits, _, grad = inputs(2, 20)

    def nan(*shape, dtype, device):
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", nan)
    monkeypatch.setattr(
        torch, "empty_like", lambda x: nan(*x.shape, dtype=x.dtype, device=x.device)
    )
    out, log_sum = kernels.launch_forward(qkv, None, bits, None, 2, HEADS, SCALE)
    dqkv = kernels.launch_backward(grad, qkv, None, bits, None, log_sum, 2, HEADS, SCALE)
    assert bool(out.isfinite().all() and log_sum.isfinite().all() and dqkv.isfinite().all())


def test_gradients_without_memory_of_their_own_and_rows_with_gaps() -> None:
    qkv, _, bits, _, grad = inputs(2, 20)
    right, gradients = expected(qkv, None, bits, None, 2, torch.ones_like(grad))
    wide = torch.zeros(40, 6 * WIDTH)
    wide[:, ::2] = qkv
    gaps = wide[:, ::2].detach().requires_grad_()
    out = self_attention(gaps, 2, HEADS, bits, SCALE, triton=True)
    assert far(out, right) < 1e-6
    assert far(torch.autograd.grad(out.sum(), gaps)[0], gradients[0]) < 1e-6


def test_the_result_does_not_depend_on_the_tile(monkeypatch) -> None:
    from dataclasses import replace

    from msq.kernels.gpu import self_attention as kernels

    qkv, _, bits, _, _ = inputs(1, 51)
    wide = self_attention(qkv, 1, HEADS, bits, SCALE, triton=True)
    before = kernels.find_tile
    monkeypatch.setattr(
        kernels, "find_tile", lambda *a: replace(before(*a), sizes={"ROWS": 16, "COLS": 32})
    )
    monkeypatch.setattr("msq.kernels.tiles.Tile.launch", lambda self: {"ROWS": 16})
    narrow = self_attention(qkv, 1, HEADS, bits, SCALE, triton=True)
    assert far(narrow, wide.double()) < 1e-6


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's own check
@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("factorised", [False, True])
def test_the_op_is_sound_for_compilers(triton: bool, factorised: bool) -> None:
    qkv, clip, bits, _, _ = inputs(2, 12, factorised=factorised)
    leaves = [x.requires_grad_() if x is not None else None for x in (qkv, clip)]
    torch.library.opcheck(
        torch.ops.msq.self_attention, (*leaves, bits, None, 2, HEADS, SCALE, triton)
    )


def test_the_reference_has_the_right_gradients_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    qkv, clip = (torch.randn(n, 24, generator=generator).double() for n in (5, 2))
    bits = mask_bits(KEY, 0, 2 * 2 * 5, 5, 1000)
    for leaves in (
        [qkv.repeat(2, 1).requires_grad_()],
        [qkv.requires_grad_(), clip.requires_grad_()],
    ):
        assert torch.autograd.gradcheck(
            lambda x, c=None: self_attention(x, 2, 2, bits, 4096 / 3096, clip=c), leaves
        )


def test_what_does_not_fit_is_refused() -> None:
    qkv, _, bits, _, _ = inputs(2, 20)
    with pytest.raises(ValueError, match="do not fit"):
        self_attention(qkv[:-1], 2, HEADS)
    with pytest.raises(ValueError, match="bits"):
        self_attention(qkv, 2, HEADS, bits[1:])
    assert "256" in unsupported(300, 64)
    assert "width 48" in unsupported(20, 48)
    assert unsupported(157, 64) == ""
