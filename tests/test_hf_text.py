"""Text models of Hugging Face as encoders of class names, with random weights."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import msq
from msq.errors import UsageError, WeightsError
from msq.extract.encoders import TextEncoder, list_encoders, load_text_encoder
from msq.extract.encoders.text_families import ALIASES

_text = runpy.run_path(str(Path(__file__).with_name("text_fixtures.py")))
write_text_folder = _text["write_text_folder"]
write_modules = _text["write_modules"]
CONFIGS = _text["CONFIGS"]
WORDS = ["a dog running", "walk", "bird flying over the sea", "Feed a Dog"]


@torch.inference_mode()
def states(folder: Path, model: Any, text: str) -> Any:
    """Output of the library's own model for one text alone, without any padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    return model(input_ids=ids)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    write_text_folder(tmp_path / "tiny-bert")
    return tmp_path / "tiny-bert"


@pytest.mark.parametrize("kind", sorted(CONFIGS))
@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_vectors_are_those_of_the_librarys_own_forward(
    tmp_path: Path, kind: str, pooling: str
) -> None:
    model = write_text_folder(tmp_path / "m", kind)
    if pooling == "pooler" and kind in ("distilbert", "t5"):
        with pytest.raises(UsageError, match=r"needs a pooled output.*use one of mean, cls"):
            load_text_encoder(f"local-dir:{tmp_path / 'm'}", pooling=pooling)
        return
    text = load_text_encoder(f"local-dir:{tmp_path / 'm'}", pooling=pooling)
    assert isinstance(text, TextEncoder)
    found = text(WORDS)
    assert found.shape == (4, 24)
    assert found.dtype == torch.float32
    assert not found.is_inference()
    for row, word in zip(found, WORDS, strict=True):
        own = states(tmp_path / "m", model, word)
        hidden = own.last_hidden_state[0].double().numpy()
        if pooling == "pooler":
            expected = own.pooler_output[0].double().numpy()
        else:
            expected = hidden.sum(0) / len(hidden) if pooling == "mean" else hidden[0]
        np.testing.assert_allclose(row.numpy(), expected, atol=2e-6, rtol=0)
    assert text.spec.output == pooling
    assert text.spec.channels == 24


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_padding_changes_no_row(tmp_path: Path, kind: str) -> None:
    write_text_folder(tmp_path / "m", kind)
    text = load_text_encoder(str(tmp_path / "m"))
    long = "a dog walk over the sea the bird sit"
    together = text(["walk", long, "dog run"], "the {}")
    for row, word in zip(together, ["walk", long, "dog run"], strict=True):
        torch.testing.assert_close(text([word], "the {}")[0], row, atol=1e-6, rtol=0)
    assert (together[0] - together[2]).abs().max() > 0.01


def test_the_default_is_the_pooled_output_where_there_are_weights_for_it(tmp_path: Path) -> None:
    write_text_folder(tmp_path / "bert")
    whole = load_text_encoder(str(tmp_path / "bert"))
    assert whole.spec.output == "pooler"
    state = load_file(tmp_path / "bert" / "model.safetensors")
    save_file({k: v for k, v in state.items() if "pooler" not in k},
              tmp_path / "bert" / "model.safetensors")  # fmt: skip
    without = load_text_encoder(str(tmp_path / "bert"))
    assert without.spec.output == "mean"
    assert without.model.transformer.pooler is None
    # The library would have filled them with random numbers, other ones at every load.
    with pytest.raises(UsageError, match="there are no weights for one"):
        load_text_encoder(str(tmp_path / "bert"), pooling="pooler")
    write_text_folder(tmp_path / "t5", "t5")
    assert load_text_encoder(str(tmp_path / "t5")).spec.output == "mean"


