"""Stage two as a person sees it: training and scoring."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.config import RunConfig
from msq.report import terminal
from msq.report.score_doubts import doubts
from msq.report.scores import counts, metric_rows, say_exports, scope

if TYPE_CHECKING:
    from msq.head.on_store import Store


def train(
    store: Store,
    config: RunConfig,
    out: Path | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train a head on a store, with lines and a bar on stderr; see `train_on_store`."""
    from msq.head.on_store import train_on_store

    with terminal.late_progress("training", quiet=quiet) as update:
        return train_on_store(
            store,
            config,
            out,
            device=device,
            overwrite=overwrite,
            progress=lambda event: update(*epochs_done(event)),
            say=None if quiet else terminal.say,
        )


def epochs_done(event: Mapping[str, Any]) -> tuple[int, int, str]:
    """Epochs done, of how many, of all partitions where there are several, and a note."""
    names = event.get("partitions", ("",))
    before = names.index(event.get("partition", "")) * event["epochs"]
    which = f"{event['partition']}: " if "partition" in event else ""
    return (
        before + event["epoch"],
        len(names) * event["epochs"],
        f"{which}{epoch_note(event)}",
    )


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


def show(result: Mapping[str, Any], *, json: bool = False) -> None:
    """A run's metrics, all of them, with the protocol named."""
    say_exports(result)
    for doubt in doubts(result):
        terminal.say(f"warning: {doubt}")
    if json:
        terminal.print_json(result)
        return
    metrics = result["metrics"]
    title = f"{result['run']}: {scope(result)}, protocol {result['protocol']}"
    header, rows = metric_rows(result)
    terminal.table(title, header, rows)
    said = f"{counts(metrics)}; {result['coverage']}"
    if result["epochs"] is not None:
        said += f"; {result['epochs']} epochs in {result['seconds']:.1f} s "
        said += f"({result['seconds_per_epoch']:.2f} s each)"
    terminal.say(said)
