"""The first look at features that others computed: which clip has which, do they fit together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msq.errors import UsageError
from msq.extract.array_file import DamagedFile, FeatureError
from msq.extract.datasets.dataset import Clip
from msq.extract.feature_files import FeatureSource
from msq.extract.feature_layout import Rate, orient, rows_inside
from msq.extract.feature_matching import Match, match_clips

_SHOWN = 3


@dataclass(frozen=True)
class ClipFeatures:
    """What the source has for one clip.

    Attributes:
        key: of the item; "" where there is none.
        rows: which of the item's features are the clip's, ascending; None where it has none.
        reason: why the clip has no features, else None.
        message: what the file's reader said.
        begin: second of the video at which the item begins: not 0 for an item of one cut alone.
    """

    key: str = ""
    rows: NDArray[np.intp] | None = None
    reason: str | None = None
    message: str = ""
    begin: float = 0.0


@dataclass
class Survey:
    """What a source has for a list of clips; made by `survey`.

    Attributes:
        clips: for each clip.
        channels: D.
        per_moment: N, tokens of one moment.
        sha256: over the clips' ids, their items' keys, and the bytes of these.
        unused: keys of items that belong to no clip.
        digests: key -> SHA-256 of the item as it was read.
    """

    source: FeatureSource
    layout: str
    clips: list[ClipFeatures] = field(default_factory=list)
    channels: int = 0
    per_moment: int = 0
    sha256: str = ""
    unused: tuple[str, ...] = ()
    digests: dict[str, str] = field(default_factory=dict)
    _first: str = ""
    _last: tuple[str, NDArray[np.float32]] | None = None

    def read(self, key: str) -> NDArray[np.float32]:
        """One item as `[T, N, D]`; the item that was read last is kept, for cuts of one video.

        Raises:
            DamagedFile: it cannot be read.
            FeatureError: another shape than expected, or other bytes than at the first look.
        """
        if self._last is None or self._last[0] != key:
            values = self.source.read(key)
            digest = _digest(values)
            if self.digests.setdefault(key, digest) != digest:
                raise FeatureError(
                    f"{self.source.place(key)}: changed while it was imported; run it again"
                )
            self._last = key, orient(values, self.layout, self.source.place(key))
        return self._last[1]

    def read_again(self, clip: ClipFeatures) -> NDArray[np.float32]:
        """The features of one clip `[T, N, D]`."""
        return self.read(clip.key)[clip.rows]

    def common_count(self) -> int:
        """How many features in time every clip has.

        Raises:
            UsageError: not all have the same number.
        """
        counts = {len(c.rows): c.key for c in self.clips if c.rows is not None}
        if len(counts) > 1:
            low, high = min(counts), max(counts)
            raise UsageError(
                f"{self.source.path}: clips have {low} ({counts[low]!r}) to {high} "
                f"({counts[high]!r}) features; expected the same number for all, or --tokens S "
                "to average each clip's to S pieces"
            )
        return next(iter(counts))

    def check_width(self, values: NDArray[np.float32], key: str) -> None:
        """Refuse an item of another width than the first.

        Raises:
            FeatureError: with the item, expected and found.
        """
        if not self.channels:
            self.per_moment, self.channels = values.shape[1:]
            self._first = key
        elif values.shape[1:] != (self.per_moment, self.channels):
            wide, deep = values.shape[2], values.shape[1]
            raise FeatureError(
                f"{self.source.place(key)}: expected features of width {self.channels} as in "
                f"{self._first!r}, found {wide}"
                + (f"; {self.per_moment} tokens, found {deep}" if deep != self.per_moment else "")
                + "; where time is the last axis, say --layout DT"
            )


def survey(
    clips: Sequence[Clip],
    source: FeatureSource,
    layout: str,
    rate: Rate | None,
    template: str | None,
    progress: Callable[[dict[str, Any]], None] | None,
) -> Survey:
    """Find and read every clip's features once.

    Raises:
        FeatureError: no item belongs to a clip, none can be used, or items that do not fit
            together.
        UsageError: parts of videos, and no rate; a template that cannot be.
    """
    matches = match_clips(clips, source.keys, template)
    if not any(matches):
        raise _nothing_fits(clips, source, template)
    found = Survey(source, layout)
    failed = 0
    for row, (clip, match) in enumerate(zip(clips, matches, strict=True)):
        found.clips.append(_look(found, clip, match, rate))
        failed += found.clips[-1].reason is not None
        if progress is not None and (row % 64 == 63 or row + 1 == len(clips)):
            progress({"stage": "read", "done": row + 1, "total": len(clips), "failed": failed})
    if all(c.rows is None for c in found.clips):
        reasons = "; ".join([*dict.fromkeys(str(c.reason) for c in found.clips)][:_SHOWN])
        raise FeatureError(f"{source.path}: no clip has features that can be used ({reasons})")
    used = {match.key for match in matches if match is not None}
    found.unused = tuple(sorted(set(source.keys.values()) - used))
    found.sha256 = _content_hash(found, clips)
    return found


def _look(found: Survey, clip: Clip, match: Match | None, rate: Rate | None) -> ClipFeatures:
    if match is None:
        return ClipFeatures(reason=f"no features for this clip in {found.source.name}")
    part = clip.start is not None or clip.end is not None or bool(clip.keep)
    if part and not match.cut and rate is None:
        raise UsageError(
            f"clip {clip.id!r} is a part of a video, and {match.key!r} holds the features of the "
            "whole; expected --seconds-per-feature X or --feature-fps X, or an item for each part "
            f"by the name of its clip ({clip.id!r})"
        )
    try:
        values = found.read(match.key)
    except DamagedFile as error:
        message = str(error).replace(str(found.source.path), found.source.name)
        return ClipFeatures(match.key, reason="features cannot be read", message=message)
    if not values.size:
        return ClipFeatures(match.key, reason=f"its features are empty, shape {values.shape}")
    rows = np.arange(len(values))
    if part and not match.cut and rate is not None:
        rows = rows_inside(clip, len(values), rate)
        if not len(rows):
            reach = rate.centres(len(values))[-1]
            reason = f"the features of its video end at {reach:.2f} s, outside of this part"
            return ClipFeatures(match.key, reason=reason)
    found.check_width(values, match.key)
    bad = ~np.isfinite(values[rows])
    if bad.any():
        first = int(rows[int(np.flatnonzero(bad.any(axis=(1, 2)))[0])])
        reason = f"{int(bad.sum())} of its features' values are NaN or infinite, first in {first}"
        return ClipFeatures(match.key, reason=reason)
    begin = clip.start if match.cut and clip.start is not None else 0.0
    return ClipFeatures(match.key, rows, begin=begin)


def _nothing_fits(
    clips: Sequence[Clip], source: FeatureSource, template: str | None
) -> FeatureError:
    ids = ", ".join(f"{clip.id!r} ({clip.path.name})" for clip in clips[:_SHOWN])
    keys = ", ".join(map(repr, list(source.keys)[:_SHOWN]))
    return FeatureError(
        f"{source.path}: none of its {len(set(source.keys.values()))} items belongs to one of the "
        f"{len(clips)} clips. Clips are named {ids}, …; items {keys}, …. "
        + ("" if template is None else f"The template is {template!r}. ")
        + "--key-template says how they are named, for example '{stem}_rgb' or '{parent}/{stem}'"
    )


def _digest(values: NDArray[np.generic]) -> str:
    plain = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    head = f"{plain.dtype.str} {plain.shape} "
    return hashlib.sha256(head.encode() + plain.tobytes()).hexdigest()


def _content_hash(found: Survey, clips: Sequence[Clip]) -> str:
    total = hashlib.sha256()
    for clip, item in zip(clips, found.clips, strict=True):
        digest = found.digests.get(item.key, "")
        total.update(f"{clip.id}\0{item.key}\0{digest}\n".encode())
    return total.hexdigest()
