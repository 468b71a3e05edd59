import hashlib
import json
import logging
import runpy
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from msq.errors import UsageError, WeightsError
from msq.extract.encoders import clip_source, load_clip, registry
from msq.extract.encoders.clip_source import find_clip
from msq.extract.encoders.clip_weights import load_clip_model

_fixtures = runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py")))
TINY = _fixtures["TINY_CLIP"]
write_clip_folder = _fixtures["write_clip_folder"]
write_bpe = _fixtures["write_bpe"]

WORDS = ["a dog running", "walk", "bird flying over the sea"]


@pytest.fixture
def folder(tmp_path):
    write_clip_folder(tmp_path / "tiny", TINY)
    return tmp_path / "tiny"


def video(frames=16, size=32, batch=2):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, frames, 3, size, size, generator=generator)


def small_vocabulary(folder):
    """A model whose tokenizer knows the merges of `dog` and `run` only."""
    folder.mkdir()
    merges = [("d", "o"), ("do", "g</w>"), ("r", "u"), ("ru", "n</w>")]
    size = write_bpe(folder / "bpe.txt.gz", merges)
    (folder / "vocabulary.txt").write_text("dog\nrun\n")
    text = {
        **TINY["text_cfg"],
        "vocab_size": size,
        "tokenizer_kwargs": {"bpe_path": "bpe.txt.gz"},
    }
    write_clip_folder(folder, {**TINY, "text_cfg": text})
    return size


