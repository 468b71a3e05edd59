"""Which look at a clip a row of features is: the clean one, an augmented one, or one of a test.

View 0 of every store is clean: the whole clip, centre crop. Augmented views are drawn from a seed
and the clip's id, so that all encoders see the same pictures and a shard can be made again. Test
views cut a clip into `clips` pieces in time and each frame into `crops` squares in space; their
scores are averaged (or the largest taken) when a head is evaluated. Official views are drawn
from the same two in the authors' way; end-to-end training shows them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from msq.errors import UsageError

ViewKind = Literal["clean", "augmented", "official", "test"]
_DRAWN = re.compile(r"(augmented|official) (\d+)")
_CLIPS_BY_CROPS = re.compile(r"(\d+)x(\d+)")
_TEST = re.compile(r"test clip (\d+)/(\d+) crop (\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class View:
    """One view; `str(view)` is what stands in a store's attributes, `parse_view` its inverse.

    Attributes:
        kind: `clean`, `augmented`, `official` or `test`.
        seed: of an augmented or official view; 1, 2, … in the order in which a store was asked for
            them, `seed_of_draw` in training.
        clip: of a test view, which piece in time, from 0.
        clips: pieces in time.
        crop: which square in space, from 0 (left or top) to `crops - 1` (right or bottom).
        crops: 1 (centre) or 3 (along the long side).
    """

    kind: ViewKind = "clean"
    seed: int = 0
    clip: int = 0
    clips: int = 1
    crop: int = 0
    crops: int = 1

    def __post_init__(self) -> None:
        """Refuse a view that cannot be.

        Raises:
            UsageError: a piece or crop outside its range, or another number of crops than 1 or 3.
        """
        if self.crops not in (1, 3):
            raise UsageError(f"test views: expected 1 or 3 crops, found {self.crops}")
        if not (0 <= self.clip < self.clips and 0 <= self.crop < self.crops):
            raise UsageError(f"test views: no such view: {self}")

    def __str__(self) -> str:
        if self.kind in ("augmented", "official"):
            return f"{self.kind} {self.seed}"
        if self.kind == "test":
            return f"test clip {self.clip + 1}/{self.clips} crop {self.crop + 1}/{self.crops}"
        return "clean"


CLEAN = View()


def augmented_views(count: int) -> tuple[View, ...]:
    """Augmented views 1 to `count`."""
    return tuple(View("augmented", seed) for seed in range(1, count + 1))


def seed_of_draw(seed: int, number: int) -> int:
    """The seed of the views that a run with this seed shows in its draw of this number.

    It is `(seed modulo 2^64 + 1) 2^32 + number`: no two draws of any runs share one, and none is
    that of a stored view, whose seeds count from 1.

    Raises:
        ValueError: a number below 0 or from 2^32 on.
    """
    if not 0 <= number < 2**32:
        raise ValueError(f"number of a draw: expected 0 to 2^32 - 1, found {number}")
    return ((seed % 2**64 + 1) << 32) + number


def clips_by_crops(clips: int, crops: int) -> tuple[View, ...]:
    """All `clips` x `crops` test views, pieces in time outermost.

    Raises:
        UsageError: fewer than one piece, or another number of crops than 1 or 3.
    """
    if clips < 1:
        raise UsageError(f"test views: expected at least 1 clip, found {clips}")
    return tuple(
        View("test", clip=i, clips=clips, crop=j, crops=crops)
        for i in range(clips)
        for j in range(crops)
    )


def parse_clips_by_crops(text: str) -> tuple[View, ...]:
    """The test views of a word such as `10x3`: 10 clips x 3 crops.

    Raises:
        UsageError: another form, or numbers that cannot be.
    """
    match = _CLIPS_BY_CROPS.fullmatch(text.strip().lower())
    if match is None:
        raise UsageError(f"test views {text!r}: expected CLIPSxCROPS, such as 10x3 or 4x1")
    return clips_by_crops(int(match[1]), int(match[2]))


def parse_view(text: str) -> View:
    """The view whose `str` this is.

    Raises:
        UsageError: it is none.
    """
    if text == "clean":
        return CLEAN
    if match := _DRAWN.fullmatch(text):
        return View("official" if match[1] == "official" else "augmented", int(match[2]))
    if match := _TEST.fullmatch(text):
        clip, clips, crop, crops = (int(x) for x in match.groups())
        return View("test", clip=clip - 1, clips=clips, crop=crop - 1, crops=crops)
    raise UsageError(
        f"view {text!r}: expected clean, augmented N, official N or test clip I/N crop J/M"
    )
