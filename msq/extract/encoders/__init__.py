"""Encoders of video, images and text: a model, its weights, and a spec of its outputs."""

from msq.extract.encoders.clip import ImageEncoder, TextEncoder
from msq.extract.encoders.encoder import Encoder, VideoEncoder
from msq.extract.encoders.registry import list_encoders, load_clip, load_video_encoder
from msq.extract.encoders.spec import EncoderSpec, difference
from msq.extract.encoders.text_families import load_text_encoder
from msq.extract.encoders.timesformer import TimeSformer, TimeSformerConfig

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
