"""Image models as video encoders: every frame by itself, without any attention over time.

A frame's token is the mean of its patch tokens after the model's final norm. That is the paper's
own rule for a video transformer (MSQNet, Eq. 3, `v_t = mean_p z[p,t]`), so that a head sees the
same kind of memory from both, and a comparison tells what attention over time is worth. The
global token is the mean over frames of the models' class tokens where they have one, otherwise the
mean of all patch tokens. Where both are wanted at once, tokens stand in TimeSformer's order:
`[global, (n t)]`, patch-major and time-minor, so that `band` means horizontal bands here, too.

Shapes: B clips, T frames, M = B·T images, N patches, D' width.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn


class PerFrame(nn.Module):
    """An image model applied to every frame.

    Attributes:
        tower: the image model.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    @abstractmethod
    def split(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """Images [M, 3, h, w] to class tokens [M, D'], or None, and patches [M, N, D']."""

    def forward(self, video: Tensor) -> Tensor:
        """Encodes normalised frames.

        Args:
            video: [B, T, 3, h, w] float.

        Returns:
            [B, 1 + N·T, D'], global token first, then token `1 + n·T + t`.
        """
        b, t = video.shape[:2]
        cls, patches = self.split(video.flatten(0, 1))
        n, d = patches.shape[1:]
        tokens = patches.reshape(b, t, n, d).transpose(1, 2).flatten(1, 2)
        if cls is None:
            first = tokens.mean(dim=1, keepdim=True)
        else:
            first = cls.reshape(b, t, d).mean(dim=1, keepdim=True)
        return torch.cat([first, tokens], dim=1)

    @torch.inference_mode()
    def places(self, size: int) -> tuple[int, int]:
        """N and D' for images of `size`, found by one forward pass of one grey image."""
        patches = self.split(torch.zeros(1, 3, size, size))[1]
        return patches.shape[1], patches.shape[2]
