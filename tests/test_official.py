"""The `official` protocol: the head against torch's own Transformer, the loop, the features."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from msq import config as configuration
from msq.config import RunConfig, official_config
from msq.errors import SpecMismatch, UsageError, WeightsError
from msq.head.batches import Batches
from msq.head.checkpoint import load_model, save_head
from msq.head.evaluate import evaluate_run, official_score, score
from msq.head.features import Features
from msq.head.metrics import official_micro_average_precision, topk_accuracy
from msq.head.model import MSQNet
from msq.head.official import to_official
from msq.head.predict import load_head
from msq.head.schedule import learning_rate
from msq.head.train import build_head, split_rows, train_head
from msq.head.zeroshot import zero_shot


class Composed(nn.Module):
    """What the authors' code computes after its encoders, written down from `nn.Transformer`."""

    def __init__(
        self, classes: int, token: int, image: int, label: int, width: int = 512, heads: int = 8,
        layers: int = 6, ffn: int = 2048, dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.query_embed = nn.Parameter(torch.randn(classes, label))
        self.linear1 = nn.Linear(token, width, bias=False)
        if image:
            self.linear2 = nn.Linear(label + image, width, bias=False)
        self.drop = nn.Dropout(dropout)
        self.transformer = nn.Transformer(
            width, heads, layers, layers, ffn, dropout, batch_first=True
        )
        self.group_linear = nn.ParameterDict(
            {"W": torch.randn(1, classes, width), "b": torch.randn(1, classes)}
        )

    def forward(self, tokens: Tensor, image: Tensor | None) -> Tensor:
        """Logits [B, K] of tokens [B, T, D'] and image [B, D'']."""
        x = self.linear1(tokens)
        width = x.shape[2]
        code = torch.zeros(2000, width, dtype=x.dtype)
        place = torch.arange(2000, dtype=x.dtype)[:, None]
        rate = 10000.0 ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
        code[:, 0::2], code[:, 1::2] = torch.sin(place * rate), torch.cos(place * rate)
        x = self.drop(x + code[: x.shape[1]])
        query = self.query_embed.expand(len(x), -1, -1)
        if image is not None:
            query = self.linear2(
                torch.cat([query, image[:, None].expand(-1, query.shape[1], -1)], dim=2)
            )
        out = self.transformer(x, query)
        return (self.group_linear["W"] * out).sum(-1) + self.group_linear["b"]


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm())


def composed(dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> Composed:
    """One with every bias and norm away from its start."""
    torch.manual_seed(seed)
    model = Composed(**({"classes": 9, "token": 20, "image": 12, "label": 16} | sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    return model.to(dtype).eval()


SMALL = {"width": 24, "heads": 4, "layers": 2, "ffn": 40}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-10)])
def test_the_head_equals_torchs_transformer_in_logits_and_every_gradient(
    dtype: torch.dtype, tolerance: float
) -> None:
    # In float32 a hidden unit within rounding of ReLU's kink may be on in one and off in the other,
    # which moves a gradient by up to 3e-3, in about one of eight starts; in this one none is.
    theirs = composed(dtype, classes=20, token=768, image=768, label=512)
    mine = MSQNet.from_official(theirs.state_dict())
    assert not mine.training
    assert (mine.config.layers, mine.config.encoder_layers, mine.config.ffn) == (6, 6, 2048)
    g = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 16, 768, generator=g, dtype=dtype).requires_grad_()
    image = torch.randn(2, 768, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(2, 20, generator=g, dtype=dtype)
    wanted = theirs(tokens, image)
    found = mine(tokens, image)["logits"]
    assert found.dtype == dtype
    assert relative(found, wanted) <= tolerance

    inputs = torch.autograd.grad((wanted * weight).sum(), (tokens, image), retain_graph=True)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), (tokens, image), retain_graph=True),
        inputs,
        strict=True,
    ):
        assert relative(a, b) <= tolerance
    (wanted * weight).sum().backward()
    (found * weight).sum().backward()
    gradients = {name: p.grad for name, p in mine.named_parameters()}
    mine_official = to_official(mine, gradients)  # type: ignore[arg-type]
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert mine_official.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        assert gradient.norm() > 0, name
        assert relative(mine_official[name], gradient) <= tolerance, name


