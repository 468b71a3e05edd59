"""Stage two: from the feature store to a trained head.

Shapes, everywhere in this package:

    B clips   K classes (queries)   S tokens   H heads of attention   T frames   V views
    D width of the head   D' width of the tokens   D'' width of the image feature
    L decoder layers   G heads trained at once

It needs torch, triton, numpy and safetensors; opening stores and running encoders is left to
`msq.extract`, which is imported inside the functions that do so.

For a loop of your own: `load_features` reads a store, `build_head` makes an `MSQNet` at its start,
`save_head` writes what `msq.load_head` and `msq predict` read.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msq.head import metrics as metrics
    from msq.head import model as model
    from msq.head.build import build_head
    from msq.head.checkpoint import save_head
    from msq.head.features import load_features
    from msq.head.model import MSQNet

__all__ = ["MSQNet", "build_head", "load_features", "metrics", "model", "save_head"]

_MODULES = ("metrics", "model")
_ATTRIBUTES = {
    "MSQNet": "model",
    "build_head": "build",
    "load_features": "features",
    "save_head": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """Names are loaded on first use: tables of finished runs are made without torch."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _ATTRIBUTES:
        return getattr(importlib.import_module(f"{__name__}.{_ATTRIBUTES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
