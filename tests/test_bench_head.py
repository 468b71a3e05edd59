"""The head's benchmark: what is timed does the same work, and is compared first."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from msq.bench import gpu_steps, head_cases
from msq.bench.cases import Gate, Settings, registry
from msq.bench.clean_decoder import CleanDecoder
from msq.bench.compiled_gate import compiled_gate
from msq.bench.gpu_timing import Session
from msq.bench.head_problem import Problem, Shape, agreement
from msq.bench.torch_sides import AuthorsHead, TorchDecoder
from msq.cli import main
from msq.head.flops import step_flops
from msq.head.masks import CountedMasks
from msq.head.packed import PackedHead
from msq.head.packed_layers import PackedLayers


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    code = end.value.code
    return int(code or 0), capsys.readouterr().out


def test_the_head_cases_are_those_that_are_promised(monkeypatch) -> None:
    names = [one.name for one in registry("head", Settings())]
    for shape in ("K=157 B=16", "K=20 B=64"):
        for dropout in ("0.1", "0"):
            assert f"step {shape} p={dropout} fp32" in names
            assert f"step {shape} p={dropout} bf16" in names
        assert f"step 6+6 {shape} p=0.1 fp32" in names
    monkeypatch.setattr(head_cases, "bf16_is_native", lambda device: False)
    for emulated in (False, True):
        found = registry("head", Settings(emulated=emulated))
        low = [one for one in found if one.name.endswith("bf16")]
        assert {bool(one.not_here) for one in low} == {not emulated}
        assert {"bf16 emulated" in one.compares for one in low} == {emulated}
        assert not any("emulated" in one.compares + one.not_here for one in found if one not in low)
    with low[0].prepare(Settings(quick=True, emulated=True)) as prepared:
        assert prepared.flops is None  # no share of a ceiling that emulation has none of
    chosen = registry("head", Settings(only="K=157 B=16 p=0 "))
    assert [one.name for one in chosen] == ["step K=157 B=16 p=0 fp32", "step K=157 B=16 p=0 bf16"]


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
    right = PackedLayers.ffn_block

    def wrong(self, x, name, masks):  # type: ignore[no-untyped-def]
        return right(self, x, name, masks) * (1 + 1e-6)

    monkeypatch.setattr(PackedLayers, "ffn_block", wrong)
    assert not agreement(shape, "cpu", "fp32").ok


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


def test_the_gate_of_the_head_compares_on_the_masks_of_the_step_that_is_timed() -> None:
    counted, drawn = (Problem(Shape(7, 4, 0.1, quick=True), counted=c) for c in (True, False))
    assert isinstance(counted.masks(), CountedMasks)
    assert not isinstance(drawn.masks(), CountedMasks)
    assert Problem(Shape(7, 4, 0.0, quick=True), counted=True).masks() is None
    right = drawn.head().eval()(counted.tokens, counted.image, masks=counted.masks())["logits"]
    packed = PackedHead(counted.head())
    found = packed(counted.tokens, counted.image, masks=counted.masks())["logits"]
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


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
