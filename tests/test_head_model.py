from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msq.config import HeadConfig
from msq.errors import UsageError
from msq.head.model import MSQNet
from msq.head.position_code import sincos

QUERIES = ("vanilla", "text", "multimodal")
CLASSIFIERS = ("per-class", "shared", "text")
PARTS = {  # of a layer here, and what torch calls them
    "expand": "linear1",
    "contract": "linear2",
    "norm_self": "norm1",
    "norm_cross": "norm2",
    "norm_ffn": "norm3",
}
K, S, TOKEN, IMAGE, WIDTH = 7, 5, 10, 6, 12  # tokens, image and text all of different widths


def make(
    queries: str = "multimodal", classifier: str = "per-class", **options: Any
) -> tuple[MSQNet, Tensor, Tensor]:
    """A small head in float64 with every parameter away from its start, tokens and image."""
    generator = torch.Generator().manual_seed(11)
    text = torch.randn(K, 9, generator=generator) + 2
    settings = {"width": WIDTH, "layers": 2, "heads": 3, "ffn": 20, "dropout": 0.0} | options
    config = HeadConfig(queries=queries, classifier=classifier, **settings)  # type: ignore[arg-type]
    model = MSQNet(config, classes=K, token_width=TOKEN, image_width=IMAGE, text=text, seed=3)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).double()
    tokens = torch.randn(4, S, TOKEN, generator=generator).double()
    image = torch.randn(4, IMAGE, generator=generator).double()
    return model, tokens, image


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    a, b = a.detach(), b.detach()
    torch.testing.assert_close(a, b, atol=tolerance * float(b.abs().max()), rtol=0)


def reference_logits(model: MSQNet, tokens: Tensor, image: Tensor) -> tuple[Tensor, nn.Module]:
    """The same head from torch's own modules, with the same weights.

    Without position codes a layer is exactly `nn.TransformerDecoderLayer`. The position of the
    keys is put in by hand: attention, residual and norm are called one after the other.
    """
    config = model.config
    width, heads = model.width, config.heads
    layers = nn.ModuleList()
    for mine in model.layers:
        theirs = nn.TransformerDecoderLayer(
            width, heads, config.ffn or 4 * width, dropout=0.0, batch_first=True
        ).double()
        for attention, other in (
            (mine.self_attention, theirs.self_attn),
            (mine.cross_attention, theirs.multihead_attn),
        ):
            parts = (attention.q, attention.k, attention.v)
            other.in_proj_weight.data = torch.cat([p.weight.data for p in parts])
            other.in_proj_bias.data = torch.cat([p.bias.data for p in parts])
            other.out_proj.load_state_dict(attention.out.state_dict())
        theirs.linear1.load_state_dict(mine.expand.state_dict())
        theirs.linear2.load_state_dict(mine.contract.state_dict())
        theirs.norm1.load_state_dict(mine.norm_self.state_dict())
        theirs.norm2.load_state_dict(mine.norm_cross.state_dict())
        theirs.norm3.load_state_dict(mine.norm_ffn.state_dict())
        layers.append(theirs)

    memory = tokens @ model.memory.weight.T
    start = model.start if config.queries == "vanilla" else model.text
    label = start + model.offset
    if model.fuse_image is not None:  # W_que [Q_l, Q_v] as the paper prints it
        joined = torch.cat(
            [label.expand(len(tokens), -1, -1), image[:, None].expand(-1, K, -1)], dim=-1
        )
        x = joined @ torch.cat([model.fuse_label.weight, model.fuse_image.weight], dim=1).T
    else:
        x = (label @ model.fuse_label.weight.T).expand(len(tokens), -1, -1)
    place = model.query_position if model.query_position is not None else torch.zeros(K, width)
    key = memory
    if config.memory_position == "sincos":
        key = memory + sincos(S, width)
    for layer in layers:
        q = x + place
        x = layer.norm1(x + layer.self_attn(q, q, x, need_weights=False)[0])
        x = layer.norm2(x + layer.multihead_attn(x + place, key, memory, need_weights=False)[0])
        x = layer.norm3(x + layer.linear2(torch.relu(layer.linear1(x))))
    x = torch.nn.functional.layer_norm(x, (width,), model.norm.weight, model.norm.bias, 1e-5)
    classifier = model.classifier
    if config.classifier == "per-class":
        rows = [x[:, k] @ classifier.weight[k] + classifier.bias[k] for k in range(K)]
        return torch.stack(rows, dim=1), layers
    if config.classifier == "shared":
        return x @ classifier.weight[0] + classifier.bias, layers
    weight = model.text @ classifier.generate.weight.T + classifier.generate.bias
    return torch.einsum("bkd,kd->bk", x, weight) + classifier.bias, layers


