import hashlib
import json
import logging
import runpy
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import TimesformerConfig, TimesformerForVideoClassification

from msq.errors import UsageError, WeightsError, WeightsNotFound
from msq.extract.encoders import list_encoders, load_video_encoder, registry
from msq.extract.encoders.timesformer_config import TimeSformerConfig
from msq.extract.encoders.timesformer_names import from_msq, layout_of, to_msq

_fixtures = runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py")))
TINY = _fixtures["TINY_TIMESFORMER"]
random_timesformer = _fixtures["random_timesformer"]
huggingface_config = _fixtures["huggingface_config"]
write_timesformer_folder = _fixtures["write_timesformer_folder"]
write_fair_file = _fixtures["write_fair_file"]
write_embedded_timesformer = _fixtures["write_embedded_timesformer"]


@pytest.fixture
def model():
    return random_timesformer(TINY, std=0.1)


@pytest.fixture
def folder(tmp_path, model):
    write_timesformer_folder(tmp_path / "hf", model)
    return tmp_path / "hf"


def video(frames=TINY.frames, size=32):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, frames, 3, size, size, generator=generator)


def edit(folder, change):
    """Rewrites a folder's tensors after a change made in place."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_hugging_face_fair_and_own_layouts_of_one_set_of_weights_give_equal_tokens(tmp_path, model):
    write_timesformer_folder(tmp_path / "hf", model)
    write_fair_file(tmp_path / "TimeSformer_divST.pyth", model)
    own = tmp_path / "own"
    own.mkdir()
    save_file(dict(model.state_dict()), own / "model.safetensors")
    (own / "config.json").write_text(json.dumps({"architecture": TINY.to_dict()}))
    names = [f"local-dir:{tmp_path / 'hf'}", str(tmp_path / "TimeSformer_divST.pyth"), str(own)]
    with torch.inference_mode():
        expected = model(video())
    for name in names:
        encoder = load_video_encoder(weights=name, pooling="patch")
        assert torch.equal(encoder(video()), expected), name


def test_a_folder_saved_by_transformers_loads_and_equals_it(tmp_path):
    theirs = TimesformerForVideoClassification(TimesformerConfig(**huggingface_config(TINY)))
    _fixtures["randomise"](theirs, std=0.1)
    theirs.save_pretrained(tmp_path / "saved")
    encoder = load_video_encoder(weights=str(tmp_path / "saved"), pooling="patch")
    with torch.inference_mode():
        expected = theirs.eval().timesformer(video()).last_hidden_state
    torch.testing.assert_close(encoder(video()), expected, rtol=0, atol=1e-5)


def test_pytorch_model_bin_and_bare_models_without_a_head_load_too(tmp_path, model, folder):
    state = load_file(folder / "model.safetensors")
    bare = {k.removeprefix("timesformer."): v for k, v in state.items() if "classifier" not in k}
    (folder / "model.safetensors").unlink()
    torch.save(bare, folder / "pytorch_model.bin")
    encoder = load_video_encoder(weights=str(folder), pooling="patch")
    with torch.inference_mode():
        assert torch.equal(encoder(video()), model(video()))


def test_every_name_goes_to_both_public_layouts_and_back(model):
    state = model.state_dict()
    for layout in ("huggingface", "fair"):
        other = from_msq(state, layout)
        assert len(other) == len(state)
        assert not set(other) & set(state)
        assert layout_of(other) == layout
        back, ignored = to_msq(other)
        assert ignored == []
        assert {k: v.data_ptr() for k, v in back.items()} == {
            k: v.data_ptr() for k, v in state.items()
        }


def test_a_convolutional_stem_cannot_be_written_in_a_public_layout():
    conv = random_timesformer(TimeSformerConfig(**{**TINY.to_dict(), "stem": "conv"}))
    with pytest.raises(UsageError, match=r"stem\.layers\.0\.weight"):
        from_msq(conv.state_dict(), "fair")


def test_the_classifier_is_left_out_and_said_so(folder, caplog):
    with caplog.at_level(logging.INFO, logger="msq"):
        load_video_encoder(weights=str(folder))
    assert "classifier left out: 2: classifier.bias, classifier.weight" in caplog.text


def test_the_spec_says_what_was_loaded_and_names_no_path(folder):
    spec = load_video_encoder(weights=f"local-dir:{folder}", precision="bf16").spec
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert spec.sha256 == digest
    assert (spec.slug, spec.weights, spec.kind) == ("timesformer-hf", "local-dir:hf", "video")
    assert (spec.frames, spec.size, spec.tokens, spec.channels) == (4, 32, 5, 64)
    assert (spec.mean, spec.std) == ((0.45,) * 3, (0.225,) * 3)
    assert str(folder.parent) not in json.dumps(spec.to_dict())
    assert spec.resized == ""


def test_the_preprocessor_beside_the_weights_gives_the_normalisation(folder):
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_resize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    spec = load_video_encoder(weights=str(folder)).spec
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    clip_mean = (0.48, 0.46, 0.41)
    assert load_video_encoder(weights=str(folder), mean=clip_mean).spec.mean == clip_mean
    with pytest.raises(UsageError, match="std must be three numbers"):
        load_video_encoder(weights=str(folder), std=(0.0, 1.0, 1.0))


def test_other_frames_and_size_interpolate_and_say_so(folder, caplog):
    with caplog.at_level(logging.INFO, logger="msq"):
        encoder = load_video_encoder(weights=str(folder), frames=6, size=48, time_resize="linear")
    note = "time 4->6 linear, space 4x4->6x6 nearest"
    assert encoder.spec.resized == note
    assert note in caplog.text
    assert encoder(video(6, 48)).shape == (2, 7, 64)
    assert note in encoder.spec.line("d")


def test_poolings_have_names_of_their_own(folder):
    slugs = {p: load_video_encoder(weights=str(folder), pooling=p).spec.slug for p in ("band",)}
    assert slugs == {"band": "timesformer-hf-band"}


def test_missing_and_unexpected_names_are_refused_by_name(folder):
    def change(state):
        del state["timesformer.encoder.layer.1.temporal_dense.bias"]
        state["timesformer.encoder.layer.1.extra.weight"] = torch.zeros(2)

    edit(folder, change)
    with pytest.raises(WeightsError) as error:
        load_video_encoder(weights=str(folder))
    assert "missing 1: blocks.1.temporal_out.bias" in str(error.value)
    assert "unexpected 1: timesformer.encoder.layer.1.extra.weight" in str(error.value)


def test_without_strict_missing_names_are_logged_instead(folder, caplog):
    edit(folder, lambda state: state.pop("timesformer.layernorm.bias"))
    encoder = load_video_encoder(weights=str(folder), strict=False)
    assert "missing 1: norm.bias" in caplog.text
    assert encoder(video()).isfinite().all()


def test_long_lists_of_names_are_shortened_with_their_count(folder):
    edit(folder, lambda state: [state.pop(k) for k in list(state) if "layer.1." in k])
    with pytest.raises(WeightsError, match=r"missing 20: .*… \(14 more\)"):
        load_video_encoder(weights=str(folder))


@pytest.mark.parametrize("strict", [True, False])
def test_tensors_of_another_shape_are_refused_with_both_shapes(folder, strict):
    def change(state):
        state["timesformer.layernorm.weight"] = torch.zeros(63)

    edit(folder, change)
    message = r"norm\.weight \(expected \[64\], found \[63\]\)"
    with pytest.raises(WeightsError, match=message):
        load_video_encoder(weights=str(folder), strict=strict)


def test_embeddings_that_contradict_the_configuration_are_refused_before_interpolation(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_frames": 8}))
    message = r"time_embed \(expected \[1, 8, 64\], found \[1, 4, 64\]\)"
    with pytest.raises(WeightsError, match=message):
        load_video_encoder(weights=str(folder), frames=16)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_type", "joint_space_time"),
        ("qkv_bias", False),
        ("layer_norm_eps", 1e-5),
        ("model_type", "videomae"),
    ],
)
def test_a_variant_with_another_forward_pass_is_refused(folder, key, value):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, key: value}))
    with pytest.raises(WeightsError, match=f"{key} .expected"):
        load_video_encoder(weights=str(folder))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(folder, bad):
    def change(state):
        state["timesformer.embeddings.time_embeddings"][0, 1, 7] = bad

    edit(folder, change)
    with pytest.raises(WeightsError, match="not finite in 1: time_embed"):
        load_video_encoder(weights=str(folder))


class _Payload:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickled_file_with_anything_but_tensors_is_refused_and_not_run(tmp_path):
    victim = tmp_path / "victim"
    torch.save({"model_state": {"a": torch.zeros(1)}, "x": _Payload(victim)}, tmp_path / "w.pyth")
    with pytest.raises(WeightsError, match="never unpickles"):
        load_video_encoder(weights=str(tmp_path / "w.pyth"))
    assert not victim.exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pyth"])
def test_a_damaged_file_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"not a checkpoint")
    with pytest.raises(WeightsError, match=name):
        load_video_encoder(weights=str(tmp_path / name))


def test_weights_of_something_else_are_refused_with_the_names_found(tmp_path):
    save_file({"conv1.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"not a TimeSformer.*conv1\.weight"):
        load_video_encoder(weights=str(tmp_path))


def test_a_fair_model_without_time_is_refused(tmp_path, model):
    state = from_msq(model.state_dict(), "fair")
    kept = {k: v for k, v in state.items() if "temporal" not in k and "time" not in k}
    torch.save({"model_state": kept}, tmp_path / "space_only.pyth")
    with pytest.raises(WeightsError, match="without time_embed"):
        load_video_encoder(weights=str(tmp_path / "space_only.pyth"))


@pytest.mark.parametrize("name", ["local-dir:nowhere", "nowhere.pyth"])
def test_weights_that_are_not_there_are_refused_with_the_ways_to_name_them(name):
    with pytest.raises(WeightsNotFound, match=r"nowhere.*hf-hub:org/name, local-dir:PATH"):
        load_video_encoder(weights=name)


def test_an_empty_folder_is_refused_with_the_expected_files(tmp_path):
    with pytest.raises(WeightsNotFound, match=r"model\.safetensors.*found no weights"):
        load_video_encoder(weights=str(tmp_path))


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_hub_name_that_cannot_be_fetched_names_the_way_without_network(offline_hub):
    with pytest.raises(WeightsError, match=r"hf-hub:org/tsf.*Without network.*local-dir:PATH"):
        load_video_encoder(weights="hf-hub:org/tsf")
    with pytest.raises(WeightsError, match="hf-hub:not a name"):
        load_video_encoder(weights="hf-hub:not a name")


def test_a_hub_that_cannot_be_reached_is_tried_once(monkeypatch):
    tried = []

    def fetch(repo, filename, revision, local_files_only):
        tried.append((filename, local_files_only))
        raise LocalEntryNotFoundError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(WeightsError, match=r"model\.safetensors: no route to host\. Without"):
        load_video_encoder(weights="hf-hub:org/tsf")
    assert [name for name, only_cache in tried if not only_cache] == ["model.safetensors"]


def test_settings_that_cannot_be_looked_up_without_network_are_warned_about(
    offline_hub, model, caplog
):
    repository = offline_hub / "models--org--tsf"
    write_timesformer_folder(repository / "snapshots" / ("1" * 40), model)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    load_video_encoder(weights="hf-hub:org/tsf")
    assert "no preprocessor_config.json in the cache" in caplog.text


def test_a_hub_name_in_the_cache_loads_offline(offline_hub, model):
    commit = "0" * 40
    repository = offline_hub / "models--org--timesformer-tiny"
    write_timesformer_folder(repository / "snapshots" / commit, model)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    encoder = load_video_encoder(weights="hf-hub:org/timesformer-tiny")
    assert encoder.spec.weights == "hf-hub:org/timesformer-tiny"
    assert encoder.spec.slug == "timesformer-tiny"


def test_the_embedded_layout_is_stored_in_half_precision_and_computed_in_float32(
    tmp_path, model, monkeypatch
):
    write_embedded_timesformer(tmp_path / "timesformer-embedded", model)
    monkeypatch.setattr(registry, "embedded_folder", lambda name: tmp_path / name)
    encoder = load_video_encoder(pooling="patch")
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}
    assert encoder.spec.weights == "embedded"
    assert load_video_encoder().spec.slug == "timesformer-embedded"
    assert (encoder.spec.mean, encoder.spec.std) == ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    rounded = random_timesformer(TINY)
    rounded.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    with torch.inference_mode():
        assert torch.equal(encoder(video()), rounded(video()))


def test_the_encoder_in_the_package_loads_by_default():
    encoder = load_video_encoder()
    tokens = encoder(video(encoder.spec.frames, encoder.spec.size))
    assert tokens.shape == (2, encoder.spec.tokens, encoder.spec.channels)
    assert tokens.isfinite().all()


def test_an_installation_without_the_embedded_weights_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("msq.extract.encoders.embedded.files", lambda name: tmp_path)
    with pytest.raises(WeightsError, match="not part of this installation"):
        load_video_encoder()


def test_calling_leaves_the_model_trainable_and_its_tokens_usable_in_training(folder):
    encoder = load_video_encoder(weights=str(folder))
    encoder.model.train()
    encoder.model.blocks[0].eval()
    tokens = encoder(video())
    assert encoder.model.training
    assert not encoder.model.blocks[0].training
    head = torch.nn.Linear(64, 2)
    head(tokens).sum().backward()
    assert head.weight.grad.any()
    encoder.model(video())[:, 0, 0].sum().backward()
    assert encoder.model.cls_token.grad.any()


def test_calling_is_in_evaluation_mode_whatever_mode_the_model_is_in(folder):
    encoder = load_video_encoder(weights=str(folder))
    encoder.model.norm = torch.nn.Sequential(encoder.model.norm, torch.nn.Dropout(0.5))
    encoder.model.train()
    assert torch.equal(encoder(video()), encoder(video()))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_stays_near_float32_and_returns_float32(folder, precision):
    full = load_video_encoder(weights=str(folder))(video())
    low = load_video_encoder(weights=str(folder), precision=precision)(video())
    assert low.dtype == torch.float32
    assert not torch.equal(low, full)
    assert (low - full).abs().mean() < 0.02  # of tokens with unit variance


def test_a_video_unlike_the_spec_is_refused(folder):
    encoder = load_video_encoder(weights=str(folder))
    with pytest.raises(UsageError, match=r"\[B, 4, 3, 32, 32\], found float32 \[2, 8, 3, 32, 32\]"):
        encoder(video(8))
    with pytest.raises(UsageError, match="found uint8"):
        encoder(video().to(torch.uint8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "i3d"}, "no video encoder 'i3d'"),
        ({"name": "timesformer-embedded", "weights": "x"}, "weights of its own"),
        ({"pooling": "max"}, "pooling is one of frame, band, patch"),
        ({"precision": "int8"}, "precision is one of fp32, bf16, fp16"),
        ({"sampling": "random"}, "sampling is one of uniform, official"),
        ({"time_resize": "cubic"}, "time_resize is one of nearest, linear"),
    ],
)
def test_unknown_names_and_options_are_refused_with_the_choices(arguments, message):
    with pytest.raises(UsageError, match=message):
        load_video_encoder(**arguments)


def test_the_list_of_encoders_says_what_each_needs_and_its_licence():
    rows = {row["name"]: row for row in list_encoders()}
    assert {"timesformer", "timesformer-embedded", "clip-embedded"} <= set(rows)
    assert all({"name", "kind", "needs", "licence"} <= set(row) for row in rows.values())
    assert "NC" in rows["timesformer"]["licence"]
