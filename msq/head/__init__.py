"""Stage two: from the feature store to a trained head.

Shapes, everywhere in this package:

    B clips   K classes (queries)   S tokens   H heads of attention   T frames   V views
    D width of the head   D' width of the tokens   D'' width of the image feature
    L decoder layers   G heads trained at once

It needs torch, triton, numpy and safetensors; opening stores and running encoders is left to
`msq.extract`, which is imported inside the functions that do so.
"""

from __future__ import annotations

from msq.head import metrics, model
from msq.head.model import MSQNet

__all__ = ["MSQNet", "metrics", "model"]
