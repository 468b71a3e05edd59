"""What every family of video encoders hands over once its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from msq.extract.encoders.pooling import TokenOrder
from msq.extract.encoders.weights import WeightFiles


@dataclass(frozen=True)
class VideoModel:
    """A model [B, T, 3, h, w] -> all its tokens, with everything that its spec needs.

    Attributes:
        model: in evaluation mode.
        order: what its tokens stand for.
        patches: N, places per step of `order`.
        channels: D'.
        files: the weights.
        stem: first part of the encoder's name inside stores, family included.
        architecture: in words, for the spec.
        frames: T.
        size: height and width in pixels.
        mean: the checkpoint's own, per channel.
        std: likewise.
        resized: note of embeddings that were made for another T or size, else empty.
    """

    model: nn.Module
    order: TokenOrder
    patches: int
    channels: int
    files: WeightFiles
    stem: str
    architecture: str
    frames: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resized: str = ""
