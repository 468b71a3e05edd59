"""VideoMAE against Hugging Face's own, and what is said of checkpoints that do not fit."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import VideoMAEConfig as TwinConfig
from transformers import VideoMAEForVideoClassification, VideoMAEModel

from msq.errors import UsageError, WeightsError
from msq.extract.encoders import load_video_encoder
from msq.extract.encoders.videomae import VideoMAE, VideoMAEConfig, position_table
from msq.extract.encoders.videomae_weights import from_msq, to_msq

_fixtures = runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py")))
TINY = _fixtures["TINY_VIDEOMAE"]
videomae_json = _fixtures["videomae_json"]
write_videomae_folder = _fixtures["write_videomae_folder"]
randomise = _fixtures["randomise"]

LARGER = VideoMAEConfig(
    image_size=(80, 80), frames=8, width=96, depth=4, heads=3, mlp_width=384, final_norm=True
)
WEIGHT_NOISE = 0.1  # large enough that a wrong detail is far outside 1e-5


def twin_of(model: VideoMAE, **changes: object) -> VideoMAEModel:
    """Hugging Face's model with the same weights, under the names of its current release."""
    twin = VideoMAEModel(TwinConfig(**{**videomae_json(model.config), **changes}))
    state = {k.removeprefix("videomae."): v for k, v in from_msq(model.state_dict()).items()}
    state = {
        k.replace("q_bias", "query.bias").replace("v_bias", "value.bias"): v
        for k, v in state.items()
    }
    twin.load_state_dict(state)
    return twin.eval()


def video(config: VideoMAEConfig, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, config.frames, 3, *config.image_size, generator=generator)


@pytest.fixture
def folder(tmp_path):
    write_videomae_folder(tmp_path / "videomae-tiny")
    return tmp_path / "videomae-tiny"


@pytest.mark.parametrize("config", [TINY, LARGER], ids=["32px-T4", "80px-T8-norm"])
@torch.inference_mode()
def test_tokens_equal_hugging_face_with_random_weights(tmp_path, config):
    model = write_videomae_folder(tmp_path / "w", config, std=WEIGHT_NOISE)
    encoder = load_video_encoder("videomae", f"local-dir:{tmp_path / 'w'}", pooling="patch")
    expected = twin_of(model)(video(config)).last_hidden_state
    found = encoder(video(config))
    torch.testing.assert_close(found[:, 1:], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, 0], expected.mean(1), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_folder_that_hugging_face_saved_is_read_without_its_head(tmp_path):
    torch.manual_seed(3)
    twin = VideoMAEForVideoClassification(TwinConfig(**videomae_json(TINY), num_labels=7)).eval()
    randomise(twin, std=WEIGHT_NOISE)
    twin.save_pretrained(tmp_path / "saved")
    assert any(k.startswith("fc_norm.") for k in load_file(tmp_path / "saved/model.safetensors"))
    encoder = load_video_encoder("auto", str(tmp_path / "saved"), pooling="patch")
    expected = twin.videomae(video(TINY)).last_hidden_state
    torch.testing.assert_close(encoder(video(TINY))[:, 1:], expected, rtol=0, atol=1e-5)


def test_the_names_of_current_and_of_published_files_are_both_read(folder):
    state = load_file(folder / "model.safetensors")
    assert "videomae.encoder.layer.0.attention.attention.q_bias" in state
    newer = {
        k.replace("q_bias", "query.bias").replace("v_bias", "value.bias"): v
        for k, v in state.items()
    }
    bare = {k.removeprefix("videomae."): v for k, v in newer.items()}
    expected, ignored = to_msq(state, "x")
    assert ignored == [k for k in state if not k.startswith("videomae.")]
    for other in (newer, bare):
        found, _ = to_msq(other, "x")
        assert found.keys() == expected.keys() == VideoMAE(TINY).state_dict().keys()
    with pytest.raises(WeightsError, match="twice, under two spellings"):
        to_msq({**state, **newer}, "x")


