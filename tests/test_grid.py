"""Grids: axes of either stage, one extraction for each making, presets, and what is refused."""

from __future__ import annotations

import json
import re
import runpy
import tomllib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msq.config import HeadConfig
from msq.errors import MsqError, UsageError
from msq.extract.extract_result import ExtractResult
from msq.extract.request import ExtractRequest
from msq.head.grid import plan_grid, run_grid
from msq.head.grid_file import parse_grid, preset_names, preset_text, read_grid
from msq.head.grid_stores import build_request, extraction_source, text_names
from msq.head.model import MSQNet
from msq.head.sweep_plan import outcomes_of, read_plan, summary
from msq.head.sweep_results import baselines, lines
from msq.report.sweeps import exit_code

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sweep_stores.py"))))
fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))
PAPER = Path(__file__).parents[1] / "docs" / "paper-tables.md"
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


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(stores.make_store(tmp_path_factory.mktemp("grid") / "toy.zarr"))


def tiny(more: str, *overrides: str) -> Any:
    return parse_grid(TINY + more, "tiny.toml", overrides)


def test_product_zip_list_seeds_and_choice_make_every_combination(store: Path) -> None:
    grid = tiny("""
[product]
"head.queries" = ["text", "multimodal"]
"head.dropout" = [0.0, 0.1]
[zip]
"head.width" = [16, 32]
"optim.lr" = [1e-3, 5e-4]
[[list]]
name = "plain"
[[list]]
name = "positions"
"head.query_position" = true
[choose]
"train.ema" = [0.0, 0.9]
[repeat]
"train.val" = [0.1, 0.2]
""", f"store={store}", "seeds=3")  # fmt: skip
    settings = grid.settings()
    assert len(settings) == 2 * 2 * 2 * 2 * 2 * 2 * 3
    assert Counter(s.values["head.width"] / s.values["optim.lr"] for s in settings) == {
        16 / 1e-3: 96, 32 / 5e-4: 96
    }  # fmt: skip
    assert {tuple(s.repeat) for s in settings} == {("train.val", "train.seed")}
    plan = plan_grid(grid)
    rows = {json.dumps(t.row) for t in plan.trials}
    assert len(rows) == 16
    assert {t.row["setting"] for t in plan.trials} == {"plain", "positions"}
    assert [t.config.head.query_position for t in plan.trials].count(True) == 96
    assert {t.config.train.ema for t in plan.trials} == {0.0, 0.9}
    assert {t.config.train.seed for t in plan.trials} == {0, 1, 2}


