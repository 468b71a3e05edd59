"""The packed head against the plain one, which is itself tested against torch's own modules."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msq import config as configuration
from msq.config import HeadConfig, RunConfig
from msq.errors import MsqError, SpecMismatch, UsageError
from msq.head import absorbed, packed_layers
from msq.head.absorbed import absorbed_attention, absorbing_pays
from msq.head.checkpoint import load_model, load_state, save_state
from msq.head.evaluate import score
from msq.head.features import Features
from msq.head.flat import FlatParameters
from msq.head.kernel_choice import HeadShape
from msq.head.loss import head_loss
from msq.head.masks import Masks, Part
from msq.head.model import MSQNet
from msq.head.optim import build_optimiser
from msq.head.packed import PackedHead
from msq.head.packed_choice import StepChoice, bf16_is_native, choose_step
from msq.head.packed_parameters import flat_parameters, pack, packed_groups, unpack
from msq.head.train import Training, train_head

QUERIES = ("vanilla", "text", "multimodal")
CLASSIFIERS = ("per-class", "shared", "text")
K, S, B = 7, 5, 3
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "positions": {"query_position": True},
    "official": {"encoder_layers": 2, "memory_position": "sincos-input",
                 "label_projection": "fused", "start": "torch"},
    "bare": {"memory_position": "none", "layers": 1},
}  # fmt: skip


def make(
    queries: str = "multimodal", classifier: str = "per-class", **options: Any
) -> tuple[MSQNet, Tensor, Tensor]:
    """A small head in float64 with every parameter away from its start, tokens and image."""
    g = torch.Generator().manual_seed(11)
    settings = {"width": 12, "layers": 2, "heads": 3, "ffn": 20, "dropout": 0.3} | options
    text = torch.randn(K, 12, generator=g) + 1
    config = HeadConfig(queries=queries, classifier=classifier, **settings)  # type: ignore[arg-type]
    model = MSQNet(config, classes=K, token_width=10, image_width=6, text=text, seed=3).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=g).double()
    return (
        model,
        torch.randn(B, S, 10, generator=g).double(),
        torch.randn(B, 6, generator=g).double(),
    )


def large(dropout: float = 0.1, classes: int = 20, layers: int = 6) -> MSQNet:
    """Full width, in float32, as it starts."""
    config = HeadConfig(dropout=dropout, width=512, layers=layers)
    text = torch.randn(classes, 512, generator=torch.Generator().manual_seed(0))
    return MSQNet(config, classes=classes, token_width=768, image_width=512, text=text)


def away_from_kinks(model: MSQNet) -> MSQNet:
    """The same with every hidden unit decidedly on or off, half of them each.

    In float32 rounding alone decides on units within 1e-6 of zero. Of millions one or two lie
    there; each that falls on the other side moves a gradient by 1e-4 of its size.
    """
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for layer in model.layers:
            on = torch.rand(layer.expand.bias.shape, generator=g) < 0.5
            layer.expand.bias += torch.where(on, 6.0, -6.0)  # over four standard deviations
    return model


def batch(clips: int, classes: int, tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    labels = torch.rand(clips, classes, generator=g) < 0.2
    return (
        torch.randn(clips, tokens, 768, generator=g),
        torch.randn(clips, 512, generator=g),
        labels,
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def flat_gradients(flat: FlatParameters, model: nn.Module) -> dict[str, Tensor]:
    """By plain names, through the parts that the optimiser steps on."""
    assert flat.matrices.grad is not None
    assert flat.vectors.grad is not None
    start, size = flat.data.data_ptr(), flat.data.element_size()
    whole = torch.cat([flat.matrices.grad, flat.vectors.grad])
    found = {}
    for name, p in model.named_parameters():
        place = (p.data_ptr() - start) // size
        found[name] = whole[place : place + p.numel()].view(p.shape).clone()
    return found


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Against the maximum of each tensor, with q, k and v taken together.

    The bias of the keys has no gradient at all (it shifts every score of a row alike): both sides
    hold rounding only, so it is measured against the gradients beside it.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        beside = [value]
        if name.endswith((".q.bias", ".k.bias", ".v.bias", ".q.weight", ".k.weight", ".v.weight")):
            owner, _, leaf = name.rpartition(".")
            beside = [expected[f"{owner[:-1]}{x}.{leaf}"] for x in "qkv"]
        largest = max(float(x.abs().max()) for x in beside)
        assert largest > 0, name
        assert float((found[name] - value).abs().max()) <= tolerance * largest, name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("queries", "classifier"), list(itertools.product(QUERIES, CLASSIFIERS)))
def test_logits_and_all_gradients_are_those_of_the_plain_head(
    queries: str, classifier: str, variant: str
) -> None:
    for masks, absorb in itertools.product((None, Masks(3, 5, 0.3)), (False, True)):
        model, tokens, image = make(queries, classifier, **VARIANTS[variant])
        weight = torch.randn(B, K, generator=torch.Generator().manual_seed(0)).double()
        expected = model.eval()(tokens, image, masks=masks)["logits"]
        torch.autograd.backward((expected * weight).sum())
        plain = gradients(model)

        def check(
            head: PackedHead, tokens: Tensor, image: Tensor, masks: Masks | None,
            expected: Tensor, weight: Tensor,
        ) -> None:  # fmt: skip
            found = head(tokens, image, masks=masks)["logits"]
            torch.testing.assert_close(
                found, expected, atol=1e-12 * float(expected.detach().abs().max()), rtol=0
            )
            torch.autograd.backward((found * weight).sum())

        check(PackedHead(model, absorb=absorb), tokens, image, masks, expected, weight)
        same_gradients(gradients(model), plain, 1e-10)
        flat = flat_parameters(model)
        flat.begin()
        check(PackedHead(model, flat=flat, absorb=absorb), tokens, image, masks, expected, weight)
        flat.gather()
        same_gradients(flat_gradients(flat, model), plain, 1e-10)


@pytest.mark.parametrize("queries", QUERIES)
def test_other_classes_take_their_place_as_in_the_plain_head(queries: str) -> None:
    g = torch.Generator().manual_seed(2)
    trained = torch.tensor([3, -1, 0, -1])
    for classifier in ("shared", "text"):
        model, tokens, image = make(queries, classifier, query_position=True)
        needs = queries != "vanilla" or classifier == "text"
        text = torch.randn(4, 12, generator=g).double() if needs else None
        for which in (trained, None) if needs else (trained,):
            expected = model.eval()(tokens, image, text=text, trained=which)["logits"]
            found = PackedHead(model)(tokens, image, text=text, trained=which)["logits"]
            assert found.shape == (B, 4)
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    model, tokens, image = make("text", "per-class")
    known = torch.tensor([2, 5])
    text = torch.randn(2, 12, generator=g).double()
    found = PackedHead(model)(tokens, image, text=text, trained=known)["logits"]
    expected = model.eval()(tokens, image, text=text, trained=known)["logits"]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    with pytest.raises(UsageError, match="never trained"):
        PackedHead(model)(tokens, image, text=text)
    with pytest.raises(UsageError, match="needs `image`"):
        PackedHead(make("multimodal")[0])(tokens)


@pytest.mark.parametrize(("queries", "classifier"), list(itertools.product(QUERIES, CLASSIFIERS)))
def test_fifty_steps_of_adam_end_at_the_same_parameters(queries: str, classifier: str) -> None:
    """With either form of the cross-attention.

    Left out: the biases of the keys. Their gradient is zero but for rounding, and Adam divides
    it by its own size, so what they become is rounding too; no output depends on them.
    """
    optim = configuration.override(RunConfig(), ["optim.lr=1e-3"]).optim
    finals = []
    for absorb in (None, False, True):  # the plain head first
        model, tokens, image = make(queries, classifier, **VARIANTS["official"])
        labels = torch.rand(B, K, generator=torch.Generator().manual_seed(1)) < 0.4
        flat = None if absorb is None else flat_parameters(model)
        head = PackedHead(model, flat=flat, absorb=absorb) if flat else model
        optimiser = build_optimiser(flat or model, optim)
        for step in range(50):
            if flat:
                flat.begin()
            else:
                model.zero_grad()
            logits = head(tokens, image, masks=Masks(0, step, 0.3))["logits"]
            torch.autograd.backward(head_loss(logits, labels, "bce"))
            if flat:
                flat.gather()
            optimiser.step()
        finals.append({n: p.detach().clone() for n, p in model.named_parameters()})
    start = make(queries, classifier, **VARIANTS["official"])[0].state_dict()
    for name, expected in finals[0].items():
        if name.endswith("attention.k.bias"):
            continue
        assert float((expected - start[name]).abs().max()) > 1e-3, name
        scale = float(expected.abs().max())
        for found in finals[1:]:
            assert float((found[name] - expected).abs().max()) < 1e-10 * scale, name


def test_in_float32_at_full_width_gradients_and_the_first_losses_agree() -> None:
    """The head as it starts, hidden units near zero included."""
    same_start_in_float32(lambda: large(classes=12, layers=4), batch(3, 12), absorb=True)


@pytest.mark.parametrize(("classes", "absorb"), [(12, False), (157, True)])
def test_in_float32_at_full_size_gradients_and_the_first_losses_agree(
    classes: int, absorb: bool
) -> None:
    """In the form that the table chooses for so many classes, away from ReLU's kinks."""
    assert absorbing_pays(classes, 17, "cpu", "fp32") == absorb
    clips = batch(3 if classes < 100 else 1, classes, 17)
    same_start_in_float32(lambda: away_from_kinks(large(classes=classes)), clips, absorb=absorb)