def test_weights_go_to_the_authors_names_and_back_without_a_bit_of_change() -> None:
    theirs = composed(**SMALL)
    state = theirs.state_dict()
    again = to_official(MSQNet.from_official(state, heads=4))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_any_number_of_tokens_and_prefixes_and_encoder_weights_are_accepted(tokens: int) -> None:
    theirs = composed(**SMALL)
    state = {f"module.model.{name}": tensor for name, tensor in theirs.state_dict().items()}
    state["module.model.backbone.embeddings.cls_token"] = torch.zeros(2)
    state["module.image_model.vision_model.post_layernorm.weight"] = torch.zeros(2)
    mine = MSQNet.from_official(state, heads=4)
    assert mine.ignored_keys == (
        "module.model.backbone.embeddings.cls_token",
        "module.image_model.vision_model.post_layernorm.weight",
    )
    x, image = torch.randn(2, tokens, 20), torch.randn(2, 12)
    with torch.no_grad():
        assert relative(mine(x, image)["logits"], theirs(x, image)) < 2e-5


@pytest.mark.parametrize("name", ["query_embed", "query_embed.weight"])
@pytest.mark.parametrize("projection", ["linear1.weight", "linear.weight"])
def test_without_image_fusion_the_label_embeddings_are_the_queries(
    name: str, projection: str
) -> None:
    theirs = composed(image=0, label=24, **SMALL)
    state = dict(theirs.state_dict())
    state[name] = state.pop("query_embed")
    state[projection] = state.pop("linear1.weight")
    state["group_linear.W"] = state["group_linear.W"][0]  # saved flat, it is the same
    state["group_linear.b"] = state["group_linear.b"][0]
    mine = MSQNet.from_official(state, heads=4)
    assert mine.fuse_label is None
    x = torch.randn(2, 5, 20)
    with torch.no_grad():
        assert relative(mine(x)["logits"], theirs(x, None)) < 2e-5


def test_the_position_code_in_a_file_must_be_the_one_used() -> None:
    state = dict(composed(**SMALL).state_dict())
    place = torch.arange(2000.0)[:, None]
    rate = torch.exp(torch.arange(0, 24, 2) * (-math.log(10000.0) / 24))
    code = torch.stack([torch.sin(place * rate), torch.cos(place * rate)], dim=2).flatten(1)
    MSQNet.from_official({**state, "pos_encod.pe": code[None]}, heads=4)
    with pytest.raises(WeightsError, match=r"pos_encod\.pe: expected the sin/cos code of width 24"):
        MSQNet.from_official({**state, "pos_encod.pe": code.flip(1)[None]}, heads=4)


def test_keys_that_are_missing_or_too_many_are_named() -> None:
    state = dict(composed(**SMALL).state_dict())
    odd = dict(state)
    odd["transformer.decoder.norm.scale"] = odd.pop("transformer.decoder.norm.weight")
    odd["classif.bias"] = torch.zeros(3)
    with pytest.raises(WeightsError) as error:
        MSQNet.from_official(odd, heads=4)
    assert "missing transformer.decoder.norm.weight;" in str(error.value)
    assert "unexpected classif.bias, transformer.decoder.norm.scale" in str(error.value)
    assert "is transformer.decoder.norm.scale what" in str(error.value)
    del odd["transformer.decoder.norm.scale"]
    gap = {k: v for k, v in state.items() if not k.startswith("transformer.encoder.layers.0.")}
    with pytest.raises(WeightsError, match=r"missing transformer\.encoder\.layers\.0\.linear1\.b"):
        MSQNet.from_official(gap, heads=4)
    with pytest.raises(WeightsError, match=r"several keys for query_embed"):
        MSQNet.from_official({**state, "query_embed.weight": state["query_embed"]}, heads=4)
    with pytest.raises(WeightsError, match=r"a tensor at 'transformer', found dict.*state_dict"):
        MSQNet.from_official({"transformer": {}})
    with pytest.raises(WeightsError, match=r"missing group_linear\.W, .* \(188 in all\)"):
        MSQNet.from_official({})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("group_linear.b", (1, 8), r"group_linear\.b: expected \[1, 9\], found \[1, 8\]"),
        ("linear2.weight", (24, 3), r"expected at least the 16 columns of query_embed, found 3"),
        ("transformer.encoder.norm.bias", (23,), r"norm\.bias: expected \[24\], found \[23\]"),
        ("query_embed", (9,), r"query_embed: expected a matrix, found \[9\]"),
    ],
)
def test_other_shapes_are_named(name: str, shape: tuple[int, ...], message: str) -> None:
    state = dict(composed(**SMALL).state_dict())
    state[name] = torch.zeros(shape)
    with pytest.raises(WeightsError, match=message):
        MSQNet.from_official(state, heads=4)


