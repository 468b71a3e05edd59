"""uint8 frames -> normalised float: resize and crop on the CPU, then one affine on any device.

Resizing stays in uint8. PIL rounds and clamps between the horizontal and the vertical pass, and
so does torch's uint8 kernel; a float path skips that and ends 5 to 12 grey levels away.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from msq.errors import UsageError

Resize = Literal["torch", "pil"]
Interpolation = Literal["bicubic", "bilinear"]


def resized_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) after the short side has become `size`; the long side is rounded down."""
    if width <= height:
        return int(size * height / width), size
    return size, int(size * width / height)


def resize_crop(
    frames: npt.NDArray[np.uint8] | Tensor,
    size: int,
    resize: str = "torch",
    *,
    short_side: int = 0,
    crop: int = 0,
    crops: int = 1,
) -> Tensor:
    """Short side to `short_side` by antialiased bicubic, then a square of `size` cut out.

    `pil` is CLIP's own preprocessing, bit for bit. `torch` is about six times faster and differs
    from it by at most 2 grey levels, in at most 0.5 % of the values of video frames (up to 0.7 %
    were seen on white noise, where every value is at the mercy of rounding). Small frames are
    enlarged.
    The centre starts at `int(round((side - size) / 2))`, as torchvision's `CenterCrop` does.

    Args:
        frames: uint8 [T, H, W, 3], an array or a CPU tensor.
        size: side of the square in pixels.
        resize: `torch` or `pil`.
        short_side: pixels, at least `size`; 0 for `size` itself.
        crop: which of the `crops` squares: along the long side 0 is left or top, 1 the centre,
            2 right or bottom.
        crops: 1 for the centre, or 3, which are cut from a short side of `size` (as SlowFast
            tests), whatever `short_side` is.

    Returns:
        Contiguous uint8 tensor [T, 3, size, size] on the CPU.

    Raises:
        UsageError: an unknown `resize`, a size below 1, or a short side below the size.
        ValueError: frames that are not uint8 [T, H, W, 3], or no such crop.
    """
    _check(resize, size)
    if short_side and short_side < size:
        raise UsageError(f"short side: expected at least the {size} pixels of the crop, "
                         f"found {short_side}")  # fmt: skip
    if crops not in (1, 3) or not 0 <= crop < crops:
        raise ValueError(f"expected crop 0 of 1, or 0 to 2 of 3; found {crop} of {crops}")
    video = _video(frames)
    short = size if crops == 3 or not short_side else short_side
    height, width = resized_shape(video.shape[1], video.shape[2], short)
    scaled = _scaled(video, height, width, resize)
    top, left = (_start(side, size, crop, crops) for side in (height, width))
    return scaled[:, :, top : top + size, left : left + size].contiguous()


def seen_box(
    height: int, width: int, size: int, *, short_side: int = 0
) -> tuple[float, float, float, float]:
    """The part of a frame that `resize_crop` shows with one crop, in pixels of the frame.

    Args:
        height: H of the frame.
        width: W.
        size: side of the square.
        short_side: as there.

    Returns:
        top, left, height and width; the part is a square of the resized frame, and one of the frame
        too but for the rounding of the long side.
    """
    sides = resized_shape(height, width, short_side or size)
    (down, top), (across, left) = (
        (own / side, own / side * _start(side, size, 0, 1))
        for own, side in zip((height, width), sides, strict=True)
    )
    return top, left, size * down, size * across