@pytest.mark.parametrize(("queries", "classifier"), list(itertools.product(QUERIES, CLASSIFIERS)))
def test_outputs_and_all_gradients_equal_those_of_torchs_own_modules(
    queries: str, classifier: str
) -> None:
    model, tokens, image = make(queries, classifier, query_position=True)
    tokens.requires_grad_()
    weight = torch.randn(4, K, generator=torch.Generator().manual_seed(0)).double()
    logits = model(tokens, image)["logits"]
    expected, layers = reference_logits(model, tokens, image)
    assert logits.shape == (4, K)
    close(logits, expected, 1e-12)

    shared = [p for n, p in model.named_parameters() if not n.startswith("layers.")]
    mine = torch.autograd.grad(
        (logits * weight).sum(), [tokens, *shared, *model.layers.parameters()]
    )
    theirs = torch.autograd.grad((expected * weight).sum(), [tokens, *shared, *layers.parameters()])
    names = ["tokens", *(n for n, _ in model.named_parameters() if not n.startswith("layers."))]
    for i, name in enumerate(names):
        assert mine[i].abs().max() > 0, name
        close(mine[i], theirs[i])
    grads = dict(
        zip((n for n, _ in model.layers.named_parameters()), mine[len(names) :], strict=True)
    )
    other = dict(zip((n for n, _ in layers.named_parameters()), theirs[len(names) :], strict=True))
    for layer in range(2):
        for attention, packed in (
            ("self_attention", "self_attn"),
            ("cross_attention", "multihead_attn"),
        ):
            for kind in ("weight", "bias"):
                parts = [grads[f"{layer}.{attention}.{x}.{kind}"] for x in "qkv"]
                # The key bias has no gradient (it shifts every score of a row alike): both sides
                # hold rounding only, hence the tolerance relative to the packed tensor.
                close(torch.cat(parts), other[f"{layer}.{packed}.in_proj_{kind}"])
        for name, theirs_name in PARTS.items():
            close(grads[f"{layer}.{name}.weight"], other[f"{layer}.{theirs_name}.weight"])
            close(grads[f"{layer}.{name}.bias"], other[f"{layer}.{theirs_name}.bias"])


def test_without_positions_a_layer_is_torchs_decoder_layer() -> None:
    model, tokens, image = make("text", "shared", memory_position="none", layers=1)
    _, layers = reference_logits(model, tokens, image)
    found = model(tokens, intermediates=True)
    start = found["queries"][0]
    close(found["queries"][1], layers[0](start, found["memory"]), 1e-12)


def test_the_first_queries_are_the_papers_projection_of_the_concatenation() -> None:
    model, tokens, image = make()
    found = model(tokens, image, intermediates=True)["queries"][0]
    assert model.text is not None
    assert model.fuse_image is not None
    w_que = torch.cat([model.fuse_label.weight, model.fuse_image.weight], dim=1)
    for b, k in itertools.product(range(4), range(K)):
        expected = w_que @ torch.cat([model.text[k] + model.offset[k], image[b]])
        close(found[b, k], expected, 1e-12)


