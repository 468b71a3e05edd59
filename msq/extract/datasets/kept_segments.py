"""Segments of classes that a class file does not have, under the policy `keep`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from msq.extract.datasets.annotation_text import Skipped
from msq.extract.datasets.options import nearest
from msq.extract.datasets.segments import segment_id

Labelled = tuple[str, float, float]  # class, start, end
Unit = Literal["label", "segment", "video"]


class KnownSegments(NamedTuple):
    """The segments of a video that are of a class, and what was said of the others."""

    segments: list[Labelled]
    changes: Skipped
    skipped: Skipped


def known_segments(
    video: str, segments: Sequence[Labelled], classes: Collection[str], source: str, unit: Unit
) -> KnownSegments:
    """Leave off labels that are no class, where their clip keeps another; else skip the clip.

    Args:
        video: its name.
        segments: all of it.
        classes: names of the classes.
        source: where they are from, for messages.
        unit: what makes a clip: one label of a segment, a segment with all its labels, a video.
    """
    found = KnownSegments([one for one in segments if one[0] in classes], [], [])
    cuts = {one[1:] for one in found.segments}
    for label, start, end in segments:
        if label in classes:
            continue
        item = segment_id(video, start, end)
        if unit == "video" and found.segments:
            kept = f"; clip {video!r} keeps its segments of other classes"
        elif unit == "segment" and (start, end) in cuts:
            kept = f"; clip {item!r} keeps another label"
        else:
            found.skipped.append((item, f"unknown label {label!r}: not in {source}"))
            continue
        hint = nearest(label, classes)
        found.changes.append((item, f"label {label!r} left off: not in {source}{hint}{kept}"))
    return found
