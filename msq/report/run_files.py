"""The files of a finished run, read for its report."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msq.errors import UsageError
from msq.head import run_result


@dataclass(frozen=True)
class RunFiles:
    """What a run's directory says.

    Attributes:
        name: of the run, among those of one report.
        result: contents of `result.json`.
        history: a line for each epoch, of `metrics.jsonl`; none where several runs are merged.
        positives: class -> clips of the scored split that show it; {} where nothing says so.
        clips: of the scored split; None likewise.
        config: text of `config.toml`.
        environment: contents of `env.json`.
        parts: the runs on each partition, where this is their mean.
    """

    name: str
    result: Mapping[str, Any]
    history: Sequence[Mapping[str, float | None]]
    positives: Mapping[str, int]
    clips: int | None
    config: str
    environment: Mapping[str, Any]
    parts: Sequence[RunFiles] = ()


def run_name(path: Path) -> str:
    """What a run is called: the name of its directory."""
    return path.name or path.resolve().name


def read_result(path: Path) -> dict[str, Any]:
    """The result of a finished run.

    Raises:
        UsageError: it is not finished, or its result is damaged.
    """
    if not (path / "result.json").exists():
        raise UsageError(f"{path}: expected a sweep (plan.json) or a finished run (result.json), "
                         "found neither")  # fmt: skip
    return run_result.read_result(path)


def read_run(path: Path, name: str) -> RunFiles:
    """Every file of a run that a report shows; those that are not there are taken as empty.

    Raises:
        UsageError: the run is not finished, or a file of it is damaged.
    """
    result = read_result(path)
    positives, clips = _positives(path / "predictions.npz", list(result.get("per_class") or ()))
    return RunFiles(
        name,
        result,
        _history(path / "metrics.jsonl"),
        positives,
        clips,
        _text(path / "config.toml"),
        _environment(path / "env.json"),
        [
            read_run(path / part, f"{name}, {part}")
            for part in result.get("partitions", ())
            if (path / part / "result.json").is_file()
        ],
    )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: expected text; {error}") from None


def _environment(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(file) or "{}")
    except json.JSONDecodeError as error:
        raise UsageError(f"{file}: expected a JSON object; {error}") from None
    return dict(found)


def _history(file: Path) -> list[dict[str, float | None]]:
    try:
        return [json.loads(line) for line in _text(file).splitlines()]
    except json.JSONDecodeError as error:
        raise UsageError(f"{file}: expected one JSON object on each line; {error}") from None


def _positives(file: Path, classes: Sequence[str]) -> tuple[dict[str, int], int | None]:
    """Clips of each class among those scored, and how many were scored.

    Args:
        file: `predictions.npz`, labels [B, K].
        classes: K names, in the order of its columns.
    """
    import numpy as np  # tables of results do without

    try:
        with np.load(file) as stored:
            labels = stored["labels"]
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{file}: expected the predictions of a run; {error}") from None
    if not classes:
        return {}, len(labels)
    if labels.ndim != 2 or labels.shape[1] != len(classes):
        raise UsageError(f"{file}: expected labels of {len(classes)} classes, those of "
                         f"result.json, found the shape {labels.shape}")  # fmt: skip
    counts = labels.astype(bool).sum(0).tolist()
    return dict(zip(classes, counts, strict=True)), len(labels)
