"""Protocol `official` and published class splits from the command line, videos to numbers."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msq.cli import main
from msq.extract.store import open_store
from msq.head.checkpoint import load_model

_fixtures = runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py")))
EXTRACT = ("--frames", 4, "--workers", 0, "--device", "cpu", "-q")
OFFICIAL = ("--protocol", "official")
SMALL_HEAD = ("head.layers=1", "head.heads=4", "head.ffn=64", "--epochs", 1, "--device", "cpu")
SHORT = ("--epochs", 1, "train.epoch_clips=6", "train.batch=3", "--device", "cpu", "--json", "-q")


def run(*arguments: Any) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One small world, extracted for either protocol."""
    folder = tmp_path_factory.mktemp("protocol")
    world = folder / "world"
    assert run("world", world, "--train", 16, "--test", 12, "--seed", 5, "-q") == 0
    clip = folder / "clip"  # the embedded CLIP is no ViT, and has no poolers
    tower = {**_fixtures["TINY_CLIP"]["vision_cfg"], "image_size": 224, "patch_size": 56}
    _fixtures["write_clip_folder"](clip, {**_fixtures["TINY_CLIP"], "vision_cfg": tower})
    video = folder / "video"  # of the size that the protocol fixes, with few patches
    config = replace(_fixtures["TINY_TIMESFORMER"], image_size=(224, 224), patch_size=56)
    _fixtures["write_timesformer_folder"](video, _fixtures["random_timesformer"](config))
    encoders = ("--video-encoder", f"local-dir:{video}", "--image-encoder", f"local-dir:{clip}")
    stores = {"paper": folder / "paper.zarr", "official": folder / "official.zarr"}
    for name, store in stores.items():
        given = (*OFFICIAL, *encoders) if name == "official" else ()
        code = run(
            "extract", "--manifest", world / "manifest.csv", "--out", store, *EXTRACT, *given
        )
        assert code == 0
    classes = list(open_store(stores["paper"]).classes)
    return SimpleNamespace(folder=folder, clip=clip, video=video, classes=classes, **stores)


def test_the_official_protocol_runs_from_videos_to_numbers(
    made: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    out = made.folder / "run"
    assert run("train-head", made.official, "--out", out, "--protocol", "official", *SHORT) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["protocol"] == "official"
    assert {"map", "map_micro", "map_official"} <= result["metrics"].keys()
    model, meta = load_model(out / "head.safetensors")
    assert (model.width, len(model.encoder), len(model.layers)) == (512, 6, 6)
    assert meta["encoders"]["video"]["pooling"] == "band"
    assert meta["encoders"]["video"]["tokens"] == 4  # T of them, and no global one
    assert run("eval", out, made.official, "--device", "cpu", "--json") == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == pytest.approx(result["metrics"])
    video = min((made.folder / "world" / "videos").iterdir())
    moved = ("--image-encoder", f"local-dir:{made.clip}")
    moved += ("--video-encoder", f"local-dir:{made.video}")
    assert run("predict", video, "--run", out, *moved, "--device", "cpu", "--json") == 0
    (item,) = json.loads(capsys.readouterr().out)
    assert len(item["predictions"]) == len(made.classes)


def test_other_features_and_other_switches_are_refused_with_what_to_do(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "run")
    assert run("train-head", made.paper, *out, "--protocol", "official", *SHORT) == 1
    error = capsys.readouterr().err
    assert "video pooling: expected band, found frame" in error
    assert "video short side: expected 256, found nothing" in error
    assert "extract them with `msq extract --protocol official" in " ".join(error.split())
    assert run("train-head", made.official, *out, *SHORT[:2], "-q") == 1
    assert "train with --protocol official" in capsys.readouterr().err
    code = run("train-head", made.official, *out, "--protocol", "official", "--classifier", "text")
    assert code == 2
    assert "head.classifier = per-class (found text)" in capsys.readouterr().err
    assert run("zero-shot", made.official, "--config", official(tmp_path), "-q") == 2
    assert "protocol official has classifier 'per-class'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def official(folder: Path) -> Path:
    """A configuration file that names the protocol alone."""
    file = folder / "official.toml"
    file.write_text('[train]\nprotocol = "official"\n', encoding="utf-8")
    return file


def test_zero_shot_takes_published_lists_and_class_order(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = len(made.classes) // 2
    for side, names in (("train", made.classes[half:]), ("test", made.classes[:half])):
        (tmp_path / side).mkdir()
        (tmp_path / side / "split_0.list").write_text("\n".join(names) + "\n", encoding="utf-8")
    given = ("--queries", "text", "--json", "-q", *SMALL_HEAD)
    out = ("--out", tmp_path / "lists")
    assert run("zero-shot", made.paper, "--split-dir", tmp_path, *out, *given) == 0
    (result,) = json.loads(capsys.readouterr().out)
    (done,) = result["runs"]
    assert done["unseen_classes"] == made.classes[:half]
    assert (done["source"], done["seed"], len(done["hash"])) == ("split_0", None, 64)
    out = ("--out", tmp_path / "order")
    code = run("zero-shot", made.paper, "--class-order", "--seen", "50,75", *out, *given)
    assert code == 0
    results = json.loads(capsys.readouterr().out)
    assert [r["runs"][0]["source"] for r in results] == ["class order"] * 2
    assert results[0]["runs"][0]["seen_classes"] == made.classes[:half]
    both = ("--class-order", "--split-dir", tmp_path)
    assert run("zero-shot", made.paper, *both) == 2
    assert "expected one of them, found both" in capsys.readouterr().err
    (tmp_path / "test" / "split_0.list").write_text("Skydiving\n", encoding="utf-8")
    assert run("zero-shot", made.paper, "--split-dir", tmp_path) == 2
    assert "'Skydiving' is no class of the store" in capsys.readouterr().err


def test_a_leaking_split_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    from msq.report.zero_shot import warn_of_leaks

    spread = {"mean": 0.5, "std": None, "values": [0.5]}
    leak = {"seen": "CliffDiving", "unseen": "Diving", "share": 1.0, "clips": 217}
    result = {
        "seen": 50, "splits": 1, "queries": "text", "classifier": "text", "unseen": {"map": spread},
        "generalised_splits": {"seen": spread, "unseen": spread, "harmonic": spread},
        "chance": spread, "runs": [{"source": "split_2", "leaks": [leak]}],
    }  # fmt: skip
    warn_of_leaks([result, {**result, "queries": "vanilla"}])
    error = capsys.readouterr().err
    assert error.count("warning: split 50 % seen, split_2 leaks") == 1
    assert "CliffDiving (seen) and Diving (unseen)" in error.replace("\n", " ")
