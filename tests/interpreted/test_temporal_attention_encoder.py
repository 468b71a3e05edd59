"""A whole TimeSformer whose attention over time is the kernel, against torch's attention."""

from __future__ import annotations

import pytest
import torch

from msq import load_video_encoder
from msq.extract.encoders.timesformer import DividedLayer, TimeSformer
from msq.extract.encoders.timesformer_config import TimeSformerConfig

CPU = torch.device("cpu")


def far(found: torch.Tensor, right: torch.Tensor) -> float:
    found, right = found.detach().double(), right.detach().double()
    return float((found - right).norm() / right.norm())


def awake(frames: int) -> TimeSformer:
    """Random everywhere: a fresh model's attention over time is multiplied by zero."""
    torch.manual_seed(frames)
    config = TimeSformerConfig(
        image_size=(24, 16), patch_size=8, frames=frames, width=64, depth=2, heads=2, mlp_ratio=2.0
    )
    model = TimeSformer(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("frames", [8, 10])
def test_tokens_and_all_gradients_are_those_of_torch_s_attention(frames: int) -> None:
    model = awake(frames)
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(2, frames, 3, 24, 16, generator=generator)
    right = model(video.double())
    grad = torch.randn(right.shape, generator=generator)
    wide = torch.autograd.grad(right, list(model.parameters()), grad.double())
    model.float()
    plain = model(video)
    gradients = torch.autograd.grad(plain, list(model.parameters()), grad)
    assert model.choose_kernels("triton", CPU, torch.float32).path == "triton"
    fused = model(video)
    found = torch.autograd.grad(fused, list(model.parameters()), grad)
    # Two layers add to the rounding: the kernel's error is held to that of torch in float32.
    assert far(fused, right) < 2 * far(plain, right) + 1e-7
    for (name, _), a, b, c in zip(model.named_parameters(), found, gradients, wide, strict=True):
        if name.endswith("temporal_attention.qkv.bias"):
            third = len(a) // 3  # the bias of the keys has the gradient 0, but for rounding
            a, b, c = (torch.cat([x[:third], x[2 * third :]]) for x in (a, b, c))
        assert far(a, c) < max(2 * far(b, c), 1e-6), name


def test_an_encoder_with_the_kernel_says_so_in_its_spec() -> None:
    generator = torch.Generator().manual_seed(2)
    video = torch.randn(1, 8, 3, 48, 48, generator=generator)
    plain, fused = (load_video_encoder(kernels=k) for k in ("reference", "triton"))
    assert fused.spec.kernels == "triton"
    assert fused.spec.line("x") == plain.spec.line("x").replace("|fp32|", "|fp32 triton|")
    assert all(
        isinstance(block, DividedLayer) and block.temporal_attention.fused
        for block in fused.model.blocks
    )
    assert far(fused(video), plain(video)) < 1e-5
    assert not torch.equal(fused(video), plain(video))  # which is why the spec has to tell them
