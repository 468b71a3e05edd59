"""`msq report --format html`: one file, every number of the runs in it, and every name escaped."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from msq import config as configuration
from msq.config import RunConfig
from msq.extract.store import open_store
from msq.head.end_to_end import train_end_to_end
from msq.head.features import load_features
from msq.head.json_file import write_json
from msq.head.partitions import merged
from msq.head.train import train_head
from msq.report.page import curves

HERE = Path(__file__)
stores = SimpleNamespace(**runpy.run_path(str(HERE.with_name("sweep_stores.py"))))
end_to_end = SimpleNamespace(**runpy.run_path(str(HERE.with_name("end_to_end_material.py"))))
VOID = ("meta", "br", "img", "line", "circle", "polyline")
CLASSES = ("<b>", "a & b", '"quoted"', *(f"class {k}" for k in range(3, 8)))


class Page(HTMLParser):
    """What a page holds; a tag that is closed wrongly, or not at all, is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.bars: list[list[str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "div" and "bar" in (dict(attrs).get("class") or "").split():
            self.bars.append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] in ("span", "b", "em") and "div" in self.open[-2:]:
            self.bars[-1].append(data)

    def cell(self, name: str, column: int = 1) -> str:
        (found,) = {row[column] for row in self.rows if row[0] == name}
        return found

    def drawings(self) -> list[str]:
        return [str(a["aria-label"]) for tag, a in self.tags if tag == "svg" and "role" in a]


def page_of(out: Path, *paths: Path) -> Page:
    """The page of some folders, which needs nothing from anywhere and runs nothing."""
    file = out / "page.html"
    assert stores.msq("report", *paths, "--format", "html", "--out", file) == 0
    text = file.read_text(encoding="utf-8")
    found = Page(text)
    for tag, attributes in found.tags:
        assert tag not in ("script", "link", "iframe", "img", "object"), tag
        assert not {"src", "href", "onload", "onclick"} & attributes.keys()
    assert "url(" not in text
    assert "@import" not in text
    return found


def require_metrics(page: Page, result: dict[str, Any]) -> None:
    """Every metric of a result stands on the page."""
    for key, value in result["metrics"].items():
        (row,) = (row for row in page.rows if row[0].endswith(f"({key})"))
        count = key.startswith(("classes_", "rows"))
        assert row[1] == (f"{value:g}" if count else f"{100 * value:.2f} %"), key


def read(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A store, its features under other names, and two runs on them: with partitions too."""
    folder = tmp_path_factory.mktemp("page")
    store = stores.make_store(folder / "toy.zarr")
    features = replace(load_features(open_store(store)), classes=CLASSES, name="<i>toy</i>")
    labels = features.labels.clone()
    labels[features.rows("test"), 7] = 0
    features = replace(features, labels=labels)  # no test clip shows the last class
    for k in (1, 2):
        settings = [*stores.HEAD, "train.epochs=3", f"train.seed={k}"]
        config = configuration.override(RunConfig(), settings)
        train_head(features, config, folder / f"run/split{k}")
    both = {name: read(folder / "run" / name) for name in ("split1", "split2")}
    write_json(folder / "run" / "result.json", merged(str(folder / "run"), both))
    return SimpleNamespace(folder=folder, store=store, run=folder / "run")


def test_a_run_has_its_making_every_metric_curves_and_classes_worst_first(made: Any) -> None:
    run = made.run / "split1"
    page, result = page_of(made.folder, run), read(run)
    require_metrics(page, result)
    assert page.cell("protocol") == "paper"
    assert page.cell("dataset") == "<i>toy</i>"
    assert page.cell("fingerprint") == result["fingerprint"]
    assert page.cell("step.precision") == result["step"]["precision"]
    assert (run / "config.toml").read_text(encoding="utf-8") in page.words
    assert page.drawings() == ["training loss over epoch", "validation mAP over epoch"]
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "val_map"):
        assert f" split1 {history[-1][key]:.3f}" in page.words
    lines = [a["points"] for tag, a in page.tags if tag == "polyline"]
    assert [len(str(points).split()) for points in lines] == [3, 3]
    scores = {name: ap for name, ap in result["per_class"].items() if ap is not None}
    with np.load(run / "predictions.npz") as stored:
        counts = dict(zip(CLASSES, stored["labels"].sum(0).tolist(), strict=True))
    assert counts["class 7"] == 0
    assert "<b>" in scores
    worst_first = sorted((ap, name) for name, ap in scores.items())
    expected = [[name, f"{ap:.4f}", f"{counts[name]} positive"] for ap, name in worst_first]
    assert page.bars == expected
    assert "no positive clip, so no average precision: class 7" in page.words
    text = (made.folder / "page.html").read_text(encoding="utf-8")
    for name, shown in (("<b>", "&lt;b&gt;"), ("<i>toy</i>", "&lt;i&gt;toy&lt;/i&gt;")):
        assert f">{name}<" not in text
        assert shown in text


def test_partitions_have_a_column_a_curve_and_classes_each(made: Any) -> None:
    page, result = page_of(made.folder, made.run), read(made.run)
    (row,) = (row for row in page.rows if row[0].endswith("(map)"))
    mean, std = (100 * result[key]["map"] for key in ("metrics", "spread"))
    assert row[1] == f"{mean:.2f} ± {std:.2f} %"
    parts = [result["partitions"][name]["map"] for name in ("split1", "split2")]
    assert row[2:] == [f"{100 * value:.2f} %" for value in parts]
    assert len(page.drawings()) == 2
    assert sum(tag == "polyline" for tag, _ in page.tags) == 4
    assert len(page.bars) == 14


def test_several_runs_stand_in_one_table_and_one_picture(made: Any) -> None:
    paths = [made.run / name for name in ("split1", "split2")]
    page = page_of(made.folder, *paths)
    values = [read(path)["metrics"]["map"] for path in paths]
    best = f"{100 * max(values):.2f}"
    (marked,) = (row for row in page.rows if best in row)
    assert marked[0] == paths[values.index(max(values))].name
    assert sum(a.get("class") == "best" for tag, a in page.tags if tag == "td") >= 1
    assert sum(tag == "polyline" for tag, _ in page.tags) == 4
    assert [word for word in page.words if word.endswith(": how it was made")] == [
        "split1: how it was made", "split2: how it was made"
    ]  # fmt: skip


def test_a_sweep_has_its_table_and_what_failed(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "g.toml", tmp_path / "sweep"
    file.write_text('name = "<u>"\n[product]\n"head.queries" = ["text", "vanilla"]\n')
    more = ("train.epochs=1", "--device", "cpu", "-q", "--out", out, *stores.HEAD)
    assert stores.msq("grid", file, f"store={made.store}", *more) == 0
    table = json.loads((out / "results.json").read_text())["table"]
    page = page_of(tmp_path, out)
    header = next(row for row in page.rows if row[0] == "queries")
    for row in table["rows"]:
        shown = f"{100 * row['metrics']['map']['mean']:.2f}"
        assert page.cell(row["labels"]["queries"], header.index("mAP")) == shown
    assert page.cell("trials") == "2 of 2 done, 0 failed"
    assert "<u>: the sweep" in page.words
    assert "<u>" not in (tmp_path / "page.html").read_text()
    failed = next((out / "trials").glob("*/outcome.json"))
    outcome = {"id": failed.parent.name, "status": "failed", "error": "no <room>"}
    failed.write_text(json.dumps(outcome))
    page = page_of(tmp_path, out, made.run / "split1")
    assert page.cell("trials") == "1 of 2 done, 1 failed"
    assert any(word.startswith("failed: ") and "no <room>" in word for word in page.words)
    assert len(page.bars) == 7


def test_an_end_to_end_run(tmp_path: Path) -> None:
    data, video = end_to_end.dataset(tmp_path / "clips"), end_to_end.encoder()
    features = end_to_end.features_of(data, tmp_path / "a.zarr", video)
    run = tmp_path / "trained"
    config = end_to_end.settings("train.epochs=2", "clips.test_views=2x1")
    train_end_to_end(end_to_end.material(data, features, video), config, run, workers=0)
    page, result = page_of(tmp_path, run), read(run)
    require_metrics(page, result)
    (row,) = (row for row in page.rows if row[0].endswith("(map)"))
    assert row[2] == f"{100 * result['test_views']['metrics']['map']:.2f} %"
    assert page.cell("unfrozen") == result["unfrozen"]
    assert page.cell("encoder") == str(run / "encoder")
    assert page.drawings() == ["training loss over epoch", "validation mAP over epoch"]
    assert page.bars


def test_files_of_a_run_that_are_damaged_are_named(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "result.json").write_text(json.dumps(read(made.run / "split1")))
    page = page_of(tmp_path, run)  # the result alone is a report too
    assert len(page.bars) == 7
    assert page.drawings() == []
    for name, content in (("predictions.npz", b"PK"), ("metrics.jsonl", b"{"),
                          ("config.toml", b"\xff"), ("env.json", b"[")):  # fmt: skip
        (run / name).write_bytes(content)
        capsys.readouterr()
        assert stores.msq("report", run, "--format", "html") == 2
        assert f"{run / name}: expected" in capsys.readouterr().err
        (run / name).unlink()


def test_a_curve_keeps_its_place_where_a_value_is_missing_and_marks_a_single_one() -> None:
    page = Page(curves({"a <": [None, 1.0, 2.0], "b": [0.5]}, x="epoch", y="loss"))
    (line,) = (a for tag, a in page.tags if tag == "polyline")
    left, right = (float(p.split(",")[0]) for p in str(line["points"]).split())
    (ring,) = (a for tag, a in page.tags if tag == "circle")
    assert right - left == pytest.approx(left - float(str(ring["cx"])), abs=0.2)
    assert " a < 2.000" in page.words
    assert "epoch 1 to 3" in page.words
