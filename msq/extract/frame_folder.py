"""A folder of numbered pictures in the place of a video file."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from msq.extract.packets import UndecodableVideo
from msq.extract.pixels import Pictures

_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

# Optical flow lies beside the frames in dumps such as mmaction2's (`img_00001.jpg`).
_FLOW = re.compile(r"flow_[xy]_\d+\.")


def frame_files(folder: Path) -> list[Path]:
    """Pictures of a folder in natural order: `frame_2.jpg` comes before `frame_10.jpg`.

    Optical flow (`flow_x_00001.jpg`, `flow_y_00001.jpg`) is left out.

    Raises:
        UndecodableVideo: the folder cannot be listed or holds no picture.
    """
    try:
        with os.scandir(folder) as entries:
            files = [
                Path(entry.path)
                for entry in entries
                if os.path.splitext(entry.name)[1].lower() in _SUFFIXES
                and not entry.name.startswith(".")
                and not _FLOW.match(entry.name)
                and entry.is_file()
            ]
    except OSError as error:
        raise UndecodableVideo(
            folder, f"expected a folder of frames, found: {error.strerror}"
        ) from error
    if not files:
        kinds = " ".join(sorted(_SUFFIXES))
        raise UndecodableVideo(
            folder, f"expected a folder of frames ({kinds}), found no picture in it"
        )
    return sorted(files, key=_natural)


def read_frame(folder: Path, file: Path) -> Pictures:
    """One picture as RGB [H, W, 3], turned as its EXIF orientation is *not* asked to.

    Frame dumps carry no orientation; grey, palette and alpha pictures become RGB by PIL, those of
    16 bits (thermal cameras) by their higher 8, as libswscale takes them.

    Raises:
        UndecodableVideo: the picture cannot be decoded, or has 32 bits a pixel of one channel,
            of which nothing says where white is.
    """
    try:
        with Image.open(file) as image:
            return np.asarray(_eight_bits(image, folder, file).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        found = str(error).replace(str(file), file.name) or type(error).__name__
        raise UndecodableVideo(
            folder, f"expected a picture in {file.name}, found: {found}"
        ) from error


def _eight_bits(image: Image.Image, folder: Path, file: Path) -> Image.Image:
    """A picture of 8 bits a channel: PIL's own conversion makes white of all above 255."""
    # PNG has 16 bits at most; Pillow before 10.3 opens these in mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UndecodableVideo(
            folder,
            f"expected pictures of 8 or 16 bits a channel, found 32 in {file.name} (mode "
            f"{image.mode}); save them with 16, scaled to 0 to 65535",
        )
    return image


def _natural(file: Path) -> tuple[list[tuple[int, int, str]], str]:
    """Runs of digits compare as numbers, the rest as text; the name decides between equals."""
    parts = re.split(r"(\d+)", file.name)
    key = [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p]
    return key, file.name