def huggingface_twin(state, quick_gelu=False):
    """Hugging Face's CLIPModel holding the tensors of a tiny open_clip model."""
    vision, text = TINY["vision_cfg"], TINY["text_cfg"]
    activation = "quick_gelu" if quick_gelu else "gelu"
    config = CLIPConfig(
        projection_dim=TINY["embed_dim"],
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": activation,
        },
        text_config={
            "vocab_size": text["vocab_size"],
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "hidden_act": activation,
            "eos_token_id": 49407,
            "bos_token_id": 49406,
        },
    )
    new = {
        "logit_scale": state["logit_scale"],
        "visual_projection.weight": state["visual.proj"].T,
        "text_projection.weight": state["text_projection"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
    }
    leaves = ("weight", "bias")
    for ours, theirs in [
        ("visual.ln_pre", "vision_model.pre_layrnorm"),
        ("visual.ln_post", "vision_model.post_layernorm"),
        ("ln_final", "text_model.final_layer_norm"),
    ]:
        new |= {f"{theirs}.{leaf}": state[f"{ours}.{leaf}"] for leaf in leaves}
    names = [
        ("attn.out_proj", "self_attn.out_proj"),
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
    ]
    for ours, theirs in [("visual.transformer", "vision_model"), ("transformer", "text_model")]:
        for i in range(2):
            a, b = f"{ours}.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
            for x, y in names:
                new |= {f"{b}.{y}.{leaf}": state[f"{a}.{x}.{leaf}"] for leaf in leaves}
            for leaf in leaves:
                packed = state[f"{a}.attn.in_proj_{leaf}"].chunk(3)
                for x, part in zip("qkv", packed, strict=True):
                    new[f"{b}.self_attn.{x}_proj.{leaf}"] = part
    model = CLIPModel(config)
    model.load_state_dict({k: v.clone() for k, v in new.items()})
    return model.eval()


@pytest.mark.parametrize("quick_gelu", [False, True])
@torch.inference_mode()
def test_both_outputs_of_both_towers_equal_hugging_face_with_random_weights(folder, quick_gelu):
    twin = huggingface_twin(load_file(folder / "open_clip_model.safetensors"), quick_gelu)
    source = replace(find_clip(f"local-dir:{folder}", None), quick_gelu=quick_gelu)
    tokens = open_clip.get_tokenizer("ViT-B-16", context_length=12)(WORDS)
    x = video(1, batch=3)[:, 0]
    expected = {
        False: (twin.visual_projection, twin.text_projection),
        True: (torch.nn.Identity(), torch.nn.Identity()),
    }
    pooled_image = twin.vision_model(x).pooler_output
    pooled_text = twin.text_model(tokens).pooler_output
    for pooler, (image, text) in expected.items():
        ours = load_clip_model(source, size=None, pooler=pooler, strict=True)
        for found, wanted in [
            (ours.model.encode_image(x), image(pooled_image)),
            (ours.model.encode_text(ours.tokenizer(WORDS)), text(pooled_text)),
        ]:
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_projected_outputs_are_those_of_open_clip(folder):
    image, text = load_clip(f"local-dir:{folder}", frames=4)
    logging.getLogger().addHandler(handler := logging.NullHandler())
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    logging.getLogger().removeHandler(handler)
    x = video(4)
    found = image(x)
    assert found.shape == (2, 4, 16)
    for t in range(4):
        torch.testing.assert_close(found[:, t], model.encode_image(x[:, t]), rtol=0, atol=1e-6)
    prompt = "a video of {}"
    expected = model.encode_text(tokenizer([prompt.format(w) for w in WORDS]))
    torch.testing.assert_close(text(WORDS, prompt), expected, rtol=0, atol=1e-6)


def test_the_image_tower_takes_any_number_of_frames(folder):
    image, _ = load_clip(str(folder), frames=16)
    whole = image(video())
    assert whole.shape[:2] == (2, 16)
    for frames in (1, 5):
        found = image(video()[:, :frames])
        assert torch.allclose(found, whole[:, :frames], atol=1e-5)
    for wrong in (video(size=30), video(frames=0), video()[0]):
        with pytest.raises(
            UsageError, match=r"expected normalised float video \[B, T, 3, 32, 32\]"
        ):
            image(wrong)


def test_projected_and_pooler_outputs_have_names_and_channels_of_their_own(folder):
    specs = {}
    for output in ("projected", "pooler"):
        image, text = load_clip("ViT-B-16", weights=f"local-dir:{folder}", output=output)
        assert image(video()).shape[-1] == image.spec.channels
        assert text(WORDS).shape == (3, text.spec.channels)
        specs[output] = (image.spec, text.spec)
    assert [s.slug for s in specs["projected"]] == ["clip-vit-b-16"] * 2
    assert [s.slug for s in specs["pooler"]] == ["clip-vit-b-16-pooler"] * 2
    assert [s.channels for s in specs["projected"]] == [16, 16]
    assert [s.channels for s in specs["pooler"]] == [64, 32]
    assert [s.kind for s in specs["pooler"]] == ["image", "text"]


def test_the_spec_says_what_was_loaded_and_names_no_path(folder):
    image, text = load_clip(f"local-dir:{folder}", frames=4, precision="bf16")
    digest = hashlib.sha256((folder / "open_clip_model.safetensors").read_bytes()).hexdigest()
    assert image.spec.sha256 == text.spec.sha256 == digest
    assert (image.spec.weights, image.spec.slug) == ("local-dir:tiny", "clip-tiny")
    assert (image.spec.frames, image.spec.size, text.spec.frames) == (4, 32, 0)
    assert image.spec.mean == (0.5, 0.4, 0.3)
    assert image.spec.std == open_clip.OPENAI_DATASET_STD
    for spec in (image.spec, text.spec):
        assert str(folder.parent) not in json.dumps(spec.to_dict())
        assert spec.precision == "bf16"


def test_another_image_size_interpolates_and_says_so(folder):
    image, text = load_clip(f"local-dir:{folder}", size=48, frames=2)
    assert image(video(2, 48)).shape == (2, 2, 16)
    assert image.spec.resized == "space 17->37 bicubic"
    assert text.spec.resized == ""


def test_weights_from_a_file_need_the_architectures_name(folder, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", TINY)
    file = folder / "open_clip_model.safetensors"
    image, _ = load_clip("tiny-clip", weights=str(file))
    by_folder, _ = load_clip(f"local-dir:{folder}")
    assert torch.equal(image(video()), by_folder(video()))
    assert image.spec.weights == "open_clip_model.safetensors"
    assert image.spec.architecture == by_folder.spec.architecture
    (folder / "open_clip_config.json").unlink()
    by_name, _ = load_clip("tiny-clip", weights=f"local-dir:{folder}")
    assert torch.equal(image(video()), by_name(video()))
    with pytest.raises(WeightsError, match=r"expected open_clip_config\.json"):
        load_clip(f"local-dir:{folder}")


def test_a_folder_without_weights_is_refused_where_open_clip_would_be_random(folder):
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="found no weights"):
        load_clip(f"local-dir:{folder}")


def test_a_tag_trained_with_quick_gelu_gets_quick_gelu(folder, monkeypatch):
    file = str(folder / "open_clip_model.safetensors")
    monkeypatch.setattr(clip_source, "download_pretrained", lambda settings: file)
    for name, weights in [
        ("ViT-B-16", "openai"),
        ("ViT-B-16/openai", None),
        ("ViT-B/16", "openai"),
    ]:
        source = find_clip(name, weights)
        assert source.quick_gelu
        assert (source.config, source.files.id) == ("ViT-B-16", "ViT-B-16/openai")
        assert source.preprocess["mean"] == open_clip.OPENAI_DATASET_MEAN
    assert not find_clip("ViT-B-16", "laion2b_s34b_b88k").quick_gelu
    quick = replace(source, config=f"local-dir:{folder}", tokenizer=f"local-dir:{folder}")
    loaded = load_clip_model(quick, size=None, pooler=False, strict=True)
    assert " quickgelu " in loaded.architecture


def test_a_tag_that_cannot_be_fetched_names_the_way_without_network(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"ViT-B-16/openai.*Without network.*local-dir:PATH"):
        load_clip("ViT-B-16", weights="openai")
    with pytest.raises(WeightsError, match=r"hf-hub:org/clip.*Without network"):
        load_clip("hf-hub:org/clip")


def test_a_hub_name_in_the_cache_loads_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--clip-tiny"
    write_clip_folder(repository / "snapshots" / ("0" * 40), TINY)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    image, text = load_clip("hf-hub:org/clip-tiny")
    assert (image.spec.slug, image.spec.weights) == ("clip-tiny", "hf-hub:org/clip-tiny")
    assert text(["dog"]).shape == (1, 16)


def test_a_relative_table_is_found_beside_the_model_whatever_the_working_directory(
    tmp_path, monkeypatch
):
    size = small_vocabulary(tmp_path / "small")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    _, text = load_clip(f"local-dir:{tmp_path / 'small'}")
    ids = text.tokenizer(["dog run"])[0].tolist()
    # 512 bytes (with and without end of word), the merges in order, start and end of text.
    start, end = size - 2, size - 1
    assert ids[:4] == [start, 512 + 1, 512 + 3, end]
    assert set(ids[4:]) == {0}


def test_a_small_model_with_the_general_table_is_refused(tmp_path):
    small_vocabulary(tmp_path / "small")
    path = tmp_path / "small" / "open_clip_config.json"
    config = json.loads(path.read_text())
    del config["model_cfg"]["text_cfg"]["tokenizer_kwargs"]
    path.write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"tokenizer has 49408 words, the model 518.*bpe_path"):
        load_clip(f"local-dir:{tmp_path / 'small'}")
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": "gone.gz"}
    path.write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"gone\.gz"):
        load_clip(f"local-dir:{tmp_path / 'small'}")