def same_start_in_float32(
    start: Callable[[], MSQNet], clips: tuple[Tensor, Tensor, Tensor], *, absorb: bool
) -> None:
    """Gradients of the first step, losses of ten, plain and packed."""
    tokens, image, labels = clips
    losses: dict[str, list[float]] = {"plain": [], "packed": []}
    first: dict[str, dict[str, Tensor]] = {}
    for path, found in losses.items():
        model = start()
        flat = flat_parameters(model)
        head = PackedHead(model, flat=flat, absorb=absorb) if path == "packed" else model
        optimiser = build_optimiser(
            flat, configuration.override(RunConfig(), ["optim.lr=2e-5"]).optim
        )
        for step in range(10):
            flat.begin()
            logits = head(tokens, image, masks=Masks(0, step, 0.1))["logits"]
            loss = head_loss(logits, labels, "bce")
            torch.autograd.backward(loss)
            flat.gather()
            if not step:
                first[path] = flat_gradients(flat, model)
            optimiser.step()
            found.append(float(loss.detach()))
    same_gradients(first["packed"], first["plain"], 1e-5)
    assert losses["plain"][9] < losses["plain"][0] - 0.05
    for a, b in zip(losses["packed"], losses["plain"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_absorbed_attention_is_torchs_multi_head_attention() -> None:
    g = torch.Generator().manual_seed(4)
    width, heads, rows, tokens = 12, 3, 6, 4
    theirs = nn.MultiheadAttention(width, heads, batch_first=True).double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    x = torch.randn(B, rows, width, generator=g).double().requires_grad_()
    memory = torch.randn(B, tokens, width, generator=g).double().requires_grad_()
    expected, _ = theirs(x, memory, memory, need_weights=False)
    wq, wk, wv = theirs.in_proj_weight.chunk(3)
    bq, bk, bv = theirs.in_proj_bias.chunk(3)
    split = (B, tokens, heads, width // heads)
    k = (memory @ wk.t() + bk).view(split)
    v = (memory @ wv.t() + bv).view(split)
    out = (theirs.out_proj.weight, theirs.out_proj.bias)
    found = absorbed_attention(x, k, v, (wq, bq), out)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    inputs = [x, memory, theirs.in_proj_weight, theirs.in_proj_bias, *out]
    weight = torch.randn(found.shape, generator=g).double()
    mine = torch.autograd.grad((found * weight).sum(), inputs)
    for a, b in zip(mine, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_the_recorded_table_decides_on_the_absorbed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = {"cpu fp32": {"9": {"20": 0.9, "50": 1.1}, "17": {"20": 0.8, "100": 1.2}}}
    monkeypatch.setattr(absorbed, "table", lambda: recorded)
    assert absorbing_pays(50, 9, "cpu", "fp32")
    assert absorbing_pays(157, 8, "cpu", "fp32")
    assert not absorbing_pays(49, 9, "cpu", "fp32")  # as 20
    assert not absorbing_pays(60, 10, "cpu", "fp32")  # as 20 queries and 17 tokens
    assert absorbing_pays(157, 10, "cpu", "fp32")
    assert not absorbing_pays(10, 9, "cpu", "fp32")  # below the table
    assert not absorbing_pays(157, 18, "cpu", "fp32")  # beyond it
    assert not absorbing_pays(157, 9, "cpu", "bf16")  # not measured
    monkeypatch.undo()
    for name in ("cpu fp32", "cpu bf16"):
        precision = name.split()[1]
        assert absorbing_pays(157, 17, "cpu", precision), name
        assert not absorbing_pays(12, 17, "cpu", precision), name
        assert not absorbing_pays(157, 3137, "cpu", precision), name


def test_the_table_is_what_chooses_between_the_two_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, image = make()
    asked: list[tuple[int, int, str, str]] = []

    def pays(*question: Any) -> bool:
        asked.append(question)
        return True

    calls: list[int] = []
    own = packed_layers.absorbed_attention
    monkeypatch.setattr(packed_layers, "absorbing_pays", pays)
    monkeypatch.setattr(packed_layers, "absorbed_attention", lambda *a: calls.append(1) or own(*a))
    PackedHead(model)(tokens, image)
    assert asked == [(K, S, "cpu", "fp32")]
    assert len(calls) == 2


@pytest.mark.parametrize("encoder_layers", [0, 2])
def test_plain_names_to_packed_ones_and_back_give_the_same_bits(encoder_layers: int) -> None:
    model = make(encoder_layers=encoder_layers)[0]
    plain = model.state_dict()
    joined = pack(plain, 2, encoder_layers)
    assert joined["layers.1.self_attention.qkv.weight"].shape == (36, 12)
    assert joined["layers.cross_attention.kv.weight"].shape == (48, 12)
    assert not [name for name in joined if name.endswith(("k.weight", ".v.bias"))]
    again = unpack(joined, 2, encoder_layers)
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    assert torch.equal(joined["layers.cross_attention.kv.weight"][12:24],
                       plain["layers.0.cross_attention.v.weight"])  # fmt: skip


def test_in_the_flat_buffer_modules_see_their_parameters_and_the_packed_head_the_groups() -> None:
    model = make(encoder_layers=1)[0]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    flat = flat_parameters(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    for name, names in packed_groups(2, 1).items():
        expected = pack(before, 2, 1)[name]
        assert torch.equal(flat.leaf(names), expected)
    with torch.no_grad():
        model.layers[0].self_attention.k.weight.fill_(7.0)  # written through one, read by the other
    assert bool(
        (flat.leaf(packed_groups(2, 1)["layers.0.self_attention.qkv.weight"])[12:24] == 7).all()
    )
    assert len(flat.matrices) + len(flat.vectors) == len(flat.data)
    start, size = flat.data.data_ptr(), flat.data.element_size()
    for _, p in model.named_parameters():
        assert ((p.data_ptr() - start) // size < len(flat.matrices)) == (p.ndim >= 2)
    with pytest.raises(ValueError, match="do not lie side by side"):
        flat.leaf(("layers.0.expand.weight", "layers.1.expand.weight"))


def test_a_parameter_that_the_loss_does_not_reach_gets_a_zero_gradient() -> None:
    pair = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    flat = FlatParameters(pair)
    flat.grad.fill_(9.0)
    flat.begin()
    torch.autograd.backward(pair["used"](torch.ones(4, 3)).sum())
    flat.gather()
    found = flat_gradients(flat, pair)
    assert bool((found["used.weight"] == 4).all())
    assert bool((found["idle.weight"] == 0).all())
    assert bool((found["idle.bias"] == 0).all())


def toy() -> Features:
    g = torch.Generator().manual_seed(0)
    labels = (torch.rand(60, 5, generator=g) < 0.3).to(torch.uint8)
    marks = torch.randn(5, 16, generator=g)
    tokens = 0.5 * torch.randn(60, 4, 16, generator=g) + (labels.float() @ marks)[:, None]
    return Features(
        name="toy", task="multilabel", classes=tuple("abcde"), ids=tuple(map(str, range(60))),
        splits=tuple("test" if i % 4 == 3 else "train" for i in range(60)), tokens=tokens,
        labels=labels, image=torch.randn(60, 16, generator=g),
        text=torch.randn(5, 16, generator=g), prompt="a {}",
        specs={kind: {"slug": kind} for kind in ("video", "image", "text")},
    )  # fmt: skip


def small(*overrides: str) -> RunConfig:
    return configuration.override(
        RunConfig(), ["head.layers=2", "head.heads=2", "head.ffn=32", "train.epochs=3",
                      "train.batch=16", *overrides])  # fmt: skip


def test_both_paths_train_the_same_head_and_each_resumes_to_its_own_bits(tmp_path: Path) -> None:
    losses = {}
    for path in ("plain", "packed"):
        config = small(f"train.path={path}")
        whole = train_head(toy(), config, tmp_path / path)
        step = whole.result["step"]
        assert (step["path"], step["precision"], step["kernels"]) == (path, "fp32", "")
        lines = (tmp_path / path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses[path] = [json.loads(line)["loss"] for line in lines]
        out = tmp_path / f"{path} in parts"
        for part in (1, 3, 2):
            assert not train_head(toy(), config, out, stop_after=part).finished
        train_head(toy(), config, out)
        first, second = (load_model(folder / "head.safetensors")[0].state_dict()
                         for folder in (out, tmp_path / path))  # fmt: skip
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses["packed"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["packed"][2] < losses["packed"][0]


def test_checkpoints_of_a_packed_run_hold_plain_names_alone(tmp_path: Path) -> None:
    done = train_head(toy(), small(), tmp_path / "run", stop_after=2)
    names = load_state(tmp_path / "run" / "state.pt")["model"].keys()  # type: ignore[index]
    plain = Training(toy(), small("train.path=plain")).model.state_dict().keys()
    assert names == plain
    train_head(toy(), small(), tmp_path / "run")
    model, _ = load_model(tmp_path / "run" / "head.safetensors")
    assert model.state_dict().keys() == plain
    assert done.result == {}


def test_auto_is_resolved_once_and_a_resumed_run_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    train_head(toy(), small(), out, stop_after=2)
    stored = tomllib.loads((out / "config.toml").read_text(encoding="utf-8"))
    assert stored["train"]["path"] == stored["train"]["precision"] == "auto"
    step = stored["data"]["step"]
    assert (step["path"], step["precision"], step["kernels"]) == ("packed", "fp32", "")
    assert "packed head in fp32" in (out / "log.txt").read_text(encoding="utf-8")
    assert configuration.load(out / "config.toml") == small()
    monkeypatch.setattr("msq.head.train.choose_step", lambda *_, **__: StepChoice("plain", "bf16"))
    done = train_head(toy(), small(), out)
    assert done.result["step"] == step
    monkeypatch.undo()
    with pytest.raises(SpecMismatch, match=r"train\.path: expected 'auto', found 'plain'"):
        train_head(toy(), small("train.path=plain"), out)
    other = tmp_path / "other"
    train_head(toy(), small(), other, stop_after=1)
    text = (other / "config.toml").read_text(encoding="utf-8")
    (other / "config.toml").write_text(text.replace("precision = \"fp32\"", "speed = \"fast\""),
                                       encoding="utf-8")  # fmt: skip
    with pytest.raises(UsageError, match=r"data\.step: expected path and precision, found"):
        train_head(toy(), small(), other)


def begun_on_a_gpu(out: Path, **step: str) -> None:
    """A run that was stopped, with a record as if a GPU had begun it."""
    train_head(toy(), small(), out, stop_after=2)
    file = out / "config.toml"
    text = file.read_text(encoding="utf-8")
    found = tomllib.loads(text)["data"]["step"]
    for key, value in {"device": "cuda", **step}.items():
        before = f'{key} = "{found[key]}"'
        assert text.count(before) == 1
        text = text.replace(before, f'{key} = "{value}"')
    file.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"kernels": "relu_drop"}, r"with Triton kernels \(data\.step\.kernels = relu_drop\)"),
        ({"graph": "on"}, r"with a CUDA graph \(data\.step\.graph = on\): expected a CUDA device"),
        (
            {"kernels": "relu_drop", "graph": "on"},
            "a CUDA graph .* and Triton kernels .*, found cpu",
        ),
    ],
)
def test_steps_that_need_a_gpu_are_refused_on_a_cpu(
    step: dict[str, str], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    begun_on_a_gpu(out, **step)
    kept = (out / "state.pt").read_bytes()
    with pytest.raises(UsageError, match=message):
        train_head(toy(), small(), out)
    assert (out / "state.pt").read_bytes() == kept
    assert train_head(toy(), small(), out, overwrite=True).finished
    assert train_head(toy(), small(), out).finished  # a finished run takes no more steps


def test_steps_that_any_device_can_take_go_on_with_a_line_in_the_log(tmp_path: Path) -> None:
    begun_on_a_gpu(tmp_path / "run", precision="bf16")
    done = train_head(toy(), small(), tmp_path / "run")
    assert done.finished
    assert done.result["step"]["device"] == "cuda"
    log = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert "begun on cuda, goes on on cpu" in log
    assert ("bf16, as the run began, is emulated" in log) == (not bf16_is_native("cpu"))


def test_an_unfinished_run_of_an_older_version_is_refused(tmp_path: Path) -> None:
    train_head(toy(), small(), tmp_path / "run", stop_after=1)
    state = load_state(tmp_path / "run" / "state.pt")
    assert state is not None
    del state["format"]
    save_state(tmp_path / "run" / "state.pt", state)
    with pytest.raises(MsqError, match=r"expected format 2, found 1.*--overwrite"):
        train_head(toy(), small(), tmp_path / "run")
    assert train_head(toy(), small(), tmp_path / "run", overwrite=True).finished


def test_what_auto_means() -> None:
    around: dict[str, Any] = {"threads": torch.get_num_threads(), "device": "cpu"}
    for path, precision, *changes in (
        ("packed", "fp32"),
        ("plain", "fp32", "train.path=plain"),
        ("packed", "bf16", "train.precision=bf16"),
    ):
        expected = StepChoice(path, precision, **around)
        assert choose_step(small(*changes).train, "cpu") == expected
    with pytest.raises(UsageError, match=r"train\.path: expected one of auto, plain, packed"):
        small("train.path=fast")
    official = configuration.official_config()
    assert official.train.precision == "fp32"  # as the authors train


def test_scores_are_those_of_the_plain_head_in_evaluation_mode() -> None:
    features = toy()
    model = Training(features, small("head.dropout=0.5")).model.train()
    found = score(model, features, batch=7)
    assert model.training
    assert features.image is not None
    expected = model.eval()(features.tokens, features.image)["logits"].detach()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not found.requires_grad


def test_the_masks_of_a_step_follow_seed_step_and_nothing_else() -> None:
    def logits(seed: int, step: int, noise: int) -> Tensor:
        torch.manual_seed(noise)
        training = Training(toy(), small(f"train.seed={seed}", "head.dropout=0.4"))
        training.step = step
        f = training.features
        assert f.image is not None
        training.flat.begin()
        return training._logits(f.tokens[:8], f.image[:8]).detach()

    assert torch.equal(logits(0, 3, 1), logits(0, 3, 2))
    assert not torch.equal(logits(0, 3, 1), logits(0, 4, 1))
    kept = [Masks(s, 3, 0.4).bits(Part.decoder, 0, 0, 8, 64) for s in (0, 1)]  # type: ignore[arg-type]
    assert not torch.equal(*kept)


def test_kernels_that_cannot_run_are_refused_and_auto_takes_none_here() -> None:
    shape = HeadShape(queries=20, tokens=5, width=64, heads=2, ffn=256)
    assert choose_step(small().train, "cpu", shape).kernels == ""
    with pytest.raises(UsageError, match="no CUDA device"):
        choose_step(small("train.kernels=triton").train, "cpu", shape)
    with pytest.raises(UsageError, match="plain head has no kernels"):
        choose_step(small("train.kernels=triton", "train.path=plain").train, "cpu", shape)
