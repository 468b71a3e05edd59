"""The GPU script, dry: its paths on a CPU, its goals and answers from made-up numbers."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from msq.bench import gpu_goals, gpu_parts
from msq.bench.gpu_answers import answers
from msq.bench.gpu_end_to_end import SIDES
from msq.bench.gpu_parts import run_part
from msq.bench.gpu_timing import Session
from msq.bench.head_problem import Problem, Shape
from msq.bench.kernel_coverage import covered_ops, known_ops
from msq.errors import UsageError
from msq.head.evaluate import score
from msq.kernels.dispatch import resolve

ROOT = Path(__file__).parents[1]


def test_goals_say_what_was_reached_and_what_was_not_measured() -> None:
    assert {row[3] for row in gpu_goals.table({})} == {"not measured"}
    step = {"packed": {"median": 14.0, "peak_mb": 70.0}, "kernels": {"median": 10.0},
            "B2": {"median": 15.0}, "B1": {"median": 13.0, "peak_mb": 100.0}}  # fmt: skip
    found = {
        gpu_goals.STEP: {"sides": step},
        "ceilings": {"bf16_flops": 790e12, "copy_bytes": 4.3e12},
        "loss curve": {"different": 1},
    }
    found["heads at once"] = {"sides": {"stacked": {"median": 2.0}, "sequential": {"median": 5.0}}}
    rows = {row[0]: row[1:] for row in gpu_goals.table(found)}
    at_once = rows["10 heads K=20 B=64 at once, times faster than in turn"]
    assert at_once == (">= 1.8", "2.50", "yes")
    assert rows["step p=0.1, times faster than B2"] == (">= 1.2", "1.50", "yes")
    assert rows["step p=0.1, times faster than B1"] == (">= 1.4", "1.30", "no")
    assert rows["share of the measured ceiling (MFU)"] == (">= 0.5", "0.72", "yes")  # 5.65 / 7.9
    assert rows["peak memory, over B1"] == ("<= 0.75", "0.70", "yes")
    assert rows["epoch of Charades' size, s"][1] == "0.32"
    assert rows["losses that differ between two runs"] == ("<= 0", "1", "no")
    # The table of floors by hand: 9.04 ms of layers, 0.18 of Adam, 0.02 of the classifier.
    assert gpu_goals.roofline(790e12, 4.3e12) == pytest.approx(9.25e-3, rel=0.01)


class Capturable(TorchDispatchMode):
    """Fails where a CUDA graph would: at random numbers of a new generator, and at a wait."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for word in ("random_", "_local_scalar_dense", "lift_fresh", "nonzero"):
            assert word not in str(func)
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_step_that_is_timed_in_a_graph_can_be_captured_and_goes_on_counting(
    precision: str,
) -> None:
    shape = Shape(7, 4, 0.1, quick=True)
    step = Problem(shape, counted=True).packed_step(precision, rate=0.0)
    losses, issued = [float(step())], []
    for _ in range(2):
        with Capturable() as mode:
            loss = step()
        losses.append(float(loss))
        issued.append([op for op in mode.seen if not op.startswith("profiler.")])
    assert issued[0] == issued[1]
    assert any("mask_bits" in op for op in issued[0])
    assert len(set(losses)) == 3  # the weights stay: it is the dropout that goes on
    still = Problem(replace(shape, dropout=0.0), counted=True).packed_step(precision, rate=0.0)
    assert float(still()) == float(still())


def test_sides_that_are_no_graphs_are_compared_with_nothing() -> None:
    reason = "set_current_seed can be called during stream capture only if"
    step = {"packed": {"median": 5.0, "graph": reason}, "B2": {"median": 15.0, "graph": ""},
            "B0": {"median": 90.0, "graph": "eager"}, "kernels": {"median": 10.0, "graph": ""},
            "B1": {"median": 20.0, "graph": "operation not permitted"}}  # fmt: skip
    found: dict[str, Any] = {
        gpu_goals.STEP: {"sides": step},
        "ceilings": {"bf16_flops": 790e12, "copy_bytes": 4.3e12, "cached_copy_bytes": 7e12},
    }
    rows = {row[0]: row[1:] for row in gpu_goals.table(found)}
    assert rows["step p=0.1, times faster than B2"][1:] == ("1.50", "yes")
    assert rows["step, times faster than B0"][1] == "9.00"  # eager, as people run it
    refused = "refused: B1 is no CUDA graph: operation not permitted"
    assert rows["step p=0.1, times faster than B1"][1:] == ("–", refused)
    step["kernels"]["graph"] = "no memory"
    rows = {row[0]: row[1:] for row in gpu_goals.table(found)}
    for name in ("step p=0.1, times faster than B2", "epoch of Charades' size, s",
                 "share of the measured ceiling (MFU)"):  # fmt: skip
        assert rows[name][1:] == ("–", f"refused: packed is no CUDA graph: {reason}")
    kernels = rows["step p=0.1, kernels, times faster than B2: below it they are rejected"]
    assert kernels == (">= 1.1", "–", "refused: kernels is no CUDA graph: no memory")
    found[gpu_goals.WITHOUT] = {"sides": {"B1": {"median": 12.0}}}
    assert "refused: B1" in answers(found)[0]
    forms = {"standard, forward": {"median": 3.0, "graph": "refused"},
             "absorbed, forward": {"median": 1.0}}  # fmt: skip
    found["cross-attention"] = {"sides": forms}
    rows = {row[0]: row[1:] for row in gpu_goals.table(found)}
    assert "refused" in rows["absorbed cross-attention forward, times the compiled"][2]


