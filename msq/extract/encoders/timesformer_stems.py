"""From pixels to the patches of a TimeSformer: one linear projection, or a few convolutions."""

from __future__ import annotations

import math
from typing import cast

from torch import Tensor, nn

from msq.extract.encoders.timesformer_config import TimeSformerConfig


class PatchStem(nn.Module):
    """Non-overlapping patches, each projected linearly: `z = W_emb x` of the paper."""

    def __init__(self, config: TimeSformerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B·T, 3, h, w] to patches [B·T, D', rows, columns]."""
        return cast(Tensor, self.proj(images))


class ConvStem(nn.Module):
    """3×3 convolutions of stride 2, widths doubling up to D'; all but the last with norm and GELU.

    GroupNorm, so that a clip's tokens never depend on the other clips of its batch.
    """

    def __init__(self, config: TimeSformerConfig) -> None:
        super().__init__()
        steps = max(1, config.patch_size.bit_length() - 1)
        stride = 2 if config.patch_size > 1 else 1
        layers: list[nn.Module] = []
        channels = 3
        for step in range(steps):
            last = step == steps - 1
            out = max(8, config.width >> (steps - 1 - step)) if not last else config.width
            layers.append(nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=last))
            if not last:
                layers += [nn.GroupNorm(math.gcd(out, 8), out), nn.GELU()]
            channels = out
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B·T, 3, h, w] to patches [B·T, D', rows, columns]."""
        return cast(Tensor, self.layers(images))
