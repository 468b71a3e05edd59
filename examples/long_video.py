"""What is done when in an hour-long video: a CSV of intervals.

    python examples/long_video.py                      # on two minutes of rendered scenes
    python examples/long_video.py VIDEO RUN            # your video, your head
    python examples/long_video.py VIDEO RUN 5 10 0.5   # a window each 5 s, 10 s long, threshold 0.5

Each window is scored by itself. A label's score in a stretch of time is the mean over the windows
that cover it (`msq predict --merge` joins the windows as they are); where it is above the threshold
is an interval. What comes out: `VIDEO.intervals.csv` with `label,start,end,score` (seconds; the
highest score within), in the order of time. For the rendered scenes, of which the truth is known,
precision and recall of the labelled seconds, too.

A threshold is a choice between these two: make it on videos whose truth you know.
"""

import csv
import sys
from pathlib import Path

import av
import numpy as np

import msq
from small_world import FOLDER, small_head, small_videos

SCENE = 4  # seconds that each rendered scene lasts
Interval = tuple[str, float, float, float]  # label, start, end, highest score


def mean_scores(segments: list[dict], every: float) -> dict[str, np.ndarray]:
    """For each label its mean score [n] in the stretches of `every` seconds, NaN where unseen."""
    count = round(segments[-1]["start"] / every) + 1
    seen = np.zeros(count)
    total: dict[str, np.ndarray] = {}
    for part in segments:
        if "error" in part:  # it could not be decoded
            continue
        first = round(part["start"] / every)
        covered = slice(first, max(first + 1, round(part["end"] / every)))
        seen[covered] += 1
        for found in part["predictions"]:
            total.setdefault(found["label"], np.zeros(count))[covered] += found["score"]
    with np.errstate(invalid="ignore"):
        return {label: scores / seen for label, scores in total.items()}


def intervals(segments: list[dict], every: float, threshold: float) -> list[Interval]:
    """Where each label is above the threshold, in the order of time."""
    found = []
    for label, scores in mean_scores(segments, every).items():
        above = np.concatenate([[False], scores >= threshold, [False]])
        for a, b in np.flatnonzero(above[1:] != above[:-1]).reshape(-1, 2):
            end = min(b * every, segments[-1]["end"])
            found.append((label, a * every, end, float(scores[a:b].max())))
    return sorted(found, key=lambda one: one[1:3])


def write_intervals(
    video: Path, run: Path, every: float = 5, window: float = 10, threshold: float = 0.5
) -> list[Interval]:
    """Score the windows of a video, and write the CSV."""

    def show(done: int, of: int, name: str) -> None:
        print(f"\r{name}: {done} of {of} windows", end="", file=sys.stderr, flush=True)

    head = msq.load_head(run)
    segments = list(head.segments(video, every=every, window=window, progress=show))
    print(file=sys.stderr)
    if not any(part["predictions"] for part in segments):
        sys.exit(f"{video}: {segments[0]['error']}")
    found = intervals(segments, every, threshold)
    out = video.with_suffix(".intervals.csv")
    with out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("label", "start", "end", "score"), *found])
    print(f"{len(segments)} windows, {len(found)} intervals: {out}")
    return found


def rendered() -> tuple[Path, list[Interval]]:
    """Test videos of the small world, each played for `SCENE` seconds, as one; and the truth."""
    film, fps = FOLDER / "long.mp4", 12
    manifest, truth = small_videos(), []
    with manifest.open(newline="", encoding="utf-8") as file:
        clips = [row for row in csv.DictReader(file) if row["split"] == "test"][:30]
    for k, clip in enumerate(clips):
        labels = clip["labels"].split(";")
        truth += [(label, k * SCENE, (k + 1) * SCENE, 1.0) for label in labels]
    if not film.exists():
        with av.open(film, "w") as out:
            stream = out.add_stream("libx264", rate=fps)
            stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
            for clip in clips:
                with av.open(manifest.parent / clip["path"]) as video:
                    frames = [f.to_image().resize((128, 96)) for f in video.decode(video=0)]
                for i in np.linspace(0, len(frames) - 1, SCENE * fps).round().astype(int):
                    out.mux(stream.encode(av.VideoFrame.from_image(frames[i])))
            out.mux(stream.encode())
    return film, truth


def labelled(found: list[Interval], every: float) -> set[tuple[str, int]]:
    """The stretches that have a label, to be counted."""
    return {(x, i) for x, a, b, _ in found for i in range(round(a / every), round(b / every))}


if len(sys.argv) > 1:
    video, run, *numbers = sys.argv[1:]
    write_intervals(Path(video), Path(run), *map(float, numbers))
else:
    film, truth = rendered()
    every = SCENE / 2
    found = labelled(write_intervals(film, small_head(), every, SCENE, 0.3), every)
    known = labelled(truth, every)
    precision, recall = (len(found & known) / len(x) for x in (found, known))
    print(f"of the labelled seconds: precision {precision:.2f}, recall {recall:.2f}")