def test_each_open_question_has_one_answer() -> None:
    nothing = answers({})
    assert [text.partition(" ")[0] for text in nothing] == ["(i)", "(ii)", "(iii)", "(iv)", "(v)"]
    assert all(text.endswith(": not measured") for text in nothing)
    found: dict[str, Any] = {
        "ceilings": {"bf16_flops": 800e12, "copy_bytes": 4e12, "cached_copy_bytes": 8e12},
        gpu_goals.STEP: {"sides": {"B2": {"median": 18.0}}},
        gpu_goals.WITHOUT: {"sides": {"B2": {"median": 15.0}}},
        "matrix products": {"sides": {"qkv, forward": {"median": 1.0, "flops": 600e12}}},
        "triton product": {"sides": {"cublas": {"median": 0.9}, "triton": {"median": 1.0}}},
        "kernel absorbed_cross": {
            "sides": {"kernel, forward": {"median": 0.1}}, "bytes": 200e6,
            "sizes": (256, 157, 17, 512, 8), "columns": 144, "rows": 64,
        },
        "attention 157x157 p=0.1": {"sides": {
            "flash, forward": {"median": 0.09}, "cudnn, forward": {"median": 0.08},
        }},
        "attention 157x157 p=0": {"sides": {"flash, forward": {"median": 0.01}}},
    }  # fmt: skip
    one, two, three, four, five = (text.partition(": ")[2] for text in answers(found))
    assert one.startswith("p = 0.1 less p = 0 is B2 3.00 ms")
    assert two.startswith("0.75 of the ceiling on average (assumed 0.76)")
    assert three == "0.90 of cuBLAS's speed"
    # By hand: 11.85 GFLOP in 0.1 ms of 800 TFLOP/s; 200 MB of 4 TB/s; and three programs of each
    # clip, which read 2 x 8 x 17 rows of 512 numbers: 214 MB more from the cache.
    assert four.startswith("0.15 of the products' ceiling, 0.50 of the copy's, 0.52 of a copy's")
    assert four.endswith("by none of them (all below 0.6)")
    found["kernel absorbed_cross"]["sides"]["kernel, forward"]["median"] = 0.08
    assert answers(found)[3].endswith("bound by a copy's inside the cache")
    assert five == "157x157 forward: cudnn, 80 us"


