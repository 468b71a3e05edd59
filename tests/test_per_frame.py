"""Image models on every frame: timm's and open_clip's, against the libraries' own forward."""

import json
import runpy
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from msq.errors import UsageError, WeightsError
from msq.extract.encoders import load_video_encoder
from msq.extract.encoders.per_frame_timm import TimmFrames

_fixtures = runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py")))
randomise = _fixtures["randomise"]
write_clip_folder = _fixtures["write_clip_folder"]
TINY_CLIP = _fixtures["TINY_CLIP"]


def write_timm(path: Path, name: str, **settings: object) -> torch.nn.Module:
    """A file of random weights as timm saves them, and the model that holds them."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **settings)
    randomise(model, std=0.05)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return model.eval()


def video(frames: int, size: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, frames, 3, size, size, generator=generator)


def all_tokens(features: torch.Tensor, classes: torch.Tensor | None, batch: int) -> torch.Tensor:
    """The layout by its definition, one token at a time: [global, (n t)]."""
    frames, places = features.shape[0] // batch, features.shape[1]
    rows = []
    for b in range(batch):
        own = features[b * frames : (b + 1) * frames]
        first = (
            own.mean((0, 1)) if classes is None else classes[b * frames : (b + 1) * frames].mean(0)
        )
        rows.append([first, *(own[t, n] for n in range(places) for t in range(frames))])
    return torch.stack([torch.stack(row) for row in rows])


CASES = {
    # name: (how forward_features is laid out, has a class token)
    "test_vit": ("tokens", True),
    "test_vit3": ("tokens", False),
    "vit_small_patch14_reg4_dinov2": ("tokens", True),
    "test_resnet": ("map", False),
    "swin_tiny_patch4_window7_224": ("channels last", False),
}


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_tokens_equal_timm_s_own_features(tmp_path, name):
    layout, has_class = CASES[name]
    size = {"vit_small_patch14_reg4_dinov2": 42, "swin_tiny_patch4_window7_224": 56}.get(name, 160)
    settings = {"img_size": size} if "_patch" in name else {}
    twin = write_timm(tmp_path / "w.safetensors", name, num_classes=5, **settings)
    encoder = load_video_encoder(
        f"timm/{name}/{tmp_path / 'w.safetensors'}", frames=2, size=size, pooling="patch"
    )
    x = video(2, size)
    features = twin.forward_features(x.flatten(0, 1))
    classes = features[:, 0] if has_class else None
    if layout == "tokens":
        features = features[:, twin.num_prefix_tokens :]
    elif layout == "map":
        features = features.flatten(2).transpose(1, 2)
    else:
        features = features.flatten(1, 2)
    expected = all_tokens(features, classes, 2)
    assert encoder.spec.tokens == expected.shape[1]
    torch.testing.assert_close(encoder(x), expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_frame_is_the_mean_of_its_patches_and_sees_no_other_frame(tmp_path):
    twin = write_timm(tmp_path / "w.safetensors", "test_vit")
    encoder = load_video_encoder("timm/test_vit", str(tmp_path / "w.safetensors"), frames=3)
    x = video(3, 160)
    features = twin.forward_features(x.flatten(0, 1)).unflatten(0, (2, 3))
    found = encoder(x)
    torch.testing.assert_close(found[:, 0], features[:, :, 0].mean(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, 1:], features[:, :, 1:].mean(2), rtol=0, atol=1e-5)
    changed = x.clone()
    changed[:, 1] += 1
    same = (encoder(changed) == found).all(-1).all(0)
    assert same.tolist() == [False, True, False, True]


@torch.inference_mode()
def test_bands_are_bands_of_the_image_over_all_frames(tmp_path):
    write_timm(tmp_path / "w.safetensors", "test_vit")
    name = f"timm/test_vit/{tmp_path / 'w.safetensors'}"
    patch = load_video_encoder(name, frames=2, pooling="patch")(video(2, 160))
    band = load_video_encoder(name, frames=2, pooling="band")
    assert band.spec.tokens == 2
    # 1 + 100·2 tokens in two bins of 101, which share the middle one.
    expected = torch.stack([patch[:, :101].mean(1), patch[:, 100:].mean(1)], 1)
    torch.testing.assert_close(band(video(2, 160)), expected, rtol=0, atol=1e-6)


@torch.inference_mode()
def test_another_size_resizes_positions_as_timm_does(tmp_path):
    write_timm(tmp_path / "w.safetensors", "test_vit")
    state = load_file(tmp_path / "w.safetensors")
    twin = timm.create_model(
        "test_vit", pretrained=True, img_size=96, pretrained_cfg_overlay={"state_dict": state}
    ).eval()
    name = f"timm/test_vit/{tmp_path / 'w.safetensors'}"
    encoder = load_video_encoder(name, frames=2, size=96, pooling="patch")
    x = video(2, 96)
    expected = twin.forward_features(x.flatten(0, 1))
    torch.testing.assert_close(
        encoder(x), all_tokens(expected[:, 1:], expected[:, 0], 2), rtol=0, atol=1e-5
    )
    assert encoder.spec.resized == "positions 101->37 by timm"


def test_the_spec_takes_its_numbers_from_timm(tmp_path):
    write_timm(tmp_path / "mine.safetensors", "test_vit", num_classes=0)
    spec = load_video_encoder("timm/test_vit", str(tmp_path / "mine.safetensors")).spec
    cfg = timm.get_pretrained_cfg("test_vit")
    assert (spec.mean, spec.std, spec.size) == (cfg.mean, cfg.std, cfg.input_size[-1])
    assert (spec.slug, spec.frames, spec.tokens) == ("timm-test-vit", 16, 17)
    assert spec.weights == "timm/test_vit/mine.safetensors"
    assert spec.architecture == "per frame timm test_vit"


def test_a_folder_of_the_hub_brings_its_architecture_and_settings(tmp_path):
    write_timm(tmp_path / "hub" / "model.safetensors", "test_vit", num_classes=3)
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 160, 160],
           "num_classes": 3, "classifier": "head", "fixed_input_size": True}  # fmt: skip
    values = {"architecture": "test_vit", "num_classes": 3, "pretrained_cfg": own}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(values))
    for weights in (f"local-dir:{tmp_path / 'hub'}", f"timm/local-dir:{tmp_path / 'hub'}"):
        spec = load_video_encoder("auto", weights, frames=2).spec
        assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert (spec.slug, spec.weights) == ("timm-test-vit", "local-dir:hub")


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    path = tmp_path / "w.safetensors"
    write_timm(path, "test_vit", num_classes=4)
    state = load_file(path)
    save_file({k: v for k, v in state.items() if k != "blocks.1.mlp.fc1.weight"}, path)
    with pytest.raises(WeightsError, match=r"blocks\.1\.mlp\.fc1\.weight"):
        load_video_encoder(f"timm/test_vit/{path}")
    save_file({**state, "blocks.1.mlp.fc1.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(WeightsError, match=r"size mismatch for blocks\.1\.mlp\.fc1\.weight"):
        load_video_encoder(f"timm/test_vit/{path}")
    save_file({**state, "extra.weight": torch.zeros(3)}, path)
    with pytest.raises(WeightsError, match=r"extra\.weight"):
        load_video_encoder(f"timm/test_vit/{path}")
    save_file({**state, "norm.bias": torch.full((64,), torch.nan)}, path)
    with pytest.raises(WeightsError, match=r"not finite in 1: norm\.bias"):
        load_video_encoder(f"timm/test_vit/{path}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/vit_base_patch16_223", r"timm has no model .*; close ones: vit_base_patch16_224"),
        ("timm/test_vit.nope", r"timm has no model 'test_vit\.nope'"),
        ("timm", "expected a model's name after it"),
    ],
)
def test_unknown_models_are_refused_with_near_ones(name, message):
    with pytest.raises(UsageError, match=message):
        load_video_encoder(name)


def test_a_size_that_a_model_cannot_take_is_refused(tmp_path):
    write_timm(tmp_path / "w.safetensors", "test_vit")
    with pytest.raises((UsageError, WeightsError), match=r"w\.safetensors|test_vit"):
        load_video_encoder(f"timm/test_vit/{tmp_path / 'w.safetensors'}", size=7)


def test_without_a_network_the_error_names_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"could not be fetched.*or give timm/test_vit\.r160"):
        load_video_encoder("timm/test_vit.r160_in1k")


def test_a_model_without_a_feature_map_is_refused():
    class Odd(torch.nn.Module):
        def forward_features(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    with pytest.raises(UsageError, match=r"Odd: expected forward_features to give .*\[1, 3\]"):
        TimmFrames(Odd()).places(8)


@torch.inference_mode()
def test_an_image_tower_of_open_clip_gives_its_normed_tokens(tmp_path):
    write_clip_folder(tmp_path / "clip", TINY_CLIP)
    encoder = load_video_encoder(
        f"open_clip/local-dir:{tmp_path / 'clip'}", frames=3, pooling="patch"
    )
    twin = open_clip.CLIP(**TINY_CLIP).eval()
    twin.load_state_dict(load_file(tmp_path / "clip" / "open_clip_model.safetensors"))
    seen = []
    twin.visual.ln_post.register_forward_hook(lambda module, inputs, out: seen.append(out))
    x = video(3, 32)
    image = twin.encode_image(x.flatten(0, 1))
    tokens = seen[0]
    # What is hooked is what the library's own image vector is made of.
    torch.testing.assert_close(tokens[:, 0] @ twin.visual.proj, image, rtol=0, atol=1e-5)
    expected = all_tokens(tokens[:, 1:], tokens[:, 0], 2)
    torch.testing.assert_close(encoder(x), expected, rtol=0, atol=1e-5)
    spec = encoder.spec
    assert (spec.slug, spec.weights) == ("open-clip-clip-patch", "open_clip/local-dir:clip")
    assert (spec.channels, spec.mean) == (64, (0.5, 0.4, 0.3))
    assert encoder.model.tower is not None
    assert not hasattr(encoder.model, "transformer")  # the text tower is not kept


def test_an_image_tower_without_patch_tokens_is_refused(tmp_path):
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    write_clip_folder(tmp_path / "resnet", {**TINY_CLIP, "vision_cfg": vision})
    with pytest.raises(UsageError, match="its image tower gives no tokens"):
        load_video_encoder(f"open_clip/local-dir:{tmp_path / 'resnet'}")


def test_an_open_clip_architecture_without_weights_lists_its_tags():
    with pytest.raises(UsageError, match=r"CLIP ViT-B-16 needs weights: a tag \(openai, "):
        load_video_encoder("open_clip/ViT-B-16")