def test_an_override_takes_the_place_of_an_axis(store: Path) -> None:
    text = '[product]\n"head.queries" = ["text", "vanilla"]\n"head.layers" = [1, 2]\n'
    grid = tiny(text, f"store={store}", "head.queries=multimodal", "head.width=16")
    assert [s.values["head.layers"] for s in grid.settings()] == [1, 2]
    assert {(s.values["head.queries"], s.values["head.width"]) for s in grid.settings()} == {
        ("multimodal", 16)
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[product]\n"head.qeries" = ["text"]', r"unknown key head\.qeries; did you mean head\.q"),
        ('[product]\n"extract.frame" = [8]', r"unknown key extract\.frame; did you mean extr"),
        ('[haed]\nlayers = 1', r"unknown 'haed'; did you mean head"),
        ("[head]\nlayer = 2", r"unknown key head\.layer; did you mean head\.layers"),
        ("[zero_shot]\nsene = [50]", r"unknown key zero_shot\.sene; did you mean seen"),
        ("[zero_shot]\nseen = []", "found an empty axis"),
        ("[zero_shot]\nsplits = 0", "expected 1 or more, found 0"),
        ('[product]\n"head.layers" = []', r"product: head\.layers: .* found an empty axis"),
        ('[product]\n"head.layers" = 2', r"expected a list of values, found 2"),
        ('[zip]\n"head.layers" = [1]\n"head.ffn" = [1, 2]', "of one length, found head"),
        ('[product]\n"head.ffn" = [1]\n[repeat]\n"head.ffn" = [2]', "ffn stands on two axes"),
        ("seeds = []", r"seeds: expected 1 or more, found an empty axis"),
        ("seeds = 0", r"seeds: expected 1 or more, found an empty axis \(0\)"),
        ("seeds = 1.5", r"seeds: expected a number or a list, found 1\.5"),
        ("name = 5", "name: expected a text, found 5"),
        ('metrics = "map"', "metrics: expected a list of names, found 'map'"),
        ('list = ["a"]', "expected tables"),
        ('list = [{name = "a"}, "b"]', "expected tables"),
        ('[[list]]\nname = "one"\n"optim.lr" = 1e-3\n[[list]]\nname = "one"\n"optim.lr" = 1e-1',
         r"list: expected a name of its own for each entry, found 2 of the name 'one'"),
        ('[zero_shot]\nseen = ["a"]', "expected shares in percent, found 'a'"),
        ('[zero_shot]\nsplits = "x"', "zero_shot.splits: expected a number, found 'x'"),
        ("[paper]\nrows = [{seen = 50}]", "paper.rows: expected tables with a value"),
        ('[product]\n"extract.frames" = [8]', r"expected a store, or an extraction"),
        ("nonsense", "expected TOML"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_grid(f'store = "x.zarr"\n{text}', "bad.toml")


def test_values_are_checked_before_anything_is_trained(store: Path) -> None:
    for text, message in (
        ('[product]\n"head.queries" = ["txt"]', "expected one of vanilla, text, multimodal"),
        ('[product]\n"head.layers" = [1, 1]', "two trials are the same"),
        ('[choose]\n"optim.lr" = [1e-3]\n[repeat]\n"train.val" = [0]', "needs validation clips"),
        ("[zero_shot]\nseen = [100]", "on either side"),
        ('[zero_shot]\nclassifier = "per-class"', "no weights for classes never trained"),
    ):
        with pytest.raises(UsageError, match=message):
            plan_grid(tiny(text, f"store={store}"))
    with pytest.raises(UsageError, match="expected features to train on"):
        tiny("")
    with pytest.raises(UsageError, match=r"no preset of this name; did you mean table3-charades"):
        read_grid("table3-charade")


def test_validation_clips_of_a_store_or_a_manifest_choose(tmp_path: Path) -> None:
    text = '[train]\nval = 0\n[choose]\n"optim.lr" = [1e-3, 1e-2]\n'
    names = {True: "with.zarr", False: "without.zarr"}
    for val, name in names.items():
        stores.make_store(tmp_path / name, clips=12, val=val)
        lines_of = [f"{k}.mp4,x,{'val' if val and k == 1 else 'train'}" for k in range(3)]
        manifest = tmp_path / f"{val}.csv"
        manifest.write_text("\n".join(["path,labels,split", *lines_of]) + "\n")
        for k in range(3):
            (tmp_path / f"{k}.mp4").touch()
    grids = {val: (parse_grid(text, "g.toml", [f"store={tmp_path / name}"]),
                   parse_grid(text, "g.toml", [f"extract.manifest={tmp_path / f'{val}.csv'}"]))
             for val, name in names.items()}  # fmt: skip
    for grid in grids[True]:
        assert len(plan_grid(grid, tmp_path / "stores").trials) == 2
    for grid in grids[False]:
        with pytest.raises(UsageError, match=r"found train.val = 0 and no clip of the split val"):
            plan_grid(grid, tmp_path / "stores")


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_opens_with_its_command_and_cost_and_expands(name: str) -> None:
    text = preset_text(name)
    opening = "\n".join(re.match(r"(#.*\n)+", text)[0].splitlines())  # type: ignore[index]
    assert f"# Command: msq grid {name} " in opening
    assert "# Cost: " in opening
    assert "# What to expect: " in opening
    grid = read_grid(name, ["store=x.zarr"] if "[extract]" not in text else [])
    settings = grid.settings()
    assert grid.name == name
    expected = {"components": 27, "table3": 60, "table2": 3, "table5": 3}
    assert len(settings) == expected.get(name.partition("-")[0], 2)
    for setting in settings:
        made = {k.partition(".")[2]: v for k, v in setting.values.items() if k[:8] == "extract."}
        if made:
            assert isinstance(build_request(made), ExtractRequest)


def test_the_heads_of_table_6_differ_in_nothing_but_the_text_encoder() -> None:
    for name in ("table6-animal-kingdom", "table6-charades"):
        found = read_grid(name).settings()
        assert [set(one.row) for one in found] == [{"extract.text_encoder"}] * 2
        for one, text in zip(found, (768, 512), strict=True):  # BERT's, CLIP's
            table = {k.partition(".")[2]: v for k, v in one.values.items() if k[:5] == "head."}
            head = MSQNet(HeadConfig(**table, layers=1), classes=3, token_width=768,
                          text=torch.zeros(3, text))  # fmt: skip
            assert head.width == 512, (name, text)
    section = PAPER.read_text(encoding="utf-8").partition("## Table 6")[2]
    commands = [line for line in section.splitlines() if line.startswith("msq train-head")]
    assert len(commands) == 4
    assert all("head.width=512" in line for line in commands)


def test_presets_cover_tables_1_to_6_and_hold_the_papers_numbers() -> None:
    numbers: dict[str, Counter[str]] = {}
    for name in preset_names():
        rows = (
            read_grid(name, ["store=x"] if name == "components" else [])
            .table["paper"]
            .get("rows", [])
        )
        found = Counter(f"{row['value']:.2f}" for row in rows)
        numbers[name.partition("-")[0]] = numbers.get(name.partition("-")[0], Counter()) + found
    sections = re.split(r"^## ", PAPER.read_text(encoding="utf-8"), flags=re.M)[1:]
    imported = {"55.59", "93.29", "67.47"}  # I3D and C3D: no encoder of ours, so no preset
    for number, section in enumerate(sections, start=1):
        lines = "\n".join(line for line in section.splitlines() if line.startswith("|"))
        printed = Counter(x for x in re.findall(r"\b\d\d\.\d\d\b", lines) if x not in imported)
        assert numbers[f"table{number}"] == printed, number


def test_the_papers_numbers_stand_in_the_row_they_belong_to() -> None:
    grid = read_grid("table3-charades")
    paper = {
        (r["zero_shot.seen"], r["head.queries"]): r["value"] for r in grid.table["paper"]["rows"]
    }
    assert paper[50, "multimodal"] == 30.91
    assert paper[75, "vanilla"] == 17.43


def test_a_store_of_class_folders_is_named_by_what_stage_one_finds_in_them(tmp_path: Path) -> None:
    """Behind a link to a folder, too; a link to a folder above ends the search."""
    root, elsewhere = tmp_path / "clips", tmp_path / "elsewhere"
    (root / "run").mkdir(parents=True)
    elsewhere.mkdir()
    (root / "run" / "a.mp4").touch()
    plain = extraction_source({"manifest": str(root)}, tmp_path).store
    (root / "eat").symlink_to(elsewhere)
    linked = extraction_source({"manifest": str(root)}, tmp_path).store
    (elsewhere / "b.mp4").touch()
    more = extraction_source({"manifest": str(root)}, tmp_path).store
    (elsewhere / "up").symlink_to(root)
    looped = extraction_source({"manifest": str(root)}, tmp_path).store
    assert len({plain, linked, more, looped}) == 4


def test_stores_are_shared_by_making_and_told_apart_by_it(tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,labels,split\na.mp4,x,train\n")
    base = {"manifest": str(manifest), "frames": 4}

    def store_of(**changes: Any) -> Any:
        return extraction_source({**base, **changes}, tmp_path)

    assert store_of().store == store_of(device="cpu", workers=3, batch=1).store
    assert store_of().key == store_of(device="cpu").key
    for circumstance in ({"devices": "cuda:0,cuda:1"}, {"scheduler": "dask"}, {"join": True}):
        other = store_of(**circumstance)
        assert (other.store, other.key) == (store_of().store, store_of().key), circumstance
    # Stores of grids that were made when multilabel was the default are found again.
    assert store_of(task="multilabel").key == store_of().key
    prompt = store_of(prompts=["a video of {}"])
    assert prompt.store == store_of().store  # no video is encoded again for a prompt
    assert prompt.key != store_of().key
    others = {store_of(**{k: v}).store for k, v in (("frames", 8), ("pooling", "patch"),
              ("video_encoder", "x"), ("limit", 1), ("sampling", "official"))}  # fmt: skip
    assert len(others | {store_of().store}) == 6
    before = store_of().store
    manifest.write_text("path,labels,split\nb.mp4,x,train\n")
    assert store_of().store != before
    with pytest.raises(UsageError, match=r"extract: .*fraems"):
        build_request({"fraems": 1})


def extracted(out: Path, **changes: Any) -> ExtractResult:
    """What stage one says of a store that has all of its clips."""
    values: dict[str, Any] = {
        "store": str(out), "clips": 1, "done": 1, "failed": 0, "skipped": 0, "seconds": 0.0,
        "clips_per_second": 0.0, "stages": {}, "failures": [], "degraded": [], "skipped_items": [],
        "unknown_words": {}, "warnings": [],
    }  # fmt: skip
    return ExtractResult(**{**values, **changes})


class Extraction:
    """Stage one that writes a made-up store; how often, and for what."""

    def __init__(self) -> None:
        self.asked: list[tuple[int | None, str]] = []
        self.found: dict[str, Any] = {}

    def run(self, request: ExtractRequest, progress: Any = None) -> Any:
        assert request.out is not None
        self.asked.append((request.frames, request.prompts[0]))
        if request.frames == 99:
            raise MsqError("no video of 99 frames")
        if not request.out.exists():
            stores.make_store(request.out)
        if request.prompts[0] != "{}":
            stores.add_prompt(request.out, "video-of", request.prompts[0])
        return extracted(request.out, **self.found)


STAGE_ONE = """
[extract]
manifest = "MANIFEST"
[product]
"extract.frames" = FRAMES
"extract.prompts" = ["{}", "video of {}"]
"""


def test_each_making_is_extracted_once_and_one_that_fails_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extraction = Extraction()
    monkeypatch.setattr(ExtractRequest, "run", lambda self, progress: extraction.run(self))
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,labels,split\na.mp4,x,train\n")
    text = STAGE_ONE.replace("MANIFEST", str(manifest)).replace("FRAMES", "[4, 8, 99]")
    plan = plan_grid(tiny(text), tmp_path / "stores")
    assert len(plan.trials) == 6
    assert len({one.store for one in plan.sources.values()}) == 3
    plan, found = run_grid(plan, tmp_path / "out")
    assert Counter(extraction.asked) == {
        (f, p): 1 for f in (4, 8, 99) for p in ("{}", "video of {}")
    }
    assert (found["done"], found["failed"]) == (4, 2)
    assert {one["error"] for one in found["failures"]} == {"no video of 99 frames"}
    for trial in plan.trials:
        source = plan.sources[trial.source]
        if source.extract is not None and source.extract["frames"] != 99:
            want = "plain" if source.extract["prompts"] == "{}" else "video-of"
            assert text_names(Path(source.store), source.extract)["prompt"] == want
    count = len(extraction.asked)
    run_grid(plan_grid(tiny(text), tmp_path / "stores"), tmp_path / "out")
    assert len(extraction.asked) == count  # what failed is tried again on request only
    run_grid(read_plan(tmp_path / "out"), tmp_path / "out", retry_failed=True)
    assert len(extraction.asked) == count + 2


def test_on_a_gpu_stores_are_made_before_the_engine_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extraction = Extraction()
    monkeypatch.setattr(ExtractRequest, "run", lambda self, progress: extraction.run(self))
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,labels,split\na.mp4,x,train\n")
    text = STAGE_ONE.replace("MANIFEST", str(manifest)).replace("FRAMES", "[4, 99]")
    there: list[set[bool]] = []

    def engine(plan: Any) -> Any:
        there.append({Path(one.store).exists() for one in plan.sources.values()})
        return plan

    monkeypatch.setattr("msq.head.grid.run_sweep", lambda out, plan, **how: summary(out, plan))
    for devices, expected in ((("cuda:0",), {True, False}), (("cpu",), {False})):
        plan = plan_grid(tiny(text), tmp_path / devices[0] / "stores")
        out = tmp_path / devices[0] / "out"
        extraction.asked.clear()
        _, found = run_grid(plan, out, engine=engine, devices=devices)
        assert there.pop() == expected
        assert found["failed"] == 2  # of the store that cannot be made, tried once for each
        assert len(extraction.asked) == 4


def test_a_grid_from_the_command_line_with_a_dry_run_first(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "g.toml"
    file.write_text(TINY + 'seeds = 2\n[product]\n"head.queries" = ["text", "vanilla"]\n'.replace(
        "seeds = 2\n", ""))  # fmt: skip
    given = (
        "grid",
        file,
        f"store={store}",
        "seeds=2",
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
    )
    assert stores.msq(*given, "--dry-run", "--json") == 0
    dry = json.loads(capsys.readouterr().out)
    assert [one["state"] for one in dry["trials"]] == ["to do"] * 4
    assert all(one["seconds"] > 0 for one in dry["trials"])
    assert dry["seconds"] == pytest.approx(sum(one["seconds"] for one in dry["trials"]))
    assert not (tmp_path / "out").exists()
    assert stores.msq(*given, "--dry-run") == 0
    said = capsys.readouterr()
    assert f"{store}: there" in said.out
    assert "4 trials to do, time: " in said.out
    assert said.err == ""
    assert stores.msq(*given, "--json", "-q") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["done"], found["failed"]) == (4, 0)
    rows = found["table"]["rows"]
    assert [(r["labels"]["queries"], r["done"]) for r in rows] == [("text", 2), ("vanilla", 2)]
    assert rows[0]["metrics"]["map"]["std"] is not None
    assert stores.msq(*given, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["to_do"] == 0
    assert stores.msq("grid", "--list", "--json") == 0
    assert {x["name"] for x in json.loads(capsys.readouterr().out)} == set(preset_names())
    assert stores.msq("grid", "components", "--show") == 0
    assert capsys.readouterr().out == preset_text("components")
    assert stores.msq("grid", "components", "--show", "--json") == 0
    assert json.loads(capsys.readouterr().out) == tomllib.loads(preset_text("components"))
    file.write_text("nonsense")
    assert stores.msq("grid", file, "--show", "--json") == 2
    assert "g.toml: expected TOML" in capsys.readouterr().err
    assert stores.msq("grid") == 2


def test_zero_shot_in_a_grid_shares_class_splits_between_the_modes(
    store: Path, tmp_path: Path
) -> None:
    text = '[zero_shot]\nseen = [50]\nsplits = 2\n[product]\n"head.queries" = ["text", "vanilla"]\n'
    plan = plan_grid(tiny(text + '"train.patience" = [0]\n', f"store={store}"))
    hashes = {(t.row["queries"], t.repeat["split"]): t.split.hash for t in plan.trials if t.split}
    assert hashes["text", 0] == hashes["vanilla", 0] != hashes["text", 1]
    assert {(t.row["queries"], t.config.head.classifier) for t in plan.trials} == {
        ("text", "text"), ("vanilla", "shared")
    }  # fmt: skip
    _, found = run_grid(plan, tmp_path / "out")
    assert found["done"] == 4
    (clip,) = baselines(lines(plan, outcomes_of(tmp_path / "out", plan)))
    assert clip.row == {"seen": 50, "queries": "CLIP similarity"}  # whatever the heads are like


def test_what_stage_one_lost_is_told_by_every_grid_that_reads_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by one that resumes, and by one that only reads what another made."""
    extraction = Extraction()
    item = {"item": "b.mp4", "reason": "split 'tset'"}
    extraction.found = {"skipped": 1, "skipped_items": [item], "warnings": ["a word"]}
    monkeypatch.setattr(ExtractRequest, "run", lambda self, progress: extraction.run(self))
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,labels,split\na.mp4,x,train\n")
    plan = plan_grid(tiny(f'[extract]\nmanifest = "{manifest}"\n'), tmp_path / "stores")
    (store,) = (one.store for one in plan.sources.values())
    for out in ("a", "a", "b"):
        _, found = run_grid(plan, tmp_path / out)
        assert found["done"] == 1
        record = found["stores"][store]
        assert (record["failed"], record["skipped"]) == (0, 1)
        assert (record["skipped_items"], record["warnings"]) == ([item], ["a word"])
        assert exit_code(found) == 3
    assert len(extraction.asked) == 1
    Path(store + ".extracted.json").write_text("{")  # damaged: stage one, which resumes, says again
    _, found = run_grid(plan, tmp_path / "c")
    assert found["stores"][store]["skipped"] == 1
    assert len(extraction.asked) == 2


def test_a_grid_over_videos_lists_what_it_could_not_use_and_leaves_with_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["path,labels,split"]
    for k, split in enumerate(("train", "train", "test", "train", "test", "tset")):
        fakes.write_video(tmp_path / f"{k}.mp4", k)
        lines.append(f"{k}.mp4,{'a' if k % 2 else 'b'},{split}")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    manifest, file = tmp_path / "m.csv", tmp_path / "g.toml"
    manifest.write_text("\n".join([*lines, "broken.mp4,a,train"]) + "\n")
    file.write_text(TINY + f'val = 0.0\n[extract]\nmanifest = "{manifest}"\nworkers = 0\n')
    given = ("grid", file, "--stores", tmp_path / "s", "--device", "cpu", "-q",
             "extract.device=cpu", "--out", tmp_path / "out")  # fmt: skip
    assert stores.msq(*given, "--json") == 3
    told = capsys.readouterr()
    for text in ("skipped: ", "'tset'", "failed: ", "1 of 6 clips failed, 1 skipped"):
        assert text in told.err
    document = json.loads(told.out)
    assert (document["done"], document["failed"]) == (1, 0)  # of trials
    (record,) = document["stores"].values()
    assert (record["clips"], record["done"], record["failed"], record["skipped"]) == (6, 5, 1, 1)
    assert [one["clip"] for one in record["failures"]] == ["broken"]
    assert len(record["skipped_items"]) == 1
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == document
    assert stores.msq(*given) == 3  # nothing is left to do, and it says the same
    assert "1 of 6 clips failed, 1 skipped" in capsys.readouterr().err
