"""What feeds a second device, and what it is asked for: streams, scores, end to end."""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import msq.head.backbone
import msq.head.end_to_end_step
import msq.head.step
from msq.extract.device_batches import Arriving, Moment, Sender
from msq.extract.pipeline import extract
from msq.extract.store import open_store
from msq.head.baselines import averaged, clip_similarity, linear_probe
from msq.head.class_splits import class_split
from msq.head.end_to_end import train_end_to_end
from msq.head.ensemble import combined
from msq.head.evaluate import evaluate_run, score
from msq.head.features import Features
from msq.head.predict import load_head
from msq.head.schedule import learning_rate
from msq.head.stream import StreamedTokens, waiting_bytes
from msq.head.train import train_head
from msq.head.training import Training
from msq.head.zeroshot import evaluate_split, seen_features

HERE = Path(__file__).parent
toys = SimpleNamespace(**runpy.run_path(str(HERE / "test_train.py")))
second = SimpleNamespace(**runpy.run_path(str(HERE / "second_device_cuda.py")))
fakes = SimpleNamespace(**runpy.run_path(str(HERE / "fakes.py")))
end_to_end = SimpleNamespace(**runpy.run_path(str(HERE / "end_to_end_material.py")))


def rounded(*arguments: Any) -> float:
    """The rate in float32, as a GPU has it."""
    return float(torch.tensor(learning_rate(*arguments), dtype=torch.float32))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One of before 8.0: float32, no kernels, no graphs."""
    monkeypatch.setattr(msq.head.step, "learning_rate", rounded)
    with second.second_device(monkeypatch) as found:
        yield found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("second")
    data, video = end_to_end.dataset(folder / "clips"), end_to_end.encoder()
    return data, end_to_end.features_of(data, folder / "a.zarr", video), video, folder


def streamed(features: Features, where: str, dtype: torch.dtype = torch.float16) -> Features:
    """The same with tokens that are read batch by batch, and given on a device."""
    flat = features.tokens.to(dtype).contiguous().view(torch.uint8).flatten(1).numpy()

    def read(rows: Sequence[int], out: Any) -> None:
        np.take(flat, np.asarray(rows), axis=0, out=out)

    shape = (features.tokens.shape[1], features.tokens.shape[2])
    tokens = StreamedTokens(read, torch.arange(len(flat)), shape, dtype, device=where)
    return dataclasses.replace(features, tokens=tokens).to(where)


def test_steps_from_disk_wait_for_no_more_than_a_buffer(device: Any) -> None:
    features = toys.toy()
    features = dataclasses.replace(features, tokens=features.tokens.half().float())
    config = toys.small("head.dropout=0")
    here = Training(features, config)
    there = Training(streamed(features, "cuda"), config)
    for number in range(2 * here.epoch_steps):
        with device.watched() as waits:
            there._step()
        assert number == 0 or {wait.kind for wait in waits} <= {"event"}, waits
        here._step()
    for a, b in zip(here.model.parameters(), there.model.parameters(), strict=True):
        assert torch.equal(a.detach(), b.detach().cpu())


def test_batches_from_disk_do_not_pile_up_on_the_device(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorded step is a few calls: nothing else keeps the processor from a hundred of them."""
    features = toys.toy()
    training = Training(streamed(features, "cuda"), toys.small("train.epochs=4"))
    steps, last, found = torch.cuda.current_stream(), [0], []

    class Watched(torch.cuda.Event):  # type: ignore[misc]
        def record(self, stream: Any = None) -> None:
            self.before = training.step if stream is steps else 0  # steps that it comes after
            super().record(stream)

        def synchronize(self) -> None:
            last[0] = max(last[0], self.before)
            super().synchronize()

    monkeypatch.setattr(torch.cuda, "Event", Watched)
    while training.step < min(training.steps, 12):
        training._step()
        found.append(training.step - last[0])  # that may not have run
    assert len(found) > 6
    assert max(found) == 3
    # So many batches lie there as they are stored, which is what the estimate of memory counts; of
    # float32 ones the step computes with one of them.
    assert waiting_bytes(torch.float16, torch.float32, "cuda") == max(found) * 2
    assert waiting_bytes(torch.float32, torch.float32, "cuda") == (max(found) - 1) * 4