@pytest.mark.parametrize("queries", QUERIES)
def test_permuting_classes_with_their_weights_permutes_the_logits(queries: str) -> None:
    model, tokens, image = make(queries, "per-class", query_position=True)
    before = model(tokens, image)["logits"]
    order = torch.randperm(K, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        rows = [model.offset, model.query_position, model.classifier.weight, model.classifier.bias]
        rows.append(model.start if queries == "vanilla" else model.text)
        for tensor in rows:
            assert tensor is not None
            tensor.copy_(tensor[order].clone())
    close(model(tokens, image)["logits"], before[:, order])
    assert not torch.equal(before, before[:, order])


@pytest.mark.parametrize(("queries", "classifier"), list(itertools.product(QUERIES, CLASSIFIERS)))
def test_a_batch_gives_what_its_clips_give_alone(queries: str, classifier: str) -> None:
    model, tokens, image = make(queries, classifier)
    together = model(tokens, image)["logits"]
    alone = [model(tokens[i : i + 1], image[i : i + 1])["logits"] for i in range(4)]
    close(together, torch.cat(alone), 1e-12)


def test_frame_order_matters_through_the_position_code_alone() -> None:
    order = torch.tensor([0, 3, 1, 4, 2])
    model, tokens, image = make(memory_position="none")
    close(model(tokens[:, order], image)["logits"], model(tokens, image)["logits"])
    model, tokens, image = make()
    moved = model(tokens[:, order], image)["logits"]
    assert (moved - model(tokens, image)["logits"]).abs().max() > 1e-4


def test_another_number_of_tokens_is_welcome() -> None:
    model, tokens, image = make()
    assert model(torch.cat([tokens, tokens], dim=1), image)["logits"].shape == (4, K)


@pytest.mark.parametrize(("queries", "classifier"), list(itertools.product(QUERIES, CLASSIFIERS)))
def test_a_subset_of_trained_classes_keeps_offsets_positions_and_weights(
    queries: str, classifier: str
) -> None:
    model, tokens, image = make(queries, classifier, query_position=True)
    text = None if model.text is None else model.text[[4, 2]]
    trained = torch.tensor([4, 2])
    found = model(tokens, image, text=text, trained=trained, intermediates=True)
    full = model(tokens, image, intermediates=True)
    close(found["queries"][0], full["queries"][0][:, [4, 2]], 1e-12)
    everything = torch.arange(K)
    again = model(tokens, image, text=model.text, trained=everything)["logits"]
    close(again, full["logits"], 1e-12)
    assert found["logits"].shape == (4, 2)


@pytest.mark.parametrize("classifier", ["shared", "text"])
def test_classes_never_trained_have_no_offset_and_no_position(classifier: str) -> None:
    model, tokens, image = make("text", classifier, query_position=True)
    other = torch.randn(3, 9, generator=torch.Generator().manual_seed(8)).double()
    found = model(tokens, image, text=other, intermediates=True)
    close(found["queries"][0][0], other @ model.fuse_label.weight.T, 1e-12)
    with torch.no_grad():
        model.offset += 1
        assert model.query_position is not None
        model.query_position += 1
    close(model(tokens, image, text=other)["logits"], found["logits"], 1e-12)


def test_vanilla_queries_of_unseen_classes_are_fresh_random_and_the_same_each_time() -> None:
    model, tokens, _ = make("vanilla", "shared")
    trained = torch.tensor([2, -1, -1])
    first = model(tokens, trained=trained, intermediates=True)["queries"][0]
    again = model(tokens, trained=trained, intermediates=True)["queries"][0]
    assert torch.equal(first, again)
    full = model(tokens, intermediates=True)["queries"][0]
    close(first[:, 0], full[:, 2], 1e-12)
    for k in range(K):
        assert not torch.allclose(first[0, 1], full[0, k])
    assert not torch.allclose(first[0, 1], first[0, 2])


def test_a_per_class_classifier_refuses_unseen_classes_and_names_the_fix() -> None:
    model, tokens, image = make("text", "per-class")
    with pytest.raises(UsageError, match="--classifier shared or --classifier text"):
        model(tokens, image, text=torch.zeros(2, 9).double())


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UsageError, match="needs text embeddings of the 3 classes"):
        MSQNet(HeadConfig(queries="text"), classes=3, token_width=8)
    with pytest.raises(UsageError, match="needs image features"):
        MSQNet(HeadConfig(), classes=3, token_width=8, text=torch.zeros(3, 8))
    with pytest.raises(UsageError, match="expected 3 rows, one per class, found 2"):
        MSQNet(HeadConfig(queries="text"), classes=3, token_width=8, text=torch.zeros(2, 8))
    with pytest.raises(UsageError, match=r"divisor of width 10 \[1, 2, 5, 10\], found 8"):
        MSQNet(HeadConfig(queries="vanilla"), classes=3, token_width=10)
    model, tokens, _ = make()
    with pytest.raises(UsageError, match="found None"):
        model(tokens)
    with pytest.raises(UsageError, match="other classes need `text`"):
        model(tokens, trained=torch.tensor([0]))


