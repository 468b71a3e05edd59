"""Training, scoring and feeding on a device that is not the CPU, watched: see second_device.py."""

from __future__ import annotations

import itertools
import json
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import msq.head.step
from msq.config import official_config, override
from msq.head.kernel_choice import HeadShape
from msq.head.masks import LayerMasks, Masks, Part, Site
from msq.head.packed_choice import choose_step
from msq.head.schedule import learning_rate
from msq.head.train import train_head
from msq.head.train_views import TrainViews
from msq.head.training import Training

HERE = Path(__file__).parent
toys = SimpleNamespace(**runpy.run_path(str(HERE / "test_train.py")))
second = SimpleNamespace(**runpy.run_path(str(HERE / "second_device_cuda.py")))
STEPS = 6


def rounded(*arguments: Any) -> float:
    """The rate as a GPU has it, in float32; the CPU's is in float64 otherwise."""
    return float(torch.tensor(learning_rate(*arguments), dtype=torch.float32))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One of before 8.0: float32, no kernels, no graphs."""
    monkeypatch.setattr(msq.head.step, "learning_rate", rounded)
    with second.second_device(monkeypatch) as found:
        yield found


@pytest.fixture
def modern(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One of 9.0: bf16, kernels, graphs."""
    monkeypatch.setattr(msq.head.step, "learning_rate", rounded)
    with second.second_device(monkeypatch, (9, 0)) as found:
        yield found


def counted(training: Training) -> Training:
    """Its dropout is that of a key, which is the same on both devices."""
    training.taking._counted = True
    return training


def plain(x: Tensor) -> Tensor:
    return x.detach().cpu()


def same_weights(one: Training, other: Training) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(plain(a), plain(b)) for a, b in pairs)


# What the device refuses: a check of the check.


def test_what_the_device_refuses_and_counts(device: Any) -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert there.device == torch.device("cuda", 0)
    assert there.is_cuda
    assert not here.is_cuda
    assert there.view(3, 1).is_cuda
    assert (2 * there).is_cuda
    with pytest.raises(second.Refused, match="same device"):
        here + there
    with pytest.raises(second.Refused, match="same device"):
        torch.cat([here, there])
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(second.Refused, match="generator"):
        torch.randn(3, device="cuda", generator=torch.Generator().manual_seed(0))
    with pytest.raises(second.Refused, match="generator"):
        torch.empty(3).random_(generator=torch.Generator("cuda"))
    assert device.waits == []
    readings = (
        lambda: float(there[0]), lambda: bool(there.any()), lambda: there.tolist(),
        lambda: there.nonzero(), lambda: there[there > 0], lambda: there.cpu(),
        lambda: torch.equal(there, there), lambda: here.copy_(there),
    )  # fmt: skip
    for read in readings:
        with device.watched() as waits:
            read()
        assert [wait.kind for wait in waits] == ["read"]
    for bring in (lambda: here.to("cuda"), lambda: torch.tensor([1.0], device="cuda"),
                  lambda: there[torch.tensor([0])], lambda: there.new_tensor([2.0])):  # fmt: skip
        with device.watched() as waits:
            assert bring().is_cuda
        assert [wait.kind for wait in waits] == ["copy"]


def test_gradients_are_where_their_tensors_are(device: Any) -> None:
    layer = torch.nn.Linear(3, 2).to("cuda")
    x = torch.ones(4, 3, device="cuda", requires_grad=True)
    with device.watched() as waits:
        layer(x).square().sum().backward()
    assert waits == []
    assert layer.weight.grad.is_cuda
    assert x.grad.is_cuda
    with pytest.raises(second.Refused):
        layer(torch.ones(4, 3))


def test_copies_that_are_not_waited_for(device: Any) -> None:
    buffer = torch.empty(4, pin_memory=True)
    buffer.fill_(1)
    sent, event = buffer.to("cuda", non_blocking=True), torch.cuda.Event()
    event.record()
    event.synchronize()
    buffer.fill_(2)  # late enough
    again = buffer.to("cuda", non_blocking=True)
    event.record()
    buffer.fill_(3)
    with pytest.raises(second.Refused, match="written before"):
        event.synchronize()
    assert (plain(sent).tolist(), plain(again).tolist()) == ([1] * 4, [2] * 4)
    back = torch.empty(4, pin_memory=True)
    back.copy_(sent, non_blocking=True)
    assert back.isnan().all()
    torch.cuda.synchronize()
    assert back.tolist() == [1] * 4
    with pytest.raises(second.Refused, match="pageable"):
        sent.to("cpu", non_blocking=True)


