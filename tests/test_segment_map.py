"""Macro mAP of groups of classes."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import average_precision_score

from msq.errors import UsageError
from msq.head.segments import segment_map


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(60, 6, generator=generator)
    labels = (torch.rand(60, 6, generator=generator) < 0.3).long()
    labels[:, 5] = 0
    labels[7] = 0
    return scores, labels


def test_each_segment_is_the_mean_of_its_classes_ranked_over_all_labelled_clips():
    scores, labels = example()
    found = segment_map(scores, labels, {"head": (0, 2), "tail": (1, 3, 4, 5), "none": (5,)})
    keep = labels.any(1)
    ap = [average_precision_score(labels[keep, k].numpy(), scores[keep, k]) for k in range(5)]
    assert found["overall"] == pytest.approx(sum(ap) / 5)
    assert found["head"] == pytest.approx((ap[0] + ap[2]) / 2)
    assert found["tail"] == pytest.approx((ap[1] + ap[3] + ap[4]) / 3)
    assert math.isnan(found["none"])
    assert (found["tail"].classes_scored, found["tail"].classes_left_out) == (3, 1)
    assert found["head"].rows_scored == 60 - int((~keep).sum())


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ({"head": (0, 6)}, r"expected distinct classes 0 to 5, found \[6\]"),
        ({"head": (1, 1)}, r"found \[1, 1\]"),
        ({"overall": (0,)}, "other than 'overall'"),
    ],
)
def test_segments_that_do_not_fit_the_classes_are_refused(segments, words):
    with pytest.raises(UsageError, match=words):
        segment_map(*example(), segments)
