"""Augmented views: what is drawn from (seed, clip id), and what it does to a clip's frames.

The operations are those of the authors' training transforms (crop at several scales and 13 fixed
places, colour jitter, grey), with a flip and a jitter in time, which their code has and never
switches on. Everything is drawn once for a clip: all its frames, and all encoders of a run
whatever their size, see the same crop and the same colours. `draw_official` is what the authors
do instead: no flip, and colours that are drawn anew for every frame.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from msq.extract.transforms import Interpolation, resize_box

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

Colours: TypeAlias = tuple[tuple[str, float], ...]  # (operation, amount), in order


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
        colours_of: `colours` of frame 0, 1, …, in their place; empty where all frames share them.
        interpolation: how the crop is brought to its size.
    """

    shape: tuple[float, float]
    place: tuple[int, int]
    flip: bool
    colours: Colours
    grey: bool
    colours_of: tuple[Colours, ...] = ()
    interpolation: Interpolation = "bicubic"

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
    rng = keyed_stream(seed, clip, "pixels")
    shape = SHAPES[int(rng.random() * len(SHAPES))]
    place = PLACES[int(rng.random() * len(PLACES))]
    flip, coloured, grey = (bool(rng.random() < p) for p in (FLIP, COLOUR, GREY))
    colours = _draw_colours(rng)
    return Augmentation(shape, place, flip, colours if coloured else (), grey)


def draw_official(seed: int, clip: str, frames: int) -> Augmentation:
    """One clip as the authors train on it: their `GroupMultiScaleCrop`, colour jitter and grey.

    The crop, brought to its size by bilinear interpolation, and grey are drawn once for the clip;
    colour jitter, with probability 0.8, for each frame by itself. Their flip never fires and their
    frames are the centres of their segments. Unlike theirs, a crop within two pixels of the
    encoder's size is resized too, so that encoders of different sizes see the same one.

    Args:
        seed: of the view.
        clip: the clip's id.
        frames: T; frame k is given the same colours whatever T is.
    """
    rng = keyed_stream(seed, clip, "official pixels")
    shape = SHAPES[int(rng.random() * len(SHAPES))]
    place = PLACES[int(rng.random() * len(PLACES))]
    grey = bool(rng.random() < GREY)
    each: list[Colours] = []
    for k in range(frames):
        rng = keyed_stream(seed, clip, f"official colours {k}")
        each.append(_draw_colours(rng) if rng.random() < COLOUR else ())
    return Augmentation(shape, place, False, (), grey, tuple(each), "bilinear")


def draw_places(seed: int, clip: str, frames: int) -> tuple[float, ...]:
    """T numbers in [0, 1): where in its segment of the clip each frame is taken."""
    rng = keyed_stream(seed, clip, "time")
    return tuple(float(rng.random()) for _ in range(frames))


def augment(
    frames: npt.NDArray[np.uint8], drawn: Augmentation, size: int, resize: str = "torch"
) -> Tensor:
    """Crop, resize, flip, colours, grey: the same for all frames, `drawn.colours_of` excepted.

    Args:
        frames: uint8 [T, H, W, 3].
        drawn: what to do; of as many frames, where it has colours for each.
        size: side of the result in pixels.
        resize: `torch` or `pil`, see `msq.extract.transforms.resize_crop`.

    Returns:
        Contiguous uint8 tensor [T, 3, size, size] on the CPU.
    """
    box = drawn.box(frames.shape[1], frames.shape[2])
    small = resize_box(frames, box, size, resize, drawn.interpolation)
    if drawn.flip:
        small = small.flip(-1)
    colours_of = drawn.colours_of or (drawn.colours,) * len(frames)
    if any(colours_of) or drawn.grey:
        pictures = small.permute(0, 2, 3, 1).contiguous().numpy()
        coloured = np.stack(
            [
                np.asarray(_coloured(Image.fromarray(picture), colours, drawn.grey))
                for picture, colours in zip(pictures, colours_of, strict=True)
            ]
        )
        small = torch.from_numpy(coloured).permute(0, 3, 1, 2)
    return small.contiguous()


def keyed_stream(seed: int, clip: str, purpose: str) -> np.random.Generator:
    """Numbers that depend on nothing but these three: a counter-based generator keyed by them."""
    digest = hashlib.sha256(f"{seed}\n{purpose}\n{clip}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _draw_colours(rng: np.random.Generator) -> Colours:
    """Colour jitter: an amount of every operation, in random order."""
    amounts = {
        name: (0.0 if name == "hue" else 1.0) + strength * (2 * rng.random() - 1)
        for name, strength in STRENGTHS.items()
    }
    order = sorted(amounts, key=lambda name: float(rng.random()))
    return tuple((name, float(amounts[name])) for name in order)


def _coloured(picture: Image.Image, colours: Colours, grey: bool) -> Image.Image:
    for name, amount in colours:
        if name == "hue":
            picture = _turned(picture, amount)
        else:
            picture = _ENHANCE[name](picture).enhance(amount)
    return picture.convert("L").convert("RGB") if grey else picture


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
