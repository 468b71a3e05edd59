"""Frames with heat over them: pictures by pillow alone.

The colour map rises in lightness alone, from a few stops, so that it reads in grey print and with
any colour vision too. Frames are grey under it: colour is heat and nothing else. What the crop cut
off is dark and has no colour.

Shapes: T frames of H x W pixels, h x w patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

STOPS = ((16, 8, 48), (88, 24, 112), (176, 52, 96), (236, 110, 54), (250, 190, 70), (255, 248, 200))
THUMB = 112  # height of a frame in a picture, pixels
LEAST_SPAN = 0.25  # of the even share: what varies less is not blown up to the whole colour scale
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601 luma
_GAP, _TEXT = 4, 18  # between frames, height of a line
_INK, _PAPER = (32, 32, 32), (255, 255, 255)


def colours(level: Floats) -> Pixels:
    """Levels 0 to 1 of any shape as colours [..., 3] of the map."""
    places = np.linspace(0, 1, len(STOPS))
    channels = [np.interp(level, places, [stop[c] for stop in STOPS]) for c in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def ratios(heat: Floats) -> Floats:
    """Heat over the share that each patch would have if all were looked at evenly; same shape."""
    return np.asarray(heat / max(float(heat.mean()), 1e-30), np.float32)


def levels(heat: Floats) -> Floats:
    """Heat [T, h, w] as levels 0 to 1 of one scale for all its frames, least to most."""
    over = ratios(heat)
    low, high = float(over.min()), float(over.max())
    return np.asarray((over - low) / max(high - low, LEAST_SPAN), np.float32)


def overlay(
    frame: Pixels, level: Floats | None, box: tuple[float, float, float, float], height: int = THUMB
) -> Pixels:
    """One small frame, with heat where there is any.

    Args:
        frame: uint8 [H, W, 3].
        level: [h, w], 0 to 1, over the patches of the box; None shows the frame as it is.
        box: top, left, height and width of the part that was seen, in pixels of the frame.
        height: of the small frame.

    Returns:
        uint8 [height, width, 3].
    """
    width = max(1, round(frame.shape[1] * height / frame.shape[0]))
    small = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    if level is None:
        return small
    grey = np.repeat((small @ _GREY)[..., None], 3, axis=-1)
    lit = 0.35 * grey
    down, across = height / frame.shape[0], width / frame.shape[1]
    top, bottom = (round(edge * down) for edge in (box[0], box[0] + box[2]))
    left, right = (round(edge * across) for edge in (box[1], box[1] + box[3]))
    spread = Image.fromarray(level).resize((right - left, bottom - top), Image.Resampling.BILINEAR)
    over = np.asarray(spread, np.float32)[..., None]
    part = (slice(top, bottom), slice(left, right))
    share = 0.3 + 0.55 * over
    lit[part] = (1 - share) * grey[part] + share * colours(over[..., 0])
    return np.asarray(np.rint(lit).clip(0, 255), np.uint8)


def strip(pictures: Sequence[Pixels], under: Sequence[str]) -> Image.Image:
    """Small frames of one size side by side, each with a line of text under it.

    Upright frames are narrower than their text, and stand as far apart as it needs.
    """
    height, width = pictures[0].shape[:2]
    column = max(width, *(math.ceil(font(12).getlength(words)) for words in under))
    whole = Image.new("RGB", (len(pictures) * (column + _GAP) - _GAP, height + _TEXT), _PAPER)
    draw = ImageDraw.Draw(whole)
    for k, (picture, words) in enumerate(zip(pictures, under, strict=True)):
        left = k * (column + _GAP)
        whole.paste(Image.fromarray(picture), (left + (column - width) // 2, 0))
        draw.text((left + column / 2, height + 2), words, _INK, font(12), anchor="ma")
    return whole


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font; it has Latin letters."""
    return ImageFont.load_default(size)


def wrapped(text: str, size: int, width: int, lines: int) -> list[str]:
    """Text in at most so many lines of so many pixels; what is left over becomes an ellipsis."""
    face = font(size)
    found = [""]
    for word in text.split():
        longer = f"{found[-1]} {word}".strip()
        if found[-1] and face.getlength(longer) > width:
            found.append(word)
        else:
            found[-1] = longer
    cut = found[:lines]
    if len(found) > lines:
        cut[-1] += " …"
    for k, line in enumerate(cut):
        while len(line) > 2 and face.getlength(line) > width:
            line = line.removesuffix("…")[:-1] + "…"
        cut[k] = line
    return cut


def sheet(
    title: str, rows: Sequence[tuple[str, str, Image.Image]], notes: Sequence[str]
) -> Image.Image:
    """All rows on one picture.

    Args:
        title: over them.
        rows: name, grey words under it, and the strip.
        notes: lines at the foot.
    """
    margin, column = 16, 190
    width = max([column + max(row[2].width for row in rows), 640]) + 2 * margin
    feet = [line for note in notes for line in wrapped(note, 12, width - 2 * margin, 3)]
    height = 3 * margin + 24 + sum(row[2].height + 8 for row in rows) + _TEXT * len(feet)
    whole = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(whole)
    draw.text((margin, margin), wrapped(title, 18, width - 2 * margin, 1)[0], _INK, font(18))
    y = margin + 32
    for name, words, picture in rows:
        lines = wrapped(name, 14, column - 12, 3)
        for k, line in enumerate(lines):
            draw.text((margin, y + 18 * k), line, _INK, font(14))
        for k, line in enumerate(wrapped(words, 12, column - 12, 3)):
            draw.text((margin, y + 18 * len(lines) + 4 + 16 * k), line, (110, 110, 110), font(12))
        whole.paste(picture, (margin + column, y))
        y += picture.height + 8
    for k, line in enumerate(feet):
        draw.text((margin, y + 8 + _TEXT * k), line, (110, 110, 110), font(12))
    return whole