def test_copies_beside_the_steps_share_a_stream(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is kept for each stream, and every evaluation begins to read anew."""
    made, stream = [], torch.cuda.Stream
    monkeypatch.setattr(torch.cuda, "Stream", lambda *a: made.append(a) or stream(*a))
    there = streamed(toys.toy(), "cuda")
    model = Training(there, toys.small()).model
    for _ in range(3):
        score(model, there, there.rows("test"), batch=4)
    assert len(made) == 1


def test_scoring_from_disk_reads_its_rows_once(device: Any) -> None:
    features = toys.toy()
    features = dataclasses.replace(features, tokens=features.tokens.half().float())
    there = streamed(features, "cuda")
    model = Training(there, toys.small()).model
    rows = there.rows("test")
    with device.watched() as waits:
        found = score(model, there, rows, batch=4)
    reads = [wait for wait in waits if wait.kind != "event"]
    assert len(reads) == 2, reads  # the rows; whether what was read is finite
    expected = score(model.to("cpu"), features, rows.cpu(), batch=4)
    assert torch.equal(found.cpu(), expected)


def test_scoring_from_memory_waits_for_nothing(device: Any) -> None:
    features = toys.toy().to("cuda")
    model = Training(features, toys.small()).model
    with device.watched() as waits:
        found = score(model, features, features.rows("train"), batch=8)
    assert [wait.what for wait in waits] == ["copy_"]  # the rows themselves, made in this test
    assert found.is_cuda


@pytest.mark.parametrize("task", ["multilabel", "singlelabel"])
@pytest.mark.parametrize("known", [False, True])
def test_an_evaluation_waits_for_its_numbers_once(
    device: Any, tmp_path: Path, task: str, known: bool
) -> None:
    features = toys.toy(task=task)
    groups = {"some": (0, 1), "none": ()}
    features = dataclasses.replace(features, groups=groups)
    if known:
        draw = torch.rand(features.labels.shape, generator=torch.Generator().manual_seed(0))
        features = dataclasses.replace(features, known=(draw > 0.2).to(torch.uint8))
    train_head(features, toys.small("train.epochs=1"), tmp_path / "run")
    expected = evaluate_run(tmp_path / "run", features)
    resident = features.to("cuda")
    with device.watched() as waits:
        found = evaluate_run(tmp_path / "run", resident, device="cuda")
    for one in (found, expected):
        del one["eval_seconds"]
    assert repr(found) == repr(expected)  # a segment without classes is NaN
    reads = [wait.what for wait in waits if wait.kind == "read"]
    assert reads == ["nonzero", "copy_"], waits


def test_zero_shot_scores_on_the_device(device: Any) -> None:
    features = toys.toy(classes=8)
    split = class_split(features.classes, 0.5, 0)
    for queries, classifier in (("text", "text"), ("vanilla", "shared"), ("multimodal", "text")):
        config = toys.small(f"head.queries={queries}", f"head.classifier={classifier}",
                            "head.dropout=0")  # fmt: skip
        results = []
        for where in ("cpu", "cuda"):
            there = features.to(where)
            model = Training(seen_features(there, split), config).model
            results.append(evaluate_split(model, there, split))
        assert results[0] == results[1]


def test_baselines_and_ensembles_on_the_device(device: Any) -> None:
    features = toys.toy()
    there = features.to("cuda")
    rows = features.rows("test")
    assert torch.equal(averaged(there).cpu(), averaged(features))
    found, chosen = linear_probe(there, rows.to("cuda"))
    expected, same = linear_probe(features, rows)
    assert chosen == same
    assert torch.equal(found.cpu(), expected)
    assert clip_similarity(there, rows.to("cuda"), [0, 2]).is_cuda
    for how in ("mean", "max"):
        assert combined([found, found + 1], "multilabel", how).is_cuda


def test_prediction_from_features(device: Any, tmp_path: Path) -> None:
    features = toys.toy()
    train_head(features, toys.small("train.epochs=1"), tmp_path / "run")
    expected = load_head(tmp_path / "run").predict(features)
    assert load_head(tmp_path / "run", device="cuda").predict(features) == expected


# Frames to a device, and features back.


def test_frames_and_features_go_both_ways_without_waiting(device: Any) -> None:
    rng, where = np.random.default_rng(0), torch.device("cuda", 0)
    sender, under_way, sent = Sender(where), [], []
    for number in range(6):
        frames = [rng.integers(0, 256, (2, 3, 4, 4), np.uint8) for _ in range(3 - number % 2)]
        began = Moment(where)
        with device.watched() as waits:
            pixels = sender.send(frames)
            values = pixels.float().flatten(1)
            under_way.append(Arriving(values, torch.float16, began))
        assert {wait.kind for wait in waits} <= {"event"}
        sent.append(np.stack(frames))
        for frame in frames:
            frame.fill(0)  # they may be overwritten at once
    for arriving, frames in zip(under_way, sent, strict=True):
        values, finite, seconds = arriving.fetch()
        assert np.array_equal(values.numpy(), frames.reshape(len(frames), -1).astype(np.float16))
        assert finite == [True] * len(frames)
        assert seconds > 0


def test_a_store_made_on_the_device_is_that_of_the_cpu(device: Any, tmp_path: Path) -> None:
    data = fakes.make_dataset(tmp_path / "clips", 10, broken=(4,))
    stores = []
    for where in ("cpu", "cuda"):
        video = end_to_end.encoder().to(where)
        assert video.device.type == where
        path = tmp_path / f"{where}.zarr"
        extract(data, path, video=video, image=fakes.FakeEncoder(fakes.image_spec()),
                text=fakes.FakeText(), workers=0, batch=3)  # fmt: skip
        stores.append(open_store(path))
    rows = stores[0].ok_rows([stores[0].encoders("video")[0]])
    assert len(rows) == 9
    assert torch.equal(*(store.tokens(rows) for store in stores))


# End to end.


@pytest.mark.parametrize("more", [(), ("backbone.accumulate=2", "backbone.checkpointing=on"),
                                  ("backbone.unfreeze=last:1", "optim.clip_grad=0")])  # fmt: skip
def test_end_to_end_steps_wait_for_no_more_than_a_buffer(
    device: Any, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    data, features, video, _ = world
    config = end_to_end.settings("head.dropout=0", "train.val=0.2", *more)
    expected = train_end_to_end(end_to_end.material(data, features, video), config, workers=0)
    steps: list[list[Any]] = []
    step = Training._step

    def watched(training: Training) -> None:
        with device.watched() as waits:
            step(training)
        steps.append(waits)

    monkeypatch.setattr(Training, "_step", watched)
    told: list[int] = []
    found = train_end_to_end(
        end_to_end.material(data, features, video), config, tmp_path / "run", workers=0,
        device="cuda", progress=lambda event: told.append(len(device.waits)),
    )  # fmt: skip
    assert len(steps) > 3
    for waits in steps[1:]:
        assert {wait.kind for wait in waits} <= {"event"}, waits
    for name in ("map", "map_micro"):
        assert found.metrics[name] == pytest.approx(expected.metrics[name], abs=1e-6)
    pairs = zip(found.model.parameters(), expected.model.parameters(), strict=True)
    assert all(torch.allclose(a.detach().cpu(), b, atol=1e-5) for a, b in pairs)
