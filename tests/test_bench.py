"""`msq bench`: cases, gates, the runner and what is shown, of every kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from msq.bench.cases import KINDS, Case, Gate, Prepared, Settings, Side, registry, worst_of
from msq.bench.runner import exit_code, interleaved, quartiles, run_cases
from msq.cli import main
from msq.errors import UsageError
from msq.report import benchmarks


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


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    code = end.value.code
    return int(code or 0), capsys.readouterr().out


@pytest.mark.parametrize("kind", ["store", "decode"])
def test_bench_store_and_decode_end_to_end(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(["bench", kind, "--quick", "--rounds", "1", "--json", "-q"], capsys)
    document = json.loads(out)
    assert code == 0
    assert len(document["cases"]) == len(registry(kind, Settings()))
    for one in document["cases"]:
        assert one["gate"]["worst"] == 0
        assert len(one["sides"]) >= 2


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