def test_inference_is_timed_as_the_commands_score_too(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[dict[str, Any]] = []
    calls = []
    monkeypatch.setattr(
        gpu_parts, "score", lambda *a, **k: calls.append(k["batch"]) or score(*a, **k)
    )
    gpu_parts.inference(Session("cpu", True, 60.0, results.append), 1)
    (one,) = results
    assert one["gate"]["ok"]
    assert one["sides"].keys() == {"B2", "packed", "as msq scores"}
    assert one["sides"]["as msq scores"]["graph"] == "eager"
    assert set(calls) == {1}
    found = {"inference B=1": {"sides": {"as msq scores": {"median": 2.0}, "B2": {"median": 0.4},
                                         "packed": {"median": 0.2}}}}  # fmt: skip
    rows = {row[0]: row[2:] for row in gpu_goals.table(found)}
    assert rows["inference B=1 as msq scores, ms"] == ("2.00", "no")
    assert rows["inference B=1 in bf16 and a CUDA graph (no command), ms"] == ("0.20", "yes")


def test_heads_at_once_are_held_against_heads_in_turn_without_graphs_too() -> None:
    sides = {"stacked": {"median": 1.0}, "sequential": {"median": 2.0},
             "sequential, eager": {"median": 7.0}}  # fmt: skip
    rows = {row[0]: row[1:] for row in gpu_goals.table({"heads at once": {"sides": sides}})}
    name = "10 heads K=20 B=64 at once, times faster than in turn"
    assert rows[name] == (">= 1.8", "2.00", "yes")
    assert rows[f"{name} without CUDA graphs"] == (">= 6", "7.00", "yes")


def test_a_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from msq.kernels import gpu

    entered: list[Any] = []

    @contextmanager
    def device_of(x: torch.Tensor) -> Iterator[None]:
        entered.append(x)
        yield

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    key, count = torch.zeros(2, dtype=torch.int64), 0
    for found in pkgutil.iter_modules(gpu.__path__, "msq.kernels.gpu."):
        module = importlib.import_module(found.name)
        for name in (n for n in vars(module) if n.startswith("launch")):
            count += 1
            with pytest.raises(TypeError):
                getattr(module, name)(key)  # the other arguments are missing
            assert entered.pop() is key, f"{found.name}.{name}"
    assert count == 15


def test_sizes_that_no_tile_is_for_are_left_to_the_reference_and_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    asked = ("cross_attention", torch.device("cuda"), torch.bfloat16, 5000)
    choice = resolve(*asked)
    assert (choice.path, choice.reason) == ("reference", "cross_attention: no tile for 5000")
    with pytest.raises(UsageError, match="cannot run its kernel: cross_attention: no tile for 5"):
        resolve(*asked, kernels="triton")


def test_the_mask_kernel_is_compiled_once_for_all_places_of_a_head() -> None:
    from msq.kernels.gpu.bits import make_bits

    (site,) = (one for one in make_bits.params if one.name == "site")
    assert not site.is_constexpr
    assert site.do_not_specialize


def test_every_op_of_the_kernels_has_a_check_on_the_gpu() -> None:
    assert known_ops() <= covered_ops()
    assert "drop_add_norm" in known_ops()


BLOCKED = ("zarr", "typer", "rich", "av", "open_clip", "timm", "dask", "h5py", "tomli_w")


PROGRAM = f"""
import runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def gpu_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_gpu_script_runs_every_path_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    parts = [word for number in "1234" for word in ("--part", number)]
    done = gpu_script("--dry-run", "--smoke", "--seconds", "1000", *parts, "--out", str(out))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "all green" in done.stdout
    assert "FAILED" not in done.stdout
    results = [json.loads(text) for text in out.read_text(encoding="utf-8").splitlines()]
    assert not [one for one in results if "error" in one or "left_out" in one]
    last = {(one["part"], one["name"]): one for one in results}
    steps = [one for one in results if one["name"].startswith("step")]
    # Two shapes in part 1, written without what is compiled, with B2, with B1; three in part 3.
    assert len(steps) == 2 * 3 + 3 * 2
    assert all(one["gate"]["ok"] for one in steps)
    first, second = (last[1, f"step K=5 B=2 p={p}"]["sides"].keys() for p in ("0.1", "0"))
    assert first == {"packed", "B0", "B0 TF32", "B1", "B2", "eager bf16"}
    assert second == {"packed", "B0", "B1", "B2"}
    assert last[3, "heads at once"]["sides"].keys() == {
        "stacked",
        "sequential",
        "sequential, eager",
    }
    assert not any("error" in side for one in steps for side in one["sides"].values())
    names = {one["name"] for one in results}
    assert {"machine", "ceilings", "matrix products", "triton product", "ffn product", "mask bits",
            "cross-attention", "loss curve", "inference B=1", "inference B=256",
            "kernel self_attention", "kernel drop_add_norm", "heads at once",
            "encoder TimeSformer-B", "encoder ViT-B/16", "end to end"} <= names  # fmt: skip
    printed = done.stdout
    assert "| goal | target | reached | met |" in printed
    assert all(f"| {goal.text} | " in printed for goal in gpu_goals.GOALS)
    assert all(f"- ({number}) " in printed for number in ("i", "ii", "iii", "iv", "v"))


def test_the_end_to_end_part_runs_every_side_on_a_cpu() -> None:
    results: list[dict[str, Any]] = []
    run_part(5, Session("cpu", True, 60.0, results.append))  # 6 is alike, with more frames
    found = {one["name"]: one for one in results}
    assert not [one for one in results if "error" in one or "left_out" in one]
    assert all(found[name]["gate"]["ok"] for name in found if name != "ceilings")
    trained = found["train TimeSformer-B T=8"]
    assert trained["sides"].keys() == set(SIDES)
    assert all("median" in side for side in trained["sides"].values())
    reached = {row[0]: row[2:] for row in gpu_goals.table(found)}
    assert reached["end-to-end step T=8, share of the ceiling (MFU)"][1] in ("yes", "no")
    assert reached["end-to-end step T=16, share of the ceiling (MFU)"][1] == "not measured"


def test_the_goals_of_the_end_to_end_step_are_counted_from_medians_and_peaks() -> None:
    sides = {"msq": {"median": 100.0, "peak_mb": 90.0}, "msq compiled": {"median": 80.0},
             "HF": {"median": 150.0}, "HF SDPA": {"median": 120.0, "peak_mb": 100.0}}  # fmt: skip
    found = {"ceilings": {"bf16_flops": 800e12},
             "train TimeSformer-B T=16": {"flops": 32e12, "sides": sides}}  # fmt: skip
    rows = {row[0]: row[1:] for row in gpu_goals.table(found)}
    start = "end-to-end step T=16, "
    assert rows[f"{start}share of the ceiling (MFU)"] == (">= 0.45", "0.50", "yes")  # 32 / 0.08
    assert rows[f"{start}times faster than HF, eager"][1] == "1.50"
    assert rows[f"{start}times faster than HF's best"][1] == "1.50"  # 120 / 80
    assert rows[f"{start}peak memory over HF SDPA"] == ("<= 1", "0.90", "yes")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_script_says_so() -> None:
    done = gpu_script("--smoke")
    assert done.returncode == 0
    assert "GPU tier not run" in done.stdout
