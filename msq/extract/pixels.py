"""Decoded pictures -> one uint8 RGB array."""

from __future__ import annotations

import math
from collections.abc import Sequence

import av
import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import SideData
from PIL import Image

Pictures = npt.NDArray[np.uint8]


def to_rgb(frame: av.VideoFrame) -> Pictures:
    """RGB picture [H, W, 3] in display orientation.

    Any pixel format, bit depth and colour range is converted by libswscale at full size. PyAV
    never rotates by itself: the container's display matrix is applied here, to the nearest quarter
    turn, and mirrored where it mirrors (front cameras write such a matrix).
    """
    # By default swscale starts a thread per core for every frame; the workers fill the cores.
    picture: Pictures = np.asarray(frame.to_ndarray(format="rgb24", threads=1), np.uint8)
    mirrored, turn = _orientation(frame)
    if mirrored:
        picture = picture[:, ::-1]
    quarters = round(turn / 90) % 4
    if not quarters:
        return np.ascontiguousarray(picture)
    return np.ascontiguousarray(np.rot90(picture, quarters))


def _orientation(frame: av.VideoFrame) -> tuple[bool, float]:
    """Whether a frame is to be mirrored left to right, and turned by how many degrees after that.

    Degrees are counter-clockwise. `frame.rotation` alone takes a mirror for half a turn: it is the
    angle of one axis. The matrix (ISO 14496-12, 8.3.2) takes (x, y) to (a x + c y, b x + d y).
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(data, SideData):
        return False, float(frame.rotation)
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].astype(np.float64)
    if a * d - b * c >= 0:
        return False, float(frame.rotation)
    return True, -math.degrees(math.atan2(-b, -a))


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