def test_a_sentence_encoder_pools_and_scales_as_its_folder_says(bert: Path) -> None:
    model = write_text_folder(bert)
    write_modules(bert, "Pooling", "Normalize", pooling_mode_mean_tokens=True)
    (bert / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    text = load_text_encoder(str(bert))
    assert text.spec.output == "mean unit"
    tokenizer = AutoTokenizer.from_pretrained(bert)
    inputs = tokenizer(WORDS, padding=True, truncation=True, max_length=6, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**inputs).last_hidden_state.double().numpy()
    mask = inputs["attention_mask"].numpy()
    sums = np.einsum("knd,kn->kd", hidden, mask) / mask.sum(1, keepdims=True)
    expected = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    np.testing.assert_allclose(text(WORDS).numpy(), expected, atol=1e-6, rtol=0)
    assert text.too_long(WORDS) == ["a dog running", "bird flying over the sea"]
    # A pooling that is asked for takes the place of all steps.
    plain = load_text_encoder(str(bert), pooling="mean")
    assert plain.spec.output == "mean"
    np.testing.assert_allclose(plain(WORDS).numpy(), sums, atol=2e-6, rtol=0)
    assert load_text_encoder(str(bert), pooling="mean unit").spec == text.spec

    write_modules(bert, "Pooling", pooling_mode_cls_token=True)
    assert load_text_encoder(str(bert)).spec.output == "cls"
    (bert / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    assert load_text_encoder(str(bert)).spec.output == "mean"


def test_dense_layers_follow_the_pooling(bert: Path) -> None:
    model = write_text_folder(bert)
    write_modules(bert, "Pooling", "Dense", pooling_mode_mean_tokens=True)
    dense = bert / "2_Dense"
    (dense / "config.json").write_text(json.dumps({
        "in_features": 24, "out_features": 10, "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }))  # fmt: skip
    state = {"linear.weight": torch.randn(10, 24), "linear.bias": torch.randn(10)}
    save_file(state, dense / "model.safetensors")
    text = load_text_encoder(str(bert))
    assert (text.spec.output, text.spec.channels) == ("mean dense", 10)
    mean = states(bert, model, "dog").last_hidden_state[0].mean(0)
    expected = torch.tanh(state["linear.weight"] @ mean + state["linear.bias"])
    torch.testing.assert_close(text(["dog"])[0], expected, atol=2e-6, rtol=0)
    before = text.spec.architecture
    save_file({**state, "linear.bias": torch.zeros(10)}, dense / "model.safetensors")
    assert load_text_encoder(str(bert)).spec.architecture != before
    save_file({"linear.weight": state["linear.weight"]}, dense / "model.safetensors")
    with pytest.raises(WeightsError, match=r"2_Dense.*missing 1: bias"):
        load_text_encoder(str(bert))


def test_the_spec_tells_apart_what_changes_vectors_and_nothing_else(
    bert: Path, tmp_path: Path
) -> None:
    spec = load_text_encoder(str(bert)).spec
    assert spec.slug == "tiny-bert"
    assert spec.kind == "text"
    assert spec.weights == "local-dir:tiny-bert"
    assert spec.architecture.startswith("hf bert d2 w24 h4 cfg ")
    assert str(tmp_path) not in str(spec.to_dict())

    def changed(file: str, **values: Any) -> Any:
        copy = tmp_path / "copy" / "tiny-bert"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(bert, copy)
        settings = json.loads((copy / file).read_text()) | values
        (copy / file).write_text(json.dumps(settings))
        return load_text_encoder(str(copy)).spec

    assert changed("config.json", transformers_version="4.0", dtype="float16") == spec
    assert changed("config.json", hidden_act="relu") != spec
    assert changed("tokenizer_config.json", do_lower_case=False) != spec
    assert changed("tokenizer_config.json", model_max_length=10) != spec
    # The same tokenizer in one file, as newer tools write it.
    copy = tmp_path / "saved" / "tiny-bert"
    shutil.copytree(bert, copy)
    AutoTokenizer.from_pretrained(bert).save_pretrained(copy)
    (copy / "vocab.txt").unlink()
    assert load_text_encoder(str(copy)).spec == spec
    assert load_text_encoder(str(bert), pooling="mean").spec != spec


def test_long_texts_are_cut_where_the_model_ends_and_named(tmp_path: Path) -> None:
    long, longest = " ".join(["dog"] * 16), " ".join(["dog"] * 17)
    for kind, fits in [("bert", 18), ("mpnet", 18), ("roberta", 19)]:
        write_text_folder(tmp_path / kind, kind)
        text = load_text_encoder(str(tmp_path / kind))
        # MPNet's and RoBERTa's positions start after the padding's: 1 + 1 and 0 + 1 are not used.
        limit = {"bert": 20, "mpnet": 18, "roberta": 19}[kind]
        names = [long, longest, "walk"]
        assert text.too_long(names) == [n for n in names if len(n.split()) + 2 > limit]
        assert text.too_long(names, "a {}") == [n for n in names if len(n.split()) + 3 > limit]
        assert text.too_long(names, ["{}", "a {}"]) == text.too_long(names, "a {}")
        endless = " ".join(["dog"] * 300)
        cut = " ".join(["dog"] * (limit - 2))
        torch.testing.assert_close(text([endless]), text([cut]), atol=1e-6, rtol=0)
        assert fits <= limit


def test_words_without_a_piece_are_unknown(bert: Path) -> None:
    text = load_text_encoder(str(bert))
    assert text.unknown_words("The dogs running; a zebra, a Zebra") == ["zebra"]
    assert text.unknown_words("Zebra or bird, zebra") == ["Zebra", "or"]
    assert text.unknown_words("sitting") == ["sitting"]  # `##t` is no piece
    assert text.unknown_words("a dog") == []


def test_sets_of_templates_are_averaged_and_a_set_of_one_is_that_template(bert: Path) -> None:
    text = load_text_encoder(str(bert))
    assert torch.equal(text(WORDS, ["the {}"]), text(WORDS, "the {}"))
    rows = [text(WORDS, prompt).double().numpy() for prompt in ("the {}", "a {} door")]
    lengths = [np.linalg.norm(r, axis=1, keepdims=True) for r in rows]
    units = sum(r / n for r, n in zip(rows, lengths, strict=True)) / 2
    expected = units / np.linalg.norm(units, axis=1, keepdims=True) * (sum(lengths) / 2)
    found = text(WORDS, ("the {}", "a {} door"))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6, rtol=0)
    with pytest.raises(UsageError, match=r"prompt 'a dog' has no \{\}"):
        text(WORDS, ["{}", "a dog"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_and_in_the_spec(bert: Path, precision: Any) -> None:
    whole = load_text_encoder(str(bert))
    half = load_text_encoder(str(bert), precision=precision)
    assert half.spec.precision == precision
    torch.testing.assert_close(half(WORDS), whole(WORDS), atol=0.05, rtol=0)
    assert half(WORDS).dtype == torch.float32
    with pytest.raises(UsageError, match="precision is one of"):
        load_text_encoder(str(bert), precision="int8")  # type: ignore[arg-type]


def test_the_table_of_text_encoders_tells_the_truth() -> None:
    lines = [line for line in list_encoders() if line["kind"] == "text"]
    by_name = {line["name"]: line for line in lines}
    configs = {
        "bert-base-uncased": transformers.BertConfig(),
        "all-MiniLM-L6-v2": transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        ),
        "all-mpnet-base-v2": transformers.MPNetConfig(),
    }
    for name, config in configs.items():
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        assert by_name[name]["parameters_millions"] == pytest.approx(millions, abs=0.1)
        assert by_name[name]["width"] == config.hidden_size
        # The files hold float32.
        assert by_name[name]["megabytes"] == pytest.approx(4 * millions, rel=0.01)
        assert name in ALIASES
    assert all(line["licence"] for line in lines)


def test_the_public_api_loads_text_encoders(bert: Path) -> None:
    assert torch.equal(msq.load_text_encoder(str(bert))(WORDS), load_text_encoder(str(bert))(WORDS))
