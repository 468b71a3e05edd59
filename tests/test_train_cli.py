"""`msq train` from the command line down to what the training begins with."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msq.cli import main
from msq.errors import SpecMismatch, UsageError
from msq.extract import encoders
from msq.extract.encoders import recorded
from msq.extract.store import open_store
from msq.extract.train_request import TrainRequest
from msq.head.end_to_end_config import EndToEndConfig, end_to_end_settings
from msq.head.train_material import load_material
from msq.report import end_to_end

_fixtures = runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py")))
SMALL = ("head.layers=1", "head.heads=2", "head.ffn=32", "train.batch=4", "clips.cache=off")
PLAIN = ("--device", "cpu", "--workers", 0)
SHORT = (*SMALL, *PLAIN, "--epochs", 1, "--json")
CLASSES = ("run", "jump", "sit")


def run(*arguments: Any) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def write_manifest(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    """A CSV of (path, labels, split)."""
    lines = ["path,labels,split", *(",".join(row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def world(media: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Twelve tiny clips, a manifest, small encoders, and a store that they made."""
    folder = tmp_path_factory.mktemp("train")
    rows = []
    for k in range(12):
        media.encode(folder / f"clip{k:02}.mp4", 10, size=(48, 32), gop=4, bframes=0, seed=k)
        labels = ";".join(CLASSES[i] for i in {k % 3, (k // 3) % 3})
        rows.append((f"clip{k:02}.mp4", labels, "test" if k >= 9 else "train"))
    (folder / "moved").mkdir()
    for path, _, _ in rows:
        shutil.copy(folder / path, folder / "moved" / path)
    manifest = write_manifest(folder / "clips.csv", rows)
    video, clip = folder / "video", folder / "clip"
    config = replace(_fixtures["TINY_TIMESFORMER"], image_size=(16, 16), width=32)
    _fixtures["write_timesformer_folder"](video, _fixtures["random_timesformer"](config))
    tower = {**_fixtures["TINY_CLIP"]["vision_cfg"], "image_size": 16, "layers": 1}
    _fixtures["write_clip_folder"](clip, {**_fixtures["TINY_CLIP"], "vision_cfg": tower})
    named = ("--video-encoder", f"local-dir:{video}", "--image-encoder", f"local-dir:{clip}")
    store = folder / "clips.zarr"
    made = ("--manifest", manifest, "--out", store, "--store-dtype", "float32", *PLAIN, "-q")
    assert run("extract", *made, *named) == 0
    return SimpleNamespace(
        folder=folder, rows=rows, manifest=manifest, video=f"local-dir:{video}",
        clip=f"local-dir:{clip}", named=named, store=store,
    )  # fmt: skip


def loaded(world: SimpleNamespace, out: Path, *assignments: str, **asked: Any) -> Any:
    """The material of a request."""
    given = {"what": str(world.manifest), "device": "cpu", "workers": 0, **asked}
    return load_material(TrainRequest(**given), end_to_end_settings(None, assignments), out)


def test_training_from_videos_alone_makes_the_towers_once_and_an_encoder_for_stage_one(
    world: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ("train", world.manifest, *SHORT, "--out", out, *world.named)
    assert run(*command) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    keys = {"run", "protocol", "metrics", "epochs", "seconds", "seconds_per_epoch", "encoder"}
    assert keys | {"unfrozen", "replaced", "failures", "input", "failed", "skipped"} <= set(result)
    assert (result["unfrozen"], result["replaced"], result["failures"]) == ("all", 0, [])
    assert "12 of 12 clips" in said.err
    towers = open_store(out / "towers.zarr")
    assert (towers.encoders("video"), len(towers.encoders("image"))) == ([], 1)

    again = shlex.split(result["extract"])
    again[again.index("--out") + 1] = str(tmp_path / "tuned.zarr")
    assert run(*again[1:], *PLAIN, "-q", "--store-dtype", "float32", "--json") == 0
    capsys.readouterr()
    assert run("eval", out, tmp_path / "tuned.zarr", "--device", "cpu", "--json") == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["metrics"] == pytest.approx(result["metrics"], abs=1e-6)

    status = [p for p in (out / "towers.zarr" / "status").rglob("*") if p.parent.name != "status"]
    files = {p: p.stat().st_mtime_ns for p in status if p.is_file()}
    assert run(*command) == 0  # finished, and found again
    assert json.loads(capsys.readouterr().out) == result
    assert {p: p.stat().st_mtime_ns for p in files} == files
    for path in files:  # a towers' store that was being made when the process was killed
        if path.name != "zarr.json":
            path.unlink()
    assert run(*command, "--overwrite") == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == result["metrics"]


def test_the_command_itself_trains_with_a_store_and_runs_no_tower(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ["train", world.manifest, "--store", world.store, *SMALL, *PLAIN, "--epochs", 2,
             "--unfreeze", "last:1", "--out", out]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "msq", *map(str, words)],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "MSQ_CACHE": os.environ["MSQ_CACHE"]},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mAP (macro, whole set)" in done.stdout
    assert "unfrozen: last:1" in done.stderr
    assert "training: 2/2 · loss " in done.stderr
    assert "% of it waiting for clips" in done.stderr
    assert f"encoder: {out / 'encoder'}" in done.stderr
    assert not (out / "towers.zarr").exists()
    assert (out / "encoder" / "model.safetensors").is_file()


def test_features_of_the_towers_are_those_of_the_store_and_the_encoder_is_its_own(
    world: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(world.store)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tower was loaded")

    for module in (encoders, recorded):
        monkeypatch.setattr(module, "load_clip", refuse)
    material = loaded(world, tmp_path / "run", store=world.store)
    f = material.features
    assert f.ids == store.clips == tuple(clip.id for clip in material.clips)
    assert f.splits == store.splits
    assert torch.equal(f.labels, store.labels())
    assert f.image is not None
    assert torch.equal(f.image, store.image())
    assert torch.equal(f.text, store.text())
    assert f.tokens.device.type == "meta"
    assert f.tokens.shape == store.tokens().shape
    assert material.video.spec == store.spec(store.encoders("video")[0])
    assert material.image is None
    assert not list(tmp_path.iterdir())


def test_the_encoder_to_begin_with_may_be_fed_otherwise_or_be_another_one(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    more = loaded(world, tmp_path, store=world.store, frames=6, pooling="patch")
    own = open_store(world.store).spec(open_store(world.store).encoders("video")[0])
    spec = more.video.spec
    assert (spec.sha256, spec.frames, spec.pooling) == (own.sha256, 6, "patch")
    assert (spec.mean, spec.size) == (own.mean, own.size)
    other = loaded(world, tmp_path, store=world.store, video_encoder="embedded")
    assert other.video.spec.weights == "embedded"
    assert other.features.tokens.shape[1:] == (other.video.spec.tokens, other.video.spec.channels)


def test_a_head_without_image_features_decodes_nothing_before_it_trains(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    rows = [*world.rows, ("gone.mp4", "sit", "train")]
    manifest = write_manifest(world.folder / "gone.csv", rows)
    asked = {"what": str(manifest), "image_encoder": world.clip, "video_encoder": world.video}
    text = loaded(world, tmp_path / "a", "head.queries=text", **asked)
    assert torch.equal(text.features.text, open_store(world.store).text())
    assert (text.features.image, text.features.prompt) == (None, "{}")
    assert text.features.left_out == {"failed": 1}
    assert [entry["clip"] for entry in text.failures] == ["gone"]
    vanilla = loaded(world, tmp_path / "a", "head.queries=vanilla", **asked)
    assert (vanilla.features.image, vanilla.features.text) == (None, None)
    worded = loaded(world, tmp_path / "a", "head.queries=vanilla", "head.classifier=text", **asked)
    assert worded.features.text is not None
    assert not list(tmp_path.iterdir())


def test_the_image_tower_comes_along_where_steps_run_it(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    shown = loaded(world, tmp_path, "clips.image=shown", store=world.store)
    assert shown.image is not None
    assert shown.image.spec.sha256 == open_store(world.store).spec("clip-clip", "image").sha256
    without = loaded(world, tmp_path, "clips.image=shown", "head.queries=text", store=world.store)
    assert without.image is None


def test_what_cannot_be_decoded_is_left_out_listed_and_makes_the_exit_code_3(
    world: SimpleNamespace, media: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(media("noise.mp4"), world.folder / "noise.mp4")
    rows = [*world.rows, ("noise.mp4", "sit", "train"), ("clip00.mp4", "sit", "holdout")]
    manifest = write_manifest(world.folder / "broken.csv", rows)
    command = ("train", manifest, *SHORT, *world.named, "--out", tmp_path / "run")
    assert run(*command) == 3
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert (result["failed"], result["skipped"]) == (1, 1)
    assert [entry["clip"] for entry in result["failures"]] == ["noise"]
    assert result["left_out"]["failed"] == 1
    assert result["clips"] == result["clips_by_split"]["test"] == 3
    assert "12 of 13 clips (1 failed)" in said.err
    assert re.match(r"training on cpu \(\d+ threads?\), fp32\n", said.err)
    assert "failed: noise: " in said.err
    assert "skipped: " in said.err
    # Without image features nobody has looked before: a step meets the clip, another stands in.
    command = (*command[:-1], tmp_path / "text", "--queries", "text", "--quiet")
    assert run(*command) == 3
    result = json.loads(capsys.readouterr().out)
    assert [entry["clip"] for entry in result["failures"]] == ["noise"]
    assert result["replaced"] > 0


def other_labels(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return [(rows[0][0], "sit", rows[0][2]), *rows[1:]]


def other_splits(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return [(*rows[0][:2], "val"), *rows[1:]]


def other_classes(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return [(rows[0][0], "swim", rows[0][2]), *rows[1:]]


def other_ids(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return [(f"moved/{path}", labels, split) for path, labels, split in rows]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_labels, "labels of 1 of 12 clips, such as 'clip00': expected run, found sit"),
        (other_splits, "split of 1 of 12 clips, such as 'clip00': expected train, found val"),
        (other_classes, "classes: expected 3, found 4; missing none, unknown 'swim'"),
        (
            other_ids,
            "no id in common, such as 'moved/clip00', 'moved/clip01', 'moved/clip02', …",
        ),
    ],
)
def test_a_store_of_other_clips_is_refused_with_the_difference(
    world: SimpleNamespace, tmp_path: Path, change: Any, said: str
) -> None:
    manifest = write_manifest(world.folder / "other.csv", change(world.rows))
    with pytest.raises(SpecMismatch) as error:
        loaded(world, tmp_path, what=str(manifest), store=world.store)
    assert said in str(error.value)
    assert str(world.store) in str(error.value)


def test_other_cuts_of_the_same_clips_are_refused(world: SimpleNamespace, tmp_path: Path) -> None:
    lines = world.manifest.read_text().splitlines()
    cut = [f"{lines[0]},id,start,end", *(f"{x},{x[:6]},," for x in lines[1:])]
    cut[1] = cut[1][:-2] + ",0.0,0.2"
    path = world.folder / "cut.csv"
    path.write_text("\n".join(cut) + "\n")
    with pytest.raises(SpecMismatch, match="start, end, frame rate"):
        loaded(world, tmp_path, what=str(path), store=world.store)


def test_clips_that_only_one_side_has_are_counted_and_said(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.copy(world.folder / "clip00.mp4", world.folder / "new.mp4")
    rows = [*world.rows[2:], ("new.mp4", "sit", "train")]
    manifest = write_manifest(world.folder / "part.csv", rows)
    material = loaded(world, tmp_path, what=str(manifest), store=world.store)
    assert len(material.clips) == 10
    assert material.features.coverage() == "10 of 11 clips (1 not in clips.zarr)"
    first, second = material.notes
    assert "1 of 11 clips of part have no row in" in first
    assert "2 clips of" in second
    assert torch.equal(material.features.image, open_store(world.store).image()[2:])


def test_towers_other_than_those_of_the_store_are_refused_with_the_difference(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    same = loaded(
        world, tmp_path, store=world.store, image_encoder=world.clip, text_encoder=world.clip,
        prompts=("{}",),
    )  # fmt: skip
    assert torch.equal(same.features.image, open_store(world.store).image())
    with pytest.raises(SpecMismatch, match=r"image-encoder embedded[\s\S]*sha256: expected "):
        loaded(world, tmp_path, store=world.store, image_encoder="embedded")
    with pytest.raises(SpecMismatch, match=r"text-encoder embedded[\s\S]*sha256: expected "):
        loaded(world, tmp_path, store=world.store, text_encoder="embedded")
    with pytest.raises(SpecMismatch, match=r"found 'a video of \{\}'"):
        loaded(world, tmp_path, store=world.store, prompts=("a video of {}",))


BAD: list[tuple[str, list[str], int, str]] = [
    ("no such manifest", ["nowhere.csv"], 2, "found no such file"),
    ("a name nearly right", ["charade"], 2, "did you mean the dataset charades"),
    ("a dataset without its root", ["charades"], 2, "needs --root DIR"),
    ("a manifest with a root", ["MANIFEST", "--root", "."], 2, "go with the name of a dataset"),
    ("a store for videos", ["STORE"], 2, "msq train-head"),
    ("an unknown key", ["MANIFEST", "backbone.lrr=1"], 2, "backbone.lr"),
    ("an unknown layer set", ["MANIFEST", "--unfreeze", "first:2"], 2, "backbone.unfreeze"),
    ("no such store", ["MANIFEST", "--store", "none.zarr"], 2, "no feature store here"),
    ("no video encoder", ["MANIFEST", "--video-encoder", "none"], 2, "msq train trains it"),
    ("no words", ["MANIFEST", "--text-encoder", "none"], 2, "needs an image and a text encoder"),
    ("no such partition", ["MANIFEST", "--partition", "split2"], 2, "no partition 'split2'"),
    ("no training clips", ["TESTS"], 2, "expected clips of split train, found 3 test"),
    ("no files", ["ABSENT"], 1, "expected videos or frame folders"),
    ("not trainable", ["MANIFEST", "--video-encoder", "CLIP"], 2, "a TimeSformer or a VideoMAE"),
    ("two prompts", ["MANIFEST", "--prompts", "a {}", "--prompts", "b {}"], 2, "features.prompt"),
    ("no run to begin with", ["MANIFEST", "--init-head", "nowhere"], 2, "is the run finished"),
]


@pytest.mark.parametrize(("words", "code", "said"), [case[1:] for case in BAD],
                         ids=[case[0] for case in BAD])  # fmt: skip
def test_bad_input_ends_with_a_message_that_says_what_to_do(
    world: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    words: list[str], code: int, said: str,
) -> None:  # fmt: skip
    tests = write_manifest(world.folder / "tests.csv", world.rows[9:])
    gone = [(f"gone{path}", labels, split) for path, labels, split in world.rows]
    absent = write_manifest(world.folder / "absent.csv", gone)
    places = {"MANIFEST": world.manifest, "STORE": world.store, "TESTS": tests, "ABSENT": absent}
    places["CLIP"] = f"open_clip/{world.clip}"
    given = [str(places.get(word, word)) for word in words]
    assert run("train", *given, *PLAIN, "--out", tmp_path / "run") == code
    found = capsys.readouterr().err
    assert said in found
    assert "Traceback" not in found


def test_a_run_takes_over_the_head_that_it_starts_from(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    head = tmp_path / "head"
    small = ("head.layers=2", "head.heads=2", "head.ffn=48", "head.classifier=shared")
    assert run("train-head", world.store, "--out", head, *small, "--epochs", 1, "-q") == 0

    def settings(*overrides: str, **options: Any) -> EndToEndConfig:
        given = {f"head.{key}": value for key, value in options.items()}
        return end_to_end.settings(None, overrides, given, head)

    taken = settings("head.dropout=0.0", "head.layers=2").run.head
    assert (taken.layers, taken.heads, taken.ffn, taken.classifier) == (2, 2, 48, "shared")
    assert (taken.dropout, taken.width) == (0.0, 16)
    assert settings().run.head.dropout == 0.1
    with pytest.raises(UsageError, match=r"head\.layers = 2, which its head has, found 3"):
        settings("head.layers=3")
    with pytest.raises(UsageError, match=r"head\.queries = multimodal, which its head has"):
        settings(queries="text")
    with pytest.raises(UsageError, match=r"train\.protocol = paper, which its head has"):
        settings("train.protocol=official")
    file = tmp_path / "run.toml"
    file.write_text('[head]\nclassifier = "text"\n')
    with pytest.raises(UsageError, match=r"head\.classifier = shared"):
        end_to_end.settings(file, (), {}, head)


def test_notes_go_out_as_lines_and_an_epoch_says_what_the_input_took(
    capsys: pytest.CaptureFixture[str],
) -> None:
    event = {"event": "epoch", "epoch": 2, "epochs": 4, "loss": 0.5, "val_map": 0.25,
             "seconds": 6.0, "waited_share": 0.3}  # fmt: skip
    with end_to_end._Line("training", quiet=False) as line:
        line.training({"event": "note", "text": "one step takes 3 GB"})
        line.training(event)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "one step takes 3 GB"
    assert said[1].startswith("training: 2/4 · loss 0.5000, val mAP 25.00")
    assert "3.0 s an epoch, 30% of it waiting for clips" in said[1]
    with end_to_end._Line("training", quiet=True) as line:
        line.training({"event": "note", "text": "one step takes 3 GB"})
        line.training(event)
    assert capsys.readouterr().err == ""


def test_a_stray_file_in_the_run_directory_is_still_refused(
    world: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert run("train", world.manifest, "--store", world.store, *SHORT, "--out", out) == 2
    assert "expected an empty or new folder" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == "mine"
