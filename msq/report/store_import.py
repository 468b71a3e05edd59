"""`msq store import` as a person sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from msq.errors import UsageError
from msq.report import stage_one, terminal

if TYPE_CHECKING:
    from pathlib import Path

    from msq.extract.feature_import import ImportResult
    from msq.extract.request import ExtractRequest

_DOING = {"read": "reading features", "write": "writing the store"}


def run(
    store: Path,
    features: Path,
    request: ExtractRequest,
    options: dict[str, Any],
    *,
    quiet: bool = False,
) -> ImportResult:
    """Import the features for the request's dataset, with progress on stderr.

    Args:
        store: the store.
        features: folder or file of features.
        request: names the dataset.
        options: of `msq.extract.feature_import.import_features`.
        quiet: show nothing.
    """
    from msq.extract.feature_import import import_features

    data = request.read_dataset()
    with terminal.progress("importing", quiet=quiet) as update:
        return import_features(data, store, features, progress=_events(update), **options)


def show(result: ImportResult, *, json: bool = False) -> None:
    """The result on stdout; failed items and warnings on stderr."""
    stage_one.show(result, json=json)
    if not json:
        shape = f"{result.tokens} tokens of {result.channels}" if result.tokens else "one vector"
        terminal.say(f"{result.encoder}: {shape} a clip from {result.source}: {result.spec}")


def step(seconds: float | None, fps: float | None) -> float | None:
    """Seconds from one feature to the next, from either way to say it.

    Raises:
        UsageError: both are given, or not a positive number per second.
    """
    if fps is None:
        return seconds
    if seconds is not None:
        raise UsageError("expected --seconds-per-feature or --feature-fps, found both")
    if not fps > 0:
        raise UsageError(f"--feature-fps: expected more than 0, found {fps}")
    return 1 / fps


def _events(update: terminal.Update) -> Callable[[dict[str, Any]], None]:
    def show_event(event: dict[str, Any]) -> None:
        failed = f", {event['failed']} failed" if event["failed"] else ""
        update(event["done"], event["total"], _DOING[event["stage"]] + failed)

    return show_event
