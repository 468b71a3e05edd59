"""Videos as a whole, and window by window where that is asked for: labels with scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from msq.errors import VideoError
from msq.head.predict_windows import Progress, Score, Windows, scored_windows

if TYPE_CHECKING:
    from msq.extract.encode import Encoded

FAR_APART = 60.0  # seconds between sampled frames from which a result says so


def predict_videos(
    paths: Sequence[Path],
    encoders: Sequence[Any],
    score: Score,
    windows: Windows | None,
    fps: float | None,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Decode and encode videos one by one; each is decoded once for all encoders.

    Args:
        paths: files, or folders of pictures.
        encoders: see `msq.extract.encode.encode_clip`.
        score: features of n clips, per clip one tensor for each encoder, to n lists of predictions.
        windows: which windows are scored, too.
        fps: frames per second of folders of pictures.
        progress: told of windows done, of how many, and of which video.

    Returns:
        As `Head.predict` has it.
    """
    results: list[dict[str, Any]] = []
    whole: list[tuple[dict[str, Any], Sequence[Tensor]]] = []
    for path, clip in zip(paths, clip_names(paths), strict=True):
        item: dict[str, Any] = {"clip": clip, "predictions": []}
        results.append(item)
        try:
            found = _encoded(path, item, encoders, score, windows, fps, progress)
        except VideoError as error:
            item["error"] = str(error)
            continue
        whole.append((item, found.features))
        if found.degraded is not None:
            item["degraded"] = found.degraded
        if (gap := _widest_gap(found)) > FAR_APART:
            item["seconds_between_frames"] = gap
    scored = score([features for _, features in whole])
    for (item, _), predictions in zip(whole, scored, strict=True):
        item["predictions"] = predictions
    return results


def _encoded(
    path: Path,
    item: dict[str, Any],
    encoders: Sequence[Any],
    score: Score,
    windows: Windows | None,
    fps: float | None,
    progress: Progress | None,
) -> Encoded:
    """The whole video; its windows, where there are to be any, go into the item.

    Raises:
        VideoError: it cannot be read; windows of it may have been, all the same.
    """
    from msq.extract.encode import encode_clip, encode_cuts
    from msq.extract.timeline import Cut
    from msq.extract.video_survey import survey

    if windows is None:
        return encode_clip(path, encoders, fps=fps)
    item["segments"] = []
    video = survey(path, fps=fps)
    ((_, found),) = encode_cuts(video, [Cut(None, None)], encoders)
    item["segments"] = list(scored_windows(video, windows, encoders, score, progress))
    if isinstance(found, VideoError):
        raise found
    return found


def clip_names(paths: Sequence[Path]) -> list[str]:
    """What each video is called: its name without suffix, its path where several have that name."""
    stems = Counter(path.stem for path in paths)
    names = [path.stem if stems[path.stem] == 1 else path.as_posix() for path in paths]
    # JSON and CSV are UTF-8; the bytes of a name that is not are written as escapes.
    return [name.encode("utf-8", "backslashreplace").decode() for name in names]


def _widest_gap(found: Encoded) -> float:
    """Seconds between two sampled frames at most, over all encoders; 0 where unknown."""
    gaps = (float(np.diff(times).max()) for times in found.times if len(times) > 1)
    return max((gap for gap in gaps if gap == gap), default=0.0)
