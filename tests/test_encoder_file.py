"""An encoder that a run trained: written, named on the command line, moved, damaged."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msq
from msq.cli import main
from msq.errors import MsqError, UsageError, WeightsError
from msq.extract.encoders import VideoEncoder, load_video_encoder
from msq.extract.encoders.pooling import TokenOrder
from msq.extract.encoders.timesformer import TimeSformer
from msq.extract.request import ExtractRequest
from msq.extract.request_text import anchored
from msq.extract.store import open_store
from msq.extract.transforms import normalise, resize_crop
from msq.extract.video import decode_samples
from msq.head import encoder_file
from msq.head.encoder_file import recorded_spec, require_trainable, save_encoder
from msq.head.predict import load_head

_HERE = Path(__file__)
encoders = SimpleNamespace(**runpy.run_path(str(_HERE.with_name("encoder_fixtures.py"))))
media = SimpleNamespace(**runpy.run_path(str(_HERE.with_name("media.py"))))
NOTE = {"unfreeze": "all", "protocol": "paper"}
CLIPS = 6


def run(*arguments: Any) -> Any:
    """Exit code of one command."""
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    return left.value.code


def tuned(start: VideoEncoder, seed: int) -> TimeSformer:
    """The model after some training: other weights."""
    model = TimeSformer(start.model.config)
    model.load_state_dict(start.model.state_dict())
    encoders.randomise(model, seed, std=0.05)
    return model.eval()


@dataclass
class World:
    """Videos, an encoder before training, and what a run made of it."""

    folder: Path
    start: VideoEncoder
    model: TimeSformer  # trained, as it was in memory

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "Fine Tuned"

    @property
    def store(self) -> Path:
        return self.folder / "s.zarr"

    def extract(self, encoder: Any, *more: Any, store: Path | None = None) -> Any:
        return run("extract", "--manifest", self.folder / "clips.csv", "--out",
                   store or self.store, "--video-encoder", encoder, "--workers", 0, "--batch",
                   CLIPS, "--store-dtype", "float32", "-q", *more)  # fmt: skip

    def video(self) -> Tensor:
        """All clips as the encoder is shown them [B, T, 3, h, w]."""
        spec = self.start.spec
        shown = []
        for row in range(CLIPS):
            (clip,) = decode_samples(self.folder / f"{row}.mp4", [(spec.frames, spec.sampling)])
            frames = resize_crop(clip.frames, spec.size, spec.resize)
            shown.append(normalise(frames, spec.mean, spec.std))
        return torch.stack(shown)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A store with the features of the run's encoder, and those of the one before training."""
    folder = tmp_path_factory.mktemp("tuned")
    lines = ["path,labels,split"]
    for row in range(CLIPS):
        media.encode(folder / f"{row}.mp4", 12 + row, seed=row)
        label = ("dog run", "bird fly", "open door")[row % 3]
        lines.append(f"{row}.mp4,{label},{'test' if row > 3 else 'train'}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    encoders.write_timesformer_folder(
        folder / "start", encoders.random_timesformer(encoders.TINY_TIMESFORMER)
    )
    start = load_video_encoder("auto", f"local-dir:{folder / 'start'}")
    made = World(folder, start, tuned(start, 1))
    save_encoder(made.run / "encoder", made.model, start.spec, NOTE)
    assert made.extract(folder / "start") == 0
    assert made.extract(made.run) == 0
    return made


@pytest.fixture(scope="module")
def head_run(world: World) -> Path:
    """A head trained on the stored features of the run's encoder; it has no encoder itself."""
    out = world.folder / "runs" / "head"
    assert run("train-head", world.store, "--out", out, "--epochs", 1, "--classifier", "text", "-q",
               "head.layers=1", "head.heads=4", "head.ffn=16", "train.val=0",
               "features.video=timesformer-fine-tuned") == 0  # fmt: skip
    return out


