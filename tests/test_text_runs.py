"""From a text model through a store and a head to predictions, on the command line."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from msq.cli import main
from msq.extract.encoders import load_text_encoder
from msq.extract.encoders.prompts import PromptSet
from msq.extract.store import open_store
from msq.head.predict import load_head

_text = runpy.run_path(str(Path(__file__).with_name("text_fixtures.py")))
write_text_folder = _text["write_text_folder"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos, a manifest, a text model 24 wide, and a store of it with the embedded CLIP."""
    folder = tmp_path_factory.mktemp("world")
    write_text_folder(folder / "bert", seed=5)
    fakes = runpy.run_path(str(Path(__file__).with_name("fakes.py")))
    lines = ["path,labels,split"]
    for row, label in enumerate(["dog run", "bird fly", "open door"] * 2):
        fakes["write_video"](folder / f"{row}.mp4", seed=row)
        lines.append(f"{row}.mp4,{label},{'test' if row > 3 else 'train'}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    assert run("extract", "--manifest", folder / "clips.csv", "--out", folder / "s.zarr", "-q",
               "--text-encoder", folder / "bert", "--text-pooling", "mean", "--workers", "0",
               "--prompts", "clip-simple") == 0  # fmt: skip
    return folder


def run(*arguments: Any) -> Any:
    """Exit code of one command."""
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    return left.value.code


def train(world: Path, queries: str) -> Path:
    out = world / f"run-{queries}"
    done = run("train-head", world / "s.zarr", "--out", out, "--epochs", 1, "--queries", queries,
               "--classifier", "text", "-q", "head.layers=1", "head.heads=4", "head.ffn=16",
               "train.val=0")  # fmt: skip
    assert done == 0
    return out


@pytest.mark.parametrize("queries", ["text", "multimodal"])
def test_heads_train_on_bert_with_images_of_clip_and_predict_other_words(
    world: Path, queries: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store = open_store(world / "s.zarr")
    text = load_text_encoder(str(world / "bert"), pooling="mean")
    templates = PromptSet.parse("clip-simple").templates
    torch.testing.assert_close(
        store.text(), text(list(store.classes), templates), atol=1e-6, rtol=0
    )
    out = train(world, queries)
    head = load_head(out)
    assert head.model.width == 24  # that of the text, not of the images
    image = head.model.fuse_image
    assert (None if image is None else image.in_features) == (
        None if queries == "text" else store.spec("clip-embedded", "image").channels
    )
    capsys.readouterr()
    # The weights are found where the extraction had seen them, or where they are said to be.
    words = ["--labels", "a zebra door,dog run", "--json"]
    assert run("predict", world / "0.mp4", "--run", out, *words) == 0
    first = json.loads(capsys.readouterr().out)
    assert first[0]["unknown_words"] == ["zebra"]
    new = head._asked(["a zebra door"], None).text
    assert new is not None
    torch.testing.assert_close(new, text(["a zebra door"], templates), atol=1e-6, rtol=0)
    monkeypatch.setenv("MSQ_CACHE", str(tmp_path / "another machine"))
    assert run("predict", world / "0.mp4", "--run", out, *words) == 1
    assert "say where they are with --video-encoder, --image-encoder or --text-encoder" in (
        capsys.readouterr().err
    )
    shutil.copytree(world / "bert", tmp_path / "moved")
    moved = ("--text-encoder", tmp_path / "moved")
    assert run("predict", world / "0.mp4", "--run", out, *words, *moved) == 0
    assert json.loads(capsys.readouterr().out) == first
    write_text_folder(tmp_path / "moved", seed=6)
    assert run("predict", world / "0.mp4", "--run", out, *words, *moved) == 1
    assert "the text encoder from" in (error := capsys.readouterr().err)
    assert "  sha256: expected " in error


def test_another_pooling_or_model_is_no_part_of_the_same_array(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ("extract", "--manifest", world / "clips.csv", "--out", world / "s.zarr", "-q",
             "--workers", "0", "--prompts", "clip-simple")  # fmt: skip
    own = ("--text-encoder", f"local-dir:{world / 'bert'}")
    assert run(*again, *own, "--text-pooling", "mean") == 0
    capsys.readouterr()
    assert run(*again, *own) == 1
    assert "bert: output: expected pooler, found mean" in capsys.readouterr().err
    assert run(*again, "--text-pooling", "cls") == 2  # of the embedded CLIP
    assert "found clip-embedded, a CLIP" in capsys.readouterr().err
    assert run(*again, "--text-encoder", "none", "--text-pooling", "cls") == 2
    assert "found no text encoder" in capsys.readouterr().err


def test_class_names_that_do_not_fit_are_counted(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "long.csv"
    names = ["dog " * 14 + "run", "dog run", "bird " * 18 + "fly"]
    lines = [f"{world / f'{row}.mp4'},{name},train" for row, name in enumerate(names)]
    manifest.write_text("\n".join(["path,labels,split", *lines]) + "\n")
    assert run("extract", "--manifest", manifest, "--out", tmp_path / "s.zarr", "--json", "-q",
               "--text-encoder", world / "bert", "--video-encoder", "none", "--workers", "0",
               "--prompts", "{}", "--prompts", "a {} over the sea") == 0  # fmt: skip
    out, error = capsys.readouterr()
    warnings = json.loads(out)["warnings"]
    assert [line.split(" are longer")[0] for line in warnings] == [
        "1 of 3 class names with prompt 'plain' ({})",
        "2 of 3 class names with prompt 'a-over-the-sea' (a {} over the sea)",
    ]
    assert "warning: 1 of 3 class names" in error