def test_the_position_table_is_that_of_the_formula():
    table = position_table(7, 6)
    for p in range(7):
        for i in range(3):
            angle = p / 10000 ** (2 * i / 6)
            assert table[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_a_token_covers_two_frames_of_one_place_and_time_comes_first():
    torch.manual_seed(0)
    model = VideoMAE(VideoMAEConfig(**{**vars(TINY), "depth": 1})).eval()
    with torch.no_grad():  # nothing passes between tokens
        for layer in (model.blocks[0].attention.out, model.blocks[0].mlp.down):
            layer.weight.zero_()
            layer.bias.zero_()
    x = video(TINY, 1)
    changed = x.clone()
    changed[0, 3, :, 8:16, 0:8] += 1.0  # frame 3 is of tubelet 1; row 1, column 0 is place 4
    difference = (model(changed) - model(x)).abs().amax(-1)[0]
    assert difference.nonzero().flatten().tolist() == [TINY.patches + 4]


@torch.inference_mode()
def test_poolings_are_means_over_tubelets_bands_and_everything(folder):
    tokens = load_video_encoder("videomae", str(folder), pooling="patch")(video(TINY))[:, 1:]
    n = TINY.patches
    frame = load_video_encoder("videomae", str(folder))
    expected = [tokens.mean(1), tokens[:, :n].mean(1), tokens[:, n:].mean(1)]
    assert frame.spec.tokens == 3
    torch.testing.assert_close(frame(video(TINY)), torch.stack(expected, 1), rtol=0, atol=1e-6)
    band = load_video_encoder("videomae", str(folder), pooling="band")
    expected = [tokens[:, i : i + n // 2].mean(1) for i in range(0, 2 * n, n // 2)]
    assert band.spec.tokens == 4
    torch.testing.assert_close(band(video(TINY)), torch.stack(expected, 1), rtol=0, atol=1e-6)


@torch.inference_mode()
def test_another_t_and_size_equal_hugging_face_made_for_them(tmp_path):
    model = write_videomae_folder(tmp_path / "w", TINY, std=WEIGHT_NOISE)
    encoder = load_video_encoder(
        "videomae", str(tmp_path / "w"), frames=6, size=48, pooling="patch"
    )
    target = VideoMAEConfig(**{**vars(TINY), "frames": 6, "image_size": (48, 48)})
    twin = twin_of(model, num_frames=6, image_size=48)
    found = encoder(video(target))[:, 1:]
    torch.testing.assert_close(found, twin(video(target)).last_hidden_state, rtol=0, atol=1e-5)
    assert encoder.spec.resized == "positions 2x4x4->3x6x6 computed"
    assert load_video_encoder("videomae", str(tmp_path / "w")).spec.resized == ""


def test_the_spec_says_how_the_tokens_are_made(folder):
    preprocessor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    spec = load_video_encoder("auto", f"local-dir:{folder}", pooling="band").spec
    assert (spec.slug, spec.weights) == ("videomae-tiny-band", "local-dir:videomae-tiny")
    assert (spec.mean, spec.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert spec.architecture == "videomae p8 t2 d2 w48 h4 m96 eps1e-12"
    assert (spec.frames, spec.size, spec.tokens, spec.channels) == (4, 32, 4, 48)
    (folder / "preprocessor_config.json").unlink()
    assert load_video_encoder("auto", str(folder)).spec.mean == (0.485, 0.456, 0.406)


def test_names_and_shapes_that_do_not_fit_are_named(folder):
    file = folder / "model.safetensors"
    state = load_file(file)
    key = "videomae.encoder.layer.1.intermediate.dense.weight"
    save_file({k: v for k, v in state.items() if k != key}, file)
    with pytest.raises(WeightsError, match=r"missing 1: blocks\.1\.mlp\.up\.weight"):
        load_video_encoder("videomae", str(folder))
    load_video_encoder("videomae", str(folder), strict=False)
    save_file({**state, "videomae.layernorm.weight": torch.ones(48)}, file)
    with pytest.raises(WeightsError, match=r"unexpected 1: norm\.weight"):
        load_video_encoder("videomae", str(folder))
    save_file({**state, key: torch.zeros(96, 47)}, file)
    with pytest.raises(WeightsError, match=r"blocks\.1\.mlp\.up\.weight .*\[96, 48\].*\[96, 47\]"):
        load_video_encoder("videomae", str(folder), strict=False)
    save_file({"blocks.0.attn.q_bias": torch.ones(3)}, file)
    with pytest.raises(WeightsError, match="authors' own layout; take the same weights from"):
        load_video_encoder("videomae", str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"expected config\.json beside the weights"):
        load_video_encoder("videomae", str(folder))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model_type": "timesformer"}, "model_type .expected 'videomae', found 'timesformer'"),
        ({"hidden_act": "relu"}, "hidden_act .expected 'gelu', found 'relu'"),
        ({"patch_size": [8, 4]}, "patches must be square, found 8x4"),
    ],
)
def test_other_variants_are_refused(folder, setting, message):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **setting}))
    with pytest.raises(WeightsError, match=message):
        load_video_encoder("videomae", str(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 5}, "5 frames are not a multiple of 2"),
        ({"size": 36}, "36x36 is not a multiple of the patch size 8"),
        ({"time_resize": "linear"}, "time_resize and space_resize are TimeSformer's"),
    ],
)
def test_options_that_cannot_be_are_refused(folder, arguments, message):
    with pytest.raises(UsageError, match=message):
        load_video_encoder("videomae", str(folder), **arguments)


def test_gradients_reach_every_parameter():
    model = VideoMAE(TINY).train()
    weights = torch.linspace(-1, 1, TINY.width)
    (model(video(TINY)) * weights).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
