"""What a random order scores: the mAP that a result has to be seen beside.

Shapes, labels and `known` are as in `msq.head.metrics`, which has every number that msq reports.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msq.head.ranking import labelled
from msq.head.sending import brought


def chance_map(labels: Tensor, known: Tensor | None = None) -> float:
    """Expected `mean_average_precision` of a random order without ties.

    For R positives among N rows the expected AP is ((R - 1) / (N - 1) (N - H_N) + H_N) / N with
    H_N the N-th harmonic number: a little above the share R / N. Of each class only the known rows
    count.
    """
    keep = labelled(labels, known).nonzero().flatten()
    positive = labels != 0 if known is None else (labels != 0) & (known != 0)
    part = None if known is None else known[keep]
    rows, found = brought({"both": class_counts(positive[keep], part)})["both"]
    return chance_of_counts(rows, found)


def class_counts(positive: Tensor, known: Tensor | None) -> Tensor:
    """Known clips, and known positive ones, of each class [2, K]."""
    counted = torch.ones_like(positive) if known is None else known != 0
    return torch.stack([counted.double().sum(0), positive.double().sum(0)])


def chance_of_counts(rows: Tensor, found: Tensor) -> float:
    """`chance_map` of R = `found` [K] among N = `rows` [K], on the CPU."""
    rows, found = rows[found > 0], found[found > 0]
    if not len(found):
        return float("nan")
    steps = 1.0 / torch.arange(1, int(rows.max()) + 1, dtype=torch.float64)
    harmonic = steps.cumsum(0)[rows.long() - 1]
    spread = (found - 1) / (rows - 1).clamp(min=1) * (rows - harmonic)
    return float(((spread + harmonic) / rows).mean())