def test_values_that_are_not_finite_and_wrong_heads_are_refused() -> None:
    state = dict(composed(**SMALL).state_dict())
    with pytest.raises(WeightsError, match="heads that divide width 24, found heads=5"):
        MSQNet.from_official(state, heads=5)
    state["linear1.weight"] = state["linear1.weight"].clone()
    state["linear1.weight"][0, 0] = torch.nan
    with pytest.raises(WeightsError, match=r"not finite in linear1\.weight"):
        MSQNet.from_official(state, heads=4)
    without = {k: v for k, v in state.items() if not k.startswith("linear2")}
    with pytest.raises(WeightsError, match=r"expected width 24 as in linear1\.weight, found 16"):
        MSQNet.from_official(without, heads=4)


def band(clips: int = 24, task: str = "multilabel", **changes: Any) -> Features:
    """Small features as the authors' code would make them."""
    g = torch.Generator().manual_seed(0)
    text = torch.randn(4, 10, generator=g)
    labels = (torch.rand(clips, 4, generator=g) < 0.4).to(torch.uint8)
    if task == "singlelabel":
        labels = torch.eye(4, dtype=torch.uint8)[torch.randint(0, 4, (clips,), generator=g)]
    inputs = {"sampling": "official", "size": 224, "short_side": 256,
              "mean": [0.48145466, 0.4578275, 0.40821073],
              "std": [0.26862954, 0.26130258, 0.27577711]}  # fmt: skip
    video = {"slug": "t", "pooling": "band", **inputs}
    image = {"slug": "c", "output": "pooler", **inputs}
    return Features(**{
        "name": "toy", "task": task, "classes": tuple("abcd"),
        "ids": tuple(str(i) for i in range(clips)),
        "splits": tuple("test" if i % 4 == 3 else "train" for i in range(clips)),
        "tokens": torch.randn(clips, 3, 8, generator=g), "labels": labels,
        "image": torch.randn(clips, 6, generator=g), "text": text, "prompt": "{}",
        "specs": {"video": video, "image": image, "text": {"slug": "c", "output": "pooler"}},
    } | changes)  # fmt: skip


def short(*overrides: str) -> RunConfig:
    """Two epochs of two steps; the head has its full size, which the protocol fixes."""
    given = ["train.epochs=2", "train.epoch_clips=6", "train.batch=4", "train.val=0.3"]
    return configuration.override(RunConfig(), ["train.protocol=official", *given, *overrides])


def test_the_start_is_that_of_torchs_own_modules() -> None:
    torch.manual_seed(0)
    theirs = Composed(4, 8, 6, 10)
    bound = 512**-0.5
    for parameter in theirs.group_linear.values():
        nn.init.uniform_(parameter, -bound, bound)
    features = band()
    head = build_head(features, official_config(), features.rows("train"))
    mine = to_official(head)
    assert features.text is not None
    assert torch.equal(mine.pop("query_embed"), features.text)
    for name, parameter in theirs.named_parameters():
        if name == "query_embed":
            continue
        a, b = mine[name].flatten(), parameter.detach().flatten()
        if b.numel() < 2000:  # constants, or too few draws for more than their bound
            assert float(a.abs().max()) == pytest.approx(float(b.abs().max()), rel=0.25), name
        else:
            assert float(a.std()) == pytest.approx(float(b.std()), rel=0.05), name
            assert float(a.abs().max()) == pytest.approx(float(b.abs().max()), rel=0.02), name
    again = build_head(features, official_config(), features.rows("train"))
    same = again.state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in head.state_dict().items())


def test_dropout_stands_where_torch_has_it() -> None:
    head = MSQNet.from_official(composed(**SMALL).state_dict(), heads=4, dropout=0.3)
    rates = {m.p for m in head.modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.3}
    x, image = torch.randn(2, 5, 20), torch.randn(2, 12)
    evaluated = head(x, image, intermediates=True)
    head.train()
    trained = head(x, image, intermediates=True)
    assert not torch.equal(trained["memory"], evaluated["memory"])
    assert torch.equal(trained["queries"][0], evaluated["queries"][0])  # none on the queries
    assert evaluated["encoder_attention"].shape == (2, 2, 4, 5, 5)
    torch.testing.assert_close(evaluated["encoder_attention"].sum(-1), torch.ones(2, 2, 4, 5))


def test_more_tokens_than_the_authors_code_has_places_are_refused() -> None:
    head = MSQNet.from_official(composed(**SMALL).state_dict(), heads=4)
    with pytest.raises(UsageError, match="at most 2000 tokens, found 2001"):
        head(torch.zeros(1, 2001, 20), torch.zeros(1, 12))


