from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, hamming_loss
from torch import Tensor

from msq.errors import MsqError, UsageError
from msq.head import metrics


def example(n: int, k: int, *, ties: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores and labels; class 3 has no positive, row 5 no label, class 0 is always there."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, k, generator=generator)
    labels = (torch.rand(n, k, generator=generator) < 0.15).long()
    labels[:, 3] = 0
    labels[:, 0] = 1
    labels[5] = 0
    return (scores.round() if ties else scores), labels


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("n", [7, 64, 313])
def test_average_precision_equals_scikit_learn(n: int, ties: bool) -> None:
    scores, labels = example(n, 11, ties=ties)
    found = metrics.average_precision(scores, labels)
    assert found.shape == (11,)
    for k in range(11):
        if labels[:, k].any():
            expected = average_precision_score(labels[:, k].numpy(), scores[:, k].numpy())
            assert float(found[k]) == pytest.approx(expected, abs=1e-12)
        else:
            assert math.isnan(found[k])
    micro = average_precision_score(labels.numpy(), scores.numpy(), average="micro")
    assert metrics.micro_average_precision(scores, labels) == pytest.approx(micro, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_average_precision_equals_torchmetrics(ties: bool) -> None:
    from torchmetrics.functional.classification import (
        multilabel_average_precision,
    )

    scores, labels = example(120, 9, ties=ties)
    scores = scores.sigmoid()  # what torchmetrics does on its own to anything outside 0..1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of the empty class
        per_class = multilabel_average_precision(scores, labels, 9, average="none")
        micro = multilabel_average_precision(scores, labels, 9, average="micro")
    filled = [k for k in range(9) if k != 3]
    torch.testing.assert_close(
        metrics.average_precision(scores, labels)[filled], per_class[filled].double(),
        atol=1e-6, rtol=0,
    )  # fmt: skip
    assert metrics.micro_average_precision(scores, labels) == pytest.approx(float(micro), abs=1e-6)


def test_official_micro_ap_equals_torchmetrics_batch_by_batch_weighted_by_size() -> None:
    from torchmetrics.classification import MultilabelAveragePrecision

    scores, labels = example(83, 6, ties=True)
    scores = scores.sigmoid()
    labels[32:64] = 0  # a whole batch without a positive
    meter = MultilabelAveragePrecision(num_labels=6, average="micro")
    total = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for first in range(0, 83, 32):
            rows = slice(first, first + 32)
            total += float(meter(scores[rows], labels[rows])) * len(scores[rows])
    found = metrics.official_micro_average_precision(scores, labels, batch_size=32)
    assert found == pytest.approx(total / 83, abs=1e-6)
    assert found != pytest.approx(metrics.micro_average_precision(scores, labels), abs=1e-3)


def test_the_order_of_tied_rows_matters_to_the_charades_scorer_only() -> None:
    labels = torch.tensor([[1], [0], [1]])
    scores = torch.zeros(3, 1)
    swapped = labels[[1, 0, 2]]
    assert float(metrics.average_precision(scores, labels)) == pytest.approx(2 / 3)
    assert float(metrics.average_precision(scores, swapped)) == pytest.approx(2 / 3)
    # Rows without a label are ranked last: of three tied rows the two positives come first.
    assert metrics.charades_map(scores, labels) == pytest.approx(1.0)
    both = torch.tensor([[1, 0], [0, 1], [1, 0]])
    assert float(metrics.charades_map(torch.zeros(3, 2), both).per_class[0]) == pytest.approx(5 / 6)


def test_charades_map_equals_a_loop_over_a_stable_order() -> None:
    scores, labels = example(60, 5, ties=True)
    fixed = scores.double().numpy().copy()
    fixed[labels.sum(1).numpy() == 0] = -np.inf
    for k in (0, 1, 2, 4):
        order = np.argsort(-fixed[:, k], kind="stable")
        hits, precisions = 0, []
        for place, row in enumerate(order, 1):
            if labels[row, k]:
                hits += 1
                precisions.append(hits / place)
        found = metrics.charades_map(scores, labels).per_class[k]
        assert float(found) == pytest.approx(np.mean(precisions), abs=1e-12)


def test_unlabelled_rows_and_empty_classes_are_left_out_of_the_mean_and_counted() -> None:
    scores, labels = example(40, 6, ties=False)
    value = metrics.mean_average_precision(scores, labels)
    keep = labels.any(1)
    expected = [
        average_precision_score(labels[keep, k].numpy(), scores[keep, k].numpy())
        for k in (0, 1, 2, 4, 5)
    ]
    assert value == pytest.approx(np.mean(expected), abs=1e-12)
    assert (value.classes_scored, value.classes_left_out) == (5, 1)
    assert value.rows_left_out == int((~keep).sum()) >= 1
    assert value.rows_scored + value.rows_left_out == 40


def test_a_permutation_of_rows_changes_no_grouped_metric() -> None:
    scores, labels = example(50, 7, ties=True)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        metrics.average_precision(scores, labels),
        metrics.average_precision(scores[order], labels[order]),
        equal_nan=True, atol=1e-12, rtol=0,
    )  # fmt: skip


def test_topk_accuracy_equals_torchmetrics_and_takes_label_sets() -> None:
    from torchmetrics.functional.classification import multiclass_accuracy

    scores, _ = example(90, 8, ties=False)
    index = torch.randint(0, 8, (90,), generator=torch.Generator().manual_seed(2))
    for k in (1, 5):
        expected = multiclass_accuracy(scores, index, 8, average="micro", top_k=k)
        assert metrics.topk_accuracy(scores, index, k) == pytest.approx(float(expected), abs=1e-6)
    several = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0]])
    ranks = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.5, 0.1], [1.0, 0.0, 0.0]])
    assert metrics.topk_accuracy(ranks, several) == 0.5  # the unlabelled row does not count
    assert metrics.topk_accuracy(ranks, several, 9) == 1.0
    assert metrics.topk_accuracy(torch.zeros(2, 4), torch.tensor([0, 1])) == 0.5


