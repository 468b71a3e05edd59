"""Labels that nobody knows: left out of the loss, of every metric, and counted."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from msq import config as configuration
from msq.cli import main
from msq.config import RunConfig
from msq.errors import DatasetError, SpecMismatch, UsageError
from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.datasets.manifest import read_manifest
from msq.extract.store import open_store
from msq.extract.store_writer import StoreWriter
from msq.head import metrics
from msq.head.features import Features
from msq.head.loss import head_loss
from msq.head.segments import segment_metrics
from msq.head.train import build_head, train_head
from msq.head.zeroshot import zero_shot

fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))
SMALL = ("head.layers=1", "head.heads=2", "head.ffn=32", "train.epochs=2", "train.batch=16")


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


def example(n: int = 80, k: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores with ties, labels, and what is known (a fifth is not; positives among it)."""
    g = torch.Generator().manual_seed(1)
    scores = torch.randn(n, k, generator=g).mul(4).round() / 4
    labels = (torch.rand(n, k, generator=g) < 0.3).long()
    known = (torch.rand(n, k, generator=g) > 0.2).long()
    return scores, labels, known


def test_each_class_is_ranked_over_the_rows_that_know_it():
    scores, labels, known = example()
    found = metrics.all_metrics(scores, labels, "multilabel", known=known)
    s, y, w = scores.numpy(), labels.numpy(), known.numpy().astype(bool)
    keep = (y.astype(bool) & w).any(1)
    ap = []
    for k in range(6):
        rows = keep & w[:, k]
        ap.append(average_precision_score(y[rows, k], s[rows, k]))
    assert found["map"] == pytest.approx(np.mean(ap), abs=1e-12)
    pairs = w & keep[:, None]
    assert found["map_micro"] == pytest.approx(
        average_precision_score(y[pairs], s[pairs]), abs=1e-12
    )
    total = 0.0
    kept = np.flatnonzero(keep)
    for first in range(0, len(kept), 32):
        rows = kept[first : first + 32]
        part = average_precision_score(y[rows][w[rows]], s[rows][w[rows]])
        total += part * len(rows)
    assert found["map_official"] == pytest.approx(total / len(kept), abs=1e-12)
    charades = []
    for k in range(6):
        column = s[w[:, k], k].astype(float)
        column[~keep[w[:, k]]] = -np.inf
        hits = y[w[:, k], k][np.argsort(-column, kind="stable")]
        hits = hits * (np.arange(len(hits)) < keep[w[:, k]].sum())
        charades.append((np.cumsum(hits) / np.arange(1, len(hits) + 1) * hits).sum() / hits.sum())
    assert found["map_charades"] == pytest.approx(np.mean(charades), abs=1e-12)
    right = (1 / (1 + np.exp(-s)) > 0.5) == y.astype(bool)
    assert found["accuracy"] == pytest.approx(right[w].mean(), abs=1e-12)
    assert found["accuracy_all_negative"] == pytest.approx((y[w] == 0).mean(), abs=1e-12)
    best = np.where(w, s, -np.inf).argmax(1)
    hit = (y.astype(bool) & w)[np.arange(80), best]
    assert found["top1"] == pytest.approx(hit[keep].mean(), abs=1e-12)
    assert found["pairs_unknown"] == int((~w).sum())
    assert found["rows_unlabelled"] == int((~keep).sum())
    segments = segment_metrics(scores, labels, {"head": (0, 3)}, known)
    assert segments == {"map_head": pytest.approx((ap[0] + ap[3]) / 2), "classes_scored_head": 2}


def test_what_stands_under_an_unknown_pair_changes_no_metric():
    scores, labels, known = example()
    g = torch.Generator().manual_seed(2)
    unknown = known == 0
    other = torch.where(unknown, torch.randn(80, 6, generator=g) * 9, scores)
    turned = torch.where(unknown, 1 - labels, labels)
    before = metrics.all_metrics(scores, labels, "multilabel", known=known)
    after = metrics.all_metrics(other, turned, "multilabel", known=known)
    assert after == pytest.approx(before, abs=1e-12)
    assert metrics.all_metrics(other, turned, "multilabel")["map"] != before["map"]


@pytest.mark.parametrize("task", ["multilabel", "singlelabel"])
def test_where_all_is_known_nothing_changes(task):
    scores, labels, _ = example()
    if task == "singlelabel":
        labels = torch.nn.functional.one_hot(labels.argmax(1), 6)
    plain = metrics.all_metrics(scores, labels, task)
    found = metrics.all_metrics(scores, labels, task, known=torch.ones_like(labels))
    assert found.pop("pairs_unknown") == 0
    assert "pairs_unknown" not in plain
    assert found == pytest.approx(plain, abs=1e-12, nan_ok=True)


