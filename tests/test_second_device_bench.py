"""The GPU script's own code on a second device: devices, dtypes and graphs, no number counts."""

from __future__ import annotations

import functools
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msq.bench import gpu_encoders, gpu_end_to_end, gpu_ffn, gpu_micro, gpu_parts, gpu_stack
from msq.bench.gpu_smoke import checks
from msq.bench.gpu_steps import steps
from msq.bench.gpu_timing import Session, ceilings
from msq.bench.head_problem import Shape
from msq.bench.temporal_cases import temporal

HERE = Path(__file__).parent
second = SimpleNamespace(**runpy.run_path(str(HERE / "second_device_cuda.py")))
TINY = Shape(5, 2, 0.1, quick=True)
# What needs no compiler: that would make code for the GPU.
WORK: dict[str, Callable[[Session], None]] = {
    "ceilings": ceilings,
    "kernels": gpu_micro.kernels,
    "matrix products": gpu_micro.matrix_products,
    "mask bits": gpu_micro.mask_bits_of_a_step,
    "attention backends": gpu_micro.attention_backends,
    "ffn product": gpu_ffn.ffn_product,
    "temporal": temporal,
    "heads at once": gpu_stack.heads_at_once,
    "loss curve": gpu_parts.curves,
    "end to end": gpu_encoders.end_to_end,
    "step": functools.partial(
        steps, shape=TINY, wanted=("packed", "kernels", "eager bf16", "B0", "B0 TF32")
    ),
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with second.second_device(monkeypatch, (9, 0)) as found:
        yield found


@pytest.mark.filterwarnings("ignore:.*capturable=True.*")
def test_the_smoke_checks_are_green(device: Any) -> None:
    ran = 0
    for name, check in checks("cuda", tiny=True):
        if name.startswith("opcheck"):
            continue  # it traces with modes of its own
        gate = check()
        assert gate.ok, f"{name}: {gate.worst} ({gate.what})"
        ran += 1
    assert ran > 30


@pytest.mark.filterwarnings("ignore:.*capturable=True.*")
@pytest.mark.parametrize("name", WORK)
def test_a_piece_of_work_on_the_device(device: Any, name: str) -> None:
    found: list[dict[str, Any]] = []
    WORK[name](Session("cuda", True, 1e6, found.append))
    assert found
    for one in found:
        assert one.get("gate", {"ok": True})["ok"], one
        assert "error" not in one
        for side, values in one.get("sides", {}).items():
            if "attention" not in one["name"]:  # a CPU has two backends of the four
                assert "error" not in values, (side, values)
                assert values.get("graph", "") in ("", "eager", "not asked for"), (side, values)


@pytest.mark.filterwarnings("ignore:.*capturable=True.*")
def test_end_to_end_sides_on_the_device(device: Any) -> None:
    session = Session("cuda", True, 1e6, lambda found: None)
    for name in ("msq", "msq checkpointing", "msq kernel"):
        learner = gpu_end_to_end.side(session, gpu_end_to_end.TINY, 2, name)
        learner.run()
        with device.watched() as waits:
            learner.run()
        assert waits == []
        assert all(p.grad.is_cuda for p in learner.model.parameters())
