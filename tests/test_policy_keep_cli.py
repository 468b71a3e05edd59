"""`--policy keep` on the command line: what is made, what is said, and the exit codes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from msq.cli import main
from msq.extract.store import open_store

fakes = runpy.run_path(str(Path(__file__).with_name("fakes.py")))
SMALL = ("head.layers=1", "head.heads=4", "head.ffn=32", "train.batch=4", "train.val=0")
PLAIN = ("--device", "cpu", "--workers", 0, "-q", "--json")
ITEM = {"item": "m.csv line 4", "change": "joined with line 2, clip '0': adds 'eat'"}


def run(*arguments: Any) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos of six lines: one has a line for each of its labels, one stands in two splits."""
    folder = tmp_path_factory.mktemp("keep")
    for k in range(4):
        fakes["write_video"](folder / f"{k}.mp4", k)
    lines = ("0.mp4,run,train", "1.mp4,eat,train", "0.mp4,eat,train", "2.mp4,run,train",
             "3.mp4,run,test")  # fmt: skip
    path = folder / "m.csv"
    path.write_text("\n".join(("path,labels,split", *lines)) + "\n")
    return path


@pytest.fixture(scope="module")
def store(manifest: Path) -> Path:
    out = manifest.with_name("made.zarr")
    assert run("extract", "--manifest", manifest, "--policy", "keep", "--out", out, *PLAIN) == 0
    return out


def test_extract_keeps_and_lists_and_leaves_with_0(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("extract", "--manifest", manifest, "--out", tmp_path / "s.zarr", *PLAIN)
    assert run(*given, "--policy", "keep", "--dry-run") == 0
    told = capsys.readouterr()
    plan = json.loads(told.out)
    assert (plan["clips"], plan["kept"], plan["kept_items"]) == (4, 1, [ITEM])
    assert f"kept: {ITEM['item']}: {ITEM['change']}" in told.err
    assert run(*given, "--policy", "keep") == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert (found["clips"], found["done"], found["skipped"]) == (4, 4, 0)
    assert (found["kept"], found["kept_items"]) == (1, [ITEM])
    assert f"kept: {ITEM['item']}: {ITEM['change']}" in told.err
    assert open_store(tmp_path / "s.zarr").labels().tolist() == [[1, 1], [1, 0], [0, 1], [0, 1]]
    assert run(*given, "--policy", "keep") == 0  # the same list again
    capsys.readouterr()
    assert run(*given) == 1  # another: the label of line 4 is not in it
    assert "this store was made in another way" in capsys.readouterr().err
    with manifest.with_name("skipped.csv").open("w") as file:
        file.write(manifest.read_text() + "0.mp4,run,test\n")
    given = ("extract", "--manifest", file.name, "--out", tmp_path / "t.zarr", *PLAIN)
    assert run(*given, "--policy", "keep") == 3  # what it cannot keep is skipped
    found = json.loads(capsys.readouterr().out)
    assert (found["kept"], found["skipped"]) == (1, 1)
    assert found["skipped_items"][0]["item"] == "line 7"


def test_a_dry_run_says_how_many_more_were_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes["write_video"](tmp_path / "0.mp4", 0)
    lines = ["0.mp4,run,train"] * 24 + ["0.mp4,run,test"] * 22
    (tmp_path / "m.csv").write_text("\n".join(("path,labels,split", *lines)) + "\n")
    given = ("extract", "--manifest", tmp_path / "m.csv", "--policy", "keep", "--dry-run")
    assert run(*given, "--out", tmp_path / "s.zarr", *PLAIN) == 0
    told = capsys.readouterr().err
    assert told.count("\nkept: m.csv") + told.startswith("kept: m.csv") == 20
    assert "kept: … and 3 more (all of them with --json)" in told
    assert "skipped: … and 2 more (all of them with --json)" in told


def test_check_counts_what_the_manifest_gives_and_lists_what_was_changed(
    manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("datasets", "check", "manifest", "--root", manifest, "--option", "policy=keep")
    assert run(*given, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kept_items"] == [ITEM]
    assert found["oddities"] == {}
    assert run(*given) == 0
    assert f"kept: {ITEM['item']}: {ITEM['change']}" in capsys.readouterr().err


def test_verify_extracts_again_from_the_list_as_it_was_kept(
    manifest: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("store", "verify", store, "--sample", 3, "--manifest", manifest, "-q", "--json",
             "--device", "cpu")  # fmt: skip
    assert run(*given, "--policy", "keep") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["sampled"] == 3
    assert run(*given) == 1
    assert "is not of this dataset" in capsys.readouterr().err


def test_a_grid_keeps_tells_and_does_not_take_the_store_of_another_policy(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = 'name = "t"\n[train]\nepochs = 1\nval = 0.0\n[head]\nlayers = 1\nheads = 4\n'
    file = tmp_path / "g.toml"
    names = {}
    for policy, code in (("skip", 3), ("keep", 0), ("error", 2)):
        file.write_text(f'{settings}ffn = 32\n[extract]\nmanifest = "{manifest}"\nworkers = 0\n'
                        f'policy = "{policy}"\ndevice = "cpu"\n')  # fmt: skip
        given = ("grid", file, "--stores", tmp_path / "s", "--device", "cpu", "-q", "--json")
        left = run(*given, "--out", tmp_path / policy)
        told = capsys.readouterr()
        if policy == "error":
            assert left != 0
            continue
        assert left == code, told.err
        ((name, record),) = json.loads(told.out)["stores"].items()
        names[policy] = name
        assert record["kept_items"] == ([ITEM] if policy == "keep" else [])
        assert ("kept: " in told.err) == (policy == "keep")
    assert names["skip"] != names["keep"]


def test_training_end_to_end_lists_what_was_kept(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("train", manifest, "--policy", "keep", "--out", tmp_path / "run", "--epochs", 1)
    assert run(*given, *SMALL, *PLAIN) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert (found["skipped"], found["kept_items"]) == (0, [ITEM])
    assert "kept: m.csv line 4" in told.err
    assert "--policy keep" in found["extract"]


def test_a_dataset_that_does_not_know_the_policy_says_which_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("extract", "--dataset", "hmdb51", "--root", tmp_path, "--policy", "keep")
    assert run(*given, "--out", tmp_path / "s.zarr") == 2
    assert "policy=keep: expected skip, error" in capsys.readouterr().err
