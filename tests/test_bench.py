"""Comparisons: the gate before every number, the registry, the document, the GPU script."""

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

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from msq.bench import gpu_goals, gpu_parts, gpu_steps
from msq.bench.cases import KINDS, Case, Gate, Prepared, Settings, Side, registry, worst_of
from msq.bench.clean_decoder import CleanDecoder
from msq.bench.compiled_gate import compiled_gate
from msq.bench.gpu_answers import answers
from msq.bench.gpu_end_to_end import SIDES
from msq.bench.gpu_parts import run_part
from msq.bench.gpu_timing import Session
from msq.bench.head_problem import Problem, Shape, agreement
from msq.bench.kernel_cases import covered_ops, known_ops
from msq.bench.runner import exit_code, interleaved, quartiles, run_cases
from msq.bench.torch_sides import AuthorsHead, TorchDecoder
from msq.cli import main
from msq.errors import UsageError
from msq.head.evaluate import score
from msq.head.flops import step_flops
from msq.head.masks import CountedMasks
from msq.head.packed import PackedHead
from msq.kernels.dispatch import resolve
from msq.report import benchmarks

ROOT = Path(__file__).parents[1]


def case(worst: float, sides: dict[str, Side] | None = None, **options: float) -> Case:
    """Two sides, one of which does twice the work, and a gate this far from perfect."""
    work = torch.randn(400, 400)
    ways = sides or {
        "once": Side(lambda: work @ work),
        "twice": Side(lambda: [work @ work, work @ work, work @ work, work @ work]),
    }

    @contextmanager
    def prepare(settings: Settings) -> Iterator[Prepared]:
        yield Prepared(lambda: Gate(worst, 0.5, "a difference"), lambda: ways, **options)

    unit = "MB/s" if "megabytes" in options else "ms"
    return Case("a case", "work", next(iter(ways)), unit, 9, prepare)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quick", [True, False])
def test_every_kind_has_cases_with_names_of_their_own(kind: str, quick: bool) -> None:
    found = registry(kind, Settings(quick=quick))
    names = [one.name for one in found]
    assert len(set(names)) == len(names) >= 2
    assert all(one.compares and one.base and one.rounds >= 5 for one in found)


def test_the_head_cases_are_those_that_are_promised() -> None:
    names = [one.name for one in registry("head", Settings())]
    for shape in ("K=157 B=16", "K=20 B=64"):
        for dropout in ("0.1", "0"):
            assert f"step {shape} p={dropout} fp32" in names
            assert f"step {shape} p={dropout} bf16" in names
        assert f"step 6+6 {shape} p=0.1 fp32" in names
    chosen = registry("head", Settings(only="K=157 B=16 p=0 "))
    assert [one.name for one in chosen] == ["step K=157 B=16 p=0 fp32", "step K=157 B=16 p=0 bf16"]


def test_unknown_kinds_and_cases_are_refused_by_name() -> None:
    with pytest.raises(
        UsageError, match="expected head, stack, store, decode, extract, found 'disk'"
    ):
        registry("disk", Settings())
    with pytest.raises(UsageError, match=r"no case contains 'GOP 7'.*decode GOP 30"):
        registry("decode", Settings(only="GOP 7"))


def test_a_red_gate_gives_no_speed_and_exit_code_four() -> None:
    def never() -> None:
        raise AssertionError("timed behind a red gate")

    red, green = case(0.6, {"a": Side(never), "b": Side(never)}), case(0.4)
    document = run_cases([red, green], Settings(rounds=2))
    assert document["cases"][0]["gate"] == {
        "ok": False, "worst": 0.6, "tolerance": 0.5, "what": "a difference",
    }  # fmt: skip
    for key in ("sides", "ratios", "cpu_ratios", "mfu"):
        assert document["cases"][0][key] == {}
    assert document["cases"][1]["sides"].keys() == {"once", "twice"}
    assert exit_code(document) == 4
    assert exit_code({"cases": document["cases"][1:]}) == 0