def resize_box(
    frames: npt.NDArray[np.uint8] | Tensor,
    box: tuple[int, int, int, int],
    size: int,
    resize: str = "torch",
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """A rectangle cut out and brought to a square of `size`, antialiased.

    Args:
        frames: uint8 [T, H, W, 3], an array or a CPU tensor.
        box: top, left, height, width in pixels.
        size: side of the square in pixels.
        resize: `torch` or `pil`.
        interpolation: `bicubic` or `bilinear`.

    Returns:
        Contiguous uint8 tensor [T, 3, size, size] on the CPU.

    Raises:
        UsageError: an unknown `resize`, or a size below 1.
        ValueError: frames that are not uint8 [T, H, W, 3], or a box that is not inside them.
    """
    _check(resize, size)
    video = _video(frames)
    top, left, height, width = box
    inside = top + height <= video.shape[1] and left + width <= video.shape[2]
    if min(top, left) < 0 or min(height, width) < 1 or not inside:
        raise ValueError(f"expected a box inside {tuple(video.shape[1:3])}, found {box}")
    cut = video[:, top : top + height, left : left + width].contiguous()
    return _scaled(cut, size, size, resize, interpolation).contiguous()


def _check(resize: str, size: int) -> None:
    if resize not in get_args(Resize):
        raise UsageError(f"resize: expected one of {', '.join(get_args(Resize))}; found {resize!r}")
    if size < 1:
        raise UsageError(f"size: expected a side of at least 1 pixel, found {size}")


def _video(frames: npt.NDArray[np.uint8] | Tensor) -> Tensor:
    """uint8 [T, H, W, 3] as a tensor."""
    # A read-only (memory-mapped) array is copied: torch warns about sharing memory with one.
    video = (
        frames
        if isinstance(frames, Tensor)
        else torch.from_numpy(np.require(frames, requirements=["C", "W"]))
    )
    if video.dtype != torch.uint8 or video.dim() != 4 or video.shape[3] != 3:
        raise ValueError(
            f"expected uint8 frames [T, H, W, 3], found {video.dtype} {tuple(video.shape)}"
        )
    return video


def _start(side: int, size: int, crop: int, crops: int) -> int:
    """First pixel of a crop along one side; the short side leaves no room to choose."""
    if crops == 3 and crop != 1:
        return 0 if crop == 0 else side - size
    return round((side - size) / 2)


def normalise(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`(frames / 255 - mean) / std` as one affine, `frames * scale + bias`.

    Args:
        frames: uint8 [..., 3, h, w] on any device.
        mean: three channel means of values in 0..1.
        std: three channel standard deviations, positive.

    Returns:
        float32 [..., 3, h, w] on the same device.

    Raises:
        ValueError: a mean or std that is not three numbers, or a std that is not positive.
    """
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"expected three means and three positive stds, found {mean} and {std}")
    if frames.dim() < 3 or frames.shape[-3] != 3:
        raise ValueError(f"expected frames [..., 3, h, w], found {tuple(frames.shape)}")
    scale, bias = _affine(tuple(mean), tuple(std), frames.device)
    values = frames.to(torch.float32, copy=True)
    return torch.addcmul(bias, values, scale, out=values)


@functools.lru_cache(maxsize=32)
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The scale and bias `[3, 1, 1]` of `normalise`, on a device once and for all batches.

    They are made in float64, so that only the affine itself is rounded.
    """
    with torch.inference_mode(False):  # whatever the first call was made in
        offset, spread = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
        scale, bias = 1.0 / (255.0 * spread), -offset / spread
        return scale.to(device, torch.float32), bias.to(device, torch.float32)


def _scaled(
    video: Tensor, height: int, width: int, resize: str, mode: Interpolation = "bicubic"
) -> Tensor:
    """uint8 [T, H, W, 3] -> [T, 3, height, width]."""
    scale = _resize_pil if resize == "pil" else _resize
    return scale(video, height, width, mode)


def _resize(video: Tensor, height: int, width: int, mode: Interpolation) -> Tensor:
    """The permuted view is channels_last, which torch's uint8 kernel takes without a copy."""
    return torch.nn.functional.interpolate(
        video.permute(0, 3, 1, 2), size=(height, width), mode=mode, antialias=True
    )


def _resize_pil(video: Tensor, height: int, width: int, mode: Interpolation) -> Tensor:
    way = Image.Resampling[mode.upper()]
    images = [
        np.asarray(Image.fromarray(frame).resize((width, height), way)) for frame in video.numpy()
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