def test_the_chance_level_counts_the_known_rows_of_each_class():
    _, labels, known = example(12, 2)
    g = torch.Generator().manual_seed(3)
    keep = metrics.labelled(labels, known)
    values = [
        float(metrics.mean_average_precision(torch.rand(12, 2, generator=g), labels, known))
        for _ in range(4000)
    ]
    assert int(keep.sum()) < 12
    assert metrics.chance_map(labels, known) == pytest.approx(np.mean(values), abs=0.01)


def test_known_of_another_shape_is_refused():
    scores, labels, known = example()
    with pytest.raises(UsageError, match=r"found \[80, 5\]"):
        metrics.average_precision(scores, labels, known[:, :5])


def test_the_loss_is_the_mean_over_known_pairs():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, generator=g, dtype=torch.float64, requires_grad=True)
    labels = (torch.rand(7, 5, generator=g) < 0.4).to(torch.uint8)
    known = (torch.rand(7, 5, generator=g) < 0.7).to(torch.uint8)
    loss = head_loss(logits, labels, "bce", known)
    x, y, w = logits.detach().numpy(), labels.numpy(), known.numpy().astype(bool)
    each = np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0) - x * y
    assert loss.item() == pytest.approx(each[w].mean(), abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert bool((gradient[known == 0] == 0).all())
    expected = (1 / (1 + np.exp(-x)) - y) / w.sum()
    np.testing.assert_allclose(gradient.numpy()[w], expected[w], atol=1e-12)
    everything = head_loss(logits, labels, "bce", torch.ones_like(known))
    assert everything.item() == pytest.approx(head_loss(logits, labels, "bce").item(), abs=1e-12)
    assert head_loss(logits, labels, "bce", torch.zeros_like(known)).item() == 0.0


def test_a_class_of_unknown_label_is_no_alternative_in_the_cross_entropy():
    logits = torch.tensor([[1.0, 2.0, 5.0], [0.0, 1.0, 0.0]], requires_grad=True)
    labels = torch.tensor([[0, 1, 0], [1, 0, 0]])
    known = torch.tensor([[1, 1, 0], [1, 1, 1]])
    loss = head_loss(logits, labels, "ce", known)
    x = logits.detach().double().numpy()
    first = np.log(np.exp(x[0, :2]).sum()) - x[0, 1]
    second = np.log(np.exp(x[1]).sum()) - x[1, 0]
    assert loss.item() == pytest.approx((first + second) / 2, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert bool(gradient.isfinite().all())
    assert float(gradient[0, 2]) == 0.0


def toy(known: bool) -> Features:
    """120 clips of 5 classes; where `known`, wrong labels stand under what is not known."""
    g = torch.Generator().manual_seed(0)
    marks = torch.randn(5, 16, generator=g)
    labels = (torch.rand(120, 5, generator=g) < 0.3).to(torch.uint8)
    tokens = labels.float() @ marks
    tokens = tokens[:, None] + 0.5 * torch.randn(120, 3, 16, generator=g)
    mask = (torch.rand(120, 5, generator=g) > 0.3).to(torch.uint8)
    wrong = torch.where(mask == 0, 1 - labels, labels)
    return Features(
        name="toy", task="multilabel", classes=tuple("abcde"),
        ids=tuple(f"clip {i}" for i in range(120)),
        splits=tuple("test" if i % 4 == 3 else "train" for i in range(120)),
        tokens=tokens, labels=wrong if known else labels, known=mask if known else None,
        image=tokens.mean(1), text=torch.randn(5, 16, generator=g),
        specs={kind: {"slug": kind} for kind in ("video", "image", "text")},
    )  # fmt: skip


def test_training_does_not_see_what_is_unknown():
    config = configuration.override(RunConfig(), SMALL)
    features = toy(known=True)
    turned = replace(
        features,
        labels=torch.where(features.known == 0, 1 - features.labels, features.labels),
    )
    first, second = train_head(features, config), train_head(turned, config)
    for a, b in zip(
        first.model.state_dict().values(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    assert first.metrics == second.metrics
    test = features.rows("test")
    assert first.metrics["pairs_unknown"] == int((features.known[test] == 0).sum())
    without = train_head(replace(features, known=None), config)
    assert "pairs_unknown" not in without.metrics
    assert without.metrics["map"] != first.metrics["map"]


def test_the_start_of_a_class_is_its_share_among_known_rows():
    features = toy(known=True)
    rows = features.rows("train")
    config = configuration.override(RunConfig(), SMALL)
    model = build_head(features, config, rows)
    turned = torch.where(features.known == 0, 1 - features.labels, features.labels)
    other = build_head(replace(features, labels=turned), config, rows)
    plain = build_head(replace(features, known=None), config, rows)

    def starts(head: torch.nn.Module) -> list[torch.Tensor]:
        return list(head.state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(starts(model), starts(other), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(starts(model), starts(plain), strict=True))


def test_class_splits_keep_what_is_known():
    features = toy(known=True)
    part = features.select(rows=torch.tensor([5, 2]), columns=(4, 1))
    assert torch.equal(part.known, features.known[[5, 2]][:, [4, 1]])
    grouped = replace(features, groups={"head": (0, 1), "tail": (4,)})
    assert grouped.select(columns=(4, 1)).groups == {"head": (1,), "tail": (0,)}
    assert features.identity()["clip_hash"] != replace(features, known=None).identity()["clip_hash"]
    turned = torch.where(features.known == 0, 1 - features.labels, features.labels)
    options = {"seen": (60,), "splits": 1, "queries": ("text",)}
    config = configuration.override(RunConfig(), SMALL)
    results = [zero_shot(f, config, **options)[0]["runs"][0]["per_class"]
               for f in (features, replace(features, labels=turned))]  # fmt: skip
    assert results[0] == results[1]


MANIFEST = """path,labels,split,unknown
a.mp4,run;jump,train,
b.mp4,jump,train,run
c.mp4,,val,run;swim
d.mp4,run,test,jump
e.mp4,run,test,run
"""


def test_a_manifest_says_what_is_unknown(tmp_path):
    file = tmp_path / "m.csv"
    file.write_text(MANIFEST)
    data = read_manifest(file)
    # A class of which it is only said that nobody knows it is a class all the same.
    assert data.classes == ("jump", "run", "swim")
    assert [c.unknown for c in data.clips] == [(), (1,), (1, 2), (0,)]
    assert [c.labels for c in data.clips] == [(0, 1), (0,), (), (1,)]
    assert data.skipped == (
        ("line 6", "'run' stands under labels and under unknown: it can be one of them"),
    )
    lines = [
        {"path": "a.mp4", "labels": ["run", "jump"], "split": "train"},
        {"path": "b.mp4", "labels": ["jump"], "split": "train", "unknown": ["run"]},
        {"path": "c.mp4", "labels": [], "split": "val", "unknown": ["run", "swim"]},
        {"path": "d.mp4", "labels": ["run"], "split": "test", "unknown": ["jump"]},
    ]
    jsonl = tmp_path / "m.jsonl"
    jsonl.write_text("\n".join(json.dumps(line) for line in lines))
    assert read_manifest(jsonl).clips == data.clips
    assert read_manifest(jsonl).clip_list_hash() == data.clip_list_hash()
    order = tmp_path / "classes.txt"
    order.write_text("run\njump\n")
    skipped = read_manifest(file, classes=order).skipped
    assert ("line 4", f"unknown label 'swim': not in {order}") in skipped
    with pytest.raises(DatasetError, match="line 6: 'run' stands under labels and under unknown"):
        read_manifest(file, policy="error")


def test_the_store_carries_it_and_another_is_refused(tmp_path):
    clips = tuple(
        Clip(f"c{row}", Path(f"{row}.mp4"), None, None, (0,), "train", unknown=(1,) * (row == 2))
        for row in range(3)
    )
    data = Dataset("toy", ("a", "b"), "multilabel", clips, "map")
    StoreWriter(tmp_path / "a.zarr", data)
    known = open_store(tmp_path / "a.zarr").label_known()
    assert known is not None
    assert known.tolist() == [[True, True], [True, True], [True, False]]
    all_known = replace(data, clips=tuple(replace(c, unknown=()) for c in clips))
    with pytest.raises(SpecMismatch, match="clip list"):
        StoreWriter(tmp_path / "a.zarr", all_known)
    StoreWriter(tmp_path / "b.zarr", all_known)
    assert open_store(tmp_path / "b.zarr").label_known() is None
    with pytest.raises(SpecMismatch, match="clip list"):
        StoreWriter(tmp_path / "b.zarr", data)


def test_from_a_manifest_to_a_result(tmp_path, capsys):
    rows = ["path,labels,split,unknown"]
    for k in range(12):
        fakes.write_video(tmp_path / f"{k}.mp4", k)
        labels = ("run", "jump", "run;jump")[k % 3]
        unknown = "swim" if k % 4 == 0 else ""
        labels += ";swim" if k in (1, 5, 11) else ""
        rows.append(f"{k}.mp4,{labels},{'test' if k >= 8 else 'train'},{unknown}")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    store = tmp_path / "m.zarr"
    assert run("extract", "--manifest", tmp_path / "m.csv", "--out", store, "--frames", 2,
               "--workers", 0, "-q") == 0  # fmt: skip
    capsys.readouterr()
    out = tmp_path / "run"
    assert run("train-head", store, "--out", out, "-q", "--json", *SMALL) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metrics"]["pairs_unknown"] == 1
    with np.load(out / "predictions.npz") as held:
        logits, labels, kept = (torch.from_numpy(held[k]) for k in ("logits", "labels", "known"))
    known = open_store(store).label_known([8, 9, 10, 11])
    assert kept.tolist() == torch.as_tensor(known).tolist()
    assert metrics.all_metrics(logits, labels, "multilabel", known=known) == result["metrics"]
    assert run("eval", out, store) == 0
    assert "1 pairs of clip and class unknown" in " ".join(capsys.readouterr().err.split())
