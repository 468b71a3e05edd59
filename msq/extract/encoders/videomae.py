"""VideoMAE's encoder, written from the paper's description.

Source: Tong, Song, Wang, Wang, "VideoMAE: Masked Autoencoders are Data-Efficient Learners for
Self-Supervised Video Pre-Training" (arXiv 2203.12602), section 3: a plain ViT with joint
space-time attention over cubes of 2 frames by 16×16 pixels. Per layer, with residuals:

    tokens += Attention(LN(tokens))
    tokens += MLP(LN(tokens))

Queries and values have a bias, keys have none (it would cancel in the softmax). There is no global
token. The position table is fixed, not learned (Vaswani et al. 2017, section 3.5): channel 2i of
position p is sin(p / 10000^(2i/D')), channel 2i + 1 its cosine. Tokens are ordered time-major: the
token of tubelet j and place n (row-major) is number `j·N + n`.

Shapes: B clips, T frames, h×w pixels, N places per tubelet, H heads, D' width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msq.errors import UsageError
from msq.extract.encoders.timesformer import Mlp


@dataclass(frozen=True)
class VideoMAEConfig:
    """Shape of a VideoMAE encoder. The defaults are the public base model.

    Attributes:
        image_size: height and width in pixels, multiples of `patch_size`.
        patch_size: side of a patch in pixels.
        tubelet: frames that one token covers.
        frames: T, a multiple of `tubelet`.
        width: D', the number of channels of every token.
        depth: number of layers.
        heads: number of attention heads; divides `width`.
        mlp_width: hidden width of the MLP.
        norm_eps: of every LayerNorm.
        bias: queries and values have one.
        final_norm: a LayerNorm after the last layer, as after pre-training; fine-tuned models
            have none, see `videomae_weights`.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    tubelet: int = 2
    frames: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    norm_eps: float = 1e-12
    bias: bool = True
    final_norm: bool = False

    def __post_init__(self) -> None:
        """Checks that the numbers fit together."""
        for name in ("patch_size", "tubelet", "frames", "width", "depth", "heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise UsageError(f"VideoMAE: {name} is {getattr(self, name)}, at least 1 needed")
        height, width = self.image_size
        if height < 1 or width < 1 or height % self.patch_size or width % self.patch_size:
            raise UsageError(
                f"VideoMAE: image size {height}x{width} is not a multiple of the patch size "
                f"{self.patch_size}; choose a multiple of it for height and width"
            )
        if self.frames % self.tubelet:
            raise UsageError(
                f"VideoMAE: {self.frames} frames are not a multiple of {self.tubelet}, the frames "
                "of a tubelet; choose a multiple of it"
            )
        if self.width % self.heads:
            raise UsageError(f"VideoMAE: width {self.width} is not divisible by {self.heads} heads")

    @property
    def steps(self) -> int:
        """Tubelets in time, T/2."""
        return self.frames // self.tubelet

    @property
    def grid(self) -> tuple[int, int]:
        """Places of one tubelet as (rows, columns)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def patches(self) -> int:
        """N, places per tubelet."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Length of the output sequence, N·T/2."""
        return self.steps * self.patches


def position_table(positions: int, width: int) -> Tensor:
    """The fixed sine and cosine table [positions, D'], computed in float64."""
    channel = torch.arange(width, dtype=torch.float64)
    rate = 10_000.0 ** (-2 * (channel // 2) / width)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * rate
    return torch.where(channel.long() % 2 == 0, angle.sin(), angle.cos()).float()


class JointAttention(nn.Module):
    """Multi-head self-attention over all tokens of a clip; keys without a bias."""

    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width, bias=config.bias)
        self.key = nn.Linear(config.width, config.width, bias=False)
        self.value = nn.Linear(config.width, config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences [B, S, D'] to [B, S, D']."""
        b, s, d = x.shape
        q, k, v = (
            projection(x).view(b, s, self.heads, d // self.heads).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return cast(Tensor, self.out(attended.transpose(1, 2).reshape(b, s, d)))


class JointLayer(nn.Module):
    """One layer: attention and MLP, each pre-normed and residual."""

    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = JointAttention(config)
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, config.mlp_width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S, D'] to the same shape."""
        tokens = tokens + cast(Tensor, self.attention(self.attention_norm(tokens)))
        return tokens + cast(Tensor, self.mlp(self.mlp_norm(tokens)))


class VideoMAE(nn.Module):
    """The encoder, from normalised frames to all tokens.

    State-dict names, all of them: `stem.{weight,bias}` ([D', 3, 2, P, P]),
    `blocks.i.{attention_norm, attention.query, attention.key (weight only), attention.value,
    attention.out, mlp_norm, mlp.up, mlp.down}.{weight,bias}`, and `norm.{weight,bias}` with
    `final_norm`. The position table is computed and never stored.
    """

    positions: Tensor

    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        self.config = config
        cube = (config.tubelet, config.patch_size, config.patch_size)
        self.stem = nn.Conv3d(3, config.width, cube, stride=cube)
        table = position_table(config.tokens, config.width)
        self.register_buffer("positions", table, persistent=False)
        self.blocks = nn.ModuleList(JointLayer(config) for _ in range(config.depth))
        self.norm: nn.Module = nn.Identity()
        if config.final_norm:
            self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, video: Tensor) -> Tensor:
        """Encodes normalised frames.

        Args:
            video: [B, T, 3, h, w] float, with T and h×w exactly those of `config`.

        Returns:
            All tokens [B, N·T/2, D'], token `j·N + n` of tubelet j and place n.

        Raises:
            UsageError: if the video has another shape than the model was made for.
        """
        expected = (self.config.frames, 3, *self.config.image_size)
        if video.ndim != 5 or tuple(video.shape[1:]) != expected:
            raise UsageError(
                f"VideoMAE: expected video [B, {', '.join(map(str, expected))}] (B, frames, "
                f"channels, height, width), found {list(video.shape)}"
            )
        tokens = self.stem(video.transpose(1, 2)).flatten(2).transpose(1, 2)
        tokens = tokens + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return cast(Tensor, self.norm(tokens))