def test_multilabel_accuracy_is_one_minus_the_hamming_loss() -> None:
    scores, labels = example(30, 6, ties=False)
    expected = 1 - hamming_loss(labels.numpy(), (scores > 0).long().numpy())
    assert metrics.multilabel_accuracy(scores, labels, logits=True) == pytest.approx(expected)
    assert metrics.multilabel_accuracy(scores.sigmoid(), labels) == pytest.approx(expected)
    nothing = metrics.multilabel_accuracy(torch.zeros(30, 6), labels)
    assert metrics.all_negative_accuracy(labels) == pytest.approx(nothing)
    with pytest.raises(UsageError, match="pass logits=True"):
        metrics.multilabel_accuracy(scores, labels)


@pytest.mark.parametrize("unknown", [0.0, 0.4])
def test_f1_equals_scikit_learn_over_the_classes_with_a_positive(unknown: float) -> None:
    logits, labels = example(200, 9, ties=False, seed=4)
    logits, labels = logits - logits.mean(), labels.clone()
    labels[:, 3] = 0  # never there, sometimes said
    logits[:, 5] = -9  # there, never said
    g = torch.Generator().manual_seed(1)
    known = (torch.rand(labels.shape, generator=g) >= unknown).to(torch.uint8)
    part = known if unknown else None
    found = metrics.all_metrics(logits, labels, "multilabel", known=part)
    yes, y, w = (x.numpy().astype(bool) for x in (logits.sigmoid() > 0.5, labels, known))
    assert 0 < yes[:, 3].sum() < 200
    f1 = [
        f1_score(y[w[:, k], k], yes[w[:, k], k], zero_division=0.0)
        for k in range(9)
        if y[w[:, k], k].any()
    ]
    assert len(f1) == 8
    assert found["f1_macro"] == pytest.approx(sum(f1) / 8, abs=1e-12)
    assert found["f1_micro"] == pytest.approx(f1_score(y[w], yes[w]), abs=1e-12)
    if not unknown:
        shown = [k for k in range(9) if k != 3]
        sklearn = f1_score(y, yes, labels=shown, average="macro", zero_division=0.0)
        assert found["f1_macro"] == pytest.approx(sklearn, abs=1e-12)


