"""Names of video encoders: what they mean, and every family from videos to predictions."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.models import get_model, get_model_weights

from msq import config as configuration
from msq.config import RunConfig
from msq.errors import UsageError, WeightsError
from msq.extract.datasets import Clip, Dataset
from msq.extract.encoders import list_encoders, load_clip, load_video_encoder
from msq.extract.encoders.families import VideoName, find_family, location_key, moved_name
from msq.extract.encoders.locations import recall
from msq.extract.encoders.timesformer import TimeSformer
from msq.extract.encoders.timesformer_config import TimeSformerConfig
from msq.extract.encoders.videomae import VideoMAE, VideoMAEConfig
from msq.extract.pipeline import extract
from msq.extract.request import ExtractRequest
from msq.extract.store import open_store
from msq.head.features import load_features
from msq.head.predict import load_head
from msq.head.train import train_head

_fixtures = runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py")))
_media = runpy.run_path(str(Path(__file__).with_name("media.py")))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny weights of every family, in folders and files as users have them."""
    folder = tmp_path_factory.mktemp("weights")
    tiny = _fixtures["random_timesformer"](_fixtures["TINY_TIMESFORMER"])
    _fixtures["write_timesformer_folder"](folder / "timesformer-tiny", tiny)
    _fixtures["write_fair_file"](folder / "tiny.pyth", tiny)
    _fixtures["write_videomae_folder"](folder / "videomae-tiny")
    _fixtures["write_clip_folder"](folder / "clip", _fixtures["TINY_CLIP"])
    torch.manual_seed(0)
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    (folder / "hub").mkdir()
    for file in (folder / "resnet.safetensors", folder / "hub" / "model.safetensors"):
        save_file(state, file)
    settings = {"architecture": "test_resnet", "num_classes": 3}
    (folder / "hub" / "config.json").write_text(json.dumps(settings))
    torch.save(get_model("mc3_18", weights=None).state_dict(), folder / "mc3.pth")
    return folder


NAMES = {
    "timesformer": ("local-dir:{}/timesformer-tiny", "timesformer-tiny", 5, 64),
    "fair": ("{}/tiny.pyth", "timesformer-tiny", 5, 64),
    "videomae": ("{}/videomae-tiny", "videomae-tiny", 3, 48),
    "timm": ("timm/test_resnet/{}/resnet.safetensors", "timm-test-resnet", 5, None),
    "timm-hub": ("local-dir:{}/hub", "timm-test-resnet", 5, None),
    "open_clip": ("open_clip/local-dir:{}/clip", "open-clip-clip", 5, 64),
    "torchvision": ("torchvision/mc3_18/{}/mc3.pth", "torchvision-mc3-18", 5, 512),
}
SIZES = {"torchvision": 32, "timm": 64, "timm-hub": 64}


