"""3-D networks of torchvision against what their own forward passes on to the classifier."""

from urllib.error import URLError

import pytest
import torch
from torchvision.models import get_model, get_model_weights
from torchvision.models.video.mvit import MSBlockConfig, MViT

from msq.errors import UsageError, WeightsError
from msq.extract.encoders import load_video_encoder
from msq.extract.encoders.pooling import TokenOrder, pool
from msq.extract.encoders.torchvision_3d import NETWORKS, FeatureMap


def write(path, name, classes=5):
    """A state dict of random weights, BatchNorm's statistics included, and its model."""
    torch.manual_seed(0)
    model = get_model(name, weights=None, num_classes=classes).eval()
    for key, value in model.state_dict().items():
        if key.endswith("running_mean"):
            value.normal_(std=0.1)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 2.0)
    torch.save(model.state_dict(), path)
    return model


def video(frames, size, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, frames, 3, size, size, generator=generator)


@pytest.mark.parametrize(
    ("name", "frames", "size", "steps"),
    [("mc3_18", 5, 48, 5), ("r2plus1d_18", 9, 32, 2), ("s3d", 16, 224, 2),
     ("swin3d_t", 6, 64, 3)],
)  # fmt: skip
@torch.inference_mode()
def test_tokens_are_the_feature_map_before_global_pooling(tmp_path, name, frames, size, steps):
    twin = write(tmp_path / "w.pth", name)
    seen = []
    twin.avgpool.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch = 1 if name == "s3d" else 2
    x = video(frames, size, batch)
    logits = twin(x.transpose(1, 2))
    feature_map = seen[0]  # [B, D', t, h', w']
    assert feature_map.shape[2] == steps
    places = [feature_map[:, :, t].flatten(2).transpose(1, 2) for t in range(steps)]
    tokens = torch.cat(places, 1)
    options = {"weights": str(tmp_path / "w.pth"), "frames": frames, "size": size}
    patch = load_video_encoder(f"torchvision/{name}", pooling="patch", **options)(x)
    torch.testing.assert_close(patch[:, 1:], tokens, rtol=0, atol=1e-5)
    frame = load_video_encoder(f"torchvision/{name}", **options)
    found = frame(x)
    assert frame.spec.tokens == 1 + steps
    expected = torch.stack([tokens.mean(1), *(p.mean(1) for p in places)], 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    head = getattr(twin, "fc", None) or getattr(twin, "head", None)
    if head is not None:  # S3D averages its classifier over windows instead
        torch.testing.assert_close(head(found[:, 0]), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("relative", [False, True], ids=["like-v1", "like-v2"])
@torch.inference_mode()
def test_mvit_gives_its_class_token_and_time_major_tokens(relative):
    # The published sizes take seconds; the same class with two small blocks shows the same.
    blocks = [MSBlockConfig(2, 16, 16, (3, 3, 3), (3, 3, 3), (1, 1, 1), (1, 2, 2)),
              MSBlockConfig(2, 16, 24, (3, 3, 3), (3, 3, 3), (1, 2, 2), (1, 2, 2))]  # fmt: skip
    torch.manual_seed(0)
    twin = MViT((64, 64), 6, blocks, residual_pool=relative, residual_with_cls_embed=not relative,
                rel_pos_embed=relative, proj_after_attn=relative, num_classes=5).eval()  # fmt: skip
    seen = []
    twin.norm.register_forward_hook(lambda module, inputs, out: seen.append(out))
    x = video(6, 64)
    logits = twin(x.transpose(1, 2))
    found = FeatureMap(twin, NETWORKS["mvit_v2_s"])(x)
    assert found.shape == (2, 1 + 3 * 8 * 8, 24)
    torch.testing.assert_close(found, seen[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(twin.head(found[:, 0]), logits, rtol=0, atol=1e-6)
    pooled = pool(found, 6, "frame", TokenOrder(3, time_major=True))
    expected = [found[:, 0], *(found[:, 1 + 64 * t : 65 + 64 * t].mean(1) for t in range(3))]
    torch.testing.assert_close(pooled, torch.stack(expected, 1), rtol=0, atol=1e-6)


def test_mvit_is_loaded_at_its_own_frames_and_size_only(tmp_path):
    write(tmp_path / "w.pth", "mvit_v2_s")
    name = f"torchvision/mvit_v2_s/{tmp_path / 'w.pth'}"
    spec = load_video_encoder(name, pooling="patch").spec
    assert (spec.frames, spec.size, spec.tokens) == (16, 224, 1 + 8 * 7 * 7)
    assert load_video_encoder(name).spec.tokens == 9
    with pytest.raises(UsageError, match="for 16 frames of 224 pixels only, found 8 of 224"):
        load_video_encoder(name, frames=8)


def test_the_spec_takes_its_numbers_from_the_weights_transforms(tmp_path):
    write(tmp_path / "mine.pth", "mc3_18")
    spec = load_video_encoder(f"torchvision/mc3_18/{tmp_path / 'mine.pth'}", pooling="band").spec
    transforms = get_model_weights("mc3_18").DEFAULT.transforms()
    assert (list(spec.mean), list(spec.std)) == (transforms.mean, transforms.std)
    assert (spec.frames, spec.size, spec.tokens, spec.channels) == (16, 112, 16, 512)
    assert (spec.slug, spec.weights) == ("torchvision-mc3-18-band", "torchvision/mc3_18/mine.pth")


def test_published_weights_come_from_torch_hub_s_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    entry = get_model_weights("mc3_18").DEFAULT
    write(folder / entry.url.rsplit("/", 1)[-1], "mc3_18", classes=400)
    for name in ("torchvision/mc3_18", "torchvision/mc3_18/KINETICS400_V1"):
        assert load_video_encoder(name).spec.weights == "torchvision/mc3_18/KINETICS400_V1"


def test_without_a_network_the_error_names_the_way_out(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(WeightsError, match=r"no network.*give torchvision/r3d_18/FILE"):
        load_video_encoder("torchvision/r3d_18")


def test_weights_and_names_that_do_not_fit_are_refused(tmp_path):
    write(tmp_path / "w.pth", "mc3_18")
    with pytest.raises(WeightsError, match=r"another shape|missing"):
        load_video_encoder(f"torchvision/r3d_18/{tmp_path / 'w.pth'}")
    state = torch.load(tmp_path / "w.pth", weights_only=True)
    del state["layer2.0.conv1.0.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"missing 1: layer2\.0\.conv1\.0\.weight"):
        load_video_encoder(f"torchvision/mc3_18/{tmp_path / 'w.pth'}")
    with pytest.raises(UsageError, match="no such network; there are r3d_18, mc3_18"):
        load_video_encoder("torchvision/x3d_s")
    with pytest.raises(UsageError, match="neither a file nor one of its tags: KINETICS400_V1"):
        load_video_encoder("torchvision/r3d_18/KINETICS600")


def test_too_few_frames_are_refused(tmp_path):
    write(tmp_path / "w.pth", "s3d")
    with pytest.raises(UsageError, match=r"torchvision/s3d: .*4 frames of 224 pixels"):
        load_video_encoder(f"torchvision/s3d/{tmp_path / 'w.pth'}", frames=4)


def test_every_network_of_the_installed_library_is_known():
    from torchvision.models import list_models, video

    assert set(list_models(module=video)) == set(NETWORKS)
