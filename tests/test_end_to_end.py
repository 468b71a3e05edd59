"""End-to-end training beside extraction and the head's own training."""

from __future__ import annotations

import copy
import dataclasses
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from msq.errors import MsqError, SpecMismatch, UsageError, VideoError
from msq.extract.decode_task import DecodeTask, Picture, decode
from msq.extract.shard_builder import encode
from msq.extract.views import parse_clips_by_crops
from msq.head import end_to_end as run_module
from msq.head.backbone import Backbone, depth_of, learning_names
from msq.head.end_to_end import train_end_to_end
from msq.head.end_to_end_clips import RunClips
from msq.head.end_to_end_config import BackboneConfig
from msq.head.end_to_end_training import EndToEndTraining
from msq.head.packed_choice import choose_step
from msq.head.train import train_head
from msq.head.training import Training

_made = runpy.run_path(str(Path(__file__).with_name("end_to_end_material.py")))
settings, encoder, dataset = _made["settings"], _made["encoder"], _made["dataset"]
features_of, material, SHAPE = _made["features_of"], _made["material"], _made["SHAPE"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Data, features and encoder, in float32."""
    folder = tmp_path_factory.mktemp("end_to_end")
    data, video = dataset(folder / "clips"), encoder()
    return data, features_of(data, folder / "a.zarr", video), video, folder


def training(world: Any, *assignments: str, start: Path | None = None) -> EndToEndTraining:
    data, features, video, _ = world
    config, given = settings(*assignments), material(data, features, video)
    clips = RunClips(given, config, 0)
    return EndToEndTraining(given, config, choose_step(config.run.train, CPU), clips, start)


def losses(run: Training, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        run._step()
        found.append(float(run.taking.loss))
    return found


@pytest.mark.parametrize("protocol", ["paper"])
def test_a_frozen_encoder_gives_the_losses_of_the_cached_head(world: Any, protocol: str) -> None:
    """20 steps, dropout on, the same order and batches; float32 features in the store."""
    frozen = training(world, "backbone.unfreeze=none", "train.epochs=10")
    cached = Training(world[1], frozen.config, frozen.choice)
    assert cached.steps >= 20
    expected, found = losses(cached, 20), losses(frozen, 20)
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected[0] != pytest.approx(expected[-1], rel=1e-3), "nothing was learned"


def test_with_a_float16_store_the_first_logits_agree(world: Any, tmp_path: Path) -> None:
    data, _, video, _folder = world
    features = features_of(data, tmp_path / "half.zarr", video, "float16")
    frozen = training(world, "backbone.unfreeze=none")
    cached = Training(features, frozen.config, frozen.choice)
    batch, part = cached.feed.of(0), next(frozen.feed.of(0))
    assert part.rows.tolist() == batch.rows.tolist()
    expected = cached._logits(batch.tokens, batch.image)
    found = frozen._logits(frozen.backbone.tokens(part.frames), part.image)
    assert not torch.equal(found, expected)  # the store has rounded
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_validation_and_test_are_those_of_the_cached_head(world: Any, tmp_path: Path) -> None:
    data, features, video, _ = world
    config = settings("backbone.unfreeze=none")
    expected = train_head(features, config.run).result
    given = material(data, features, video)
    result = train_end_to_end(given, config, tmp_path / "run", workers=0)
    for key in ("map", "map_micro"):
        assert result.metrics[key] == pytest.approx(expected["metrics"][key], abs=1e-6)
    history = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(history) == 3
    assert all("val_map" in line for line in history)


KINDS: dict[str, Callable[[str], bool]] = {
    "none": lambda name: False,
    "norms": lambda name: "norm" in name,
    "temporal": lambda name: name == "time_embed" or "temporal" in name,
    "last:1": lambda name: name.startswith(("blocks.1.", "norm.")),
    "last:2": lambda name: name.startswith(("blocks.", "norm.")),
    "all": lambda name: True,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_unfrozen_moves_and_nothing_else(world: Any, kind: str) -> None:
    run = training(world, f"backbone.unfreeze={kind}", "backbone.weight_decay=0")
    before = copy.deepcopy(run.backbone.encoder.model.state_dict())
    losses(run, 2)
    after = run.backbone.encoder.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if KINDS[kind](name)}


def test_rates_fall_with_the_depth(world: Any) -> None:
    run = training(world, "backbone.layer_decay=0.5", "backbone.lr=1e-3", "optim.warmup=0",
                   "optim.schedule=constant")  # fmt: skip
    run.taking.plan(0)
    model, tuning = run.backbone.encoder.model, run.taking.tuning
    assert tuning is not None
    rates = {id(p): group["lr"] for group in tuning.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in tuning.param_groups
              for p in group["params"]}  # fmt: skip
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        depth = {"blocks.0": 1, "blocks.1": 2, "norm.we": 3, "norm.bi": 3}.get(name[:8], 0)
        depth = 3 if name.startswith("norm.") else depth
        assert depth_of(model, name) == depth
        assert rates[id(parameter)] == pytest.approx(1e-3 * 0.5 ** (3 - depth)), name
        assert (decays[id(parameter)] > 0) == (parameter.ndim >= 2), name
    run.taking.plan(5)
    assert tuning.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**3)


def test_parts_of_a_batch_are_the_batch(world: Any) -> None:
    """Without dropout; one step's gradients, float64, with labels that are not all known."""
    data, features, video, folder = world
    known = torch.ones_like(features.labels)
    known[::2, 0] = 0
    partly = (data, dataclasses.replace(features, known=known), video, folder)
    found = []
    for accumulate in (1, 2, 3):
        run = training(partly, "head.dropout=0", f"backbone.accumulate={accumulate}",
                       "optim.clip_grad=0", "optim.lr=0", "backbone.lr=0",
                       "backbone.weight_decay=0", "optim.weight_decay=0")  # fmt: skip
        losses(run, 1)
        grads = {n: p.grad.clone() for n, p in run.backbone.learning.items() if p.grad is not None}
        found.append((float(run.taking.loss), {**grads, "head": run.flat.grad.clone()}))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        for name, expected in found[0][1].items():
            scale = float(expected.abs().max()) or 1.0
            assert float((grads[name] - expected).abs().max()) <= 2e-5 * scale, name


def test_a_run_that_was_interrupted_ends_with_the_same_bits(world: Any, tmp_path: Path) -> None:
    data, features, video, _ = world
    config = settings("clips.augment=consistent")
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"

    def go_on(out: Path, **options: Any) -> Any:
        given = material(data, features, video)
        return train_end_to_end(given, config, out, workers=0, **options)

    go_on(whole)
    for steps in (1, 3, 2):  # in the middle of an epoch, and at its end
        assert not go_on(parts, stop_after=steps).finished
    assert go_on(parts).finished
    for name in ("head.safetensors", "encoder/model.safetensors", "predictions.npz"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    again = go_on(parts)
    assert again.finished
    assert again.result["metrics"] == go_on(whole).result["metrics"]


def test_averaged_weights_of_the_encoder_are_kept(world: Any) -> None:
    run = training(world, "train.ema=0.9", "train.select=last")
    losses(run, 6)
    raw = [p.detach().clone() for p in run.backbone.learning.values()]
    assert run.average is not None
    average = [a.clone() for a in run.average.average[1:]]  # the head's are the first
    run.use_chosen_weights()
    for before, wanted, now in zip(raw, average, run.backbone.learning.values(), strict=True):
        assert torch.equal(now, wanted)
        assert not torch.equal(now, before)


def test_the_head_of_a_cached_run_is_gone_on_with(world: Any, tmp_path: Path) -> None:
    data, features, _video, _ = world
    train_head(features, settings().run, tmp_path / "cached")
    run = training(world, start=tmp_path / "cached")
    stored = safetensors.torch.load_file(tmp_path / "cached" / "head.safetensors")
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, stored[name]), name
    with pytest.raises(UsageError, match=r"layers\.1\..*head\.\* settings"):
        training(world, "head.layers=2", start=tmp_path / "cached")
    other = (data, features_of(data, tmp_path / "b.zarr", encoder(5, dataclasses.replace(
        SHAPE, depth=1))), encoder(5, dataclasses.replace(SHAPE, depth=1)), tmp_path)  # fmt: skip
    with pytest.raises(SpecMismatch, match="architecture: expected 'random w16 d2'"):
        training(other, start=tmp_path / "cached")


def test_another_configuration_is_refused(world: Any, tmp_path: Path) -> None:
    data, features, video, _ = world
    given = material(data, features, video)
    assert not train_end_to_end(given, settings(), tmp_path, workers=0, stop_after=1).finished
    for change, message in {
        "backbone.lr=2e-3": r"backbone\.lr: expected 0\.001, found 0\.002",
        "clips.augment=consistent": r"clips\.augment: expected 'none', found 'consistent'",
        "train.seed=1": r"train\.seed: expected 0, found 1",
    }.items():
        with pytest.raises(SpecMismatch, match=message):
            train_end_to_end(material(data, features, video), settings(change), tmp_path, workers=0)
    file = tmp_path / "none"
    train_head(features, settings().run, file)
    with pytest.raises(SpecMismatch, match=r"backbone"):
        train_end_to_end(material(data, features, video), settings(), file, workers=0)


def test_a_clip_that_breaks_is_replaced_counted_and_named(tmp_path: Path) -> None:
    """It was whole when stage one saw it."""
    data, video = dataset(tmp_path / "clips"), encoder()
    features = features_of(data, tmp_path / "a.zarr", video)
    broken = next(clip for clip in data.clips if clip.split == "train")
    broken.path.write_bytes(b"no video any more" * 50)
    given = material(data, features, video)
    config = settings("train.epochs=2")
    found = []
    for out, stops in (("a", ()), ("b", (2, 1))):
        for steps in stops:
            train_end_to_end(
                material(data, features, video), config, tmp_path / out, workers=0, stop_after=steps
            )
        given = material(data, features, video)
        found.append(train_end_to_end(given, config, tmp_path / out, workers=0).result)
    for result in found:
        assert result["replaced"] == 2  # once in each epoch
        assert [item["clip"] for item in result["failures"]] == [broken.id]
        assert str(tmp_path) not in json.dumps(result["failures"])
    assert found[0]["metrics"] == found[1]["metrics"]


def test_a_run_goes_on_with_its_threads_and_not_without_the_gpu_that_it_needs(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, features, video, _ = world
    taken, before = [], torch.get_num_threads()
    step = EndToEndTraining._step

    def noted(self: EndToEndTraining) -> None:
        taken.append(torch.get_num_threads())
        step(self)

    monkeypatch.setattr(EndToEndTraining, "_step", noted)
    given = material(data, features, copy.deepcopy(video))
    try:
        torch.set_num_threads(2)
        train_end_to_end(given, settings(), tmp_path, workers=0, stop_after=1)
        torch.set_num_threads(1)
        train_end_to_end(given, settings(), tmp_path, workers=0, stop_after=1)
        assert taken == [2, 2]
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    line = "2 threads, as the run began, in place of the 1 of this process"
    assert line in (tmp_path / "log.txt").read_text(encoding="utf-8")
    file = tmp_path / "config.toml"
    text = file.read_text(encoding="utf-8")
    assert text.count('device = "cpu"') == text.count('kernels = ""') == 1
    text = text.replace('device = "cpu"', 'device = "cuda"')
    file.write_text(text.replace('kernels = ""', 'kernels = "relu_drop"'), encoding="utf-8")
    with pytest.raises(UsageError, match=r"Triton kernels \(data.step.kernels = relu_drop\)"):
        train_end_to_end(given, settings(), tmp_path, workers=0)


def test_clips_to_score_that_cannot_be_decoded(tmp_path: Path) -> None:
    """Where no tower has decoded them before: left out and counted, before the first step."""
    video = encoder()
    data = dataset(tmp_path / "clips", broken=(2,))  # of the validation clips
    good = features_of(data, tmp_path / "a.zarr", video)
    assert len(good.ids) == 17
    rows = [0, 1, 2, *range(2, 17)]
    ids = tuple(clip.id for clip in data.clips)
    features = dataclasses.replace(
        good, ids=ids, splits=tuple(clip.split for clip in data.clips), image=None,
        tokens=good.tokens[rows], labels=good.labels[rows], left_out={},
    )  # fmt: skip
    config = settings("head.queries=text", "train.epochs=1")
    result = train_end_to_end(material(data, features, video), config, workers=0).result
    assert result["clips_by_split"]["val"] == 2
    assert result["left_out"] == {"not decodable": 1}
    assert [item["clip"] for item in result["failures"]] == [data.clips[2].id]


def test_scoring_a_clip_that_vanishes_says_so(world: Any, tmp_path: Path) -> None:
    _, features, video, _ = world
    data = dataset(tmp_path / "clips")
    data.clips[2].path.unlink()
    with pytest.raises(VideoError, match=r"clip-2-é: cannot be decoded any more"):
        train_end_to_end(material(data, features, video), settings(), tmp_path / "run", workers=0)


def test_several_views_of_the_test_clips(world: Any) -> None:
    data, features, video, _ = world
    config = settings("clips.test_views=2x3", "train.epochs=1", "backbone.unfreeze=none")
    result = train_end_to_end(material(data, features, video), config, workers=0).result
    assert result["test_views"]["views"] == "2x3"
    assert 0 <= result["test_views"]["metrics"]["map"] <= 1
    run, rows = training(world), features.rows("test")
    seen = [run.scored_in(view, rows) for view in parse_clips_by_crops("2x3")]
    view = parse_clips_by_crops("2x3")[4]
    clips = [clip for clip in data.clips if clip.split == "test"]
    picture = Picture.of(video.spec, view)
    frames = [decode(DecodeTask(0, c.path, None, None, (picture,), id=c.id)).frames for c in clips]
    tokens = encode(run.backbone.encoder, [found[0] for found in frames])
    image = features.image[rows]
    torch.testing.assert_close(seen[4], run.model.eval()(tokens, image)["logits"])
    assert len({tuple(logits.flatten().tolist()) for logits in seen}) == 6


def test_the_image_tower_runs_on_what_is_shown(world: Any) -> None:
    data, features, video, _ = world
    made = {}
    for image in ("clean", "shown"):
        config = settings("clips.augment=consistent", f"clips.image={image}")
        given = material(data, features, video, image=image == "shown")
        run = EndToEndTraining(
            given, config, choose_step(config.run.train, CPU), RunClips(given, config, 0)
        )
        made[image] = next(run.feed.of(0))
    clean, shown = made["clean"], made["shown"]
    assert torch.equal(clean.frames, shown.frames)
    assert torch.equal(clean.image, features.image[clean.rows])
    assert shown.image.shape == clean.image.shape
    assert not torch.equal(shown.image, clean.image)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    world: Any, tmp_path: Path
) -> None:
    data, features, video, _ = world
    config = settings("optim.clip_grad=0", "backbone.lr=1e30", "optim.warmup=0")
    with pytest.raises(MsqError, match=r"not finite in epoch 1.*lower backbone\.lr.*clip-"):
        train_end_to_end(material(data, features, video), config, tmp_path, workers=0)


def test_a_graph_of_the_step_is_refused() -> None:
    with pytest.raises(UsageError, match=r"train\.graph = on: end-to-end"):
        settings("train.graph=on")


def test_names_that_no_model_has() -> None:
    model = encoder().model
    with pytest.raises(UsageError, match=r"last:3: expected at most last:2"):
        learning_names(model, "last:3")
    with pytest.raises(UsageError, match=r"expected none, norms, temporal, last:N or all"):
        BackboneConfig(unfreeze="last:0")
    plain = copy.deepcopy(encoder())
    plain.model = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match="attention over time, found Linear"):
        Backbone(plain, BackboneConfig(unfreeze="temporal"), "fp32")


def test_memory_that_runs_out_names_the_knob(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, features, video, _ = world

    def short(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(run_module.EndToEndTraining, "_step", short)
    with pytest.raises(MsqError, match=r"backbone\.accumulate|train\.batch"):
        train_end_to_end(material(data, features, video), settings(), tmp_path, workers=0)


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_same_losses(world: Any) -> None:
    plain, compiled = (training(world, f"backbone.compile={x}") for x in ("off", "on"))
    assert compiled.backbone.module is not compiled.backbone.encoder.model
    assert losses(compiled, 3) == pytest.approx(losses(plain, 3), rel=1e-5)
    saved, wanted = (run.backbone.state() for run in (compiled, plain))
    assert list(saved) == list(wanted)
