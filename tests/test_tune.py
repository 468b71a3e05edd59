"""The tuner without a GPU: it compiles candidates, and fills a table by a clock that is none."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from msq.bench import tune as tuner
from msq.bench.gpu_timing import Session
from msq.bench.kernel_builds import Made
from msq.bench.tune import Judge, merged, named, tune, untimed, write_table
from msq.bench.tune_candidates import BUCKETS, Bucket, candidates
from msq.bench.tune_judges import block, fake_judge, gpu_judge
from msq.errors import UsageError
from msq.head.packed_kernels import OPS
from msq.kernels import dispatch, tiles
from msq.kernels.tiles import Tile, all_tiles, find_tile, forced

GOOD = Made(64, 0, 1024, 100)
TINY = {
    op: Bucket(op, 256, clips=2, queries=5, tokens=3, width=64 if op != "absorbed_cross" else 128)
    for op in OPS
}


@pytest.fixture
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "compile_for", lambda *_: GOOD)


def silent(_: str) -> None:
    pass


@pytest.mark.parametrize("op", OPS)
def test_all_forms_of_a_block_are_the_same_numbers(op: str) -> None:
    leaves, forms = block(TINY[op], "cpu", torch.float64, triton=False)
    assert len(forms) == (3 if "cross" in op else 2)
    grad = torch.randn(forms["kernel"]().shape, dtype=torch.float64)
    expected = (
        forms["kernel"](),
        *torch.autograd.grad(forms["kernel"](), leaves, grad, materialize_grads=True),
    )
    for name, form in forms.items():
        found = form(), *torch.autograd.grad(form(), leaves, grad, materialize_grads=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("op", OPS)
def test_what_runs_on_a_gpu_runs_on_the_cpu_with_references(op: str) -> None:
    judge = gpu_judge(Session("cpu", True, 60, print))
    bucket = TINY[op]
    one = [Tile(op, "sm_90", 1, {"ROWS": 1}, 4, 1)]
    assert judge.right(bucket, one)
    for both in (False, True):
        times = judge.time(bucket, {"a": one, "b": one}, both)
        assert all(t["q25"] <= t["median"] <= t["q75"] for t in times.values())
        assert times.keys() == {"a", "b"}
    assert len(judge.against(bucket, one)) == (3 if "cross" in op else 2)


def test_real_candidates_compile_and_fill_a_table_that_the_dispatch_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    bucket = next(b for b in BUCKETS if b.op == "relu_drop" and b.keys == 3072)
    found = tune(bucket, 90, fake_judge(), "no machine", told.append, most=2)
    assert sum(line.endswith(": fits") for line in told) == 4  # two of each kernel
    rest = untimed(BUCKETS, [bucket], 90)
    file = tmp_path / "tiles.json"
    write_table(file, merged(all_tiles(), [*rest, found]))
    table = tuple(Tile(**line) for line in json.loads(file.read_text(encoding="utf-8")))
    assert {t.op for t in table} == {t.op for t in all_tiles()}
    monkeypatch.setattr(tiles, "all_tiles", lambda: table)
    tiles._from_table.cache_clear()
    winner = find_tile("relu_drop", (9, 0), 3072)
    assert winner == found.tiles[0]
    assert winner.ratio is not None
    assert winner.measured["kernel_us"]["median"] > 0
    assert find_tile("relu_drop", (9, 0), 2048).ratio is None  # that range was not timed
    assert find_tile("relu_drop", (8, 0), 3072).ratio is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.delenv("MSQ_KERNELS", raising=False)
    dispatch.resolve.cache_clear()
    choice = dispatch.resolve("relu_drop", torch.device("cuda"), torch.bfloat16, 3072)
    assert choice.path == ("triton" if winner.ratio > 1 else "reference")
    assert choice.reason == f"measured {winner.ratio:.2f} x the reference on sm_90"
    dispatch.resolve.cache_clear()
    tiles._from_table.cache_clear()


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_every_range_ends_with_one_tile_for_each_kernel(bucket: Bucket) -> None:
    found = tune(bucket, 90, fake_judge(), "", silent)
    assert [t.op for t in found.tiles] == [b.op for b in bucket.builds()]
    assert found.tiles[0].op == bucket.op
    for tile, build in zip(found.tiles, bucket.builds(), strict=True):
        assert (tile.architecture, tile.keys) == ("sm_90", bucket.keys)
        assert build.keys <= bucket.keys
        tried = list(candidates(build.op, "sm_90", bucket.keys))
        fastest = min(tried, key=lambda t: found.timed[named(t)]["median"])
        assert (tile.sizes, tile.warps, tile.stages) == (
            fastest.sizes, fastest.warps, fastest.stages,
        )  # fmt: skip
    assert (found.tiles[0].ratio is None) is False
    assert all(tile.ratio is None for tile in found.tiles[1:])


def test_candidates_that_spill_or_are_wrong_are_never_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = TINY["self_attention"]

    def compiled(build: Any, architecture: int, tile: Tile) -> Made:
        if tile.warps == 4:
            return replace(GOOD, stack=8)
        if tile.sizes["ROWS"] == 64:
            return replace(GOOD, shared=228 * 1024)
        return GOOD

    timed: list[str] = []

    def time(bucket: Bucket, sets: Any, both: bool) -> Any:
        timed.extend(sets)
        return fake_judge().time(bucket, sets, both)

    def right(_: Bucket, of: Any) -> bool:
        if of[0].stages == 3 and of[0].architecture == "sm_90" and of[0].warps == 8:
            raise RuntimeError("out of resources")
        return of[0].sizes["ROWS"] != 16

    monkeypatch.setattr(tuner, "compile_for", compiled)
    found = tune(bucket, 90, Judge(right, time, fake_judge().against), "", silent)
    forward = [name for name in timed if name.startswith("self_attention ROWS")]
    assert forward == [f"self_attention ROWS={rows} warps=8 stages=2" for rows in (32, 128)]
    assert found.left_out["self_attention ROWS=32 warps=4 stages=2"] == "spills (8 bytes of stack)"
    assert found.left_out["self_attention ROWS=64 warps=8 stages=2"].endswith("of shared memory")
    assert found.left_out["self_attention ROWS=16 warps=8 stages=2"] == "wrong"
    assert "does not run: out" in found.left_out["self_attention ROWS=32 warps=8 stages=3"]
    nothing = Judge(lambda *_: False, time, fake_judge().against)
    with pytest.raises(UsageError, match="no candidate of self_attention is left"):
        tune(bucket, 90, nothing, "", silent)


def test_the_ratio_is_to_the_faster_reference(nothing_is_compiled: None) -> None:
    def against(*_: Any) -> Any:
        times = {"kernel": 2.0, "standard": 5.0, "absorbed": 3.0}
        return {name: dict.fromkeys(("median", "q25", "q75"), t) for name, t in times.items()}

    judge = replace(fake_judge(), against=against)
    tile = tune(TINY["cross_attention"], 90, judge, "this machine", silent).tiles[0]
    assert tile.ratio == 1.5
    assert tile.measured["reference"] == "absorbed"
    assert tile.measured["reference_us"]["median"] == 3000
    assert tile.measured["machine"] == "this machine"


def test_forced_tiles_last_as_long_as_they_are_asked_for() -> None:
    usual = find_tile("self_attention", (9, 0), 157)
    other = replace(usual, warps=16)
    with forced(other):
        assert find_tile("self_attention", (9, 0), 157) is other
        assert find_tile("relu_drop", (9, 0), 2048).op == "relu_drop"
    assert find_tile("self_attention", (9, 0), 157) == usual


@pytest.mark.usefixtures("nothing_is_compiled")
def test_the_command_writes_a_table_and_never_one_of_a_dry_run_into_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, script = tmp_path / "tiles.json", Path(__file__).parents[1] / "benchmarks" / "tune.py"
    command = [str(script), "--dry-run", "--op", "drop_add_norm", "--keys", "512"]
    monkeypatch.setattr(sys, "argv", [*command, "--write"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(script), run_name="__main__")
    assert "use --out" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(file)])
    runpy.run_path(str(script), run_name="__main__")
    assert "no number of it counts" in capsys.readouterr().out
    lines = json.loads(file.read_text(encoding="utf-8"))
    fresh = [line for line in lines if "ratio" in line]
    assert [(line["op"], line["architecture"], line["keys"]) for line in fresh] == [
        ("drop_add_norm", "sm_90", 512)
    ]
