"""msq: actor-agnostic multi-label action recognition with multi-modal queries (arXiv 2307.10763).

Two stages: `extract` runs encoders over videos once and writes a feature store; a query-fusion
head is then trained on the store in seconds. `extract_features`, `train_head`, `evaluate` and
`zero_shot` do what the commands `extract`, `train-head`, `eval` and `zero-shot` do. Names are
loaded on first use, so that `import msq` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from msq import head as head
    from msq.api.extraction import extract_features
    from msq.api.heads import evaluate, train_head
    from msq.api.sweeps import zero_shot
    from msq.extract.encode import encode
    from msq.extract.encoders import load_clip, load_text_encoder, load_video_encoder
    from msq.extract.store import open_store
    from msq.head import metrics as metrics
    from msq.head.predict import load_head

__all__ = [
    "__version__",
    "encode",
    "evaluate",
    "extract_features",
    "head",
    "load_clip",
    "load_head",
    "load_text_encoder",
    "load_video_encoder",
    "metrics",
    "open_store",
    "train_head",
    "zero_shot",
]

_MODULES = {"head": "msq.head", "metrics": "msq.head.metrics"}
_ATTRIBUTES = {
    "encode": "msq.extract.encode",
    "evaluate": "msq.api.heads",
    "extract_features": "msq.api.extraction",
    "load_clip": "msq.extract.encoders",
    "load_head": "msq.head.predict",
    "load_text_encoder": "msq.extract.encoders",
    "load_video_encoder": "msq.extract.encoders",
    "open_store": "msq.extract.store",
    "train_head": "msq.api.heads",
    "zero_shot": "msq.api.sweeps",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _ATTRIBUTES:
        return getattr(importlib.import_module(_ATTRIBUTES[name]), name)
    raise AttributeError(f"module 'msq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
