"""Memory: what a group's limit leaves, what a stack takes, and what happens where there is none."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from msq import config as configuration
from msq.config import RunConfig
from msq.head import memory, stack_engine, stack_plan
from msq.head.features import Features
from msq.head.run import RunResult
from msq.head.stack_engine import KEPT, _begin
from msq.head.stack_training import StackedTraining
from msq.head.sweep_plan import Plan, Source
from msq.head.trial import Trial
from msq.head.trials import Job, train_at_once, train_sequentially


def world(clips: int = 60, classes: int = 9, tokens: int = 4, width: int = 12) -> Features:
    g = torch.Generator().manual_seed(5)
    return Features(
        name="toy",
        task="multilabel",
        classes=tuple(f"class {k}" for k in range(classes)),
        ids=tuple(f"clip {n}" for n in range(clips)),
        splits=tuple("test" if n % 5 == 4 else "train" for n in range(clips)),
        tokens=torch.randn(clips, tokens, width, generator=g),
        labels=(torch.rand(clips, classes, generator=g) < 0.3).to(torch.uint8),
        image=torch.randn(clips, width, generator=g),
        text=torch.randn(classes, width, generator=g),
    )


def config(*changes: str) -> RunConfig:
    small = ["head.layers=1", "head.heads=3", "head.ffn=20", "train.epochs=2", "train.batch=8"]
    return configuration.override(RunConfig(), [*small, *changes])


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of a control group with a limit of 100 MB, 99 MB of it in use."""
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("100000000\n")
    (tmp_path / "memory.current").write_text("99000000\n")
    return tmp_path


def test_files_that_were_read_are_room_in_a_group_with_a_limit(group: Path) -> None:
    lines = ["anon 30000000", "file 65000000", "shmem 5000000", "inactive_anon 32000000",
             "inactive_file 40000000", "active_file 20000000", "slab_reclaimable 2000000",
             "slab_unreclaimable 1000000"]  # fmt: skip
    (group / "memory.stat").write_text("\n".join(lines) + "\n")
    assert memory.available_bytes("cpu") == 63_000_000  # shared memory and the heap stay
    assert memory.fits(31_500_000, "cpu")
    assert not memory.fits(31_500_001, "cpu")


@pytest.mark.parametrize("text", [None, "nonsense\n", "inactive_file many\n"])
def test_a_group_that_does_not_say_what_can_be_given_back(group: Path, text: str | None) -> None:
    if text is not None:
        (group / "memory.stat").write_text(text)
    assert memory.available_bytes("cpu") == 1_000_000
    (group / "memory.max").write_text("max\n")
    assert memory.available_bytes("cpu") > 100_000_000


def peak_bytes(stack: StackedTraining, file: Path) -> int:
    """The most that a step allocates at a time, as torch's profiler sees it."""
    stack.take_step()  # buffers and the optimiser's state are there from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        stack.take_step()
    seen.export_chrome_trace(str(file))
    events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    return max(itertools.accumulate(x for _, x in sorted(changes, key=lambda c: c[0])))


# B, K, S, D, F, L, encoder layers, H: many classes, few; wide hidden layer; many tokens.
SHAPES = [(4, 157, 17, 64, 256, 2, 0, 8), (16, 20, 17, 64, 512, 2, 0, 4),
          (32, 3, 40, 64, 128, 2, 0, 4), (4, 20, 90, 64, 256, 2, 2, 4)]  # fmt: skip


@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_estimate_of_a_stack_is_what_its_steps_allocate(
    shape: tuple[int, ...], dropout: float, tmp_path: Path
) -> None:
    b, k, s, d, f, layers, encoder, h = shape
    features = dataclasses.replace(world(b, k, s, d), splits=("train",) * b)
    for precision in ("fp32", "bf16"):
        begun = []
        for seed in range(2):
            made = config(f"head.layers={layers}", f"head.heads={h}", f"head.ffn={f}",
                          f"head.dropout={dropout}", f"train.batch={b}", "train.val=0",
                          f"train.precision={precision}", f"train.seed={seed}")  # fmt: skip
            # No protocol has encoder layers of this size: set past the check of the protocol.
            object.__setattr__(made, "head", dataclasses.replace(made.head, encoder_layers=encoder))
            begun.append(_begin(seed, Job(features, made, None), "cpu"))
        counted = sum(
            one.bytes - 4 * KEPT * sum(p.numel() for p in one.training.parameters) for one in begun
        )
        stack = StackedTraining([one.training for one in begun])
        ratio = counted / peak_bytes(stack, tmp_path / "trace.json")
        assert 0.75 < ratio < 1.5, (precision, ratio)


