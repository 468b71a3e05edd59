"""Charades as the authors' loader shows it: labelled frames alone, targets of the sampled ones.

Frame f of n is shown at f / fps seconds, and has class c if `start < f / fps < end` for one of its
intervals (strict, so that intervals which end before they start vanish). For a frame folder
fps = n / length, with the length of the annotation; for a video file the frame's own time counts.
Under `frames=labelled` frames without a class are taken away before any are chosen. Under
`targets=T` the labels are those of the T frames that sampling `official` then chooses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from msq.errors import UsageError, VideoError
from msq.extract.datasets.dataset import Clip
from msq.extract.datasets.options import choice

if TYPE_CHECKING:
    from msq.extract.timeline import Seconds

Interval = tuple[int, float, float]
OPTIONS = {
    "frames": "all (default) or labelled: frames without an action are never shown",
    "targets": "video (default: labels of the whole video), or T: those of T sampled frames",
}
_NOTHING_KEPT = "no frame lies inside any of its actions, and --option frames=labelled"


@dataclass(frozen=True)
class FrameRule:
    """Which frames may be shown, and which of them decide the labels.

    Attributes:
        labelled: only frames with a class.
        targets: T; 0 for the labels of the whole video.
    """

    labelled: bool
    targets: int

    @classmethod
    def of(cls, options: Mapping[str, str]) -> FrameRule:
        """The rule that options name.

        Raises:
            UsageError: values that cannot be, or a frame rate beside `frames=labelled`.
        """
        labelled = choice("charades", options, "frames", ("all", "labelled"), "all") == "labelled"
        given = options.get("targets", "video").strip()
        if given != "video" and not (given.isdecimal() and int(given) > 0):
            raise UsageError(
                f"dataset charades, --option targets={given}: expected video or a number of frames"
            )
        rule = cls(labelled, 0 if given == "video" else int(given))
        if rule.active and "fps" in options:
            raise UsageError(
                "dataset charades, --option fps: frames=labelled and targets=T take the frame "
                "rate of a folder from its files and the video's length; leave fps out"
            )
        return rule

    @property
    def active(self) -> bool:
        """False where everything is as without the options."""
        return self.labelled or self.targets > 0

    @property
    def variant(self) -> str:
        """The rule in words, empty for none."""
        parts = ["labelled frames"] * self.labelled
        parts += [f"labels of {self.targets} frames"] if self.targets else []
        return ", ".join(parts)


@dataclass
class Ruled:
    """What became of the clips.

    Attributes:
        clips: with their `keep`, frame rates and labels.
        left_out: (id, reason) of clips of which nothing is kept.
        unusable: (clip, reason) of clips whose frames had to be looked at and cannot be.
        instances: labels of `clips` and `left_out` by their whole videos.
        lost: how many of these the sampled frames do not show.
    """

    clips: list[Clip] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    unusable: list[tuple[Clip, str]] = field(default_factory=list)
    instances: int = 0
    lost: int = 0

    def note(self, rule: FrameRule) -> str:
        """How many labels there are no longer, in one line."""
        share = 100 * self.lost / self.instances if self.instances else 0.0
        where = f"{rule.targets} sampled frames" if rule.targets else "whole videos"
        return (
            f"labels of {where}: {self.lost} of {self.instances} label instances lost "
            f"({share:.2f} %), {len(self.left_out)} videos without a frame to show"
        )


def apply_rule(clips: Sequence[Clip], lengths: Mapping[str, float], rule: FrameRule) -> Ruled:
    """Restrict clips to what may be shown of them.

    Files are opened, all their packets read, where `targets` needs the times of their frames;
    frame folders are listed. Otherwise the annotation is enough.

    Args:
        clips: whole videos with their intervals.
        lengths: seconds of each, by id.
        rule: an active one.
    """
    found = Ruled()
    with ThreadPoolExecutor() as pool:  # waits for disks, mostly
        results = pool.map(partial(_shown, lengths=lengths, rule=rule), clips)
        for clip, (shown, reason) in zip(clips, results, strict=True):
            if shown is None and reason != _NOTHING_KEPT:
                found.unusable.append((clip, reason))
                continue
            found.instances += len(clip.labels)
            found.lost += len(clip.labels) - (0 if shown is None else len(shown.labels))
            if shown is None:
                found.left_out.append((clip.id, reason))
            else:
                found.clips.append(shown)
    return found


def open_intervals(intervals: Iterable[Interval]) -> tuple[tuple[float, float], ...]:
    """The union of the intervals of all classes as disjoint open ones, ascending.

    Two that only touch stay two: the moment between them is in neither.
    """
    union: list[tuple[float, float]] = []
    for start, end in sorted((start, end) for _, start, end in intervals if start < end):
        if union and start < union[-1][1]:
            union[-1] = union[-1][0], max(end, union[-1][1])
        else:
            union.append((start, end))
    return tuple(union)


def labels_at(intervals: Iterable[Interval], times: Seconds) -> tuple[int, ...]:
    """Classes with an interval around at least one of the times, ascending.

    Args:
        intervals: (class, start, end) in seconds.
        times: float64 [T], seconds.
    """
    shown = {c for c, start, end in intervals if bool(((times > start) & (times < end)).any())}
    return tuple(sorted(shown))


def restrict(clip: Clip, rule: FrameRule, times: Seconds) -> Clip | None:
    """A clip as the rule leaves it, None where it leaves no frame.

    Args:
        clip: a whole video with its intervals and labels.
        rule: what may be shown.
        times: float64 [n], seconds at which the video's frames are shown, in order.

    Returns:
        The clip with `keep`, and with the labels of the sampled frames.
    """
    from msq.extract.sampling import sample_indices
    from msq.extract.timeline import kept

    keep = open_intervals(clip.intervals) if rule.labelled else ()
    times = times[kept(times, keep)] if keep or not rule.labelled else times[:0]
    if not len(times):
        return None
    if rule.targets:
        chosen = times[sample_indices(len(times), rule.targets, "official")]
        clip = replace(clip, labels=labels_at(clip.intervals, chosen))
    return replace(clip, keep=keep)


def _shown(clip: Clip, lengths: Mapping[str, float], rule: FrameRule) -> tuple[Clip | None, str]:
    """The clip as the rule leaves it; None with the reason where it cannot be shown."""
    keep = open_intervals(clip.intervals) if rule.labelled else ()
    if rule.labelled and not keep:
        return None, _NOTHING_KEPT
    folder = clip.path.is_dir() or not clip.path.suffix
    if not folder and not rule.targets:
        return replace(clip, keep=keep), ""  # the file's own clock decides, when it is decoded
    if not clip.path.exists():
        # A folder's frame rate is needed as soon as frames are chosen by their time.
        return None, "expected the video, to know the times of its frames; found nothing there"
    try:
        rate, times = _folder_times(clip, lengths[clip.id]) if folder else _file_times(clip)
    except (VideoError, ValueError) as bad:
        return None, str(bad).removeprefix(f"{clip.path}: ")
    ruled = restrict(replace(clip, fps=rate), rule, times)
    return ruled, "" if ruled is not None else _NOTHING_KEPT


def _folder_times(clip: Clip, length: float) -> tuple[float, Seconds]:
    """Frames per second of a frame folder, and float64 [n], seconds of its frames.

    Raises:
        ValueError: the annotation has no length for it.
        VideoError: the folder holds no picture.
    """
    from msq.extract.frame_folder import frame_files
    from msq.extract.timeline import folder_times

    if not length > 0:
        raise ValueError(f"expected a length above 0 seconds in the annotation, found {length:g}")
    frames = len(frame_files(clip.path))
    return frames / length, folder_times(frames, frames / length)


def _file_times(clip: Clip) -> tuple[None, Seconds]:
    """float64 [n], seconds of a video file's frames.

    Raises:
        ValueError: they are not known.
        VideoError: the video cannot be opened.
    """
    import numpy as np

    from msq.extract.video import frame_times

    times = frame_times(clip.path)
    if np.isnan(times).any():
        raise ValueError("expected frames with times, found a video without time stamps (remux it)")
    return None, times
