"""Augmented views: what is drawn from (seed, clip id), and what it does to a clip's frames.

The operations are those of the authors' training transforms (crop at several scales and 13 fixed
places, colour jitter, grey), with a flip and a jitter in time, which their code has and never
switches on. Everything is drawn once for a clip: all its frames, and all encoders of a run
whatever their size, see the same crop and the same colours.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from msq.extract.transforms import resize_box

SCALES = (1.0, 0.875, 0.75, 0.66)
# (height, width) of a crop as shares of the short side: equal scales, or neighbours in the list.
SHAPES = tuple(
    (SCALES[i], SCALES[j]) for i, j in product(range(len(SCALES)), repeat=2) if abs(i - j) <= 1
)
# (down, right) in quarters of the room that the crop leaves: corners, middles of the sides, centre,
# and the four centres of the quadrants.
PLACES = (
    *((0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2)),
    *((1, 1), (1, 3), (3, 1), (3, 3)),
)
FLIP, COLOUR, GREY = 0.5, 0.8, 0.2  # probabilities
STRENGTHS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}


@dataclass(frozen=True, slots=True)
class Augmentation:
    """One draw.

    Attributes:
        shape: (height, width) of the crop as shares of the frame's short side.
        place: (down, right) of the crop in quarters of the room it leaves.
        flip: mirror left and right.
        colours: (operation, amount) in the order in which they are applied; empty for none. Three
            amounts are factors around 1, that of `hue` a share of the circle around 0.
        grey: leave only the luma (ITU-R 601).
    """

    shape: tuple[float, float]
    place: tuple[int, int]
    flip: bool
    colours: tuple[tuple[str, float], ...]
    grey: bool

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height, width in pixels of the crop in frames of this size."""
        short = min(height, width)
        high, wide = (max(1, int(short * share)) for share in self.shape)
        down, right = self.place
        return down * ((height - high) // 4), right * ((width - wide) // 4), high, wide


def draw(seed: int, clip: str) -> Augmentation:
    """The augmentation of one clip in the augmented view of this seed.

    Args:
        seed: of the view.
        clip: the clip's id.
    """
    rng = _stream(seed, clip, "pixels")
    shape = SHAPES[int(rng.random() * len(SHAPES))]
    place = PLACES[int(rng.random() * len(PLACES))]
    flip, coloured, grey = (bool(rng.random() < p) for p in (FLIP, COLOUR, GREY))
    amounts = {
        name: (0.0 if name == "hue" else 1.0) + strength * (2 * rng.random() - 1)
        for name, strength in STRENGTHS.items()
    }
    order = sorted(amounts, key=lambda name: float(rng.random()))
    colours = tuple((name, float(amounts[name])) for name in order) if coloured else ()
    return Augmentation(shape, place, flip, colours, grey)


def draw_places(seed: int, clip: str, frames: int) -> tuple[float, ...]:
    """T numbers in [0, 1): where in its segment of the clip each frame is taken."""
    rng = _stream(seed, clip, "time")
    return tuple(float(rng.random()) for _ in range(frames))


def augment(
    frames: npt.NDArray[np.uint8], drawn: Augmentation, size: int, resize: str = "torch"
) -> Tensor:
    """Crop, resize, flip, colours, grey: the same for all frames.

    Args:
        frames: uint8 [T, H, W, 3].
        drawn: what to do.
        size: side of the result in pixels.
        resize: `torch` or `pil`, see `msq.extract.transforms.resize_crop`.

    Returns:
        Contiguous uint8 tensor [T, 3, size, size] on the CPU.
    """
    box = drawn.box(frames.shape[1], frames.shape[2])
    small = resize_box(frames, box, size, resize)
    if drawn.flip:
        small = small.flip(-1)
    if drawn.colours or drawn.grey:
        pictures = small.permute(0, 2, 3, 1).contiguous().numpy()
        coloured = np.stack([np.asarray(_coloured(Image.fromarray(p), drawn)) for p in pictures])
        small = torch.from_numpy(coloured).permute(0, 3, 1, 2)
    return small.contiguous()


def _stream(seed: int, clip: str, purpose: str) -> np.random.Generator:
    """Numbers that depend on nothing but these three: a counter-based generator keyed by them."""
    digest = hashlib.sha256(f"{seed}\n{purpose}\n{clip}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _coloured(picture: Image.Image, drawn: Augmentation) -> Image.Image:
    for name, amount in drawn.colours:
        if name == "hue":
            picture = _turned(picture, amount)
        else:
            picture = _ENHANCE[name](picture).enhance(amount)
    return picture.convert("L").convert("RGB") if drawn.grey else picture


_ENHANCE: dict[str, type[ImageEnhance.Brightness | ImageEnhance.Contrast | ImageEnhance.Color]] = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


def _turned(picture: Image.Image, share: float) -> Image.Image:
    """The hue moved by a share of the circle, in PIL's 256 steps."""
    hue, saturation, value = picture.convert("HSV").split()
    moved = np.asarray(hue) + np.uint8(int(share * 255) % 256)  # wraps around, as the circle does
    return Image.merge("HSV", (Image.fromarray(moved), saturation, value)).convert("RGB")
