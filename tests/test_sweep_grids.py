"""Grids over published class lists, and two commands at one grid."""

from __future__ import annotations

import dataclasses
import runpy
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msq.errors import UsageError
from msq.extract.store import open_store
from msq.head.class_splits import ClassSplit
from msq.head.grid import plan_grid, run_grid
from msq.head.grid_file import parse_grid
from msq.head.grid_stores import build_request, extraction_source, make_stores
from msq.head.split_shares import numbered_by_share
from msq.head.sweep import prepare
from msq.head.sweep_claims import at_work
from msq.head.sweep_plan import write_plan
from msq.report import grids
from msq.report.sweeps import conclude
from msq.world import generate_world

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sweep_stores.py"))))
TINY = """
name = "tiny"
[head]
layers = 1
heads = 2
ffn = 32
[train]
epochs = 1
batch = 16
"""
PAPER = """
[zero_shot]
seen = [50, 75]
splits = 2
[product]
"head.queries" = ["text"]
[paper]
rows = [{ "zero_shot.seen" = 50, "head.queries" = "text", value = 53.76 },
        { "zero_shot.seen" = 75, "head.queries" = "text", value = 60.28 }]
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(stores.make_store(tmp_path_factory.mktemp("grids") / "toy.zarr"))


@pytest.fixture
def lists(store: Path, tmp_path: Path) -> Path:
    """Two splits with 4 and two with 6 of the store's 8 classes, in folders as published."""
    names = list(open_store(store).classes)
    for folder, count in (("train_50_test_50", 4), ("train_75_test_25", 6)):
        for number in range(2):
            turned = names[number:] + names[:number]
            for side, found in (("train", turned[:count]), ("test", turned[count:])):
                path = tmp_path / "lists" / folder / side / f"split_{number}.list"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("\n".join(found) + "\n")
    return tmp_path / "lists"


def test_published_lists_make_a_row_for_each_share_beside_the_papers_number(
    store: Path, lists: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"store={store}", f"zero_shot.split_dir={lists}"]
    plan = plan_grid(parse_grid(TINY + PAPER, "tiny.toml", given))
    assert [(t.row["seen"], t.repeat["split"]) for t in plan.trials] == [
        (50, 0), (50, 1), (75, 0), (75, 1)
    ]  # fmt: skip
    assert [len(t.split.seen) for t in plan.trials if t.split] == [4, 4, 6, 6]
    plan, summary = run_grid(plan, tmp_path / "out")
    found = conclude(tmp_path / "out", plan, summary, zero_shot=True)
    rows = [row for row in found["table"]["rows"] if row["paper"] is not None]
    assert [(row["labels"]["seen"], row["done"], row["paper"]) for row in rows] == [
        (50, 2, pytest.approx(0.5376)), (75, 2, pytest.approx(0.6028))
    ]  # fmt: skip
    for result in found["results"]:
        result["runs"][0]["leaks"] = [{"seen": "a", "unseen": "b", "share": 1.0, "clips": 20}]
    grids.show(found, tmp_path / "out")
    said = " ".join(capsys.readouterr().err.split())
    assert "split 50 % seen, train_50_test_50/split_0 leaks" in said
    assert "split 75 % seen, train_75_test_25/split_0 leaks" in said


def test_the_shares_asked_for_are_kept_and_none_of_them_is_an_error(
    store: Path, lists: Path
) -> None:
    def shares(*changes: str) -> Counter[float]:
        given = [f"store={store}", f"zero_shot.split_dir={lists}", *changes]
        plan = plan_grid(parse_grid(TINY + PAPER, "tiny.toml", given))
        return Counter(trial.row["seen"] for trial in plan.trials)

    assert shares("zero_shot.seen=75") == {75: 2}
    assert shares("zero_shot.seen=[50]") == {50: 2}
    with pytest.raises(UsageError, match=r"have, 50, 75 %; found 25"):
        shares("zero_shot.seen=25")