class Roomy(StackedTraining):
    """Has room for two heads."""

    together: list[int] = []  # noqa: RUF012
    error: type[Exception] = torch.OutOfMemoryError

    def __init__(self, trainings: Any) -> None:
        Roomy.together.append(len(trainings))
        super().__init__(trainings)

    def take_step(self) -> None:
        super().take_step()
        if len(self.taking.trainings) > 2 and self.step > 2:
            raise self.error("CUDA out of memory. Tried to allocate 20 MiB")


def test_a_stack_without_room_is_trained_again_in_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = world()
    jobs = [Job(features, config(f"train.seed={n}"), tmp_path / str(n)) for n in range(5)]
    Roomy.together = []
    monkeypatch.setattr(stack_engine, "StackedTraining", Roomy)
    found = train_at_once(jobs, "cpu", None)
    assert Roomy.together == [5, 3, 2, 1, 2]
    alone = train_sequentially([dataclasses.replace(job, run=None) for job in jobs], "cpu", None)
    for number, (one, other) in enumerate(zip(found, alone, strict=True)):
        assert isinstance(one, RunResult), one
        assert isinstance(other, RunResult)
        assert one.metrics["map"] == pytest.approx(other.metrics["map"], abs=1e-3)
        lines = (tmp_path / str(number) / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
        assert "no room for 5 heads at once" in (tmp_path / str(number) / "log.txt").read_text()


def test_another_error_of_a_stack_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    features = world()
    jobs = [Job(features, config(f"train.seed={n}"), None) for n in range(3)]
    Roomy.together = []
    monkeypatch.setattr(Roomy, "error", ValueError)
    monkeypatch.setattr(stack_engine, "StackedTraining", Roomy)
    found = train_at_once(jobs, "cpu", None)
    assert [type(one) for one in found] == [ValueError] * 3
    assert Roomy.together == [3]


def test_the_planner_keeps_what_it_measured_before_memory_ran_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, heads = world(), []

    class Small(StackedTraining):
        def __init__(self, trainings: Any) -> None:
            heads.append(len(trainings))
            if len(trainings) > 8:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            super().__init__(trainings)

    source = Source.of(features)
    trials = [Trial(source=source.key, config=config(f"train.seed={n}")) for n in range(16)]
    plan = Plan("p", trials, {source.key: source})
    monkeypatch.setattr(stack_plan, "StackedTraining", Small)
    steps = {1: 4.0, 4: 1.0, 8: 4.0}  # seconds of a step: of one head, of a stack

    def seconds(step: Any, device: str) -> float:
        return steps[heads[-1] if heads else 1]

    monkeypatch.setattr(stack_plan, "_seconds", seconds)
    chosen = stack_plan._by_measurement(plan, "cpu", lambda trial, source: features)
    assert heads == [4, 8, 16]
    assert chosen.engine["name"] == "stacked"
    assert {len(group) for group in chosen.groups} == {4}
    assert "4: 250.00, 8: 500.00; 16 heads: CUDA out of memory" in chosen.engine["why"]


def test_each_size_is_measured_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one stack took is free when the next is made."""
    features, alive = world(), []
    real = stack_plan.Training

    class Counted(real):  # type: ignore[misc, valid-type]
        there = 0

        def __init__(self, *given: Any) -> None:
            Counted.there += 1
            super().__init__(*given)

        def __del__(self) -> None:
            Counted.there -= 1

    def seconds(step: Any, device: str) -> float:
        alive.append(Counted.there)
        return 1.0

    monkeypatch.setattr(stack_plan, "Training", Counted)
    monkeypatch.setattr(stack_plan, "_seconds", seconds)
    trials = [Trial(source="x", config=config(f"train.seed={n}")) for n in range(8)]
    stack_plan.head_seconds(trials, features, "cpu")
    assert alive == [1, 4, 8]
