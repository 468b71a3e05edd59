"""Comparisons: the gate before every number, the registry, the document, the GPU script."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from msq.bench import gpu_goals
from msq.bench.cases import KINDS, Case, Gate, Prepared, Settings, Side, registry, worst_of
from msq.bench.clean_decoder import CleanDecoder
from msq.bench.gpu_end_to_end import SIDES
from msq.bench.gpu_parts import run_part
from msq.bench.gpu_timing import Session
from msq.bench.head_problem import Problem, Shape, agreement
from msq.bench.kernel_cases import covered_ops, known_ops
from msq.bench.runner import exit_code, interleaved, quartiles, run_cases
from msq.bench.torch_sides import AuthorsHead, TorchDecoder
from msq.cli import main
from msq.errors import UsageError
from msq.head.flops import step_flops
from msq.head.packed import PackedHead

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
    (at_once,) = (row for name, row in rows.items() if "at once" in name)
    assert at_once == (">= 1.8", "2.50", "yes")
    assert rows["step p=0.1, times faster than B2"] == (">= 1.2", "1.50", "yes")
    assert rows["step p=0.1, times faster than B1"] == (">= 1.4", "1.30", "no")
    assert rows["share of the measured ceiling (MFU)"] == (">= 0.5", "0.72", "yes")  # 5.65 / 7.9
    assert rows["peak memory, over B1"] == ("<= 0.75", "0.70", "yes")
    assert rows["epoch of Charades' size, s"][1] == "0.32"
    assert rows["losses that differ between two runs"] == ("<= 0", "1", "no")
    # The table of floors by hand: 9.04 ms of layers, 0.18 of Adam, 0.02 of the classifier.
    assert gpu_goals.roofline(790e12, 4.3e12) == pytest.approx(9.25e-3, rel=0.01)


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
    steps = [one for one in results if one["name"].startswith("step")]
    assert len(steps) == 5  # two in part 1, three other shapes in part 3
    assert all(one["gate"]["ok"] for one in steps)
    assert {"packed", "B0", "B0 TF32", "B1", "B2", "eager bf16"} == steps[0]["sides"].keys()
    assert not any("error" in side for one in steps for side in one["sides"].values())
    names = {one["name"] for one in results}
    assert {"machine", "ceilings", "matrix products", "triton product", "ffn product", "mask bits",
            "cross-attention", "loss curve", "inference B=1", "inference B=256",
            "kernel self_attention", "kernel drop_add_norm", "heads at once",
            "encoder TimeSformer-B", "encoder ViT-B/16", "end to end"} <= names  # fmt: skip
    assert "| goal | target | reached | met |" in done.stdout


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