@pytest.mark.parametrize("queries", QUERIES)
def test_attention_maps_are_probabilities_and_asking_for_them_changes_nothing(queries: str) -> None:
    model, tokens, image = make(queries)
    plain = model(tokens, image)
    assert set(plain) == {"logits"}
    full = model(tokens, image, intermediates=True)
    close(full["logits"], plain["logits"], 1e-12)
    assert full["memory"].shape == (4, S, WIDTH)
    assert full["queries"].shape == (3, 4, K, WIDTH)
    assert full["self_attention"].shape == (2, 4, 3, K, K)
    assert full["cross_attention"].shape == (2, 4, 3, K, S)
    for name in ("self_attention", "cross_attention"):
        close(full[name].sum(-1), torch.ones(full[name].shape[:-1]).double(), 1e-12)


def test_dropout_acts_in_training_only_and_follows_the_seed() -> None:
    model, tokens, image = make(dropout=0.3)
    model.train()
    torch.manual_seed(0)
    first = model(tokens, image)["logits"]
    assert not torch.equal(first, model(tokens, image)["logits"])
    torch.manual_seed(0)
    assert torch.equal(first, model(tokens, image)["logits"])
    model.eval()
    assert torch.equal(model(tokens, image)["logits"], model(tokens, image)["logits"])


def test_one_seed_gives_one_start_and_queries_start_at_unit_size() -> None:
    generator = torch.Generator().manual_seed(0)
    text = 0.1 * torch.randn(40, 64, generator=generator) + 3  # a large part in common
    made = [
        MSQNet(HeadConfig(queries="text", heads=4, layers=1), classes=40, token_width=32,
               text=text, seed=seed)
        for seed in (1, 1, 2)
    ]  # fmt: skip
    states = [model.state_dict() for model in made]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["memory.weight"], states[2]["memory.weight"])
    assert not made[0].offset.any()
    found = made[0](torch.randn(2, 3, 32, generator=generator), intermediates=True)["queries"][0]
    found = found.detach()
    assert float(found.std()) == pytest.approx(1, abs=0.15)
    between = (found[0] - found[0].mean(0)).square().mean()  # classes differ: no common part
    assert float(between) == pytest.approx(1, abs=0.3)
    assert made[0].width == 64  # None means the width of the text


def test_the_position_code_is_that_of_the_first_transformer() -> None:
    code = sincos(4, 6)
    for place, i in itertools.product(range(4), range(3)):
        angle = torch.tensor(place / 10000 ** (2 * i / 6), dtype=torch.float64)
        assert float(code[place, 2 * i]) == pytest.approx(float(angle.sin()))
        assert float(code[place, 2 * i + 1]) == pytest.approx(float(angle.cos()))
    assert sincos(3, 5).shape == (3, 5)