@pytest.mark.parametrize("family", NAMES)
def test_every_family_goes_from_videos_to_predictions(
    family: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSQ_CACHE", str(tmp_path / "cache"))
    name, slug, tokens, channels = NAMES[family]
    request = ExtractRequest(
        video_encoder=name.format(weights), image_encoder="none", text_encoder="none", frames=4,
        size=SIZES.get(family), device="cpu",
    )  # fmt: skip
    video, _, _ = request.load_encoders()
    assert video is not None
    assert (video.spec.slug, video.spec.tokens) == (slug, tokens)
    assert channels in (None, video.spec.channels)
    paths = [tmp_path / f"video {i}.mp4" for i in range(4)]
    for i, path in enumerate(paths):
        _media["encode"](path, 9 + i, seed=i)
    clips = tuple(
        Clip(p.stem, p, None, None, (i % 2,), "test" if i > 2 else "train")
        for i, p in enumerate(paths)
    )
    data = Dataset("tiny", ("dog", "bird"), "multilabel", clips, "map")
    extract(data, tmp_path / "s.zarr", video=video, image=None, text=None, store_dtype="float32",
            workers=0)  # fmt: skip
    settings = ["head.classifier=per-class", "head.queries=vanilla", "head.layers=1",
                "head.heads=2", "train.epochs=1", "train.val=0"]  # fmt: skip
    store = open_store(tmp_path / "s.zarr")
    run = tmp_path / "run"
    train_head(load_features(store), configuration.override(RunConfig(), settings), run)
    head = load_head(run)  # the weights are found where the extraction saw them
    found = head.predict(paths[:2])
    for one, other in zip(found, head.predict(range(2), store=store), strict=True):
        scores = [{p["label"]: p["score"] for p in x["predictions"]} for x in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    monkeypatch.setenv("MSQ_CACHE", str(tmp_path / "another machine"))
    with pytest.raises(WeightsError, match="say where they are with --video-encoder"):
        load_head(run).predict(paths[0])


def test_one_clip_can_be_both_encoders_and_both_are_found_again(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSQ_CACHE", str(tmp_path))
    name = f"local-dir:{weights / 'clip'}"
    video = load_video_encoder(f"open_clip/{name}", frames=2).spec
    image = load_clip(name, frames=2)[0].spec
    assert video.sha256 == image.sha256
    assert recall(location_key(image.weights, image.sha256)) == (name, None)
    place = recall(location_key(video.weights, video.sha256))
    assert place == ("open_clip/", name)
    assert load_video_encoder(*place, frames=2).spec == video
    assert moved_name(video.weights, name) == ("open_clip/", name)


def test_moved_files_of_a_library_need_no_architecture(weights: Path, tmp_path: Path) -> None:
    shutil.copy(weights / "resnet.safetensors", tmp_path / "moved.safetensors")
    moved = str(tmp_path / "moved.safetensors")
    recorded = "timm/test_resnet/resnet.safetensors"
    assert moved_name(recorded, moved) == ("timm/test_resnet", moved)
    assert moved_name(recorded, f"timm/test_resnet/{moved}")[1] is None
    assert moved_name("local-dir:x", f"local-dir:{tmp_path}") == (f"local-dir:{tmp_path}", None)
    a = load_video_encoder(*moved_name(recorded, moved), size=64).spec
    b = load_video_encoder(f"timm/test_resnet/{weights}/resnet.safetensors", size=64).spec
    assert (a.sha256, a.architecture) == (b.sha256, b.architecture)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("auto", None, VideoName("timesformer")),
        ("auto", "embedded", VideoName("timesformer")),
        ("timesformer-embedded", None, VideoName("timesformer")),
        ("timesformer", "x", VideoName("timesformer", weights="x")),
        ("videomae", "hf-hub:a/b", VideoName("videomae", weights="hf-hub:a/b")),
        ("auto", "timm/vit_b.tag", VideoName("timm", "vit_b.tag")),
        ("timm/vit_b", "/x/y.pt", VideoName("timm", "vit_b", "/x/y.pt")),
        ("timm/vit_b//x/y.pt", None, VideoName("timm", "vit_b", "/x/y.pt")),
        ("timm/hf-hub:a/b", None, VideoName("timm", "", "hf-hub:a/b")),
        ("open_clip/ViT-B-16/openai", None, VideoName("open_clip", "ViT-B-16/openai")),
        ("open_clip/ViT-B-16/x.pt", None, VideoName("open_clip", "ViT-B-16", "x.pt")),
        ("torchvision/s3d", None, VideoName("torchvision", "s3d")),
        ("torchvision/s3d/DEFAULT", None, VideoName("torchvision", "s3d/DEFAULT")),
        ("torchvision/s3d/local-dir:y", None, VideoName("torchvision", "s3d", "local-dir:y")),
    ],
)
def test_names_mean_what_they_say(name: str, given: str | None, expected: VideoName) -> None:
    assert find_family(name, given) == expected


def test_a_configuration_of_another_kind_is_refused_with_what_there_is(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "vivit"}')
    with pytest.raises(UsageError, match=r"model_type 'vivit'; .* knows timesformer, videomae"):
        find_family("auto", f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("i3d", UsageError, "no video encoder 'i3d'; names are embedded, hf-hub:ORG/NAME"),
        ("absent/w.pth", WeightsError, "no such file; names are embedded"),
        ("local-dir:absent", WeightsError, "no such folder"),
        ("open_clip/", UsageError, "expected a model's name after it"),
    ],
)
def test_names_that_mean_nothing_are_refused(name: str, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        load_video_encoder("auto", name)


def test_videomae_without_weights_names_some() -> None:
    with pytest.raises(UsageError, match="videomae needs weights: hf-hub:MCG-NJU/videomae-base"):
        load_video_encoder("videomae")


def test_other_weights_of_the_same_name_are_another_encoder(weights: Path, tmp_path: Path) -> None:
    one = load_video_encoder("auto", f"local-dir:{weights / 'videomae-tiny'}").spec
    _fixtures["write_videomae_folder"](tmp_path / "videomae-tiny", seed=5)
    two = load_video_encoder("auto", f"local-dir:{tmp_path / 'videomae-tiny'}").spec
    assert one.slug == two.slug
    assert one.fingerprint("x") != two.fingerprint("x")


def _count(model: torch.nn.Module, head: str = "-") -> float:
    own = (p.numel() for n, p in model.named_parameters() if not n.startswith(head))
    return round(sum(own) / 1e6, 1)


def test_the_list_tells_the_truth_about_sizes() -> None:
    rows = {row["name"]: row for row in list_encoders() if row["kind"] == "video"}
    heads = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
    depths = {384: 12, 768: 12, 1024: 24, 1280: 32}
    checked = 0
    for name, row in rows.items():
        if row["parameters_millions"] is None or name.startswith("open_clip/"):
            continue
        checked += 1
        t, size, width = row["frames"], row["size"], row["width"]
        if name == "timesformer-embedded":
            encoder = load_video_encoder()
            own = (encoder.spec.frames, encoder.spec.size, encoder.spec.channels)
            assert own == (t, size, width)
            assert _count(encoder.model) == row["parameters_millions"]
            continue
        with torch.device("meta"):
            if "timesformer" in name:
                model = TimeSformer(TimeSformerConfig(frames=t, image_size=(size, size)))
                assert _count(model) == row["parameters_millions"]
            elif "videomae" in name:
                config = VideoMAEConfig(frames=t, width=width, heads=heads[width],
                                        depth=depths[width], mlp_width=4 * width,
                                        final_norm="finetuned" not in name)  # fmt: skip
                assert _count(VideoMAE(config)) == row["parameters_millions"]
            else:
                network = name.removeprefix("torchvision/")
                model = get_model(network, weights=None)
                assert _count(model, ("fc.", "head.", "classifier.")) == row["parameters_millions"]
                published = get_model_weights(network).DEFAULT
                assert published.transforms().crop_size == [size, size]
                assert row["megabytes"] == round(published.meta["num_params"] * 4 / 1e6)
    assert checked == 27


@pytest.mark.parametrize(
    ("repository", "frames", "size"),
    [("facebook/timesformer-base-finetuned-k600", 8, 224),
     ("facebook/timesformer-hr-finetuned-ssv2", 16, 448),
     ("fcakyon/timesformer-large-finetuned-k400", 96, 224)],
)  # fmt: skip
def test_every_published_shape_of_timesformer_loads(
    tmp_path: Path, repository: str, frames: int, size: int
) -> None:
    # One of the twelve layers: the shapes that tell the sizes apart are in the embeddings.
    config = TimeSformerConfig(frames=frames, image_size=(size, size), depth=1)
    folder = tmp_path / repository.rpartition("/")[2]
    _fixtures["write_timesformer_folder"](folder, TimeSformer(config))
    spec = load_video_encoder("auto", f"local-dir:{folder}").spec
    assert (spec.frames, spec.size, spec.tokens) == (frames, size, 1 + frames)
    assert (spec.channels, spec.resized) == (768, "")
    row = next(row for row in list_encoders() if row["name"] == f"hf-hub:{repository}")
    assert (row["frames"], row["size"]) == (frames, size)
    _fixtures["write_fair_file"](tmp_path / "w.pyth", TimeSformer(config))
    spec = load_video_encoder("auto", str(tmp_path / "w.pyth")).spec
    assert (spec.frames, spec.size) == (frames, size)