def test_f1_of_nothing_is_no_number() -> None:
    none = metrics.all_metrics(torch.full((3, 2), -1.0), torch.zeros(3, 2), "multilabel")
    assert math.isnan(none["f1_macro"])
    assert math.isnan(none["f1_micro"])
    said = metrics.all_metrics(torch.full((3, 2), 1.0), torch.zeros(3, 2), "multilabel")
    assert math.isnan(said["f1_macro"])
    assert said["f1_micro"] == 0
    one = torch.nn.functional.one_hot(torch.tensor([0, 1]), 3)
    assert "f1_macro" not in metrics.all_metrics(torch.randn(2, 3), one, "singlelabel")


def test_chance_is_what_random_orders_give_on_average() -> None:
    _, labels = example(30, 5, ties=False)
    generator = torch.Generator().manual_seed(3)
    draws = [
        metrics.mean_average_precision(torch.rand(30, 5, generator=generator), labels)
        for _ in range(1500)
    ]
    error = float(np.std(draws)) / math.sqrt(len(draws))
    assert metrics.chance_map(labels) == pytest.approx(float(np.mean(draws)), abs=4 * error)


def test_nan_scores_and_other_shapes_are_refused() -> None:
    scores, labels = example(10, 4, ties=False)
    scores[3, 1] = float("nan")
    with pytest.raises(MsqError, match="NaN among the scores of 1 rows, the first is 3"):
        metrics.mean_average_precision(scores, labels)
    with pytest.raises(UsageError, match=r"\[10, 4\] and \[10, 3\]"):
        metrics.average_precision(scores, labels[:, :3])


def test_no_positive_at_all_is_nan_and_not_a_number_to_be_proud_of() -> None:
    scores, labels = torch.rand(4, 3), torch.zeros(4, 3)
    assert math.isnan(metrics.mean_average_precision(scores, labels))
    assert math.isnan(metrics.micro_average_precision(scores, labels))
    assert math.isnan(metrics.topk_accuracy(scores, labels))
    assert metrics.harmonic_mean(0.0, 0.0) == 0.0
    assert metrics.harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)


def test_minus_infinity_ranks_last_and_ties_with_itself() -> None:
    scores = torch.tensor([[1.0], [-torch.inf], [-torch.inf], [0.0]])
    labels = torch.tensor([[0], [1], [0], [1]])
    expected = average_precision_score([0, 1, 0, 1], [1.0, -9.0, -9.0, 0.0])
    assert float(metrics.average_precision(scores, labels)) == pytest.approx(expected)


def test_all_metrics_names_every_metric_of_both_protocols() -> None:
    scores, labels = example(40, 6, ties=False)
    found = metrics.all_metrics(scores, labels, "multilabel")
    assert {"map", "map_micro", "map_official", "map_charades", "top1", "top5", "accuracy",
            "accuracy_all_negative", "classes_scored"} <= set(found)  # fmt: skip
    assert all(type(value) in (float, int) for value in found.values())
    one = torch.nn.functional.one_hot(torch.arange(40) % 6, 6)
    single = metrics.all_metrics(scores, one, "singlelabel")
    assert "accuracy" not in single
    assert single["map"] == pytest.approx(
        float(metrics.mean_average_precision(scores.double().softmax(1), one)), abs=1e-12
    )


def charades_labels(file: Path) -> Tensor:
    with file.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    labels = torch.zeros(len(rows), 157, dtype=torch.uint8)
    for row, record in enumerate(rows):
        for action in filter(None, record["actions"].split(";")):
            labels[row, int(action.split()[0][1:])] = 1
    return labels


def test_class_frequencies_alone_score_what_is_published_for_the_real_charades_labels(
    shared: Path,
) -> None:
    folder = shared / "annotations" / "charades"
    train = charades_labels(folder / "Charades_v1_train.csv")
    test = charades_labels(folder / "Charades_v1_test.csv")
    assert (len(train), len(test)) == (7985, 1863)
    share = train.double().mean(0).expand(len(test), -1)
    found = metrics.all_metrics(share.logit(), test, "multilabel")
    percent = {key: round(100 * value, 2) for key, value in found.items()}
    assert (percent["map"], percent["map_micro"], percent["map_official"]) == (5.72, 13.56, 13.80)
    assert percent["map_charades"] == 6.31
    assert found["rows_unlabelled"] == 49
    labelled = test[test.bool().any(1)]
    assert round(100 * metrics.all_negative_accuracy(labelled), 2) == 94.28