def test_a_distance_that_is_no_number_is_red_and_the_worst() -> None:
    nan = Gate(float("nan"), 1.0, "")
    assert not nan.ok
    assert worst_of([Gate(0.0, 0.0, ""), nan, Gate(0.9, 1.0, "")]) is nan
    assert worst_of([Gate(0.2, 1.0, ""), Gate(0.003, 0.004, "")]).worst == 0.003
    assert worst_of([Gate(1.0, 0.0, "bytes"), Gate(0.9, 1.0, "")]).what == "bytes"


class Clock:
    """Both clocks of the runner: they move when a side says so, and a little at each look."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def perf_counter(self) -> float:
        self.wall += 2**-10
        return self.wall

    def process_time(self) -> float:
        self.cpu += 2**-10
        return self.cpu

    def work(self, wall: float, cpu: float) -> None:
        self.wall, self.cpu = self.wall + wall, self.cpu + cpu


def test_medians_ratios_and_shares_are_what_they_are_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr("msq.bench.runner.time", clock)
    sides = {
        "once": Side(lambda: clock.work(1.0, 2.0)),
        "twice": Side(lambda: clock.work(3.0, 8.0)),
    }
    cases = [case(0.0, sides, flops=2 * 400**3), case(0.0, sides, megabytes=3.0)]
    found = run_cases(cases, Settings(rounds=7))
    first, second = found["cases"]
    assert first["rounds"] == 7
    ratio = first["ratios"]["twice / once"]
    assert ratio["q25"] <= ratio["median"] <= ratio["q75"]
    assert ratio["median"] == pytest.approx(3.0, rel=0.01)
    assert first["cpu_ratios"]["twice / once"]["median"] == pytest.approx(4.0, rel=0.01)
    side = first["sides"]["once"]
    assert side["median"] == pytest.approx(1000, rel=0.01)
    assert side["cpu"]["median"] == pytest.approx(2000, rel=0.01)
    assert side["unit"] == "ms"
    reached = 2 * 400**3 / (1e-3 * side["median"]) / 1e9
    assert first["mfu"]["once"] == pytest.approx(reached / found["ceilings"]["fp32"])
    speeds = second["sides"]
    assert speeds["once"]["unit"] == "MB/s"
    assert speeds["once"]["median"] > speeds["twice"]["median"]  # less time is more MB/s


def test_quartiles_against_numpy() -> None:
    import numpy as np

    values = [3.0, 9.0, 1.0, 7.0, 4.0, 4.5]
    expected = np.quantile(values, [0.25, 0.5, 0.75])
    found = quartiles(values)
    assert [found["q25"], found["median"], found["q75"]] == pytest.approx(expected.tolist())
    assert quartiles([2.0]) == {"median": 2.0, "q25": 2.0, "q75": 2.0}


def test_sides_are_interleaved_and_made_ready_before_each_run() -> None:
    seen: list[str] = []
    sides = {
        name: Side(lambda n=name: seen.append(n), lambda n=name: seen.append(f"before {n}"))  # type: ignore[misc]
        for name in "abc"
    }
    taken = interleaved(sides, rounds=20, warm_up=1)
    assert {len(times) for times in taken.values()} == {20}
    assert seen[0::2] == [f"before {name}" for name in seen[1::2]]
    rounds = ["".join(seen[1::2][i : i + 3]) for i in range(0, 63, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 3  # in changing order


def test_operations_are_those_that_torch_counts() -> None:
    clips, classes, tokens = 3, 7, 5
    problem = Problem(Shape(classes, clips, 0.0, quick=True))
    model = TorchDecoder(problem.head())
    memory = torch.randn(clips, tokens, 32)
    queries = torch.randn(clips, classes, 32)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model.decoder.train()(queries, memory)
    ours = step_flops(clips, classes, tokens, width=32, ffn=128, layers=2)
    assert ours == 3 * counter.get_total_flops()
    assert step_flops(256, 157, 17) == pytest.approx(5.65e12, rel=1e-3)


@pytest.mark.parametrize("official", [False, True])
def test_other_ways_of_writing_the_head_compute_the_same(official: bool) -> None:
    problem = Problem(Shape(7, 3, 0.1, official=official, quick=True), dtype=torch.float64)
    model = problem.head().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        expected = model(problem.tokens, problem.image)["logits"]
        forms = [AuthorsHead(model)] if official else [CleanDecoder(model), TorchDecoder(model)]
        for form in forms:
            found = form.eval()(problem.tokens, problem.image)
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_the_gate_of_the_head_sees_a_wrong_packed_head(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(7, 4, 0.1, quick=True)
    assert agreement(shape, "cpu", "fp32").ok
    right = PackedHead._ffn_block

    def wrong(self, x, name, masks):  # type: ignore[no-untyped-def]
        return right(self, x, name, masks) * (1 + 1e-6)

    monkeypatch.setattr(PackedHead, "_ffn_block", wrong)
    assert not agreement(shape, "cpu", "fp32").ok


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    code = end.value.code
    return int(code or 0), capsys.readouterr().out


def test_bench_head_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "head", "--quick", "--case", "fp32", "--device", "cpu", "-q"]
    code, out = run([*command, "--json"], capsys)
    document = json.loads(out)
    assert code == 0
    assert {"machine", "cases"} <= document.keys()
    assert {"processor", "cores", "threads", "torch", "python", "date"} <= document[
        "machine"
    ].keys()
    assert [one["name"] for one in document["cases"]] == [
        "step K=7 B=4 p=0.1 fp32", "step K=7 B=4 p=0 fp32", "step 6+6 K=7 B=4 p=0.1 fp32",
    ]  # fmt: skip
    for one in document["cases"]:
        assert one["gate"]["ok"]
        assert 0 < one["gate"]["worst"] <= one["gate"]["tolerance"]
        sides = {"packed", "plain", "authors" if "6+6" in one["name"] else "torch"}
        assert one["sides"].keys() == sides
        for side in one["sides"].values():
            assert 0 < side["q25"] <= side["median"] <= side["q75"]
            assert side["unit"] == "ms"
        assert one["ratios"].keys() == {f"{side} / packed" for side in sides - {"packed"}}
    code, out = run([*command, "--case", "p=0 fp32"], capsys)
    assert code == 0
    assert "gate: the same" in out
    assert "the numbers mean nothing" in out


@pytest.mark.parametrize("kind", ["store", "decode"])
def test_bench_store_and_decode_end_to_end(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(["bench", kind, "--quick", "--rounds", "1", "--json", "-q"], capsys)
    document = json.loads(out)
    assert code == 0
    assert len(document["cases"]) == len(registry(kind, Settings()))
    for one in document["cases"]:
        assert one["gate"]["worst"] == 0
        assert len(one["sides"]) >= 2


def test_heads_at_once_are_timed_against_one_after_another_and_shared_clips_against_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out = run(["bench", "stack", "--quick", "--rounds", "1", "--json", "-q"], capsys)
    assert code == 0
    *stacks, same = json.loads(out)["cases"]
    for one in stacks:
        assert one["sides"].keys() == {"stacked", "sequential"}
    assert same["sides"].keys() == {"gathered once", "gathered for each"}
    for one in (*stacks, same):
        assert one["gate"]["ok"]
        assert {name.rpartition(", ")[2] for name in one["figures"]} == one["sides"].keys()


def test_wrong_frames_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from msq.bench import decode_cases

    right = decode_cases.plan
    monkeypatch.setattr(decode_cases, "plan", lambda path: right(path)[::-1])
    command = ["bench", "decode", "--quick", "--case", "GOP 30", "-q"]
    code, out = run(command, capsys)
    assert code == 4
    assert "NOT THE SAME" in out
    assert "CPU ms" not in out


def test_libraries_that_cannot_be_compared_are_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from msq.bench import decode_libraries as libraries

    def shifted(path: Any) -> Any:
        frames = libraries.every_frame(path)
        return np.concatenate([frames[1:], frames[-1:]])

    def missing() -> Any:
        raise ImportError("No module named 'elsewhere'")

    known = {"msq", "PyAV sequential"}
    kept = {name: load for name, load in libraries.LIBRARIES.items() if name in known}
    others = {"late": lambda: (shifted, libraries.by_torch), "elsewhere": missing}
    monkeypatch.setattr(libraries, "LIBRARIES", {**kept, **others})
    command = ["bench", "decode", "--quick", "--rounds", "1", "--case", "240p g12", "-q", "--json"]
    code, out = run(command, capsys)
    (one,) = json.loads(out)["cases"]
    assert code == 0
    assert one["sides"].keys() == known
    assert one["ratios"].keys() == {"PyAV sequential / msq"}
    assert one["left_out"]["elsewhere"] == "ImportError: No module named 'elsewhere'"
    assert "frames are others than asked for" in one["left_out"]["late"]


def test_a_gpu_that_is_not_there_is_asked_for_in_vain(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "head", "--device", "cuda:1" if torch.cuda.is_available() else "cuda"],
               capsys)[0] == 2  # fmt: skip


@pytest.mark.parametrize(("kind", "named"), [("head", "cuda"), ("extract", "cuda:1")])
def test_one_of_several_gpus_can_be_chosen(
    kind: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen: list[int] = []
    asked: list[Settings] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(benchmarks, "registry", lambda kind, settings: asked.append(settings) or ())
    monkeypatch.setattr(benchmarks, "run_cases", lambda *_: {})
    monkeypatch.setattr(benchmarks, "show", lambda *_, **__: 0)
    with pytest.raises(SystemExit) as left:
        main(["bench", kind, "--device", "cuda:1"])
    assert (left.value.code, chosen, [settings.device for settings in asked]) == (0, [1], [named])
    with pytest.raises(SystemExit) as left:
        main(["bench", kind, "--device", "cuda:2"])
    assert left.value.code == 2
    assert "expected one of cuda:0, cuda:1" in capsys.readouterr().err


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


def test_the_gate_of_the_head_compares_on_the_masks_of_the_step_that_is_timed() -> None:
    counted, drawn = (Problem(Shape(7, 4, 0.1, quick=True), counted=c) for c in (True, False))
    assert isinstance(counted.masks(), CountedMasks)
    assert not isinstance(drawn.masks(), CountedMasks)
    assert Problem(Shape(7, 4, 0.0, quick=True), counted=True).masks() is None
    right = drawn.head().eval()(counted.tokens, counted.image, masks=counted.masks())["logits"]
    packed = PackedHead(counted.head())
    found = packed(counted.tokens, counted.image, masks=counted.masks())["logits"]
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


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


def logits_of(problem: Problem) -> Any:
    module = TorchDecoder(problem.head()).train()
    return lambda: module(problem.tokens, problem.image)


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_what_a_compiler_made_is_compared_before_it_is_timed(dropout: float) -> None:
    problem = Problem(Shape(7, 4, dropout, quick=True))
    with torch.no_grad():
        right = problem.head().eval()(problem.tokens, problem.image)["logits"]
    logits = logits_of(problem)

    def gate(form: Any, low: bool = False) -> Gate:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return compiled_gate("it", form, logits, right, problem.loss, dropout=dropout > 0,
                                 low=low)  # fmt: skip

    torch.manual_seed(0)
    assert gate(logits).ok
    assert gate(logits, low=True).ok
    assert not gate(lambda: logits() * torch.nan).ok
    assert not gate(lambda: logits() + 3.0, low=True).ok
    if not dropout:
        assert not gate(lambda: logits() * 1.001).ok
        assert not gate(lambda: logits() * 1.1, low=True).ok


def test_wrong_compiled_sides_are_neither_timed_nor_passed_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_steps, "compiled", lambda form, device: lambda: form() + 3.0)
    results: list[dict[str, Any]] = []
    session = Session("cpu", True, 60.0, results.append)
    gpu_steps.steps(session, Shape(5, 2, 0.0, quick=True), ("packed", "B2"))
    assert [sorted(one["sides"]) for one in results] == [["packed"], ["B2", "packed"]]
    first, last = results
    assert first["gate"]["ok"]
    assert "median" in last["sides"]["packed"]
    assert "not the same: B2, compiled" in last["sides"]["B2"]["error"]
    assert "median" not in last["sides"]["B2"]
    assert not last["gate"]["ok"]
    monkeypatch.setattr(torch, "compile", lambda form, **_: lambda: form() + 3.0)
    command = ["bench", "head", "--quick", "--compile", "--case", "p=0 fp32", "--device", "cpu",
               "-q", "--json"]  # fmt: skip
    code, out = run(command, capsys)
    assert code == 4
    assert json.loads(out)["cases"][0]["gate"]["what"].startswith("compiled, compiled,")


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
