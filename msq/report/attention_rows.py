"""The rows of an attention picture: the frames, each encoder, each class, with words beside them.

Shapes: K classes, T frames, h x w patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msq.head.predict_attention import AttentionMaps, EncoderLook
from msq.report.heat_map import levels, overlay, ratios, strip

COLUMNS = 16  # frames of a picture at most
NOTES = (
    "Colour: share of the look at each place (attention rollout), on a scale of its own in each "
    "row, from the least to the most of all its frames. Under a frame: its time, and its share of "
    "the row. Grey and dark: cut off, the encoder did not see it.",
    "A map says where information may have come from. It is no proof that a score rests on it.",
)
_ACROSS, _DOWN = ("left", "middle", "right"), ("upper", "middle", "lower")


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: what is looking.
        score: of a class.
        heat: [T, h, w]; None for the frames themselves.
        elsewhere: share that lies nowhere in the picture.
        look: the frames it is about.
    """

    name: str
    score: float | None
    heat: NDArray[np.float32] | None
    elsewhere: float
    look: EncoderLook

    @property
    def shares(self) -> NDArray[np.float32]:
        """[T], of each frame; empty for the frames themselves."""
        return np.zeros(0, np.float32) if self.heat is None else self.heat.sum(axis=(1, 2))

    @property
    def words(self) -> str:
        """Score, and how far from even the look is."""
        if self.heat is None:
            return "as decoded"
        over = ratios(self.heat)
        spread = f"{over.min():.2g} to {over.max():.2g} times an even share"
        rest = f", {self.elsewhere:.0%} on the global token" if self.elsewhere >= 0.005 else ""
        score = "" if self.score is None else f"score {self.score:.3f}; "
        return f"{score}{spread}{rest}"

    @property
    def alt(self) -> str:
        """What a reader of the picture sees, for those who cannot."""
        count = len(self.look.frames)
        if self.heat is None:
            return f"{count} frames of the video"
        frame, down, across = np.unravel_index(int(self.heat.argmax()), self.heat.shape)
        best = int(self.shares.argmax())
        place = _place(int(down), int(across), *self.heat.shape[1:])
        who = f"the {self.name}" if self.score is None else f"the query of {self.name}"
        return (
            f"{count} frames with what {who} looks at in colour; {self.words}; the frame "
            f"with most of it: {when(self.look.times[best])} ({self.shares[best]:.0%}); the "
            f"brightest place: {place} at {when(self.look.times[int(frame)])}"
        )


def rows_of(maps: AttentionMaps) -> list[Row]:
    """The frames, the encoders that were watched, then the classes, highest score first."""
    video = maps.video
    rows = [Row("frames", None, None, 0.0, video)]
    if video.heat is not None:
        rows.append(Row("video encoder", None, video.heat, video.elsewhere, video))
    if maps.image is not None:
        rows.append(Row("image encoder", None, maps.image.heat, maps.image.elsewhere, maps.image))
    for k, label in enumerate(maps.labels):
        heat, rest = maps.heat[k], float(maps.elsewhere[k])
        rows.append(Row(label, float(maps.scores[k]), heat, rest, video))
    return rows


def shown_frames(count: int) -> list[int]:
    """Places of the frames that a picture shows: all of them, or evenly chosen ones."""
    if count <= COLUMNS:
        return list(range(count))
    return [int((k + 0.5) * count / COLUMNS) for k in range(COLUMNS)]


def row_strip(row: Row) -> Image.Image:
    """A row's frames side by side, with time and share under each."""
    look, level = row.look, None if row.heat is None else levels(row.heat)
    places = shown_frames(len(look.frames))
    pictures = [overlay(look.frames[t], None if level is None else level[t], look.box)
                for t in places]  # fmt: skip
    under = [when(look.times[t]) for t in places]
    if row.heat is not None:
        shares = row.shares
        under = [f"{w} · {shares[t]:.1%}" for t, w in zip(places, under, strict=True)]
    return strip(pictures, under)


def notes(rows: Sequence[Row]) -> list[str]:
    """How to read the rows."""
    count = max(len(row.look.frames) for row in rows)
    more = [f"{COLUMNS} of {count} frames are shown."] if count > COLUMNS else []
    return [*NOTES, *more]


def when(seconds: float) -> str:
    """`1.25 s`; `–` where the time is unknown."""
    return "–" if np.isnan(seconds) else f"{seconds:.2f} s"


def _place(down: int, across: int, height: int, width: int) -> str:
    """Which ninth of the picture a patch lies in."""
    words = (_DOWN[3 * down // height], _ACROSS[3 * across // width])
    return "the middle" if words == ("middle", "middle") else f"{words[0]} {words[1]}"
