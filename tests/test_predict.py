"""From video files through a store and a trained head back to labels, with random encoders."""

from __future__ import annotations

import json
import runpy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from msq import config as configuration
from msq.cli import main
from msq.config import RunConfig
from msq.errors import SpecMismatch, UsageError, WeightsError
from msq.extract.datasets import Clip, Dataset
from msq.extract.encoders import load_clip, load_video_encoder
from msq.extract.pipeline import extract
from msq.extract.store import open_store
from msq.head.evaluate import evaluate_run
from msq.head.features import load_features
from msq.head.predict import load_head
from msq.head.train import train_head

_fixtures = runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py")))
_media = runpy.run_path(str(Path(__file__).with_name("media.py")))
CLASSES = ("dog run", "dog walk", "bird fly")


@dataclass
class World:
    """A folder of weights, videos, a store of them, and one run per classifier."""

    folder: Path
    videos: list[Path]
    store: Any

    def run(self, classifier: str, queries: str = "multimodal") -> Path:
        out = self.folder / f"run-{classifier}-{queries}"
        config = configuration.override(
            RunConfig(),
            [f"head.classifier={classifier}", f"head.queries={queries}", "head.layers=1",
             "head.heads=2", "train.epochs=2", "train.val=0", "train.batch=4"],
        )  # fmt: skip
        train_head(load_features(self.store), config, out)
        return out

    @property
    def weights(self) -> dict[str, str]:
        return {k: f"local-dir:{self.folder / k}" for k in ("video", "image")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("predict")
    tiny = _fixtures["random_timesformer"](_fixtures["TINY_TIMESFORMER"])
    _fixtures["write_timesformer_folder"](folder / "video", tiny)
    (folder / "image").mkdir()
    merges = [("d", "o"), ("do", "g</w>"), ("r", "u"), ("ru", "n</w>")]
    size = _fixtures["write_bpe"](folder / "image" / "bpe.txt.gz", merges)
    (folder / "image" / "vocabulary.txt").write_text("dog\nrun\nwalk\nbird\nfly\n")
    tiny_clip = _fixtures["TINY_CLIP"]
    words = {**tiny_clip["text_cfg"], "vocab_size": size,
             "tokenizer_kwargs": {"bpe_path": "bpe.txt.gz"}}  # fmt: skip
    _fixtures["write_clip_folder"](folder / "image", {**tiny_clip, "text_cfg": words})
    videos = [folder / f"video {i}.mp4" for i in range(6)]
    for i, path in enumerate(videos):
        _media["encode"](path, 12 + i, seed=i)
    clips = tuple(
        Clip(path.stem, path, None, None, (i % 3,), "test" if i > 3 else "train")
        for i, path in enumerate(videos)
    )
    data = Dataset("tiny", CLASSES, "multilabel", clips, "map")
    image, text = load_clip(f"local-dir:{folder / 'image'}", frames=3)
    video = load_video_encoder("timesformer", f"local-dir:{folder / 'video'}")
    extract(data, folder / "s.zarr", video=video, image=image, text=text,
            prompts={"plain": "a {}"}, store_dtype="float32", workers=0)  # fmt: skip
    return World(folder, videos, open_store(folder / "s.zarr"))


def scores(item: dict[str, Any]) -> dict[str, float]:
    return {p["label"]: p["score"] for p in item["predictions"]}


def test_a_video_is_scored_as_its_row_in_the_store(world: World) -> None:
    head = load_head(world.run("per-class"), weights=world.weights)
    from_videos = head.predict(world.videos)
    from_rows = head.predict(range(6), store=world.store)
    assert [item["clip"] for item in from_videos] == list(world.store.clips)
    assert [item["clip"] for item in from_rows] == list(world.store.clips)
    for one, other in zip(from_videos, from_rows, strict=True):
        assert scores(one) == pytest.approx(scores(other), abs=1e-5)
        assert set(scores(one)) == set(CLASSES)
    assert scores(head.predict(world.videos[2])[0]) == pytest.approx(
        scores(from_videos[2]), abs=1e-5
    )


def test_rows_of_a_store_are_scored_by_a_head_of_some_of_its_classes(world: World) -> None:
    """Zero-shot: no label of the store is read, so its classes may be others."""
    out = world.folder / "run-of-two-classes"
    config = configuration.override(
        RunConfig(),
        ["head.classifier=text", "head.queries=text", "head.layers=1", "head.heads=2",
         "train.epochs=2", "train.val=0", "train.batch=4"],
    )  # fmt: skip
    train_head(load_features(world.store).select(columns=[0, 1]), config, out)
    head = load_head(out, weights=world.weights)
    unseen = ["bird fly", "dog run"]
    rows, videos = (
        head.predict([5, 1], unseen, store=world.store),
        head.predict([world.videos[5], world.videos[1]], unseen),
    )
    for one, other in zip(rows, videos, strict=True):
        assert set(scores(one)) == set(unseen)
        assert scores(one) == pytest.approx(scores(other), abs=1e-5)
    assert set(scores(head.predict([0], store=world.store)[0])) == set(CLASSES[:2])
    with pytest.raises(
        SpecMismatch, match=r"classes: expected 2, found 3; missing none, unknown 'bird fly'$"
    ):
        evaluate_run(out, world.store)


@pytest.mark.parametrize("classifier", ["text", "shared"])
def test_other_words_are_scored_and_unknown_ones_named(world: World, classifier: str) -> None:
    head = load_head(world.run(classifier), weights=world.weights)
    own = head.predict(world.videos[:1])
    assert "unknown_words" not in own[0]
    labels = ["dog run", "bird run", "a zebra yawning"]
    found = head.predict(world.videos[:1], labels)[0]
    assert set(scores(found)) == set(labels)
    assert found["unknown_words"] == ["a", "zebra", "yawning"]
    # A class of the run under another prompt is another class, and is encoded anew.
    image, text = load_clip(world.weights["image"], frames=3)
    torch.testing.assert_close(head.model.text, text(list(CLASSES), "a {}"), atol=1e-5, rtol=0)
    assert scores(head.predict(world.videos[:1], ["dog run"], prompt="the {}")[0]) != scores(
        head.predict(world.videos[:1], ["dog run"])[0]
    )
    assert image.spec.frames == 3


def test_a_per_class_head_refuses_other_words(world: World) -> None:
    head = load_head(world.run("per-class"), weights=world.weights)
    with pytest.raises(UsageError, match=r"'dog runs' is not among its 3 classes \(nearest: "):
        head.predict(world.videos[:1], ["dog runs"])


def test_a_broken_video_gets_a_line_and_the_others_their_scores(
    world: World, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"nothing that a decoder knows")
    found = load_head(world.run("per-class"), weights=world.weights).predict(
        [world.videos[0], broken, tmp_path / "absent.mp4", world.videos[1]]
    )
    assert ["error" in item for item in found] == [False, True, True, False]
    assert "broken.mp4" in found[1]["error"]
    assert [len(item["predictions"]) for item in found] == [3, 0, 0, 3]
    only = load_head(world.run("per-class"), weights=world.weights).predict(broken)
    assert only[0]["predictions"] == []


def test_moved_weights_are_asked_for_and_other_weights_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.run("text")
    assert load_head(run).predict(world.videos[0])  # found where the extraction had seen them
    monkeypatch.setenv("MSQ_CACHE", str(tmp_path / "another machine"))
    with pytest.raises(WeightsError, match="say where they are with --video-encoder"):
        load_head(run).predict(world.videos[0])
    moved = tmp_path / "elsewhere"
    shutil.copytree(world.folder / "video", moved)
    head = load_head(run, weights={**world.weights, "video": f"local-dir:{moved}"})
    assert len(head.predict(world.videos[0])[0]["predictions"]) == 3
    other = _fixtures["random_timesformer"](_fixtures["TINY_TIMESFORMER"], seed=9)
    _fixtures["write_timesformer_folder"](tmp_path / "other", other)
    head = load_head(run, weights={**world.weights, "video": f"local-dir:{tmp_path / 'other'}"})
    with pytest.raises(
        SpecMismatch, match=r"not the one the head was trained on:\n[^$]*  sha256: "
    ):
        head.predict(world.videos[0])


@pytest.mark.parametrize("classifier", ["shared", "per-class"])
def test_a_head_that_reads_no_words_scores_its_own_classes_in_any_order(
    world: World, classifier: str
) -> None:
    run = world.run(classifier, "vanilla")
    head = load_head(run, weights={"video": world.weights["video"]})
    whole = scores(head.predict(world.videos[0])[0])
    for labels in (CLASSES[::-1], CLASSES[1:2]):
        found = scores(head.predict(world.videos[0], labels)[0])
        if len(labels) == len(CLASSES):  # queries attend to each other: fewer score otherwise
            assert found == pytest.approx(whole, abs=1e-6)
        assert set(found) == set(labels)
    with pytest.raises(UsageError, match=r"'dog ran' is not among its 3 classes \(nearest: .*dog"):
        head.predict(world.videos[0], ["dog run", "dog ran"])


def test_the_command_refuses_words_of_a_head_that_reads_none(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world.run("shared", "vanilla")
    words = ["predict", str(world.videos[0]), "--run", str(run), "--labels", "purring,singing"]
    with pytest.raises(SystemExit) as left:
        main([*words, "--video-encoder", world.weights["video"], "--quiet"])
    assert left.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "'purring' is not among its 3 classes" in said
    assert "train the head with --queries text or multimodal, or with --classifier text" in said


def test_a_class_with_a_comma_is_asked_for_in_quotes(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", str(world.videos[0]), "--run", str(world.run("text")), "--quiet", "--json"]
    with pytest.raises(SystemExit) as left:
        main([*words, "--labels", '"dog run, walk",bird fly'])
    assert left.value.code in (0, None)
    (found,) = json.loads(capsys.readouterr().out)
    assert set(scores(found)) == {"dog run, walk", "bird fly"}


def test_evaluating_a_store_gives_the_runs_own_result(world: World) -> None:
    run = world.run("shared")
    found = evaluate_run(run, world.store)
    assert found["clips"] == 2
    assert found["coverage"] == "6 of 6 clips"
    assert (
        found["metrics"]
        == train_head(
            load_features(world.store), configuration.load(run / "config.toml"), run
        ).metrics
    )
