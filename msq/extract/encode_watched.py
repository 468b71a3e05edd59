"""One clip encoded while its encoders' attention is watched; see `msq.extract.encode`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msq.extract.decode_task import Picture
from msq.extract.encoders.clip import ImageEncoder
from msq.extract.encoders.encoder import VideoEncoder
from msq.extract.encoders.image_rollout import image_rollout
from msq.extract.encoders.rollout import RollBack, rollout
from msq.extract.encoders.token_places import global_row, laid_out, own_steps, unpool
from msq.extract.shard_builder import FrameEncoder, encode
from msq.extract.transforms import seen_box
from msq.extract.video import decode_samples

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Shown:
    """What an encoder was shown of a clip.

    Attributes:
        frames: uint8 RGB [T, H, W, 3], as decoded, before any resizing.
        times: float32 [T], seconds; NaN where unknown.
        box: top, left, height and width of the part it saw, in pixels of the frames.
        inputs: uint8 [T, 3, h, w], that part as the encoder got it.
        degraded: what was wrong with the file, None for a clean one.
    """

    frames: NDArray[np.uint8]
    times: NDArray[np.float32]
    box: Box
    inputs: NDArray[np.uint8]
    degraded: str | None


def show(
    video: Path,
    encoders: Sequence[FrameEncoder],
    start: float | None = None,
    end: float | None = None,
    fps: float | None = None,
) -> list[Shown]:
    """Decode a clip once, as `encode_clip` does, for several encoders.

    Raises:
        VideoError: nothing can be decoded, or no frame lies in the part.
        UsageError: no such frame rate.
    """
    pictures = [Picture.of(encoder.spec) for encoder in encoders]
    choices = [picture.choice("") for picture in pictures]
    wanted = list(dict.fromkeys(choices))
    clips = dict(
        zip(wanted, decode_samples(video, wanted, start=start, end=end, fps=fps), strict=True)
    )
    shown = []
    for picture, choice in zip(pictures, choices, strict=True):
        clip = clips[choice]
        height, width = clip.frames.shape[1:3]
        box = seen_box(height, width, picture.size, short_side=picture.short_side)
        inputs = picture.pixels(clip.frames, "")
        shown.append(Shown(clip.frames, clip.times, box, inputs, clip.degraded))
    return shown


class WatchedTokens:
    """Tokens of a clip, and what weights over them come to on its frames.

    Args:
        encoder: makes them.
        inputs: uint8 [T, 3, h, w] of one clip.
        through_encoder: follow its attention back to the patches; otherwise weights stay where the
            tokens lie.

    Attributes:
        tokens: [S, D'] float32, with the bits of `encode_clip`.

    Raises:
        UsageError: an encoder whose attention cannot be followed.
    """

    def __init__(
        self, encoder: VideoEncoder, inputs: NDArray[np.uint8], through_encoder: bool = True
    ) -> None:
        lengths: list[int] = []
        with ExitStack() as during:
            self._back: RollBack | None = None
            if through_encoder:
                self._back = during.enter_context(rollout(encoder))
            hook = encoder.model.register_forward_hook(
                lambda _, given, out: lengths.append(out.shape[1])
            )
            during.callback(hook.remove)
            self.tokens = encode(encoder, [inputs])[0]
        self._encoder, self._length = encoder, lengths[-1]

    def heat(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Weights over the tokens as weights over the patches.

        In time a weight stays where its token lies; in space it goes to the patches of that step,
        in proportion to what they gave the token by rollout. Rollout through time, too, takes half
        of each layer's attention over time for what came from other frames, and after a few layers
        all frames' tokens come from all frames alike. The global token belongs to no frame: its
        weight follows the rollout whole.

        Args:
            rows: [R, S].

        Returns:
            [R, T, h, w], and [R] of the global token's start, which is nowhere in the picture. The
            two sum to what the rows do.
        """
        rows = unpool(rows, self._length, self._encoder)
        if self._back is None:
            return laid_out(rows, self._encoder)
        step = own_steps(self._length, self._encoder).to(rows.device)  # [t, L]
        own = rows * step[:, None]  # [t, R, L]
        rolled = self._back(own.flatten(0, 1)).view_as(own) * step[:, None]
        given = rolled.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(rolled.dtype).tiny)
        kept = (rolled * (own.sum(dim=-1, keepdim=True) / given)).sum(dim=0)
        return laid_out(kept + self._back(rows * ~step.any(dim=0)), self._encoder)

    def global_heat(self) -> tuple[Tensor, Tensor]:
        """The same [T, h, w] and [] of the global token, whatever the pooling: one row of rollout.

        It is TimeSformer's own, the mean of all tokens of a VideoMAE, the mean over frames of an
        image model's class tokens.
        """
        row = global_row(self._length, self._encoder)
        row = row if self._back is None else self._back(row)
        places, elsewhere = laid_out(row, self._encoder)
        return places[0], elsewhere[0]


def image_heat(encoder: ImageEncoder, inputs: NDArray[np.uint8]) -> tuple[Tensor, Tensor, Tensor]:
    """A clip's image feature [D''], with the bits of `encode_clip`, and what its tower attends to.

    Args:
        encoder: image tower of a CLIP.
        inputs: uint8 [T, 3, h, w] of one clip.

    Returns:
        [D'']; weights [T, h, w] over the places of each frame; their rest [].

    Raises:
        UsageError: a tower whose attention cannot be followed.
    """
    with image_rollout(encoder) as maps:
        feature = encode(encoder, [inputs])[0]
        places, elsewhere = maps()
    side = math.isqrt(places.shape[1])
    return feature, places.reshape(-1, side, side), elsewhere.sum()
