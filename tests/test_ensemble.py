"""Scores over several test views, against averages of probabilities in numpy."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from msq import config as configuration
from msq.cli import main
from msq.config import RunConfig
from msq.errors import StoreError, UsageError
from msq.extract.store import open_store
from msq.extract.views import CLEAN, augmented_views, clips_by_crops
from msq.head.checkpoint import load_model
from msq.head.ensemble import chosen_test_views, combined
from msq.head.evaluate import evaluate_run
from msq.head.features import load_features
from msq.head.metrics import all_metrics
from msq.head.train import train_head

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("view_stores.py"))))
SMALL = ("head.layers=1", "head.heads=2", "head.ffn=32", "train.epochs=3", "train.batch=16")
TEST = clips_by_crops(2, 3)
VIEWS = (CLEAN, *augmented_views(1), *TEST)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("task", ["multilabel", "singlelabel"])
def test_probabilities_of_views_are_combined_as_numpy_does(task: str, how: str) -> None:
    x = np.random.default_rng(0).normal(scale=3, size=(7, 40, 6))
    found = combined((torch.from_numpy(part) for part in x), task, how)
    assert found.dtype == torch.float64
    p = sigmoid(x) if task == "multilabel" else softmax(x)
    expected = p.mean(0) if how == "mean" else p.max(0)
    got = found.numpy()
    got = sigmoid(got) if task == "multilabel" else np.exp(got)
    assert np.abs(got - expected).max() < 1e-14


def test_one_view_and_equal_views_change_nothing() -> None:
    x = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for how in ("mean", "max"):
        for views in (1, 3):
            assert torch.allclose(combined([x] * views, "multilabel", how), x, atol=1e-13)
            logs = combined([x] * views, "singlelabel", how)
            assert torch.allclose(logs, x.log_softmax(-1), atol=1e-13)


def test_saturated_probabilities_keep_their_order() -> None:
    # As float64 probabilities all of these are 1, or 0, to the last bit.
    first = torch.tensor([[50.0], [60.0], [45.0], [-800.0], [-900.0]])
    second = torch.tensor([[52.0], [41.0], [47.0], [-810.0], [-790.0]])
    mean = combined([first, second], "multilabel", "mean").flatten()
    assert bool((torch.sigmoid(mean[:3]) == 1).all())
    assert mean[:3].argsort(descending=True).tolist() == [0, 2, 1]  # the worst view decides
    assert mean[3:].argsort(descending=True).tolist() == [1, 0]  # the best view decides
    doubts = np.logaddexp(-50.0, -52.0) - np.log(2)
    assert mean[0].item() == pytest.approx(-doubts, abs=1e-12)
    largest = combined([first, second], "multilabel", "max").flatten()
    assert largest.tolist() == [52, 60, 47, -800, -790]


def test_no_view_and_other_words_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one view"):
        combined([], "multilabel", "mean")
    with pytest.raises(UsageError, match="mean or max, found 'median'"):
        combined([torch.zeros(1, 1)], "multilabel", "median")


def test_log_probabilities_are_ranked_as_they_are() -> None:
    # Two clips with the same largest probabilities of class 0, which sum to different numbers.
    logs = torch.tensor([[0.6, 0.6, 0.1], [0.6, 0.2, 0.2], [0.5, 0.3, 0.2]]).double().log()
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 0]])
    found = all_metrics(logs, labels, "singlelabel", log_probabilities=True)
    expected = [
        average_precision_score(labels[:, k].numpy(), logs[:, k].exp().numpy()) for k in (0, 1)
    ]
    assert found["map"] == pytest.approx(np.mean(expected), abs=1e-12)
    assert all_metrics(logs, labels, "singlelabel")["map"] != pytest.approx(found["map"], abs=1e-3)


def trained(folder: Path, task: str = "multilabel", **options: Any) -> tuple[Path, Path]:
    """A store with test views and a head trained on its clean one."""
    store = stores.make_store(folder / "s.zarr", VIEWS, task=task, **options)
    classifier = "head.classifier=shared"
    config = configuration.override(RunConfig(), [*SMALL, classifier])
    train_head(load_features(open_store(store)), config, folder / "run")
    return folder / "run", store


def logits_of_views(run: Path, path: Path, rows: list[int]) -> np.ndarray:
    """[V, n, K] of the test views, one clip at a time, through the plain model."""
    store, (model, _) = open_store(path), load_model(run / "head.safetensors")
    with torch.no_grad():
        return np.array([
            [
                model(
                    store.tokens([row], view=number).float(),
                    store.image([row], view=number).float(),
                )["logits"][0].double().numpy()
                for row in rows
            ]
            for number in range(2, len(VIEWS))
        ])  # fmt: skip


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("task", ["multilabel", "singlelabel"])
def test_eval_over_test_views_is_that_of_numpy_and_sklearn(
    task: str, how: str, tmp_path: Path
) -> None:
    run, path = trained(tmp_path, task)
    store = open_store(path)
    rows = [row for row, split in enumerate(store.splits) if split == "test"]
    x = logits_of_views(run, path, rows)
    p = sigmoid(x) if task == "multilabel" else softmax(x)
    p = p.mean(0) if how == "mean" else p.max(0)
    y = store.labels(rows).numpy()
    keep = y.any(1)
    expected = [
        average_precision_score(y[keep, k], p[keep, k]) for k in range(y.shape[1]) if y[:, k].any()
    ]
    found = evaluate_run(run, store, ensemble=how)
    assert found["views"] == f"2 clips x 3 crops, {how}"
    assert found["clips"] == len(rows)
    assert found["metrics"]["map"] == pytest.approx(np.mean(expected), abs=1e-6)
    top = y[keep][np.arange(keep.sum()), p[keep].argmax(1)].mean()
    assert found["metrics"]["top1"] == pytest.approx(top)
    if task == "multilabel":
        assert found["metrics"]["accuracy"] == pytest.approx(((p > 0.5) == (y > 0)).mean())
    clean = evaluate_run(run, store)
    assert clean["views"] == "clean"
    assert clean["metrics"]["map"] != found["metrics"]["map"]
    stored = json.loads((run / "result.json").read_text())
    assert stored["views"] == "clean"
    assert clean["metrics"]["map"] == pytest.approx(stored["metrics"]["map"])


def test_clips_that_some_view_lacks_are_left_out_and_counted(tmp_path: Path) -> None:
    lost: dict[Any, int] = {("test clip 2/2 crop 1/3", 5): 2}
    lost |= {("fake-image", "test clip 1/2 crop 3/3", 8): 0}
    lost |= {("test clip 1/2 crop 1/3", 0): 2}  # a training clip, which nobody asks for
    run, path = trained(tmp_path, status=lost)
    store = open_store(path)
    found = evaluate_run(run, store, ensemble="mean")
    assert found["clips"] == store.splits.count("test") - 2
    assert "58 of 60 clips (2 without all test views)" in found["coverage"]
    assert evaluate_run(run, store)["clips"] == store.splits.count("test")


def test_a_store_without_test_views_is_refused_with_the_command(tmp_path: Path) -> None:
    run, path = trained(tmp_path)
    plain = stores.make_store(tmp_path / "plain.zarr", (CLEAN, *augmented_views(2)))
    with pytest.raises(UsageError, match=r"no test views of fake-video; .*--test-views 10x3"):
        evaluate_run(run, open_store(plain), ensemble="mean")
    with pytest.raises(UsageError, match=r"no test views 4x1 .*are 2x3\).*--test-views 4x1"):
        evaluate_run(run, open_store(path), ensemble="max", test_views="4x1")
    with pytest.raises(UsageError, match="needs a feature store"):
        evaluate_run(run, load_features(open_store(path)), ensemble="mean")
    half = stores.make_store(tmp_path / "half.zarr", VIEWS, image_views=(CLEAN,))
    with pytest.raises(StoreError, match="fake-image: no view 'test clip 1/2 crop 1/3'"):
        evaluate_run(run, open_store(half), ensemble="mean")


def test_several_sets_of_test_views_need_a_choice(tmp_path: Path) -> None:
    views = (*VIEWS, *clips_by_crops(4, 1))
    store = open_store(stores.make_store(tmp_path / "s.zarr", views))
    with pytest.raises(UsageError, match="2x3, 4x1; choose one with --test-views 2x3"):
        chosen_test_views(store, "fake-video", None)
    assert chosen_test_views(store, "fake-video", "4X1") == clips_by_crops(4, 1)
    assert chosen_test_views(store, "fake-video", "2x3") == TEST


def code(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_command_line_says_which_views_were_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, store = trained(tmp_path)
    for ensemble, words in (
        ("none", "clean"),
        ("mean", "2 clips x 3 crops, mean"),
        ("max", "2 clips x 3 crops, max"),
    ):
        assert code("eval", run, store, "--ensemble", ensemble, "--json") == 0
        assert json.loads(capsys.readouterr().out)["views"] == words
        assert code("eval", run, store, "--ensemble", ensemble) == 0
        assert f"views {words}" in " ".join(capsys.readouterr().out.split())
    assert code("eval", run, store, "--test-views", "2x3") == 2
    assert code("eval", run, store, "--ensemble", "mean", "--test-views", "2x3", "--json") == 0