def test_the_configuration_and_the_table_are_part_of_the_identity(tmp_path, folder):
    small_vocabulary(tmp_path / "small")
    table = tmp_path / "small" / "bpe.txt.gz"
    before = load_clip(f"local-dir:{tmp_path / 'small'}")[1].spec
    write_bpe(table, [("d", "a"), ("do", "g</w>"), ("r", "u"), ("ru", "n</w>")])
    other = load_clip(f"local-dir:{tmp_path / 'small'}")[1].spec
    assert other.sha256 == before.sha256
    assert other.line("d") != before.line("d")
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    first = load_clip(f"local-dir:{folder}")[0].spec
    config["model_cfg"]["vision_cfg"]["head_width"] = 32
    path.write_text(json.dumps(config))
    assert load_clip(f"local-dir:{folder}")[0].spec.line("d") != first.line("d")


def test_words_outside_a_small_vocabulary_are_named_and_a_general_one_has_none(tmp_path, folder):
    small_vocabulary(tmp_path / "small")
    _, text = load_clip(f"local-dir:{tmp_path / 'small'}")
    assert text.unknown_words("Dog RUN") == []
    assert text.unknown_words("a dog's zebra, a Zebra; été 12") == ["a", "s", "zebra", "été"]
    _, general = load_clip(f"local-dir:{folder}")
    assert general.unknown_words("xyzzy") == []


