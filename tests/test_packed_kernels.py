"""The packed head through the operations of `msq.kernels`, their references, on the CPU."""

from __future__ import annotations

import itertools
import logging
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msq.config import HeadConfig, from_dict
from msq.errors import UsageError
from msq.head.absorbed import absorbed_attention
from msq.head.features import Features
from msq.head.kernel_choice import (
    FEWEST_QUERIES,
    HeadShape,
    choose_kernels,
    cross_form,
    not_absorbed,
)
from msq.head.masks import LayerMasks, Masks, Part, Site
from msq.head.model import MSQNet
from msq.head.packed import PackedHead
from msq.head.packed_blocks import CrossAttend, DropAddNorm, FeedForward, SelfAttend, split_heads
from msq.head.packed_choice import StepChoice
from msq.head.packed_kernels import OPS, KernelBlocks
from msq.head.packed_layers import PackedLayers
from msq.head.packed_parameters import flat_parameters
from msq.head.train import train_head
from msq.kernels import dispatch
from msq.kernels.cross_attention import columns
from msq.kernels.self_attention import self_attention
from msq.kernels.tiles import all_tiles, find_tile

B, K, S, H, D, F = 3, 7, 5, 2, 16, 24
FORMS = (
    tuple(op for op in OPS if op != "absorbed_cross"),
    tuple(op for op in OPS if op != "cross_attention"),
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def same(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Results and gradients are the same numbers but for rounding in float64."""
    grad = draw(*expected.shape, seed=9).detach()
    pairs = zip(
        [found, *torch.autograd.grad(found, leaves, grad)],
        [expected, *torch.autograd.grad(expected, leaves, grad)],
        strict=True,
    )
    for a, b in pairs:
        assert float((a - b).detach().abs().max()) < 1e-12 * max(1.0, float(b.detach().abs().max()))


@pytest.fixture(params=[True, False], ids=["dropout", "no dropout"])
def masks(request: pytest.FixtureRequest) -> LayerMasks | None:
    return Masks(3, 4, 0.3).at(Part.decoder, 1) if request.param else None


def test_self_attention_is_the_piece(masks: LayerMasks | None) -> None:
    packed, blocks = draw(B * K, 3 * D), KernelBlocks(OPS, H, triton=False)
    expected = SelfAttend.apply(split_heads(packed, B, 3, H), masks)
    same(blocks.self_attention(packed, B, masks), expected, [packed])


def test_the_first_layer_in_its_factors_is_the_piece(masks: LayerMasks | None) -> None:
    own, query, value = draw(K, 3 * D), draw(B, D), draw(B, D, seed=1)
    clip = torch.cat([query, torch.zeros_like(query), value], 1)
    whole = (own + clip[:, None]).view(-1, 3 * D)
    expected = SelfAttend.apply(split_heads(whole, B, 3, H), masks)
    found = KernelBlocks(OPS, H, triton=False).self_attention(own, B, masks, clip)
    same(found, expected, [own, query, value])


def test_classes_that_are_none_count_as_little_as_if_they_were_not_there() -> None:
    """Three heads stacked, each with a mask of its own: clip b is of head b."""
    packed = draw(B * K, 3 * D)
    valid = torch.tensor([[1] * 7, [1, 1, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0]])
    grad = draw(B * K, D).detach() * valid.view(-1, 1)
    out = self_attention(packed, B, H, valid=valid.to(torch.uint8))
    (found,) = torch.autograd.grad(out, packed, grad)
    for b, real in enumerate(valid.bool()):
        rows = packed.view(B, K, -1)[b, real].detach().requires_grad_()
        alone = SelfAttend.apply(split_heads(rows, 1, 3, H), None)
        (expected,) = torch.autograd.grad(alone, rows, grad.view(B, K, -1)[b, real])
        torch.testing.assert_close(out.view(B, K, -1)[b, real], alone)
        torch.testing.assert_close(found.view(B, K, -1)[b, real], expected)
        assert found.view(B, K, -1)[b, ~real].abs().sum() == 0


def test_norm_is_the_piece(masks: LayerMasks | None) -> None:
    leaves = [draw(B * K, D), draw(B * K, D, seed=1), draw(D), draw(D, seed=1)]
    x, y, weight, bias = leaves
    expected = DropAddNorm.apply(x, y, weight, bias, masks, Site.ffn_residual)
    blocks = KernelBlocks(OPS, H, triton=False)
    same(blocks.add_norm(x, y, (weight, bias), masks, Site.ffn_residual), expected, leaves)


def test_feed_forward_is_the_piece(masks: LayerMasks | None) -> None:
    leaves = [draw(B * K, D), draw(F, D), draw(F), draw(D, F), draw(D)]
    x, w1, b1, w2, b2 = leaves
    found = KernelBlocks(OPS, H, triton=False).feed_forward(x, (w1, b1), (w2, b2), masks)
    same(found, FeedForward.apply(x, w1, b1, w2, b2, masks), leaves)


def test_short_cross_attention_is_the_piece(masks: LayerMasks | None) -> None:
    """Keys and values are columns of a wider product."""
    q, made = draw(B * K, D), draw(B * S, 6 * D)
    kv = made[:, 2 * D : 4 * D]
    k, v = kv.reshape(B, S, 2, H, D // H).permute(2, 0, 3, 1, 4)
    expected = CrossAttend.apply(split_heads(q, B, 1, H)[0], k, v, masks)
    blocks = KernelBlocks(OPS, H, triton=False)
    same(blocks.cross_attention(q, kv, B, masks), expected, [q, made])


def test_absorbed_cross_attention_is_the_piece(masks: LayerMasks | None) -> None:
    leaves = [
        draw(B * K, D), draw(B, S, H, D // H), draw(B, S, H, D // H, seed=1), draw(D, D), draw(D),
        draw(D, D, seed=1), draw(D, seed=1), draw(D, seed=2), draw(D, seed=3),
    ]  # fmt: skip
    x, k, v, wq, bq, wo, bo, weight, bias = leaves
    y = absorbed_attention(x.view(B, K, D), k, v, (wq, bq), (wo, bo), masks).view(B * K, D)
    expected = DropAddNorm.apply(x, y, weight, bias, masks, Site.cross_residual)
    found = KernelBlocks(OPS, H, triton=False).absorbed_cross(
        x, k, v, (wq, bq), (wo, bo), (weight, bias), masks
    )
    same(found, expected, leaves)


def head(**options: Any) -> tuple[MSQNet, Tensor, Tensor]:
    """A small head in float64 away from its start, tokens and image."""
    g = torch.Generator().manual_seed(4)
    settings = {"width": D, "layers": 2, "heads": H, "ffn": F, "queries": "multimodal"} | options
    model = MSQNet(HeadConfig(**settings), classes=K, token_width=10, image_width=6,
                   text=torch.randn(K, D, generator=g), seed=3).double()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=g).double()
    return model, draw(B, S, 10).detach(), draw(B, 6).detach()


VARIANTS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    *itertools.product(FORMS, [{}, {"queries": "vanilla"}, {"queries": "text"},
                               {"encoder_layers": 1, "memory_position": "sincos-input"}]),
    (FORMS[0], {"query_position": True}),
    *(((op,), {}) for op in OPS),
]  # fmt: skip


@pytest.mark.parametrize(("ops", "options"), VARIANTS)
@pytest.mark.parametrize("dropout", [0.3, 0.0])
def test_the_whole_head_is_the_same_through_the_operations(ops, options, dropout) -> None:
    """With a batch of three and then a short one of one clip, as at the end of an epoch."""
    model, tokens, image = head(**options)
    drops = Masks(3, 5, dropout) if dropout else None
    for clips in (B, 1):
        sides = []
        for kernels in ((), ops):
            model.zero_grad(set_to_none=True)
            one = PackedHead(model, kernels=kernels, triton=False)
            logits = one(tokens[:clips], image[:clips], masks=drops)["logits"]
            logits.square().sum().backward()
            found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            sides.append({"logits": logits.detach(), **found})
        assert sides[0].keys() == sides[1].keys()
        for name, expected in sides[0].items():
            if not name.endswith(".k.bias"):  # zero but for rounding
                torch.testing.assert_close(sides[1][name], expected, rtol=1e-9, atol=1e-9, msg=name)


def test_the_operations_give_flat_gradients_too() -> None:
    model, tokens, image = head()
    found = []
    for ops in ((), FORMS[1]):
        flat = flat_parameters(model)
        one = PackedHead(model, flat=flat, kernels=ops, triton=False)
        flat.begin()
        one(tokens, image, masks=Masks(3, 5, 0.1))["logits"].square().sum().backward()
        flat.gather()
        found.append(flat.grad.clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def test_an_operation_that_is_none_and_positions_in_the_absorbed_kernel_are_refused() -> None:
    model, tokens, image = head(query_position=True)
    with pytest.raises(UsageError, match=r"expected names among .* found \['soft_max'\]"):
        PackedHead(model, kernels=["soft_max"])
    with pytest.raises(UsageError, match="positions"):
        PackedHead(model, kernels=FORMS[1], triton=False)(tokens, image)


BIG = HeadShape(queries=157, tokens=17, width=512, heads=8, ffn=2048)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Dispatch sees a device of compute capability 9.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.delenv("MSQ_KERNELS", raising=False)
    dispatch.resolve.cache_clear()
    yield torch.device("cuda")
    dispatch.resolve.cache_clear()


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, "absorbed_cross"),
        ({"queries": FEWEST_QUERIES}, "absorbed_cross"),
        ({"queries": FEWEST_QUERIES - 1}, "cross_attention"),
        ({"queries": 20}, "cross_attention"),
        ({"tokens": 32}, "absorbed_cross"),
        ({"positions": True}, "cross_attention"),
        ({"heads": 16, "tokens": 17}, "cross_attention"),  # 272 columns
        ({"heads": 16, "tokens": 16}, "absorbed_cross"),
    ],
)
def test_one_cross_attention_is_taken_and_it_is_the_one_for_the_sizes(
    changes: dict[str, Any], taken: str, on_a_gpu: torch.device
) -> None:
    shape = replace(BIG, **changes)
    chosen = choose_kernels("triton", on_a_gpu, "bf16", shape)
    ops = [choice.op for choice in chosen if choice.path == "triton"]
    assert ops == sorted([taken, "drop_add_norm", "relu_drop", "self_attention"])
    assert [choice.op for choice in chosen] == sorted(OPS)
    form = "absorbed" if taken == "absorbed_cross" else "standard"
    assert cross_form(chosen, "cuda", "bf16", shape) == form
    KernelBlocks(ops, shape.heads)  # the head takes these names


@pytest.mark.parametrize("changes", [{"tokens": 33}, {"queries": 257}, {"width": 480}])
def test_sizes_that_no_kernel_takes_are_refused_by_triton_and_left_by_auto(
    changes: dict[str, Any], on_a_gpu: torch.device
) -> None:
    shape = replace(BIG, **changes)
    with pytest.raises(UsageError, match="cannot run its kernel"):
        choose_kernels("triton", on_a_gpu, "bf16", shape)
    assert {c.path for c in choose_kernels("auto", on_a_gpu, "bf16", shape)} == {"reference"}


def test_the_encoder_counts_its_tokens_as_keys(on_a_gpu: torch.device) -> None:
    shape = replace(BIG, tokens=300, encoder=True)
    found = {c.op: c.reason for c in choose_kernels("auto", on_a_gpu, "bf16", shape)}
    assert "300 keys" in found["self_attention"]
    shape = replace(shape, encoder=False)
    found = {c.op: c.reason for c in choose_kernels("auto", on_a_gpu, "bf16", shape)}
    assert found["self_attention"] == "not measured on any"


def test_auto_takes_what_was_measured_to_be_faster(
    on_a_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The absorbed kernel is looked up by its columns, 144, and not by K or T."""
    asked = []

    def measured(op: str, capability: Any, keys: int) -> Any:
        asked.append((op, keys))
        ratio = {"absorbed_cross": 1.2, "drop_add_norm": 0.9}.get(op)
        return replace(find_tile(op, capability, keys), ratio=ratio, architecture="sm_90")

    monkeypatch.setattr(dispatch, "find_tile", measured)
    chosen = choose_kernels("auto", on_a_gpu, "bf16", BIG)
    assert ("absorbed_cross", 144) in asked
    assert ("cross_attention", 157) not in asked  # decided already
    assert {c.op: c.path for c in chosen} == {
        "absorbed_cross": "triton", "cross_attention": "reference", "drop_add_norm": "reference",
        "relu_drop": "reference", "self_attention": "reference",
    }  # fmt: skip
    assert chosen[0].reason == "measured 1.20 x the reference on sm_90"


def test_without_a_kernel_the_recorded_table_says_which_form(on_a_gpu: torch.device) -> None:
    for queries, form in ((157, "absorbed"), (12, "standard")):
        shape = replace(BIG, queries=queries)
        chosen = choose_kernels("reference", torch.device("cpu"), "fp32", shape)
        assert cross_form(chosen, "cpu", "fp32", shape) == form


def test_every_operation_has_a_tile_for_all_sizes_that_are_taken() -> None:
    for architecture in ((8, 0), (9, 0), (10, 0), None):
        for op, most in (("absorbed_cross", 256), ("self_attention", 256),
                         ("cross_attention", 256), ("drop_add_norm", 2048)):  # fmt: skip
            for size in range(1, most + 1):
                assert find_tile(op, architecture, size).keys >= size
    assert {tile.op for tile in all_tiles()} >= {*OPS, "mask_bits"}


def test_what_the_absorbed_kernel_takes_has_a_tile_by_its_columns() -> None:
    for heads, tokens in itertools.product((1, 2, 4, 8, 16, 32), range(1, 40)):
        shape = replace(BIG, heads=heads, tokens=tokens)
        fits = tokens <= 32 and heads * tokens <= 256
        assert (not_absorbed(shape) == "") == fits
        if fits:
            assert find_tile("absorbed_cross", (9, 0), columns(tokens, heads)).keys <= 256


def features() -> Features:
    g = torch.Generator().manual_seed(0)
    return Features(
        name="toy", task="multilabel", classes=tuple("abcde"), ids=tuple(map(str, range(24))),
        splits=("train",) * 16 + ("test",) * 8, tokens=torch.randn(24, 4, 16, generator=g),
        labels=(torch.rand(24, 5, generator=g) < 0.4).to(torch.uint8),
    )  # fmt: skip


def test_choice_and_reasons_are_logged_stored_and_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = from_dict({"head": {"queries": "vanilla", "width": 32, "heads": 2, "layers": 1},
                        "train": {"epochs": 1, "batch": 4, "val": 0.0}})  # fmt: skip
    dispatch.resolve.cache_clear()
    with caplog.at_level(logging.INFO, "msq.kernels.dispatch"):
        train_head(features(), config, tmp_path / "run", stop_after=1)
    assert (
        sum("self_attention: reference (no CUDA device" in r.message for r in caplog.records) == 1
    )
    stored = tomllib.loads((tmp_path / "run" / "config.toml").read_text(encoding="utf-8"))
    step = stored["data"]["step"]
    assert step["cross"] == "standard"
    assert step["reasons"].keys() == set(OPS)
    assert step["reasons"]["relu_drop"] == "reference (no CUDA device (cpu))"
    assert "relu_drop: reference (no CUDA" in (tmp_path / "run" / "log.txt").read_text("utf-8")
    monkeypatch.setattr(
        "msq.head.train.choose_step", lambda *_: StepChoice("packed", "fp32", "", "absorbed")
    )
    forms = []
    own = PackedLayers.cross_form
    monkeypatch.setattr(
        PackedLayers, "cross_form",
        lambda self, *a: forms.append((self.absorb, (f := own(self, *a)).__name__)) or f,
    )  # fmt: skip
    done = train_head(features(), config, tmp_path / "run")
    assert set(forms[:3]) == {(False, "_standard")}
    assert done.result["step"] == step
