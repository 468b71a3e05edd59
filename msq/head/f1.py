"""F1 of yes and no, per class and over all pairs.

Of a class F1 = 2 TP / (2 TP + FP + FN), the harmonic mean of precision and recall (van Rijsbergen
1979). Pairs of clip and class that nobody knows are no part of any of the three.
"""

from __future__ import annotations

import torch
from torch import Tensor


def f1_tensor(yes: Tensor, positive: Tensor, known: Tensor | None = None) -> Tensor:
    """Macro and micro F1, float64 [2], on the device of its inputs and without waiting for it.

    Macro is the mean over the classes with a positive, as mAP is (a class of which all is denied
    counts 0); micro takes all N K pairs together. NaN where there is nothing to divide by.

    Args:
        yes: [N, K] bool, what a scorer says.
        positive: [N, K] bool, what is so.
        known: [N, K], zero where nobody knows; None where all is known.
    """
    if known is not None:
        yes, positive = yes & (known != 0), positive & (known != 0)
    right = 2 * (yes & positive).double().sum(0)
    wrong = (yes != positive).double().sum(0)
    shown = positive.any(0)
    of_class = torch.where(shown, right / (right + wrong), 0.0)
    micro = right.sum() / (right.sum() + wrong.sum())
    return torch.stack([of_class.sum() / shown.double().sum(), micro])