def test_the_embedded_layout_loads_by_default(tmp_path, monkeypatch):
    small_vocabulary(tmp_path / "clip-embedded")
    monkeypatch.setattr(registry, "embedded_folder", lambda name: tmp_path / name)
    image, text = load_clip()
    assert (image.spec.slug, image.spec.weights, image.spec.frames) == (
        "clip-embedded",
        "embedded",
        8,
    )
    assert load_clip("clip-embedded")[1].spec == text.spec
    assert text.unknown_words("cat") == ["cat"]


def test_the_clip_in_the_package_loads_by_default():
    image, text = load_clip()
    vectors = text(["dog running", "bird flying"])
    assert vectors.shape == (2, text.spec.channels)
    assert image(video(8, image.spec.size)).shape == (2, 8, image.spec.channels)
    assert text.unknown_words("dog") == []
    assert text.unknown_words("bureaucracy") == ["bureaucracy"]


def test_prompts_and_lists_of_names(folder):
    _, text = load_clip(f"local-dir:{folder}")
    assert torch.equal(text(["dog"], "a {} and a {}"), text(["a dog and a dog"]))
    assert torch.equal(text(["{dog}"], "see {}"), text(["see {dog}"]))
    assert text([]).shape == (0, 16)
    many = [f"word {i}" for i in range(300)]
    torch.testing.assert_close(text(many)[290:], text(many[290:]), rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match=r"has no \{\}"):
        text(["dog"], "a photo")
    with pytest.raises(UsageError, match="found one string"):
        text("dog")


def test_missing_unexpected_and_misshapen_tensors_are_refused_by_name(folder, caplog):
    path = folder / "open_clip_model.safetensors"
    state = load_file(path)
    fewer = {k: v for k, v in state.items() if k != "ln_final.bias"} | {"odd": torch.zeros(1)}
    save_file(fewer, path)
    with pytest.raises(WeightsError, match=r"missing 1: ln_final\.bias; unexpected 1: odd"):
        load_clip(f"local-dir:{folder}")
    load_clip(f"local-dir:{folder}", strict=False)
    assert "missing 1: ln_final.bias" in caplog.text
    save_file(state | {"ln_final.bias": torch.zeros(7)}, path)
    with pytest.raises(WeightsError, match=r"ln_final\.bias \(expected \[32\], found \[7\]\)"):
        load_clip(f"local-dir:{folder}")
    save_file(state | {"ln_final.bias": torch.full((32,), torch.nan)}, path)
    with pytest.raises(WeightsError, match=r"not finite in 1: ln_final\.bias"):
        load_clip(f"local-dir:{folder}")


def test_loading_leaves_the_programs_logging_alone(folder):
    root = logging.getLogger()
    before = (list(root.handlers), list(root.filters), root.level)
    load_clip(f"local-dir:{folder}")
    assert (list(root.handlers), list(root.filters), root.level) == before


def test_towers_without_a_separate_projection_refuse_the_pooler(folder):
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32}
    model = config["model_cfg"]
    write_clip_folder(folder, model)
    image, _ = load_clip(f"local-dir:{folder}", frames=1)
    assert image(video(1)).shape == (2, 1, 16)
    with pytest.raises(UsageError, match=r"pooler.*ModifiedResNet.*projected"):
        load_clip(f"local-dir:{folder}", output="pooler")


def test_towers_in_modules_of_their_own_give_both_outputs(folder):
    write_clip_folder(folder, {**TINY, "custom_text": True})
    image, text = load_clip(f"local-dir:{folder}", output="pooler")
    assert image(video()).shape == (2, 16, 64)
    assert text(WORDS).shape == (3, 32)


def test_a_resize_rule_that_msq_does_not_follow_is_warned_about(folder, caplog):
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["preprocess_cfg"]["resize_mode"] = "squash"
    path.write_text(json.dumps(config))
    load_clip(f"local-dir:{folder}")
    assert "squash" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "ViT-B-16"}, "needs weights: a tag .*openai"),
        ({"name": "ViT-B-61", "weights": "openai"}, "no architecture 'ViT-B-61'.*ViT-B-16"),
        ({"name": "ViT-B-16/nope"}, "neither a file nor one of its tags"),
        ({"name": "embedded", "weights": "openai"}, "weights of its own"),
        ({"output": "tokens"}, "output is one of projected, pooler"),
        ({"resize": "cv2"}, "resize is one of torch, pil"),
    ],
)
def test_unknown_names_and_options_are_refused_with_the_choices(arguments, message):
    with pytest.raises((UsageError, WeightsError), match=message):
        load_clip(**arguments)