def test_what_another_stream_copies_has_to_be_waited_for(device: Any) -> None:
    buffer, stream = torch.ones(4).pin_memory(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sent = buffer.to("cuda", non_blocking=True)
    with pytest.raises(second.Refused, match="another stream"):
        sent + 1
    torch.cuda.current_stream().wait_stream(stream)
    assert plain(sent + 1).tolist() == [2] * 4


def test_a_replay_has_the_numbers_of_its_recording(device: Any) -> None:
    x, number, key = torch.zeros(2, device="cuda"), [1.0], torch.ones((), device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x + number[0]) * 2 + key
        x += y
    assert plain(x).tolist() == [0, 0]  # a recording runs nothing
    for expected, given in ((3, 1), (12, 1), (40, 2)):
        key.fill_(given)
        number[0] = 100.0  # too late
        graph.replay()
        assert plain(x).tolist() == [expected] * 2
    with pytest.raises(second.Refused, match="capturing"), torch.cuda.graph(graph):
        float(x.sum())
    with pytest.raises(second.Refused), torch.cuda.graph(graph):
        torch.zeros(3).to("cuda")


# Training.


@pytest.mark.parametrize("path", ["packed", "plain"])
@pytest.mark.parametrize("classifier", ["per-class", "shared", "text"])
@pytest.mark.parametrize("queries", ["vanilla", "text", "multimodal"])
def test_steps_on_the_device_are_those_of_the_cpu(
    device: Any, queries: str, classifier: str, path: str
) -> None:
    config = toys.small(
        f"head.queries={queries}", f"head.classifier={classifier}", f"train.path={path}",
        "optim.clip_grad=0.5", "train.ema=0.9", "head.layers=2",
    )  # fmt: skip
    both = [counted(Training(toys.toy().to(where), config)) for where in ("cpu", "cuda")]
    waits: list[Any] = []
    for number in range(STEPS):
        both[0]._step()
        with device.watched() as found:
            both[1]._step()
        waits += found if number else []  # the first one makes tables that are kept
    assert waits == []
    assert both[1].flat.data.is_cuda
    assert torch.equal(both[0].loss_sum, plain(both[1].loss_sum))
    assert same_weights(*both)


OTHERS = {
    "official": ("train.batch=8", "train.epochs=3", "train.epoch_clips=20"),
    "positions": ("head.query_position=true", "head.memory_position=sincos"),
    "asymmetric": ("train.loss=asymmetric", "optim.name=adam", "train.ema=0"),
    "focal": ("train.loss=focal", "optim.clip_grad=0"),
}


@pytest.mark.parametrize("kind", [*OTHERS, "unknown labels", "one label", "augmented views"])
def test_other_heads_and_losses_on_the_device(device: Any, kind: str) -> None:
    features = toys.toy(task="singlelabel" if kind == "one label" else "multilabel")
    if kind == "unknown labels":
        features = replace(features, known=(features.tokens.sum((1, 2)) > 0)[:, None].expand(
            -1, len(features.classes)).to(torch.uint8))  # fmt: skip
    if kind == "augmented views":
        training = torch.tensor([split == "train" for split in features.splits])
        place = torch.where(training, training.cumsum(0) - 1, -1)
        shown = features.tokens[training], features.image[training]
        features = replace(features, train_views=TrainViews(
            ("a", "b"), place, *(torch.stack([x, -x]) for x in shown)))  # fmt: skip
    start = official_config() if kind == "official" else toys.small("train.val=0.2")
    config = override(start, list(OTHERS.get(kind, ())))
    both = [counted(Training(features.to(where), config)) for where in ("cpu", "cuda")]
    for training in both:
        training._step()
    with device.watched() as waits:
        for _ in range(STEPS):
            both[1]._step()
    assert waits == []
    for _ in range(STEPS):
        both[0]._step()
    assert same_weights(*both)


@pytest.mark.parametrize("path", ["packed", "plain"])
def test_masks_are_drawn_on_the_device(device: Any, path: str) -> None:
    training = Training(toys.toy().to("cuda"), toys.small(f"train.path={path}"))
    training._step()
    with device.watched() as waits:
        training._step()
    assert waits == []
    masks = Masks(0, 1, 0.3, "cuda")
    bits = masks.bits(Part.decoder, 0, Site.hidden, 20, 70)
    assert bits.is_cuda
    kept = LayerMasks(masks, Part.decoder, 0).kept(Site.hidden, (20, 70), torch.float32)
    assert 0.6 < float(kept.mean()) < 0.8


def test_bf16_on_the_device(modern: Any) -> None:
    """Kernels and masks are references here; what is left are devices, dtypes and waits."""
    for path, kernels in (("packed", "auto"), ("packed", "triton"), ("plain", "auto")):
        config = toys.small(f"train.path={path}", f"train.kernels={kernels}", "head.width=32")
        features = toys.toy().to("cuda")
        shape = HeadShape.of(features, config.head)
        choice = choose_step(config.train, "cuda", shape, config.head.dropout)
        assert choice.precision == "bf16"
        assert bool(choice.kernels) == (kernels == "triton")
        training = counted(Training(features, config, choice))
        training._step()
        with modern.watched() as waits:
            for _ in range(STEPS):
                training._step()
        assert waits == []
        assert float(training.taking.loss) < 2


def test_an_epoch_waits_twice_and_a_run_is_that_of_the_cpu(device: Any, tmp_path: Path) -> None:
    """Once to see that all is finite, once for the loss and the score of its validation clips."""
    config = toys.small("train.epochs=4", "train.val=0.2", "head.dropout=0", "train.ema=0.9")
    told: list[int] = []
    run = tmp_path / "cuda"
    found = train_head(toys.toy(), config, run, device="cuda",
                       progress=lambda event: told.append(len(device.waits)))  # fmt: skip
    assert [after - before for before, after in itertools.pairwise(told)] == [2] * 3
    expected = train_head(toys.toy(), config, tmp_path / "cpu")
    assert found.metrics == expected.metrics
    assert toys.same(toys.weights(run), toys.weights(tmp_path / "cpu"))
    lines = [
        [
            {**json.loads(line), "seconds": 0}
            for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for folder in (run, tmp_path / "cpu")
    ]
    assert lines[0] == lines[1]


def test_a_run_goes_on_on_the_device(device: Any, tmp_path: Path) -> None:
    config = toys.small("head.dropout=0", "train.ema=0.9")
    whole = train_head(toys.toy(), config, tmp_path / "whole", device="cuda")
    for _ in range(2):
        train_head(toys.toy(), config, tmp_path / "parts", device="cuda", stop_after=5,
                   checkpoint_seconds=0)  # fmt: skip
    parts = train_head(toys.toy(), config, tmp_path / "parts", device="cuda")
    assert parts.metrics == whole.metrics
    assert toys.same(toys.weights(tmp_path / "parts"), toys.weights(tmp_path / "whole"))
