"""The packed head with its kernels is the packed head without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from msq.config import HeadConfig, from_dict
from msq.head import packed_blocks
from msq.head.features import Features
from msq.head.masks import step_masks
from msq.head.model import MSQNet
from msq.head.packed import PackedHead
from msq.head.train import train_head

SHORT = ("cross_attention", "drop_add_norm", "relu_drop", "self_attention")
ABSORBED = ("absorbed_cross", "drop_add_norm", "relu_drop", "self_attention")
POSITIONS = {"encoder_layers": 1, "query_position": True}


def head(queries: str, classes: int, **options: object) -> MSQNet:
    generator = torch.Generator().manual_seed(1)
    config = HeadConfig(
        queries=queries, width=64, layers=2, heads=2, classifier="shared", **options
    )
    text = torch.randn(classes, 24, generator=generator)
    model = MSQNet(config, classes=classes, token_width=20, image_width=12, text=text, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing stays at its zero start
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def run(model: MSQNet, kernels: tuple[str, ...], dropout: float, seed: int, clips: int = 3):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(clips, 5, 20, generator=generator)
    image = torch.randn(clips, 12, generator=generator)
    masks = step_masks(7, 3, dropout)
    model.zero_grad(set_to_none=True)
    logits = PackedHead(model, kernels=kernels)(tokens, image, masks=masks)["logits"]
    weights = torch.randn(logits.shape, generator=generator)
    (logits * weights).sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def clear_of_the_kink(
    model: MSQNet, dropout: float, clips: int, monkeypatch: pytest.MonkeyPatch
) -> int:
    """A seed for which no hidden unit is within rounding of ReLU's kink.

    One that is can be on in one version and off in the other, and then every gradient differs by
    about a hundredth although both are right.
    """
    nearest: list[float] = []
    before = packed_blocks.FeedForward.forward

    def noted(ctx, x, w1, b1, *rest):
        nearest.append(float(torch.addmm(b1, x, w1.t()).detach().abs().min()))
        return before(ctx, x, w1, b1, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(packed_blocks.FeedForward, "forward", staticmethod(noted))
        for seed in range(2, 42):
            nearest.clear()
            run(model, (), dropout, seed, clips)
            if min(nearest) > 4e-6:
                return seed
    raise AssertionError("every seed has a hidden unit at the kink")


@pytest.mark.parametrize(
    ("queries", "options", "kernels", "clips", "dropout"),
    [
        ("vanilla", {}, SHORT, 3, 0.1),
        ("multimodal", {}, SHORT, 3, 0.0),
        ("text", POSITIONS, SHORT, 3, 0.1),
        ("text", {}, ABSORBED, 1, 0.0),
        ("multimodal", {"encoder_layers": 1}, ABSORBED, 3, 0.1),
    ],
)
def test_logits_and_gradients_are_the_same(
    queries: str, dropout: float, options, kernels, clips: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = head(queries, 20, **options)
    seed = clear_of_the_kink(model, dropout, clips, monkeypatch)
    plain_logits, plain = run(model, (), dropout, seed, clips)
    logits, found = run(model, kernels, dropout, seed, clips)
    assert (logits - plain_logits).norm() < 2e-6 * plain_logits.norm()
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        if ".k.bias" in name:
            continue  # zero but for rounding: what it adds to a row of scores softmax takes away
        far = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert far < 1e-5, name


def features() -> Features:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(12, 12, generator=generator) < 0.3).to(torch.uint8)
    return Features(
        name="toy", task="multilabel", classes=tuple(f"c{k}" for k in range(12)),
        ids=tuple(str(i) for i in range(12)), splits=("train",) * 8 + ("test",) * 4,
        tokens=torch.randn(12, 5, 16, generator=generator), labels=labels,
    )  # fmt: skip


def test_a_run_with_kernels_says_so_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    settings = {
        "head": {"queries": "vanilla", "width": 32, "heads": 2, "layers": 1},
        "train": {"epochs": 2, "batch": 4, "val": 0.0, "kernels": "triton"},
    }
    config = from_dict(settings)
    whole = train_head(features(), config, tmp_path / "whole")
    assert whole.result["step"]["kernels"] == ",".join(SHORT)
    assert whole.result["step"]["cross"] == "standard"
    for stop in (3, None):
        train_head(features(), config, tmp_path / "halves", stop_after=stop)
    first, second = ((tmp_path / n / "head.safetensors").read_bytes() for n in ("whole", "halves"))
    assert first == second
    reference = from_dict({**settings, "train": {**settings["train"], "kernels": "reference"}})
    other = train_head(features(), reference, None)
    for a, b in zip(whole.model.parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-3)
