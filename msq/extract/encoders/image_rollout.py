"""Attention rollout through the image tower of a CLIP, each frame by itself.

A ViT is rolled out as `msq.extract.encoders.rollout` says, from what its pooling reads: the class
token, or the mean of the patches. A ResNet of CLIP has attention in its last step only, the
attention pool, without a residual: there row 0 of A is all there is, and its share for the mean
over all places is spread over these evenly. Its places are those of the last feature map.

Shapes: T frames, N places per frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from msq.errors import UsageError
from msq.extract.encoders.attention_maps import is_readable, watching
from msq.extract.encoders.clip import ImageEncoder
from msq.extract.encoders.rollout import image_layers, joint_back

FrameMaps = Callable[[], tuple[Tensor, Tensor]]


@contextmanager
def image_rollout(encoder: ImageEncoder) -> Iterator[FrameMaps]:
    """Watch an image encoder in the block; see `msq.extract.encoders.rollout.rollout`.

    Yields:
        A function that gives, of the last forward pass, of one clip, weights [T, N] over the places
        of each frame and [T] over the class token's start. All together sum to one: a clip's vector
        is the mean over its T frames.

    Raises:
        UsageError: a tower whose pooling or layers are of another kind than those above.
    """
    tower: Any = getattr(encoder.model, "visual", None)
    pooled = getattr(tower, "attnpool", None)
    if pooled is not None and is_readable(pooled):
        with watching([pooled]) as maps:
            yield lambda: _of_pool(maps[0])
        return
    found = image_layers(tower)
    kind = getattr(tower, "pool_type", "")
    if found is None or getattr(tower, "attn_pool", None) is not None or kind not in ("tok", "avg"):
        raise UsageError(
            f"{encoder.spec.slug}: expected a plain ViT or a ResNet of CLIP, found "
            f"{type(tower).__name__}, whose attention is of another kind"
        )
    with watching(found.layers) as maps:
        yield lambda: _of_vit(maps, kind)


def _of_pool(a: Tensor) -> tuple[Tensor, Tensor]:
    """From the attention pool's map [T, 1 + N, 1 + N]."""
    frames, length = a.shape[:2]
    row = a[:, 0]
    places = row[:, 1:] + row[:, :1] / (length - 1)
    return places / frames, torch.zeros(frames, device=a.device)


def _of_vit(maps: list[Tensor], kind: str) -> tuple[Tensor, Tensor]:
    """From the maps [T, 1 + N, 1 + N] of all layers."""
    frames, length = maps[0].shape[:2]
    rows = torch.zeros(frames, 1, length, device=maps[0].device)
    if kind == "tok":
        rows[:, :, 0] = 1 / frames
    else:
        rows[:, :, 1:] = 1 / (frames * (length - 1))
    rows = joint_back(rows, maps)[:, 0]
    return rows[:, 1:], rows[:, 0]
