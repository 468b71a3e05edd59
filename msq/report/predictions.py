"""What is done in new videos, as a person sees it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.errors import UsageError
from msq.extract.devices import resolve_device
from msq.report import terminal

if TYPE_CHECKING:
    from msq.head.predict import Head

TOP = 3  # labels of a window in the terminal; --json has all, or as many as --top says


def predict(
    run: Path,
    videos: Sequence[Path],
    labels: Sequence[str] | None,
    *,
    weights: Mapping[str, str | None],
    top: int | None,
    device: str = "auto",
    every: float | None = None,
    window: float | None = None,
    fps: float | None = None,
    threshold: float | None = None,
    merge: bool = False,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Predictions for each video; see `msq.head.predict.Head.predict`.

    With `merge` each video has `intervals`, see `msq.head.intervals.merged`.

    Raises:
        UsageError: a threshold that is no probability, or `merge` without one or without windows.
    """
    from msq.head.intervals import merged

    check_merging(every, threshold, merge)
    head = loaded_head(run, weights, device)
    with terminal.progress("windows", quiet=quiet or every is None) as update:
        results = head.predict(
            list(videos),
            labels=labels,
            every=every,
            window=window,
            fps=fps,
            top=top,
            threshold=threshold,
            progress=update,
        )
    if merge and threshold is not None:
        for item in results:
            item["intervals"] = list(merged(item["segments"], threshold))
    return results


def loaded_head(run: Path, weights: Mapping[str, str | None], device: str) -> Head:
    """The head of one run, its encoders where the weights are now."""
    from msq.head.partitions import require_one_run
    from msq.head.predict import load_head

    require_one_run(run)
    given = {kind: name for kind, name in weights.items() if name is not None}
    return load_head(run, device=resolve_device(device), weights=given)


def check_merging(every: float | None, threshold: float | None, merge: bool) -> None:
    """Refuse thresholds and merging that cannot be.

    Raises:
        UsageError: a threshold that is no probability, or `merge` without one or without windows.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise UsageError(f"--threshold: expected a probability, 0 to 1, found {threshold:g}")
    if merge and (every is None or threshold is None):
        raise UsageError("--merge joins windows that meet: expected --every SECONDS and "
                         "--threshold P with it, from which score on a label counts")  # fmt: skip


def show_predictions(results: Sequence[Mapping[str, Any]], *, json: bool = False) -> None:
    """Per video the labels with their scores; what could not be read goes to stderr."""
    say_unknown(sorted({word for r in results for word in r.get("unknown_words", ())}))
    for item in results:
        say_troubles(item)
    if json:
        terminal.print_json(list(results))
        return
    for item in results:
        rows = [(p["label"], terminal.percent(p["score"])) for p in item["predictions"]]
        if rows:
            terminal.table(item["clip"], ("label", "%"), rows)
        if "intervals" in item:
            _show_intervals(item)
        elif item.get("segments"):
            _show_windows(item)


def say_unknown(words: Sequence[str]) -> None:
    """That labels have words which mean nothing to the text encoder."""
    if words:
        terminal.say(
            f"warning: the text encoder does not know {', '.join(words)}; scores of labels with "
            "these words mean nothing. Use a full CLIP (--image-encoder at extraction)"
        )


def say_troubles(item: Mapping[str, Any]) -> None:
    """What could not be read of a video, or not be seen, each in a line."""
    if item.get("error"):
        terminal.say(f"failed: {item['clip']}: {item['error']}")
    for part in item.get("segments", ()):
        if part.get("error"):
            place = _span(part["start"], part["end"])
            terminal.say(f"failed: {item['clip']}, {place}: {part['error']}")
    for start, end, words in _damaged(item.get("segments", ())):
        terminal.say(f"damaged: {item['clip']}, {_span(start, end)}: {words}")
    if "seconds_between_frames" in item and "segments" not in item:
        terminal.say(
            f"warning: {item['clip']}: up to {item['seconds_between_frames']:.0f} s lie between "
            "the frames that were looked at, and what is shorter may be missed. --every SECONDS "
            "scores a window at a time"
        )


def _show_windows(item: Mapping[str, Any]) -> None:
    """A row for each window with its best labels; `–` where it could not be read."""
    most = min(TOP, max(len(part["predictions"]) for part in item["segments"]))
    rows = []
    for part in item["segments"]:
        best = [f"{p['label']} {terminal.percent(p['score'])}" for p in part["predictions"][:most]]
        rows.append((_span(part["start"], part["end"]), *best, *["–"] * (most - len(best))))
    header = ("window", *(f"{k + 1}. label, %" for k in range(most)))
    terminal.table(f"{item['clip']}: {len(rows)} windows", header, rows)


def _show_intervals(item: Mapping[str, Any]) -> None:
    """A row for each interval, in order of time."""
    found = sorted(item["intervals"], key=lambda one: (one["start"], one["end"]))
    rows = [(_span(one["start"], one["end"]), one["label"], terminal.percent(one["score"]))
            for one in found]  # fmt: skip
    title = f"{item['clip']}: {len(rows)} intervals in {len(item['segments'])} windows"
    terminal.table(title, ("interval", "label", "%"), rows)


def _damaged(
    segments: Iterable[Mapping[str, Any]],
) -> Iterator[tuple[float, float, str]]:
    """Windows that follow one another and are damaged alike: start, end, what is wrong."""
    for words, group in groupby(segments, lambda part: part.get("degraded")):
        if words is not None:
            parts = list(group)
            yield parts[0]["start"], parts[-1]["end"], str(words)


def _span(start: float, end: float | None) -> str:
    """`0:50 – 1:00`, or `1:02:50 – 1:03:00`; a decimal only where there is one."""
    return f"{_clock(start)} – {'the end' if end is None else _clock(end)}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds, 3), 60)
    hours, minutes = divmod(int(minutes), 60)
    whole = f"{rest:06.3f}".rstrip("0").rstrip(".") if rest % 1 else f"{rest:02.0f}"
    return f"{hours}:{minutes:02d}:{whole}" if hours else f"{minutes}:{whole}"


def prediction_exit_code(results: Sequence[Mapping[str, Any]]) -> int:
    """0 done, 3 when some video or window could not be read, 1 when nothing could."""
    return exit_code([bool(part.get("error")) for item in results
                      for part in (item, *item.get("segments", ()))])  # fmt: skip


def exit_code(failed: Sequence[bool]) -> int:
    """The same of whether each of them failed."""
    return 0 if not any(failed) else 1 if all(failed) else 3
