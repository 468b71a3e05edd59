"""Encoders of video, images and text: a model, its weights, and a spec of its outputs.

Names are loaded on first use: what reads specs and prompts of a store needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msq.extract.encoders.catalogue import list_encoders
    from msq.extract.encoders.clip import ImageEncoder, TextEncoder
    from msq.extract.encoders.encoder import Encoder, VideoEncoder
    from msq.extract.encoders.registry import load_clip, load_video_encoder
    from msq.extract.encoders.spec import EncoderSpec, difference
    from msq.extract.encoders.text_families import load_text_encoder
    from msq.extract.encoders.timesformer import TimeSformer
    from msq.extract.encoders.timesformer_config import TimeSformerConfig

__all__ = [
    "Encoder",
    "EncoderSpec",
    "ImageEncoder",
    "TextEncoder",
    "TimeSformer",
    "TimeSformerConfig",
    "VideoEncoder",
    "difference",
    "list_encoders",
    "load_clip",
    "load_text_encoder",
    "load_video_encoder",
]

_MODULES = {
    "Encoder": "encoder",
    "EncoderSpec": "spec",
    "ImageEncoder": "clip",
    "TextEncoder": "clip",
    "TimeSformer": "timesformer",
    "TimeSformerConfig": "timesformer_config",
    "VideoEncoder": "encoder",
    "difference": "spec",
    "list_encoders": "catalogue",
    "load_clip": "registry",
    "load_text_encoder": "text_families",
    "load_video_encoder": "registry",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