@pytest.fixture
def whole_run(world: World, head_run: Path, tmp_path: Path) -> Path:
    """A run directory as end-to-end training leaves it: head and encoder, under another name."""
    out = tmp_path / "moved and renamed"
    shutil.copytree(head_run, out)
    shutil.copytree(world.run / "encoder", out / "encoder")
    return out


def test_memory_file_and_store_hold_the_same_tokens(world: World) -> None:
    spec = recorded_spec(world.run, world.start.spec)
    in_memory = VideoEncoder(world.model, spec, TokenOrder(spec.frames))
    loaded = load_video_encoder("auto", weights=str(world.run))
    video = world.video()
    assert torch.equal(in_memory(video), loaded(video))
    store = open_store(world.store)
    assert torch.equal(store.tokens(range(CLIPS), spec.slug), in_memory(video))
    assert store.spec(spec.slug, "video") == spec == loaded.spec
    before = store.tokens(range(CLIPS), world.start.spec.slug)
    assert torch.equal(before, world.start(video))
    assert not torch.allclose(before, in_memory(video), atol=1e-2)
    assert spec.fingerprint("d") != world.start.spec.fingerprint("d")


def test_every_way_to_name_a_run_is_the_same_encoder_wherever_it_lies(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = recorded_spec(world.run, world.start.spec)
    assert (spec.slug, spec.weights) == ("timesformer-fine-tuned", "run:Fine Tuned")
    assert str(world.folder) not in (world.run / "encoder" / "config.json").read_text()
    monkeypatch.chdir(world.run.parent)
    moved = shutil.copytree(world.run, tmp_path / "elsewhere" / "renamed")
    alone = shutil.copytree(world.run / "encoder", tmp_path / "mine")
    for name in ("Fine Tuned", "local-dir:Fine Tuned", "Fine Tuned/encoder",
                 "Fine Tuned/encoder/model.safetensors", str(moved), str(alone)):  # fmt: skip
        assert msq.load_video_encoder("auto", weights=name).spec == spec, name
    assert msq.load_video_encoder("timesformer", "Fine Tuned").spec == spec
    monkeypatch.chdir(world.run / "encoder")
    assert msq.load_video_encoder("auto", ".").spec == spec


def test_the_recorded_spec_is_that_of_loading_with_the_same_options(world: World) -> None:
    options: dict[str, Any] = {
        "pooling": "band", "precision": "bf16", "sampling": "official", "resize": "pil",
        "short_side": 40, "mean": (0.4, 0.5, 0.6),
    }  # fmt: skip
    start = load_video_encoder("auto", f"local-dir:{world.folder / 'start'}", **options)
    loaded = load_video_encoder("auto", str(world.run), **options)
    assert recorded_spec(world.run, start.spec) == loaded.spec
    assert loaded.spec.slug == "timesformer-fine-tuned-band"
    # T and size are the run's own, also where the weights it began with were made for others.
    wide = load_video_encoder("auto", f"local-dir:{world.folder / 'start'}", frames=6, size=48)
    out = world.folder / "runs" / "wide"
    save_encoder(out / "encoder", wide.model, wide.spec, NOTE)
    again = load_video_encoder("auto", str(out))
    assert (again.spec.frames, again.spec.size, again.spec.resized) == (6, 48, "")
    assert recorded_spec(out, wide.spec) == again.spec
    with pytest.raises(UsageError, match="expected an encoder of 4 frames of 32x32"):
        recorded_spec(out, world.start.spec)
    asked = load_video_encoder("auto", str(world.run), frames=8, size=64)
    assert asked.spec.resized == "time 4->8 nearest, space 4x4->8x8 nearest"


def test_the_same_weights_are_the_same_bytes_and_an_average_takes_their_place(
    world: World, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        save_encoder(
            tmp_path / name / "Fine Tuned" / "encoder", world.model, world.start.spec, NOTE
        )
    for name in ("config.json", "model.safetensors"):
        one, two = (tmp_path / x / "Fine Tuned" / "encoder" / name for x in "ab")
        assert one.read_bytes() == two.read_bytes() == (world.run / "encoder" / name).read_bytes()
    document = json.loads((world.run / "encoder" / "config.json").read_text())
    begun = document["made_by"].pop("started_from")
    assert begun["sha256"] == world.start.spec.sha256
    assert document["made_by"] == NOTE
    assert document["trained_on"]["pooling"] == "frame"
    average = {k: v * 0.5 for k, v in world.model.state_dict().items()}
    out = tmp_path / "a" / "Fine Tuned"
    save_encoder(out / "encoder", world.model, world.start.spec, NOTE, average)
    found = load_video_encoder("auto", str(out)).model.state_dict()
    assert all(torch.equal(found[k], v) for k, v in average.items())
    assert [p.name for p in sorted((out / "encoder").iterdir())] == [
        "config.json", "model.safetensors"
    ]  # fmt: skip
    average.pop("norm.bias")
    with pytest.raises(UsageError, match=r"1 missing or unknown, such as 'norm\.bias'"):
        save_encoder(out / "encoder", world.model, world.start.spec, NOTE, average)


def test_another_run_of_the_same_name_does_not_fit_into_the_store(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(world.store)
    assert set(store.encoders("video")) == {"timesformer-start", "timesformer-fine-tuned"}
    other = tmp_path / "Fine Tuned"
    save_encoder(other / "encoder", tuned(world.start, 2), world.start.spec, NOTE)
    capsys.readouterr()
    assert world.extract(other) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "timesformer-fine-tuned was made in another way" in error
    one, two = (recorded_spec(r, world.start.spec).sha256 for r in (world.run, other))
    assert f"sha256: expected {two}, found {one}" in error
    assert world.extract(world.run) == 0  # the same request finds what is there


def test_workers_elsewhere_and_a_dry_run_find_the_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.run.parent)
    for name in ("Fine Tuned", "local-dir:Fine Tuned"):
        request = ExtractRequest(manifest=world.folder / "clips.csv", video_encoder=name)
        found = anchored(request).video_encoder
        assert Path(found.removeprefix("local-dir:")) == world.run
    assert world.extract("Fine Tuned", "--dry-run", store=tmp_path / "new.zarr") == 0
    assert not (tmp_path / "new.zarr").exists()


def test_prediction_finds_the_encoder_in_the_run_alone(
    world: World, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("MSQ_CACHE", str(tmp_path / "another machine"))
    head = load_head(whole_run)
    spec = recorded_spec(whole_run, world.start.spec)
    assert head.meta["encoders"]["video"] == json.loads(json.dumps(spec.to_dict()))
    store = open_store(world.store)
    rows = head.predict(range(CLIPS), store=store)
    videos = head.predict([world.folder / f"{row}.mp4" for row in range(CLIPS)])
    for one, two in zip(videos, rows, strict=True):
        scores = [{p["label"]: p["score"] for p in item["predictions"]} for item in (one, two)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert run("predict", world.folder / "0.mp4", "--run", whole_run, "--labels", "dog run,x",
               "--json") == 0  # fmt: skip
    assert len(json.loads(capsys.readouterr().out)[0]["predictions"]) == 2
    assert run("eval", whole_run, world.store, "--json") == 0
    # Another encoder in its place is found out, as is a damaged one.
    save_encoder(whole_run / "encoder", tuned(world.start, 2), world.start.spec, NOTE)
    with pytest.raises(MsqError, match=r"not the one the head was trained on:\n[^$]*  sha256: "):
        load_head(whole_run).predict(world.folder / "0.mp4")
    (whole_run / "encoder" / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"video encoder cannot be loaded: .* no config\.json"):
        load_head(whole_run).predict(world.folder / "0.mp4")


def test_a_head_on_the_stored_features_asks_for_the_run_that_moved(
    world: World, head_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = world.folder / "0.mp4"
    assert load_head(head_run).predict(video)  # found where the extraction saw it
    monkeypatch.setenv("MSQ_CACHE", str(tmp_path / "another machine"))
    with pytest.raises(WeightsError, match=r"run:Fine Tuned: .* say where they are with --video-e"):
        load_head(head_run).predict(video)
    assert load_head(head_run, weights={"video": str(world.run)}).predict(video)


def test_a_run_that_trained_a_head_only_is_no_encoder(
    world: World, head_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert world.extract(head_run) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "this run trained a head only" in error
    assert "timesformer-fine-tuned (run:Fine Tuned)" in error


def _flip(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def _entry(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**document, name: value}))

    return change


def _unfinished(folder: Path) -> None:
    shutil.rmtree(folder)
    (folder.parent / "config.toml").write_text('[head]\nlayers = 1\n[backbone]\nunfreeze = "all"\n')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "found no model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "found no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "expected a JSON object"),
        (_flip, "expected SHA-256 .* found .*: damaged, or from another run"),
        (_entry("format", 2), "expected format 1, found 2; update msq"),
        (_entry("run", ""), "expected the entries run and sha256"),
        (_entry("architecture", {"depth": 3}), "config.json|another shape|not weights"),
        (_unfinished, "the run is not finished; msq train goes on with it"),
    ],
)
def test_files_that_are_damaged_or_missing_are_named(
    world: World, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(world.run, out)
    (out / "config.toml").write_text("[head]\nlayers = 1\n")
    assert load_video_encoder("auto", str(out)).spec.frames == 4
    damage(out / "encoder")
    with pytest.raises(WeightsError, match=words) as error:
        load_video_encoder("auto", str(out))
    # What is wrong is told with its place, but for the tensors of another architecture.
    assert str(out) in str(error.value) or "run:Fine Tuned" in str(error.value)


def test_what_a_killed_writer_leaves_is_refused_and_made_whole_later(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run" / "encoder"
    folder.parent.mkdir()
    (folder.parent / "config.toml").write_text('[backbone]\nunfreeze = "all"\n')

    def killed(path: Path, content: bytes) -> None:
        path.with_name(f".{path.name}.123").write_bytes(content[:9])
        raise KeyboardInterrupt

    for _ in ("nothing there before", "another encoder there before"):
        monkeypatch.setattr(encoder_file, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            save_encoder(folder, world.model, world.start.spec, NOTE)
        monkeypatch.undo()
        with pytest.raises(WeightsError, match=r"no config\.json|expected SHA-256"):
            load_video_encoder("auto", str(folder))
        save_encoder(folder, tuned(world.start, 3), world.start.spec, NOTE)
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
        load_video_encoder("auto", str(folder.parent))


def test_a_videomae_is_written_too_and_other_families_are_refused(
    world: World, tmp_path: Path
) -> None:
    config = replace(encoders.TINY_VIDEOMAE, final_norm=True)
    model = encoders.write_videomae_folder(tmp_path / "start", config)
    start = load_video_encoder("auto", f"local-dir:{tmp_path / 'start'}", mean=(0.4, 0.5, 0.6))
    require_trainable(start)
    require_trainable(world.start)
    encoders.randomise(start.model, 7)
    out = tmp_path / "joint"
    save_encoder(out / "encoder", start.model, start.spec, NOTE)
    loaded = load_video_encoder("auto", str(out))
    assert loaded.spec == recorded_spec(out, start.spec)
    assert (loaded.spec.slug, loaded.spec.mean) == ("videomae-joint", (0.4, 0.5, 0.6))
    video = torch.randn(2, 4, 3, 32, 32)
    assert torch.equal(loaded(video), start(video))
    assert not torch.equal(model(video), loaded.model(video))
    other = VideoEncoder(nn.Linear(2, 2), replace(start.spec, architecture="timm vit"))
    for call in (lambda: require_trainable(other),
                 lambda: save_encoder(out / "encoder", other.model, other.spec, NOTE)):  # fmt: skip
        with pytest.raises(UsageError, match=r"timm vit.*expected a TimeSformer or a VideoMAE"):
            call()
