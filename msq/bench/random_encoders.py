"""Encoders of known size with random weights: what they cost does not depend on what they know."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msq.extract.encoders.clip import ImageEncoder
from msq.extract.encoders.encoder import VideoEncoder
from msq.extract.encoders.pooling import pooled_tokens
from msq.extract.encoders.spec import EncoderSpec
from msq.extract.encoders.timesformer import TimeSformer
from msq.extract.encoders.timesformer_config import TimeSformerConfig

_HIDDEN = 4  # of an MLP, over its width


class PlainViT(nn.Module):
    """A vision transformer as CLIP has it, on torch's attention; `encode_image` gives one vector.

    Args:
        size: pixels of the square image.
        patch: of a patch.
        width: D'.
        depth: layers.
        heads: of attention.
    """

    def __init__(
        self, size: int = 224, patch: int = 16, width: int = 768, depth: int = 12, heads: int = 12
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, patch, patch)
        self.first = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.places = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) * 0.02)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def encode_image(self, images: Tensor) -> Tensor:
        """[M, 3, h, w] -> [M, D']."""
        patches = self.stem(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(patches), -1, -1), patches], dim=1) + self.places
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x[:, 0])
        return out

    def forward(self, images: Tensor) -> Tensor:
        """The same."""
        return self.encode_image(images)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, _HIDDEN * width), nn.Linear(_HIDDEN * width, width)

    def forward(self, x: Tensor) -> Tensor:
        m, s, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(m, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(m, s, d)
        x = x + self.out(mixed)
        added: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return added


def video_encoder(config: TimeSformerConfig) -> VideoEncoder:
    """A TimeSformer of this shape, frame-pooled."""
    torch.manual_seed(0)
    tokens = pooled_tokens("frame", config.frames, config.patches)
    return VideoEncoder(TimeSformer(config).eval(), _spec("video", config, tokens))


def image_encoder(config: TimeSformerConfig) -> ImageEncoder:
    """A ViT of the same shape, for the same frames."""
    torch.manual_seed(1)
    size = config.image_size[0]
    model = PlainViT(size, config.patch_size, config.width, config.depth, config.heads)
    return ImageEncoder(model.eval(), _spec("image", config, 0))


def vit_flops(images: int, size: int, patch: int, width: int, depth: int) -> int:
    """Operations of `PlainViT`, two per product and sum."""
    patches = (size // patch) ** 2
    s = 1 + patches
    layer = 2 * s * width * width * (4 + 2 * _HIDDEN) + 4 * s * s * width
    return images * (2 * patches * 3 * patch * patch * width + depth * layer)


def timesformer_flops(clips: int, config: TimeSformerConfig) -> int:
    """Operations of a TimeSformer with a patch stem, two per product and sum.

    Per layer: attention over time (its output has one more projection), attention in each frame
    with the global token, the MLP.
    """
    t, n, d = config.frames, config.patches, config.width
    rows = t * n
    over_time = 2 * rows * d * d * 5 + 4 * rows * t * d
    in_space = 2 * t * (n + 1) * d * d * 4 + 4 * t * (n + 1) ** 2 * d
    mlp = 4 * (rows + 1) * d * config.mlp_width
    stem = 2 * rows * 3 * config.patch_size**2 * d
    return clips * (stem + config.depth * (over_time + in_space + mlp))


def _spec(kind: str, config: TimeSformerConfig, tokens: int) -> EncoderSpec:
    return EncoderSpec(
        slug=f"random-{kind}",
        kind="video" if kind == "video" else "image",
        architecture=f"random w{config.width} d{config.depth}",
        weights="random",
        sha256="0" * 64,
        frames=config.frames,
        size=config.image_size[0],
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        pooling="frame" if kind == "video" else "mean",
        precision="fp32",
        sampling="uniform",
        resize="torch",
        output="",
        tokens=tokens,
        channels=config.width,
    )
