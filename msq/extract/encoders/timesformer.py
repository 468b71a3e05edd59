"""TimeSformer with divided space-time attention, written from the paper's equations.

Source: Bertasius, Wang, Torresani, "Is Space-Time Attention All You Need for Video
Understanding?" (arXiv 2102.05095), section 3, variant "divided". Per layer, with residuals:

    patches += W_t · Attention_time(LN(patches))             over the T frames of one place
    sequence_t = [global, patches of frame t]                T sequences, the global token in each
    update_t = Attention_space(LN(sequence_t))
    patches += update_t[1:];  global += mean_t update_t[0]
    all tokens += MLP(LN(all tokens))

The global token takes no part in attention over time. Tokens are ordered patch-major and
time-minor: the token of patch n (row-major) in frame t is number `1 + n·T + t`; number 0 is the
global one. With `stem="patch"` the model is exactly the public one; `stem="conv"` puts a small
convolutional stem in place of the patch projection, for tiny encoders trained from scratch.

Shapes: B clips, T frames, h×w pixels, N patches per frame, H heads, D' width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from msq.errors import UsageError
from msq.extract.encoders.timesformer_config import TimeSformerConfig
from msq.extract.encoders.timesformer_stems import ConvStem, PatchStem
from msq.kernels.dispatch import Choice, Kernels, resolve
from msq.kernels.temporal_attention import temporal_attention, unsupported

_LAYER_NORM_EPS = 1e-6  # the public checkpoints' value; 1e-5 moves tokens by about 1e-4
_MAX_ATTENTION_BATCH = 65_535  # grid limit of the fused CUDA attention kernels, per launch


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection `qkv`, rows ordered q, k, v.

    Attributes:
        fused: by the kernel for short sequences, rather than by torch's attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.fused = False
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences [M, S, D'] to [M, S, D']; nothing is shared between the M sequences."""
        if self.fused:
            attended = temporal_attention(self.qkv(x), self.heads, triton=True)
            return cast(Tensor, self.out(attended))
        m, s, d = x.shape
        q, k, v = self.qkv(x).view(m, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if m <= _MAX_ATTENTION_BATCH:
            attended = F.scaled_dot_product_attention(q, k, v)
        else:
            parts = zip(*(p.split(_MAX_ATTENTION_BATCH) for p in (q, k, v)), strict=True)
            attended = torch.cat([F.scaled_dot_product_attention(*part) for part in parts])
        return cast(Tensor, self.out(attended.transpose(1, 2).reshape(m, s, d)))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D'] to [..., D']."""
        return cast(Tensor, self.down(F.gelu(self.up(x))))


class DividedLayer(nn.Module):
    """One layer: attention over time, attention over space, MLP; each pre-normed and residual."""

    def __init__(self, config: TimeSformerConfig) -> None:
        super().__init__()
        width = config.width
        self.temporal_norm = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        self.temporal_attention = Attention(width, config.heads)
        self.temporal_out = nn.Linear(width, width)
        self.spatial_norm = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        self.spatial_attention = Attention(width, config.heads)
        self.mlp_norm = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        self.mlp = Mlp(width, config.mlp_width)

    def forward(self, tokens: Tensor, frames: int) -> Tensor:
        """Tokens [B, 1 + N·T, D'] to the same shape; `frames` is T."""
        b, length, d = tokens.shape
        n = (length - 1) // frames
        cls, patches = tokens[:, :1], tokens[:, 1:]

        over_time = self.temporal_norm(patches).reshape(b * n, frames, d)
        update = self.temporal_out(self.temporal_attention(over_time))
        patches = patches + update.reshape(b, n * frames, d)

        per_frame = patches.view(b, n, frames, d).transpose(1, 2)
        sequences = torch.cat([cls.unsqueeze(1).expand(b, frames, 1, d), per_frame], dim=2)
        sequences = sequences.reshape(b * frames, 1 + n, d)
        update = self.spatial_attention(self.spatial_norm(sequences)).view(b, frames, 1 + n, d)
        # Each frame proposes its own change of the one global token; their mean is taken.
        cls = cls + update[:, :, 0].mean(dim=1, keepdim=True)
        patches = patches + update[:, :, 1:].transpose(1, 2).reshape(b, n * frames, d)

        tokens = torch.cat([cls, patches], dim=1)
        return tokens + cast(Tensor, self.mlp(self.mlp_norm(tokens)))


class TimeSformer(nn.Module):
    """The encoder, from normalised frames to all tokens.

    State-dict names, all of them:
    `cls_token [1,1,D']`, `position_embed [1,1+N,D']` (entry 0 belongs to the global token),
    `time_embed [1,T,D']`, `stem.proj.{weight,bias}` (or `stem.layers.i.*` for `stem="conv"`),
    `blocks.i.{temporal_norm, temporal_attention.qkv, temporal_attention.out, temporal_out,
    spatial_norm, spatial_attention.qkv, spatial_attention.out, mlp_norm, mlp.up,
    mlp.down}.{weight,bias}`, `norm.{weight,bias}`.

    Initialisation: linear layers, the patch projection, the global token and the position
    embedding are truncated normal with std 0.02 and zero biases; the convolutional stem is
    Kaiming normal; the time embedding is zero; every `temporal_out` is zero, so that a fresh
    model, and one that starts from an image model's weights, ignores the order of frames until
    training moves it.

    Attributes:
        checkpointing: keep no activations inside the layers for the backward pass, but compute
            them again there.
    """

    def __init__(self, config: TimeSformerConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.stem = PatchStem(config) if config.stem == "patch" else ConvStem(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position_embed = nn.Parameter(torch.zeros(1, 1 + config.patches, config.width))
        self.time_embed = nn.Parameter(torch.zeros(1, config.frames, config.width))
        self.blocks = nn.ModuleList(DividedLayer(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=_LAYER_NORM_EPS)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every weight anew, as the class docstring says."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                if self.config.stem == "patch":
                    nn.init.trunc_normal_(module.weight, std=0.02)
                else:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.position_embed, std=0.02)
        nn.init.zeros_(self.time_embed)
        for block in self.blocks:
            out = cast(DividedLayer, block).temporal_out
            nn.init.zeros_(out.weight)
            nn.init.zeros_(out.bias)

    def temporal_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of everything that acts over time; the rest is the image model."""
        for name, parameter in self.named_parameters():
            if name == "time_embed" or ".temporal_" in name:
                yield name, parameter

    def choose_kernels(self, kernels: Kernels, device: torch.device, dtype: torch.dtype) -> Choice:
        """Decides by what attention over time is computed from now on.

        Args:
            kernels: `auto`, `triton` or `reference`, which is torch's attention.
            device: where the model will run.
            dtype: of the linear layers' outputs.

        Raises:
            UsageError: `triton` where the kernel cannot run; the message says why.
        """
        config = self.config
        obstacle = unsupported(config.frames, config.width // config.heads)
        choice = resolve("temporal_attention", device, dtype, config.frames, kernels, obstacle)
        for block in self.blocks:
            cast(DividedLayer, block).temporal_attention.fused = choice.path == "triton"
        return choice

    def forward(self, video: Tensor) -> Tensor:
        """Encodes normalised frames.

        Args:
            video: [B, T, 3, h, w] float, with T and h×w exactly those of `config`.

        Returns:
            All tokens [B, 1 + N·T, D'] after the final LayerNorm, global token first, then
            token `1 + n·T + t`.

        Raises:
            UsageError: if the video has another shape than the model was made for.
        """
        height, width = self.config.image_size
        expected = (self.config.frames, 3, height, width)
        if video.ndim != 5 or tuple(video.shape[1:]) != expected:
            raise UsageError(
                f"TimeSformer: expected video [B, {', '.join(map(str, expected))}] "
                f"(B, frames, channels, height, width), found {list(video.shape)}; load the "
                f"encoder with frames={video.shape[1] if video.ndim == 5 else '…'} and the "
                "matching size, or sample and resize the video as its spec says"
            )
        b, t = video.shape[:2]
        patches = self.stem(video.flatten(0, 1)).flatten(2).transpose(1, 2)
        patches = patches + self.position_embed[:, 1:]
        patches = patches.view(b, t, -1, self.config.width).transpose(1, 2) + self.time_embed
        cls = (self.cls_token + self.position_embed[:, :1]).expand(b, -1, -1).to(patches.dtype)
        tokens = torch.cat([cls, patches.flatten(1, 2)], dim=1)
        for block in self.blocks:
            if self.checkpointing and tokens.requires_grad:
                # What a layer computes is the same both times: it draws no random numbers.
                tokens = checkpoint(block, tokens, t, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, t)
        return cast(Tensor, self.norm(tokens))
