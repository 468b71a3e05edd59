"""Stage two as a person sees it: training, scoring, predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msq import config as configuration
from msq.config import RunConfig
from msq.extract.devices import resolve_device
from msq.report import terminal
from msq.report.scores import counts, metric_rows, say_exports, scope

TOP = 3  # labels of a window in the terminal; --json has all, or as many as --top says


def settings(
    file: Path | None,
    overrides: Sequence[str] | None,
    options: Mapping[str, Any],
) -> RunConfig:
    """The configuration: defaults, then the file, then `key=value`, then the command's options.

    Raises:
        UsageError: an unknown key, a value of another type or one that the protocol excludes.
    """
    config = RunConfig() if file is None else configuration.load(file)
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    # In one call: a protocol among them changes the defaults, not what is given beside it.
    return configuration.override(config, [*(overrides or ()), *given])


def train(
    store: Path,
    config: RunConfig,
    out: Path | None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train a head on a store, or one for each of its partitions; as in `result.json`."""
    from msq.extract.store import open_store
    from msq.head.device import step_in_words
    from msq.head.features import configured_features
    from msq.head.partitions import ALL, partition_names, train_partitions
    from msq.head.train import train_head

    place = resolve_device(device)
    out = out or Path("runs") / store.stem
    if not quiet:
        recorded = None if overwrite else out
        terminal.say(f"training on {step_in_words(config.train, place, recorded)}")
    if config.features.partition == ALL:
        opened = open_store(store)
        names = partition_names(opened)
        if not (quiet or overwrite):
            say_threads(*(out / name for name in names))
        with terminal.progress("training", quiet=quiet) as update:

            def report(event: Mapping[str, Any]) -> None:
                done = names.index(event["partition"]) * event["epochs"] + event["epoch"]
                total = len(names) * event["epochs"]
                update(done, total, f"{event['partition']}: {epoch_note(event)}")

            return train_partitions(
                opened, config, out, progress=report, overwrite=overwrite, device=place
            )
    if not (quiet or overwrite):
        say_threads(out)
    features = configured_features(open_store(store), config.features)
    if not quiet:
        terminal.say(f"{store}: {features.coverage()}")
    with terminal.progress("training", quiet=quiet) as update:
        result = train_head(
            features,
            config,
            out,
            progress=lambda event: update(event["epoch"], event["epochs"], epoch_note(event)),
            overwrite=overwrite,
            device=place,
        )
    return result.result


def say_threads(*runs: Path) -> None:
    """A line for each run that goes on with other threads than this process has, on stderr."""
    from msq.head.device import threads_in_words

    for line in threads_in_words(*runs):
        terminal.say(f"note: {line}")


def epoch_note(event: Mapping[str, Any]) -> str:
    """An epoch's event in a few words."""
    note = f"loss {event['loss']:.4f}"
    val = event.get("val_map")
    return note if val is None else f"{note}, val mAP {terminal.percent(val)}"


def evaluate(
    run: Path,
    store: Path,
    split: str,
    *,
    device: str = "auto",
    export: Path | None = None,
    ensemble: str = "none",
    test_views: str | None = None,
) -> dict[str, Any]:
    """Score a run on a split of a store; a run of several partitions on each of them."""
    from msq.extract.store import open_store
    from msq.head.evaluate import evaluate_run
    from msq.head.partitions import evaluate_partitions, is_partitioned

    opened, place = open_store(store), resolve_device(device)
    if is_partitioned(run):
        return evaluate_partitions(
            run, opened, split, place, export=export, ensemble=ensemble, test_views=test_views
        )
    return evaluate_run(
        run, opened, split, place, export=export, ensemble=ensemble, test_views=test_views
    )


def show(result: Mapping[str, Any], *, json: bool = False) -> None:
    """A run's metrics, all of them, with the protocol named."""
    say_exports(result)
    if json:
        terminal.print_json(result)
        return
    metrics = result["metrics"]
    title = f"{result['run']}: {scope(result)}, protocol {result['protocol']}"
    header, rows = metric_rows(result)
    terminal.table(title, header, rows)
    terminal.say(
        f"{counts(metrics)}; {result['coverage']}; {result['epochs']} "
        f"epochs in {result['seconds']:.1f} s ({result['seconds_per_epoch']:.2f} s each)"
    )


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
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Predictions for each video; see `msq.head.predict.Head.predict`."""
    from msq.head.partitions import require_one_run
    from msq.head.predict import load_head

    require_one_run(run)
    given = {kind: name for kind, name in weights.items() if name is not None}
    head = load_head(run, device=resolve_device(device), weights=given)
    with terminal.progress("windows", quiet=quiet or every is None) as update:
        results = head.predict(
            list(videos), labels=labels, every=every, window=window, fps=fps, progress=update
        )
    for item in results:
        for scored in (item, *item.get("segments", ())):
            scored["predictions"] = scored["predictions"][:top]
    return results


def show_predictions(results: Sequence[Mapping[str, Any]], *, json: bool = False) -> None:
    """Per video the labels with their scores; what could not be read goes to stderr."""
    unknown = sorted({word for r in results for word in r.get("unknown_words", ())})
    if unknown:
        terminal.say(
            f"warning: the text encoder does not know {', '.join(unknown)}; scores of labels with "
            "these words mean nothing. Use a full CLIP (--image-encoder at extraction)"
        )
    for item in results:
        _say_troubles(item)
    if json:
        terminal.print_json(list(results))
        return
    for item in results:
        rows = [(p["label"], terminal.percent(p["score"])) for p in item["predictions"]]
        if rows:
            terminal.table(item["clip"], ("label", "%"), rows)
        if item.get("segments"):
            _show_windows(item)


def _say_troubles(item: Mapping[str, Any]) -> None:
    """What could not be read of a video, or not be seen, each in a line."""
    if item.get("error"):
        terminal.say(f"failed: {item['clip']}: {item['error']}")
    for part in item.get("segments", ()):
        if part.get("error"):
            terminal.say(f"failed: {item['clip']}, {_span(part)}: {part['error']}")
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
        rows.append((_span(part), *best, *["–"] * (most - len(best))))
    header = ("window", *(f"{k + 1}. label, %" for k in range(most)))
    terminal.table(f"{item['clip']}: {len(rows)} windows", header, rows)


def _span(part: Mapping[str, Any]) -> str:
    """`0:50 – 1:00`, or `1:02:50 – 1:03:00`; a decimal only where there is one."""
    end = "the end" if part["end"] is None else _clock(part["end"])
    return f"{_clock(part['start'])} – {end}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds, 3), 60)
    hours, minutes = divmod(int(minutes), 60)
    whole = f"{rest:06.3f}".rstrip("0").rstrip(".") if rest % 1 else f"{rest:02.0f}"
    return f"{hours}:{minutes:02d}:{whole}" if hours else f"{minutes}:{whole}"


def prediction_exit_code(results: Sequence[Mapping[str, Any]]) -> int:
    """0 done, 3 when some video or window could not be read, 1 when nothing could."""
    parts = [[item, *item.get("segments", ())] for item in results]
    if parts and not any(part["predictions"] for video in parts for part in video):
        return 1
    return 3 if any(part.get("error") for video in parts for part in video) else 0
