"""`msq tsne`: the same picture twice, numbers by hand, and nothing that labels could flatter."""

from __future__ import annotations

import csv
import io
import json
import os
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msq import config as configuration
from msq.config import RunConfig
from msq.errors import SpecMismatch, UsageError
from msq.extract.store import open_store
from msq.head.checkpoint import load_model
from msq.head.clip_embeddings import after_decoder, before_decoder
from msq.head.evaluate import probabilities
from msq.head.features import Features, load_features
from msq.head.train import train_head
from msq.head.tsne import label_agreement, layout
from msq.head.tsne_of_run import tsne_of_run
from msq.report import tsne as report

HERE = Path(__file__)
stores = SimpleNamespace(**runpy.run_path(str(HERE.with_name("sweep_stores.py"))))
SVG = "{http://www.w3.org/2000/svg}"
CLASSES = ("<b>", "a & b, c", '"quoted"', "bell \x07", *(f"class {k}" for k in range(4, 8)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A store, a run on it, and what `tsne_of_run` gives for its test clips."""
    folder = tmp_path_factory.mktemp("tsne")
    store = stores.make_store(folder / "toy.zarr")
    features = load_features(open_store(store))
    config = configuration.override(RunConfig(), [*stores.HEAD, "train.epochs=3"])
    train_head(features, config, folder / "run")
    found = tsne_of_run(folder / "run", features)
    return SimpleNamespace(
        folder=folder, store=store, run=folder / "run", features=features, found=found
    )


def head(made: Any) -> Any:
    return load_model(made.run / "head.safetensors")[0]


def test_agreement_by_hand() -> None:
    """On a line, clips at 0, 1, 3 and 7; the last one has no label."""
    x = torch.tensor([[0.0], [1.0], [3.0], [2.9], [7.0]])
    labels = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 0], [1, 0]])
    found = label_agreement(x, labels, neighbours=1)
    # nearest: 0 -> 1 (alike), 1 -> 0 (alike), 3 -> 1 (alike), 7 -> 3 (not)
    assert found == {
        "agreement": 0.75,
        "chance": pytest.approx(8 / 12),
        "neighbours": 1,
        "clips": 4,
    }
    # two nearest: 0 -> 1, 3: one alike; 1 -> 0, 3: both; 3 -> 1, 0: one; 7 -> 3, 1: one
    two = label_agreement(x, labels, neighbours=2)
    assert two["agreement"] == pytest.approx((0.5 + 1 + 0.5 + 0.5) / 4)
    assert label_agreement(x, labels, neighbours=9)["agreement"] == pytest.approx(8 / 12)
    assert label_agreement(x, labels, neighbours=9)["neighbours"] == 3
    assert label_agreement(x[:1], labels[:1])["agreement"] is None


def test_clips_at_one_distance_share_the_places() -> None:
    """Equal features know nothing, in whatever order the clips stand."""
    labels = torch.eye(2, dtype=torch.uint8).repeat_interleave(20, 0)  # sorted by class
    found = label_agreement(torch.zeros(40, 3), labels)
    assert found["agreement"] == pytest.approx(19 / 39)
    assert found["chance"] == pytest.approx(19 / 39)
    x = torch.tensor([[0.0], [1.0], [-1.0]])
    labels = torch.tensor([[1], [1], [1]]) * torch.tensor([[1, 0]])
    labels[2] = torch.tensor([0, 1])
    # 0 has both others at distance 1: half of them alike; 1 -> 0 alike; -1 -> 0 not
    found = label_agreement(x, labels, neighbours=1)
    assert found["agreement"] == pytest.approx((0.5 + 1 + 0) / 3)


def test_agreement_is_computed_in_parts_as_in_one() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(600, 5, generator=generator)
    labels = (torch.rand(600, 4, generator=generator) < 0.3).int()
    keep = labels.any(1)
    far = torch.cdist(x[keep].double(), x[keep].double())
    alike = (labels[keep] @ labels[keep].T) > 0
    total = 0.0
    for row in range(len(far)):
        order = [k for k in far[row].argsort().tolist() if k != row][:10]
        total += sum(bool(alike[row, k]) for k in order) / 10
    assert label_agreement(x, labels)["agreement"] == pytest.approx(total / len(far))


def test_a_layout_is_the_same_again() -> None:
    x = torch.randn(80, 70, generator=torch.Generator().manual_seed(0))
    first, again = layout(x), layout(x)
    assert (first.points == again.points).all()
    assert first.points.shape == (80, 2)
    assert (first.perplexity, first.distinct) == (pytest.approx(79 / 3), 80)
    assert layout(x, perplexity=5).perplexity == 5


THREADS = """
import sys, torch
import sklearn.manifold as manifold
from threadpoolctl import threadpool_info
from msq.head.tsne import layout

def most():
    return max(pool["num_threads"] for pool in threadpool_info())

class Told(manifold.TSNE):
    def fit_transform(self, x):
        print(most())
        return super().fit_transform(x)

manifold.TSNE = Told
print(most())
layout(torch.randn(60, 60, generator=torch.Generator().manual_seed(0)))
print(most())
"""


def test_a_layout_is_made_in_one_thread() -> None:
    """Sums over threads have no order of their own; the process keeps its threads for all else."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS], env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["2", "1", "2"]


def test_groups_that_are_apart_stay_so_and_rows_stay_in_order() -> None:
    """Odd and even rows lie far apart; equal rows stand on one another."""
    x = 0.1 * torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    x[1::2] += 20
    x[40] = x[2]
    x[59] = x[1]
    made = layout(x)
    assert made.distinct == 58
    points = torch.from_numpy(made.points)
    assert torch.equal(points[40], points[2])
    assert torch.equal(points[59], points[1])
    far = torch.cdist(points, points)
    far.fill_diagonal_(torch.inf)
    for row, nearest in enumerate(far.argmin(1).tolist()):
        assert row % 2 == nearest % 2


def test_too_few_clips_that_differ() -> None:
    with pytest.raises(UsageError, match="at least 4 clips that differ, found 1"):
        layout(torch.zeros(10, 3))
    with pytest.raises(UsageError, match="found 3"):
        layout(torch.eye(3))
    assert layout(torch.eye(4)).perplexity == 1


def test_values_that_are_no_numbers_are_refused() -> None:
    x = torch.arange(18.0).reshape(6, 3)
    x[1, 2], x[4, 0] = torch.inf, torch.nan
    with pytest.raises(UsageError, match="expected finite values, found others in 2 of 6 clips"):
        layout(x)


def test_what_stands_before_and_after_the_decoder(made: Any) -> None:
    """The decoder's own output, from the plain head, query by query."""
    features, model = made.features, head(made)
    rows = features.rows("test")[3:9]
    tokens, image = features.tokens[rows].float(), features.image[rows].float()
    assert torch.allclose(before_decoder(features, rows), tokens.mean(1), atol=1e-6)
    with torch.no_grad():
        whole = model(tokens, image, intermediates=True)
        queries = model.norm(whole["queries"][-1])
    assert queries.shape == (6, 8, 16)
    assert torch.allclose(after_decoder(model, features, rows), queries.mean(1), atol=1e-5)
    share = probabilities(whole["logits"], features.task)
    share = share / share.sum(1, keepdim=True)
    weighted = torch.stack([share[i] @ queries[i] for i in range(6)])
    assert torch.allclose(after_decoder(model, features, rows, "scores"), weighted, atol=1e-5)
    assert not torch.allclose(weighted, queries.mean(1), atol=1e-3)
    assert not model.norm._forward_hooks


def test_labels_have_no_say_in_where_a_clip_stands(made: Any) -> None:
    """Other labels of the test clips: other numbers and colours, and the same points."""
    features, labels = made.features, made.features.labels.clone()
    test = features.rows("test")
    labels[test] = labels[test.flip(0)]
    assert not torch.equal(labels, features.labels)
    other = tsne_of_run(made.run, replace(features, labels=labels))
    for side in ("before", "after"):
        points = [point[side] for point in made.found["points"]]
        assert [point[side] for point in other["points"]] == points
        assert other[side]["agreement"] != made.found[side]["agreement"]


def test_a_run_laid_out(made: Any) -> None:
    found, features = made.found, made.features
    test = features.rows("test").tolist()
    assert [point["clip"] for point in found["points"]] == [features.ids[row] for row in test]
    assert (found["clips"], found["clips_of"], found["left_out"]) == (len(test), len(test), {})
    for point, row in zip(found["points"], test, strict=True):
        shown = [features.classes[k] for k in features.labels[row].nonzero().flatten().tolist()]
        assert point["labels"] == shown
        assert (point["class"] is None) == (not shown)
    count = Counter(name for point in found["points"] for name in point["labels"])
    for point in found["points"]:
        if point["labels"]:
            assert count[point["class"]] == min(count[name] for name in point["labels"])
    coloured = Counter(point["class"] for point in found["points"] if point["class"])
    assert {one["class"]: one["clips"] for one in found["classes"]} == coloured
    rows = torch.tensor(test)
    before = label_agreement(before_decoder(features, rows), features.labels[rows])
    assert {key: found["before"][key] for key in before} == before
    assert found["before"]["what"] == "mean over 4 tokens of fake-video"
    assert (found["before"]["dimensions"], found["after"]["dimensions"]) == (16, 16)
    assert tsne_of_run(made.run, open_store(made.store)) == found


def test_fewer_clips_and_fewer_classes(made: Any) -> None:
    some = tsne_of_run(made.run, made.features, limit=20, most=3)
    assert (some["clips"], some["left_out"]) == (20, {"beyond the limit": 20})
    order = [point["clip"] for point in made.found["points"]]
    drawn = [order.index(point["clip"]) for point in some["points"]]
    assert drawn == sorted(drawn)
    assert drawn != list(range(20))
    assert len(some["classes"]) == 3
    count = Counter(name for point in some["points"] for name in point["labels"])
    shown = {one["class"] for one in some["classes"]}
    assert {count[name] for name in shown} >= {max(count.values())}
    assert min(count[name] for name in shown) >= max(count[n] for n in count if n not in shown)
    other = [p for p in some["points"] if p["class"] is None and p["labels"]]
    assert all(not shown & set(point["labels"]) for point in other)

    chosen = tsne_of_run(made.run, made.features, classes=["class 5", "class 1"])
    assert {name for point in chosen["points"] for name in point["labels"]} == {
        "class 1", "class 5",
    }  # fmt: skip
    assert all(point["class"] for point in chosen["points"])
    asked = {"class 1", "class 5"}
    expected = [p["clip"] for p in made.found["points"] if asked & set(p["labels"])]
    assert [point["clip"] for point in chosen["points"]] == expected
    left = made.found["clips"] - len(expected)
    assert chosen["left_out"] == {"without a class asked for": left}


def test_labels_that_nobody_knows_are_not_shown(made: Any) -> None:
    features = made.features
    known = torch.ones_like(features.labels)
    known[:, 2] = 0
    found = tsne_of_run(made.run, replace(features, known=known))
    assert "class 2" not in {name for point in found["points"] for name in point["labels"]}


def test_bad_input(made: Any) -> None:
    with pytest.raises(UsageError, match="no class 'clas 1' in toy; did you mean class 1"):
        tsne_of_run(made.run, made.features, classes=["clas 1"])
    with pytest.raises(UsageError, match=r"no usable clip in split 'val'; found \['test', 'train'"):
        tsne_of_run(made.run, made.features, split="val")
    with pytest.raises(SpecMismatch, match="made in another way"):
        tsne_of_run(made.run, replace(made.features, classes=CLASSES))
    with pytest.raises(UsageError, match=r"head\.safetensors: no such file"):
        tsne_of_run(made.folder / "nothing", made.features)


def named(made: Any) -> dict[str, Any]:
    """What was found, with classes and a clip of names that need to be escaped."""
    text = json.dumps(made.found)
    for k, name in enumerate(CLASSES):
        text = text.replace(f'"class {k}"', json.dumps(name))
    found: dict[str, Any] = json.loads(text)
    found["points"][0]["clip"] = "<script>&\x00"
    return found


def test_the_picture_is_xml_with_each_clip_in_both_panels(made: Any) -> None:
    found = named(made)
    text = report.svg(found)
    root = ET.fromstring(text)
    groups = [g for g in root.iter(f"{SVG}g") if g.get("class") == "clips"]
    keys = [g for g in root.iter(f"{SVG}g") if g.get("class") == "key"]
    kinds = len(found["classes"]) + any(not p["labels"] for p in found["points"])
    assert (len(groups), len(keys)) == (2 * kinds, kinds)
    marks = [clip for group in groups for clip in group]
    assert len(marks) == 2 * found["clips"]
    titles = Counter(clip.findtext(f"{SVG}title") for clip in marks)
    bad = "\ufffd"
    for point in found["points"]:
        name = f"{point['clip']}: {'; '.join(point['labels']) or 'no label'}"
        assert titles[name.replace("\x07", bad).replace("\x00", bad)] == 2
    words = [element.text or "" for element in root.iter(f"{SVG}text")]
    for one in found["classes"]:
        assert f"{one['class'].replace(chr(7), bad)} ({one['clips']})" in words
    percent = f"{100 * found['after']['agreement']:.2f} %"
    assert any(percent in line for line in words)
    colours = [g.get("style") for g in keys]
    assert len(set(colours)) == len(colours)


def test_points_lie_within_their_panel_in_their_own_order(made: Any) -> None:
    root = ET.fromstring(report.svg(made.found))
    width = float(str(root.get("width")))
    groups = [g for g in root.iter(f"{SVG}g") if g.get("class") == "clips"]
    at: dict[str, list[tuple[float, float]]] = {}
    for group in groups:
        for clip in group:
            (mark,) = clip.findall(f"{SVG}circle")
            name = str(clip.findtext(f"{SVG}title")).partition(":")[0]
            place = (float(str(mark.get("cx"))), float(str(mark.get("cy"))))
            at.setdefault(name, []).append(place)
    points = made.found["points"]
    for side, left, right in (("before", 0, width / 2), ("after", width / 2, width)):
        k = ("before", "after").index(side)
        drawn = [at[point["clip"]][k] for point in points]
        assert all(left < x < right for x, _ in drawn)
        by_x = sorted(range(len(points)), key=lambda i: points[i][side][0])
        assert [drawn[i][0] for i in by_x] == sorted(x for x, _ in drawn)
        by_y = sorted(range(len(points)), key=lambda i: -points[i][side][1])
        assert [drawn[i][1] for i in by_y] == sorted(y for _, y in drawn)


def test_more_classes_than_colours_have_other_shapes(made: Any) -> None:
    """Thirty classes: each colour in three shapes."""
    found = json.loads(json.dumps(made.found))
    points = found["points"][:30]
    for k, point in enumerate(points):
        point["class"], point["labels"] = f"kind {k}", [f"kind {k}"]
    found["points"] = points
    found["classes"] = [{"class": f"kind {k}", "clips": 1} for k in range(30)]
    root = ET.fromstring(report.svg(found))
    keys = [g for g in root.iter(f"{SVG}g") if g.get("class") == "key"]
    looks = {(g.get("style"), g[0].tag) for g in keys}
    assert len(looks) == 30


def test_the_table_has_every_clip_and_every_digit(made: Any) -> None:
    found = named(made)
    rows = list(csv.DictReader(io.StringIO(report.table(found), newline="")))
    assert len(rows) == found["clips"]
    for row, point in zip(rows, found["points"], strict=True):
        assert (row["clip"], row["class"]) == (point["clip"], point["class"] or "")
        assert row["labels"] == ";".join(point["labels"])
        assert [float(row["before_x"]), float(row["before_y"])] == point["before"]
        assert [float(row["after_x"]), float(row["after_y"])] == point["after"]


def test_the_command(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("tsne", made.run, "--store", made.store, "--device", "cpu", "-q")
    assert stores.msq(*words, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads(json.dumps(made.found))
    for name in ("a.svg", "a.html", "a.csv", "a.json"):
        assert stores.msq(*words, "--out", tmp_path / "new" / name) == 0
        said = capsys.readouterr()
        assert name in said.err
        assert f"{100 * shown['before']['agreement']:.2f}" in said.out
    assert (tmp_path / "new/a.svg").read_text() == report.svg(made.found)
    assert json.loads((tmp_path / "new/a.json").read_text()) == shown
    page = (tmp_path / "new/a.html").read_text()
    assert page.count("<svg") == 1
    assert "<script" not in page
    assert f"{100 * shown['after']['agreement']:.2f}" in page
    assert stores.msq(*words, "--out", tmp_path / "b.svg", "--classes", '"class 1", class 2') == 0
    assert "not shown: " in capsys.readouterr().err
    assert stores.msq(*words, "--split", "train", "--json") == 0
    assert "the head was trained on these clips" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected --out FILE or --json, found neither"),
        (("--json", "--classes", " , "), "--classes: expected at least one name, found none"),
        (("--json", "--perplexity", "0"), "--perplexity: expected a number above 0, found 0"),
        (("--json", "--perplexity", "nan"), "--perplexity: expected a number above 0, found nan"),
        (("--out", "a.png"), "--out a.png: expected a file that ends in .svg, .html, .csv, .json"),
        (("--json", "--classes", "dance"), "no class 'dance' in toy"),
        (("--json", "--split", "val"), "no usable clip in split 'val'"),
    ],
)
def test_options_that_cannot_be(
    made: Any, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stores.msq("tsne", made.run, "--store", made.store, "--device", "cpu", *words) == 2
    assert message in capsys.readouterr().err


def test_without_scikit_learn(
    made: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert stores.msq("tsne", made.run, "--store", made.store, "--json") == 2
    assert "pip install 'msq[plots]'" in capsys.readouterr().err


def test_a_clip_of_a_feature_set_without_a_class(made: Any) -> None:
    features: Features = made.features
    labels = features.labels.clone()
    labels[features.rows("test")] = 0
    found = tsne_of_run(made.run, replace(features, labels=labels))
    assert (found["before"]["agreement"], found["classes"]) == (None, [])
    root = ET.fromstring(report.svg(found))
    assert sum(len(g) for g in root.iter(f"{SVG}g") if g.get("class") == "clips") == 80