@pytest.mark.parametrize(("seen", "left_out"), [("75", 2), ("[50, 75]", 0)])
def test_lists_of_other_shares_are_counted_in_one_line(
    seen: str, left_out: int, store: Path, lists: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = TINY + PAPER.replace('["text"]', '["text", "vanilla"]')
    (tmp_path / "tiny.toml").write_text(text)
    given = [f"store={store}", f"zero_shot.split_dir={lists}", f"zero_shot.seen={seen}"]
    assert stores.msq("grid", tmp_path / "tiny.toml", *given, "--dry-run") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "class lists" in line]
    expected = (
        f"warning: {tmp_path / 'tiny.toml'}: {left_out} of 4 class lists of {lists} are left out: "
        "other shares than zero_shot.seen"
    )
    assert said == ([expected] if left_out else [])


def test_a_share_is_that_which_a_list_misses_by_less_than_a_class() -> None:
    names = tuple(f"class {k}" for k in range(51))  # those of HMDB51
    splits = [ClassSplit(names[:count], names[count:]) for count in (25, 26, 38, 10, 26)]
    found = numbered_by_share(splits, [50, 75], "grid.toml")
    assert [(share, number, len(split.seen)) for share, number, split in found] == [
        (50, 0, 25), (50, 1, 26), (75, 0, 38), (50, 2, 26)
    ]  # fmt: skip
    every = numbered_by_share(splits, None, "grid.toml")
    assert [(share, number) for share, number, _ in every] == [
        (49, 0), (51, 0), (74.5, 0), (19.6, 0), (51, 1)
    ]  # fmt: skip


def test_stores_are_named_by_their_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,labels,split\na.mp4,x,train\n")
    monkeypatch.chdir(tmp_path)
    found = extraction_source({"manifest": str(manifest)}, Path("stores"))
    assert Path(found.store).parent == tmp_path / "stores"
    whole = extraction_source({"manifest": str(manifest)}, tmp_path / "stores")
    assert (found.store, found.key) == (whole.store, whole.key)


def test_a_plan_that_names_its_stores_from_here_goes_on_as_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grids were planned with the stores as they were typed."""
    (tmp_path / "m.csv").write_text("path,labels,split\na.mp4,x,train\n")
    monkeypatch.chdir(tmp_path)
    grid = parse_grid(f'{TINY}[extract]\nmanifest = "{tmp_path / "m.csv"}"\n', "tiny.toml")
    plan = plan_grid(grid, Path("stores"))
    sources = {
        key: dataclasses.replace(one, store=f"stores/{Path(one.store).name}")
        for key, one in plan.sources.items()
    }
    write_plan(tmp_path / "out", dataclasses.replace(plan, sources=sources, threads=7))
    before = (tmp_path / "out" / "plan.json").read_bytes()
    with at_work(tmp_path / "out"):  # while it is, no plan is replaced
        assert prepare(tmp_path / "out", plan).threads == 7
    assert (tmp_path / "out" / "plan.json").read_bytes() == before
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert prepare(tmp_path / "out", plan).threads == plan.threads == 1


def test_a_second_command_helps_the_first_to_make_a_store(tmp_path: Path) -> None:
    """The first is in the middle of its extraction, with nothing of it done."""
    made = generate_world(tmp_path / "w", train=6, val=0, test=2, seed=0)
    text = f'{TINY}[extract]\nmanifest = "{made.manifest}"\nframes = 4\nworkers = 0\n'
    plan = plan_grid(parse_grid(text, "tiny.toml"), tmp_path / "stores")
    ((key, source),) = plan.sources.items()
    (tmp_path / "stores").mkdir()
    assert source.extract is not None
    first = build_request(source.extract, Path(source.store)).extraction()
    at_it, let_go = threading.Event(), threading.Event()
    results: list[Any] = []

    def extract() -> None:
        with first.joined() as member:
            at_it.set()
            let_go.wait(600)
            first.fill(member)
            results.append(first.result(member))

    other = threading.Thread(target=extract)
    other.start()
    try:
        assert at_it.wait(600)
        problems = make_stores(plan, [key])
    finally:
        let_go.set()
        other.join()
    assert problems == {}
    assert results[0].done == results[0].clips == 8
    assert len(open_store(Path(source.store)).clips) == 8