def test_an_epoch_is_drawn_as_torchs_random_sampler_draws_it() -> None:
    rows = torch.arange(100, 137)  # 37 training clips
    for wanted in (10, 37, 100):
        batches = Batches(rows, 8, wanted, seed=3)
        assert batches.epoch_steps == math.ceil(wanted / 8)
        for epoch in (0, 2):
            steps = range(epoch * batches.epoch_steps, (epoch + 1) * batches.epoch_steps)
            taken = torch.cat([batches.of(step) for step in steps])
            generator = torch.Generator().manual_seed(3 * 1_000_003 + epoch)
            sampler = RandomSampler(range(37), num_samples=wanted, generator=generator)  # type: ignore[arg-type]
            assert taken.tolist() == [100 + i for i in sampler]
            assert len(batches.of(steps[-1])) == (wanted % 8 or 8)
    assert Batches(torch.arange(7985), 32, 2500, seed=0).epoch_steps == 79


def test_warm_restarts_are_torchs_stepped_once_an_epoch() -> None:
    optim = official_config().optim
    parameter = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.Adam([parameter], lr=optim.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimiser, T_0=10)
    for epoch in range(25):
        for step in range(3):
            rate = learning_rate(optim, 3 * epoch + step, 75, 3)
            assert rate == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-12)
        optimiser.step()
        schedule.step()


def test_a_run_names_its_protocol_and_can_be_evaluated_and_predicted_from(tmp_path: Path) -> None:
    features, out = band(), tmp_path / "run"
    done = train_head(features, short(), out)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert result["protocol"] == "official"
    assert result["selected_by"] == "official"
    assert result["weights"] == "raw"
    assert result["protocol_changes"] == [
        "train.epochs: official 100, here 2", "train.epoch_clips: official 2500, here 6",
        "train.batch: official 32, here 4",
    ]  # fmt: skip
    assert {"map", "map_micro", "map_official"} <= result["metrics"].keys()
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx(
        [1e-5, 0.5e-5 * (1 + math.cos(0.1 * math.pi))]
    )
    best = max(lines, key=lambda line: line["val_official"])
    assert result["best_epoch"] == best["epoch"]
    assert result["best_val_score"] == best["val_official"]
    assert configuration.load(out / "config.toml") == short()

    model, meta = load_model(out / "head.safetensors")
    assert meta["protocol"] == "official"
    expected = score(done.model, features)
    assert torch.equal(score(model, features), expected)
    _, val = split_rows(features, 0.3, 0)
    assert official_score(expected[val], features.labels[val], "multilabel") == pytest.approx(
        result["best_val_score"]
    )
    scored = evaluate_run(out, features)
    assert scored["protocol"] == "official"
    assert scored["metrics"] == done.metrics
    (first, *_) = load_head(out).predict(features)
    assert {p["label"] for p in first["predictions"]} == set("abcd")
    with pytest.raises(UsageError, match="per-class"):
        load_head(out).predict(features, ["a", "never seen"])
    theirs = to_official(model)  # and into the authors' own classes
    again = MSQNet.from_official(theirs)
    rows = slice(0, 4)
    assert features.image is not None
    with torch.no_grad():
        got = again(features.tokens[rows], features.image[rows])["logits"]
    assert relative(got, expected[rows]) < 1e-6


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    features, config = band(), short("train.epochs=1")  # the optimiser's state is 0.3 GB
    whole = train_head(features, config).model.state_dict()
    assert not train_head(features, config, tmp_path / "run", stop_after=1).finished
    parts = train_head(features, config, tmp_path / "run")
    assert all(
        torch.equal(whole[name], tensor) for name, tensor in parts.model.state_dict().items()
    )


@pytest.mark.parametrize("queries", ["text", "vanilla"])
def test_ablated_queries_are_taken_unprojected_and_make_the_round_trip(
    tmp_path: Path, queries: str
) -> None:
    features = band(text=torch.randn(4, 512), image=None)
    config = official_config(queries)  # type: ignore[arg-type]
    head = build_head(features, config, features.rows("train")).eval()
    assert head.fuse_label is None
    with torch.no_grad():
        found = head(features.tokens, intermediates=True)
    start = head.start if queries == "vanilla" else features.text
    assert start is not None
    assert torch.equal(found["queries"][0][0], start)
    save_head(tmp_path / "head.safetensors", head, features, "official")
    again, _ = load_model(tmp_path / "head.safetensors")
    assert torch.equal(score(again, features), score(head, features))
    with pytest.raises(UsageError, match="expected embeddings of width 512, found 10"):
        build_head(band(), official_config("text"), features.rows("train"))


