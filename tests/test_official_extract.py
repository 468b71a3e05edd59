"""`msq extract --protocol official`: the authors' preprocessing, settings, frames, end to end."""

from __future__ import annotations

import json
import runpy
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
    ToTensor,
)

from msq.cli import main
from msq.errors import UsageError
from msq.extract.decode_pool import Picture
from msq.extract.encode import encode, encode_clip
from msq.extract.encoders import load_clip, load_video_encoder
from msq.extract.encoders.spec import EncoderSpec, difference
from msq.extract.request import ExtractRequest
from msq.extract.store import open_store
from msq.head.predict import Head

_fixtures = runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py")))
_spec = runpy.run_path(str(Path(__file__).with_name("test_encoder_spec.py")))["VIDEO"]
_write = runpy.run_path(str(Path(__file__).with_name("test_charades.py")))["write"]
SQUARE = Compose([Resize(256, InterpolationMode.BICUBIC), CenterCrop(224)])
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def run(*arguments: Any) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


# --- pixels and specs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width"), [(240, 320), (320, 240), (256, 256), (257, 391), (180, 300), (720, 405)]
)
def test_the_authors_preprocessing_is_torchvisions_bit_for_bit(height: int, width: int) -> None:
    rng = np.random.default_rng(height)
    blocks = np.kron(rng.integers(0, 256, (2, height // 9 + 1, width // 9 + 1, 3)),
                     np.ones((1, 9, 9, 1)))[:, :height, :width]  # fmt: skip
    frames = np.clip(blocks + rng.normal(0, 10, blocks.shape), 0, 255).astype(np.uint8)
    expected = np.stack([np.asarray(SQUARE(Image.fromarray(f))).transpose(2, 0, 1) for f in frames])
    spec = replace(_spec, short_side=256, resize="pil")
    np.testing.assert_array_equal(Picture.of(spec).pixels(frames, ""), expected)
    fast = Picture.of(replace(spec, resize="torch")).pixels(frames, "")
    assert np.abs(fast.astype(int) - expected).max() <= 2


def test_a_short_side_is_part_of_the_spec_only_where_it_is_set() -> None:
    # As specs were before there was a short side: the same line, hash and dict.
    assert "short_side" not in _spec.to_dict()
    assert EncoderSpec.from_dict(_spec.to_dict()) == _spec
    wide = replace(_spec, short_side=256)
    assert wide.line("d") == _spec.line("d").replace("|224 torch|", "|224 of 256 torch|")
    assert EncoderSpec.from_dict(json.loads(json.dumps(wide.to_dict()))) == wide
    assert replace(_spec, short_side=224) == _spec  # the same pictures, the same encoder
    assert difference(wide.to_dict(), _spec.to_dict()) == [
        "short_side: expected 256, found nothing"
    ]
    with pytest.raises(UsageError, match="at least the 224 pixels of the crop, found 200"):
        replace(_spec, short_side=200)


def test_loaders_record_the_short_side() -> None:
    video = load_video_encoder("timesformer-embedded", short_side=64)
    assert (video.spec.size, video.spec.short_side) == (48, 64)
    image, text = load_clip("embedded", short_side=128)
    assert (image.spec.short_side, text.spec.short_side) == (128, 0)
    with pytest.raises(UsageError, match="at least the 96 pixels"):
        load_clip("embedded", short_side=64)


# --- settings -------------------------------------------------------------------------------------


def test_paper_sets_nothing_and_official_sets_the_authors_ways() -> None:
    paper = ExtractRequest(manifest=Path("x.csv"))
    assert (paper.protocol, paper.pooling, paper.clip_output) == ("paper", "frame", "projected")
    assert (paper.sampling, paper.prompts, paper.frames) == ("uniform", ("{}",), None)
    assert (paper.size, paper.short_side, paper.mean, paper.std) == (None,) * 4
    official = ExtractRequest(manifest=Path("x.csv"), protocol="official")
    assert (official.pooling, official.clip_output, official.sampling) == (
        "band", "pooler", "official",
    )  # fmt: skip
    assert (official.size, official.short_side) == (224, 256)
    assert (official.mean, official.std) == (MEAN, STD)
    assert (official.frames, official.prompts) == (10, ("{}",))
    assert ExtractRequest(protocol="official", frames=16).frames == 16  # an amount
    again = ExtractRequest(protocol="official", pooling="band", prompts=["{}"], mean=MEAN)
    assert again.mean == MEAN  # saying what it says anyway is no contradiction
    with pytest.raises(UsageError, match="--protocol theirs: expected one of paper, official"):
        ExtractRequest(protocol=cast(Any, "theirs"))


def test_contradictions_are_listed_in_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (
        "--pooling", "frame", "--clip-output", "projected", "--sampling", "uniform",
        "--size", 112, "--short-side", 128, "--prompts", "a video of {}",
        "--option", "frames=all", "--option", "targets=16", "--option", "unlabelled=keep",
    )  # fmt: skip
    start = ("extract", "--protocol", "official", "--dataset", "charades", "--root", tmp_path)
    assert run(*start, *given) == 2
    error = " ".join(capsys.readouterr().err.split())
    for line in (
        "--pooling band (found frame)", "--clip-output pooler (found projected)",
        "--sampling official (found uniform)", "--size 224 (found 112)",
        "--short-side 256 (found 128)", "--prompts {} (found a video of {})",
        "--option frames=labelled (found frames=all)",
        "--option targets=10 (found targets=16)",
        "--option unlabelled=skip (found unlabelled=keep)",
    ):  # fmt: skip
        assert line in error
    assert "docs/protocols.md" in error
    assert run(*start, "--frames", 16, "--option", "targets=16") == 2  # agrees; no files there
    assert "expected Charades_v1_train.csv" in " ".join(capsys.readouterr().err.split())


def test_the_embedded_clip_cannot_be_official(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.csv").write_text("path,labels,split\na.mp4,x,train\n")
    assert run("extract", "--manifest", tmp_path / "m.csv", "--protocol", "official") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "found the embedded one, which has no poolers" in error
    assert "--image-encoder ViT-B-16/openai" in error


# --- end to end -----------------------------------------------------------------------------------

ACTIONS = {  # id -> (split, actions); 2 seconds, 12 frames at 6 a second
    "AAAAA": ("train", "c001 0.40 0.90;c002 1.20 1.40"),
    "BBBBB": ("train", ""),
    "CCCCC": ("test", "c000 0.00 1.90;c002 1.60 1.90;c001 1.05 1.10"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Charades with frame folders, extracted as the authors' code would."""
    folder = tmp_path_factory.mktemp("official")
    rows: dict[str, list[str]] = {"train": [], "test": []}
    for seed, (name, (split, actions)) in enumerate(ACTIONS.items()):
        rows[split].append(f"{name},P{split},Kitchen,6,7,Yes,s,o,d,{actions},2.0")
        frames = folder / "root" / "Charades_v1_rgb" / name
        frames.mkdir(parents=True)
        rng = np.random.default_rng(seed)
        for i in range(12):
            blocks = np.kron(rng.integers(0, 256, (12, 16, 3)), np.ones((20, 20, 1)))
            Image.fromarray(blocks.astype(np.uint8)).save(frames / f"{name}-{i + 1:06d}.jpg")
    root = _write(folder / "root", train=rows["train"], test=rows["test"])
    clip, video = folder / "clip", folder / "video"
    tower = {**_fixtures["TINY_CLIP"]["vision_cfg"], "image_size": 224, "patch_size": 56}
    _fixtures["write_clip_folder"](clip, {**_fixtures["TINY_CLIP"], "vision_cfg": tower})
    config = replace(_fixtures["TINY_TIMESFORMER"], image_size=(224, 224), patch_size=56)
    _fixtures["write_timesformer_folder"](video, _fixtures["random_timesformer"](config))
    arguments = (
        "extract", "--protocol", "official", "--dataset", "charades", "--root", root,
        "--frames", 4, "--resize", "pil", "--store-dtype", "float32", "--device", "cpu",
        "--video-encoder", f"local-dir:{video}", "--image-encoder", f"local-dir:{clip}",
        "--workers", 0, "-q", "--json", "--out", folder / "store.zarr",
    )  # fmt: skip
    return SimpleNamespace(folder=folder, root=root, clip=clip, video=video, arguments=arguments)


def preprocessed(folder: Path, indices: list[int]) -> torch.Tensor:
    """[1, T, 3, 224, 224]: what the authors' test transforms make of these frames."""
    whole = Compose([SQUARE, ToTensor(), Normalize(MEAN, STD)])
    files = sorted(folder.iterdir())
    return torch.stack([whole(Image.open(files[i]).convert("RGB")) for i in indices])[None]


def encoders(made: SimpleNamespace) -> tuple[Any, Any]:
    """The two encoders, loaded by hand."""
    video = load_video_encoder("timesformer", f"local-dir:{made.video}", frames=4, pooling="band")
    return video, load_clip(f"local-dir:{made.clip}", frames=4, output="pooler")[0]


def test_features_are_those_of_the_authors_frames_and_preprocessing(
    made: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*made.arguments, "--dry-run") == 0
    plan = json.loads(capsys.readouterr().out)
    assert all("|224 of 256 pil|" in e["spec"] for e in plan["encoders"].values())
    assert run(*made.arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["clips"], result["done"], result["skipped"]) == (2, 2, 0)
    assert result["left_out_items"][0]["item"] == "BBBBB"
    assert any("labels of 4 sampled frames: 1 of 5 label" in line for line in result["warnings"])
    store = open_store(made.folder / "store.zarr")
    assert (store.name, store.variant) == ("charades", "labelled frames, labels of 4 frames")
    # Frames at i / 6 s. AAAAA: 3, 4, 5 and 8 have a class; CCCCC: 1 to 11, of which segment
    # centres take the places 1, 3, 6, 9 (ticks 0 2 5 8 11). Class 1 (1.05 to 1.10 s) has no frame.
    shown = {"AAAAA": [3, 4, 5, 8], "CCCCC": [2, 4, 7, 10]}
    assert store.labels([0, 1])[:, :4].tolist() == [[0, 1, 1, 0], [1, 0, 1, 0]]
    video, image = encoders(made)
    (video_name, image_name) = (e.spec.slug for e in (video, image))
    for row, (name, indices) in enumerate(shown.items()):
        times = store.time([row], video_name)[0]
        np.testing.assert_allclose(times, np.array(indices) / 6, atol=1e-6)
        frames = preprocessed(made.root / "Charades_v1_rgb" / name, indices)
        tokens, vectors = video(frames), image(frames).mean(1)
        assert torch.allclose(store.tokens([row], video_name), tokens, atol=2e-5)
        assert torch.allclose(store.image([row], image_name), vectors, atol=2e-5)
        moved = preprocessed(made.root / "Charades_v1_rgb" / name, [i - 1 for i in indices])
        assert not torch.allclose(
            video(moved), tokens, atol=1e-3
        )  # the tolerance tells frames apart
    assert run(*made.arguments) == 0  # the same request finds the finished store
    capsys.readouterr()


def test_other_settings_do_not_fit_into_the_same_store(
    made: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*made.arguments)
    plain = [a for a in made.arguments if a not in ("--protocol", "official")]
    given = ("--pooling", "band", "--clip-output", "pooler", "--sampling", "official")
    assert run(*plain, *given) == 1
    assert "clip" in capsys.readouterr().err  # other clips and labels already
    rule = ("--option", "frames=labelled", "--option", "targets=4", "--option", "unlabelled=skip")
    assert run(*plain, *given, *rule) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "short_side: expected nothing, found 256" in error
    assert "mean: expected" in error


def test_prediction_shows_videos_as_the_store_did(made: SimpleNamespace) -> None:
    run(*made.arguments)
    store = open_store(made.folder / "store.zarr")
    video, image = encoders(made)
    specs = {k: store.spec(e.spec.slug).to_dict() for k, e in (("video", video), ("image", image))}
    weights = {"video": f"local-dir:{made.video}", "image": f"local-dir:{made.clip}"}
    meta = {"classes": list(store.classes), "encoders": specs}
    head = Head(cast(Any, None), meta, "run", torch.device("cpu"), weights)
    path = made.root / "Charades_v1_rgb" / "CCCCC"
    shown = [head.encoders[kind] for kind in ("video", "image")]
    tokens, vectors = encode_clip(path, shown).features
    frames = preprocessed(path, [1, 4, 7, 10])  # of all twelve: nobody has labelled a new video
    assert torch.allclose(tokens, video(frames), atol=2e-5)
    assert torch.allclose(vectors, image(frames).mean(1), atol=2e-5)
    without = {**specs["video"]}  # as runs on a plain store have it
    del without["short_side"]
    meta["encoders"] = {**specs, "video": without}
    plain = Head(cast(Any, None), meta, "run", torch.device("cpu"), weights)
    assert not torch.allclose(encode(path, plain.encoders["video"]), tokens, atol=1e-3)


def test_one_command_trains_encoder_and_head_as_the_authors_code_does(
    made: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    out = made.folder / "run"
    arguments = (
        "train", "charades", "--root", made.root, "--protocol", "official", "--frames", 4,
        "--video-encoder", f"local-dir:{made.video}", "--image-encoder", f"local-dir:{made.clip}",
        "--epochs", 1, "train.epoch_clips=3", "train.batch=2", "--out", out, "--device", "cpu",
        "--workers", 0, "-q", "--json",
    )  # fmt: skip
    assert run(*arguments) in (0, 3)  # clips without a label are left out
    result = json.loads(capsys.readouterr().out)
    assert result["protocol"] == "official"
    assert result["unfrozen"] == "all"
    changes = " ".join(result["protocol_changes"])
    assert "train.epochs: official 100, here 1" in changes
    assert "train.epoch_clips: official 2500, here 3" in changes
    recorded = tomllib.loads((out / "config.toml").read_text())
    assert recorded["clips"] == {
        "augment": "official", "image": "shown", "cache": "auto", "prefetch_mb": 256
    }  # fmt: skip
    assert recorded["backbone"]["lr"] == recorded["optim"]["lr"] == 1e-5
    trained = load_video_encoder("auto", str(out), frames=4, pooling="band")
    before, _ = encoders(made)
    moved = [
        name
        for (name, a), b in zip(
            before.model.state_dict().items(), trained.model.state_dict().values(), strict=True
        )
        if not torch.equal(a, b)
    ]
    assert "blocks.0.mlp.up.weight" in moved
    assert run(*arguments[:4], "--protocol", "official", "clips.augment=consistent") == 2
    assert "clips.augment = official (found consistent)" in capsys.readouterr().err
