"""Decoded pictures -> one uint8 RGB array."""

from __future__ import annotations

from collections.abc import Sequence

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

Pictures = npt.NDArray[np.uint8]


def to_rgb(frame: av.VideoFrame) -> Pictures:
    """RGB picture [H, W, 3] in display orientation.

    Any pixel format, bit depth and colour range is converted by libswscale at full size. PyAV
    never rotates by itself: `frame.rotation` (degrees counter-clockwise, from the container's
    display matrix) is applied here, to the nearest quarter turn.
    """
    # By default swscale starts a thread per core for every frame; the workers fill the cores.
    picture: Pictures = np.asarray(frame.to_ndarray(format="rgb24", threads=1), np.uint8)
    quarters = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(picture, quarters)) if quarters else picture


def stack_pictures(pictures: Sequence[Pictures]) -> tuple[Pictures, set[tuple[int, int]]]:
    """Pictures [H, W, 3] as one array [T, H, W, 3], and the sizes (H, W) found.

    Where a recording changes its size on the way, pictures of another size are brought to that of
    the first one by PIL bicubic; the caller says so in the clip's record.
    """
    height, width = pictures[0].shape[:2]
    sizes = {(p.shape[0], p.shape[1]) for p in pictures}
    if len(sizes) == 1:
        return np.stack(pictures), sizes
    fitted = [
        p
        if p.shape[:2] == (height, width)
        else np.asarray(Image.fromarray(p).resize((width, height), Image.Resampling.BICUBIC))
        for p in pictures
    ]
    return np.stack(fitted), sizes