def test_loaded_weights_make_the_round_trip_through_a_head_file(tmp_path: Path) -> None:
    features = band(8)
    head = MSQNet.from_official(
        composed(classes=4, token=8, image=6, label=10, **SMALL).state_dict(), heads=4
    )
    save_head(tmp_path / "head.safetensors", head, features, "official")
    again, _ = load_model(tmp_path / "head.safetensors")
    assert again.config == head.config
    assert torch.equal(score(again, features), score(head, features))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("video", {"pooling": "frame"}, "video pooling: expected band, found frame"),
        ("video", {"sampling": "uniform"}, "video sampling: expected official, found uniform"),
        ("image", {"output": "projected"}, "image output: expected pooler, found projected"),
        ("text", {"output": ""}, "text output: expected pooler, found nothing"),
        ("video", {"short_side": 0}, "video short side: expected 256, found nothing"),
        ("image", {"size": 112}, "image size: expected 224, found 112"),
        (
            "video",
            {"std": [0.5] * 3},
            "video std: expected 0.26862954,0.26130258,0.27577711, found 0.5,0.5,0.5",
        ),
    ],
)
def test_features_of_another_making_are_refused_with_the_command_that_makes_them(
    tmp_path: Path, kind: str, change: dict[str, Any], message: str
) -> None:
    features = band()
    specs = {**features.specs, kind: {**features.specs[kind], **change}}
    with pytest.raises(SpecMismatch) as error:
        train_head(band(specs=specs), short(), tmp_path / "run")
    assert message in str(error.value)
    assert "msq extract --protocol official" in str(error.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(SpecMismatch, match=r"prompt: expected \{\} \(the bare class name\)"):
        train_head(band(prompt="a video of {}"), short())
    with pytest.raises(SpecMismatch, match="protocol paper needs one token per frame"):
        train_head(band(), RunConfig())


def test_the_protocol_decides_the_defaults_and_refuses_what_contradicts_it(tmp_path: Path) -> None:
    chosen = configuration.override(
        RunConfig(), ["head.queries=text", "train.protocol=official", "optim.lr=5e-4"]
    )
    assert chosen == dataclasses.replace(
        official_config("text"), optim=dataclasses.replace(official_config().optim, lr=5e-4)
    )
    assert configuration.override(official_config(), ["train.protocol=paper"]) == RunConfig()
    file = tmp_path / "official.toml"
    file.write_text('[train]\nprotocol = "official"\nepochs = 3\n', encoding="utf-8")
    loaded = configuration.load(file)
    assert (loaded.train.epochs, loaded.train.epoch_clips, loaded.optim.lr) == (3, 2500, 1e-5)
    made = configuration.to_toml(loaded)
    file.write_text(made, encoding="utf-8")
    assert configuration.load(file) == loaded
    assert configuration.protocol_changes(official_config()) == []

    wrong = ["train.protocol=official", "head.classifier=shared", "train.ema=0.9"]
    with pytest.raises(UsageError) as error:
        configuration.override(RunConfig(), wrong)
    assert "head.classifier = per-class (found shared)" in str(error.value)
    assert "train.ema = 0.0 (found 0.9)" in str(error.value)
    assert "head.width" not in str(error.value)
    with pytest.raises(UsageError, match=r"paper means head\.encoder_layers = 0 \(found 6\)"):
        configuration.override(RunConfig(), ["head.encoder_layers=6"])
    with pytest.raises(UsageError, match="one of paper, official, found 'offical'"):
        configuration.override(RunConfig(), ["train.protocol=offical"])


def test_the_watched_number_is_the_authors_and_leaves_unlabelled_clips_out() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(70, 4, generator=g)
    labels = (torch.rand(70, 4, generator=g) < 0.3).to(torch.uint8)
    labels[[3, 40]] = 0
    keep = labels.bool().any(1)
    assert official_score(logits, labels, "multilabel") == official_micro_average_precision(
        logits[keep], labels[keep]
    )
    single = torch.eye(4, dtype=torch.uint8)[torch.randint(0, 4, (70,), generator=g)]
    assert official_score(logits, single, "singlelabel") == topk_accuracy(logits, single)


def test_zero_shot_under_the_official_protocol_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match=r"official .*no weights for classes never trained"):
        zero_shot(band(), short())
