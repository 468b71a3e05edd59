"""The run directory: what it was asked for, what happened, and whether it is done."""

from __future__ import annotations

import datetime
import json
import platform
import shutil
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msq import config as configuration
from msq.config import RunConfig
from msq.errors import SpecMismatch, UsageError
from msq.head.batches import Batches
from msq.head.event_file import EventFile, event_files, require_tensorboard
from msq.head.features import Features
from msq.head.json_file import jsonable, write_atomic, write_json
from msq.head.model import MSQNet
from msq.head.packed_choice import StepChoice
from msq.head.run_result import read_result
from msq.whole_file import append_text

FILES = ("result.json", "config.toml", "env.json", "metrics.jsonl", "head.safetensors", "state.pt",
         "predictions.npz", "log.txt")  # fmt: skip
# In a run of `msq train`: features of the frozen towers, made before it, and the trained encoder.
TOWERS, ENCODER = "towers.zarr", "encoder"


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a training run gave.

    Attributes:
        run: its directory; None where nothing was written.
        finished: False when it was stopped on request before its end.
        result: the contents of `result.json`; empty unless finished.
        model: the head with the chosen weights, in evaluation mode; the latest ones if unfinished.
    """

    run: Path | None
    finished: bool
    result: dict[str, Any]
    model: MSQNet

    @property
    def metrics(self) -> dict[str, Any]:
        """Test metrics by their JSON names."""
        metrics: dict[str, Any] = self.result.get("metrics", {})
        return metrics


class RunDirectory:
    """One run's directory; with `path` None everything is kept in memory only.

    Args:
        path: the directory, made when missing.
        config: of the run.
        features: it is trained on.
        overwrite: delete the files of an earlier run there.
        choice: how to take the training steps; a run found there goes on as it began.
        more: further sections of its configuration, as plain values.

    Attributes:
        choice: the given one, or that of the run found there.

    Raises:
        SpecMismatch: a run with another configuration or other features is in it.
        UsageError: files that are no run are in it, or TensorBoard is asked for and not there.
    """

    def __init__(
        self, path: Path | None, config: RunConfig, features: Features, overwrite: bool = False,
        choice: StepChoice | None = None, more: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        self.path, self.choice = path, choice
        self._config, self._more = config, more or {}
        self._events: EventFile | None = None
        if path is None:
            return
        if overwrite or not (path / "result.json").exists():
            require_tensorboard(config.train.tensorboard, None if overwrite else path)
        path.mkdir(parents=True, exist_ok=True)
        old = event_files(path) if overwrite and not config.train.tensorboard else ()
        for file in (*path.glob(".events.*"), *old):
            file.unlink()
        # Without config.toml there is no run: it goes last, and a kill in between leaves one.
        for name in sorted(FILES, key=lambda one: one == "config.toml"):
            for part in path.glob(f".{name}.*"):  # half-written by a process that was killed
                part.unlink()
            if overwrite:
                (path / name).unlink(missing_ok=True)
        if overwrite:
            shutil.rmtree(path / ENCODER, ignore_errors=True)
        if (path / "config.toml").exists():
            self.choice = _require_same(path, config, features, more or {}) or choice
        elif not overwrite and any(not x.name.startswith(TOWERS) for x in path.iterdir()):
            raise UsageError(
                f"{path}: expected an empty or new folder, or a run; found files but no config.toml"
            )
        else:
            data = dict(features.identity())
            if choice is not None:
                data["step"] = choice.to_dict()
            text = configuration.to_toml(config, data, more)
            write_atomic(path / "config.toml", text.encode())

    def stored_result(self) -> dict[str, Any] | None:
        """The result of a finished run; it is written last, so the rest is there too.

        Raises:
            UsageError: it is damaged.
        """
        if self.path is None or not (self.path / "result.json").exists():
            return None
        result = read_result(self.path)
        return {**result, **clip_counts(result)}

    def finished(self) -> dict[str, Any] | None:
        """`stored_result`; its event file is written where one is asked for and not there."""
        result = self.stored_result()
        if result is None or not self._config.train.tensorboard or event_files(self._there()):
            return result
        text = (self._there() / "metrics.jsonl").read_text(encoding="utf-8")
        t, clips = self._config.train, result["clips_by_split"]["train"]
        batches = Batches(torch.arange(clips), t.batch, t.epoch_clips, t.seed)
        self._begin_events([json.loads(line) for line in text.splitlines()], batches, result)
        return result

    def write_environment(self, device: torch.device) -> None:
        """Write `env.json`: versions, processor, threads. No names of people or machines."""
        if self.path is None:
            return
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        write_json(
            self.path / "env.json",
            {
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "numpy": np.__version__,
                "system": f"{platform.system()} {platform.machine()}",
                "device": device.type,
                "gpu": gpu,
                "threads": torch.get_num_threads(),
                "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            },
        )

    def write_history(self, history: Sequence[Mapping[str, float]], batches: Batches) -> None:
        """Write `metrics.jsonl` anew, one line per epoch: after a crash it holds no stray lines.

        So it is with TensorBoard's event file, where one is asked for or was begun.

        Args:
            history: the lines.
            batches: of the run, for the number of steps and clips in an epoch.
        """
        if self.path is None:
            return
        lines = "".join(json.dumps(jsonable(line)) + "\n" for line in history)
        write_atomic(self.path / "metrics.jsonl", lines.encode())
        if self._config.train.tensorboard or event_files(self.path):
            self._begin_events(history, batches)

    def append_history(self, line: Mapping[str, float]) -> None:
        """Add one epoch to `metrics.jsonl`, and to the event file."""
        if self.path is not None:
            append_text(self.path / "metrics.jsonl", json.dumps(jsonable(line)) + "\n")
        if self._events is not None:
            self._events.add(line)

    def write_scores(self, result: Mapping[str, Any]) -> None:
        """Add the metrics of a finished run to the event file, where there is one."""
        if self._events is not None:
            self._events.finish(result)

    def _begin_events(
        self,
        history: Sequence[Mapping[str, float | None]],
        batches: Batches,
        result: Mapping[str, Any] | None = None,
    ) -> None:
        text = (self._there() / "config.toml").read_text(encoding="utf-8")
        settings = {**configuration.deciding(self._config), **self._more}
        self._events = EventFile(self._there(), batches, text, settings, history, result)

    def _there(self) -> Path:
        assert self.path is not None
        return self.path

    def log(self, message: str) -> None:
        """Add a line with the time to `log.txt`."""
        if self.path is not None:
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            append_text(self.path / "log.txt", f"{now} {message}\n")


def clip_counts(result: Mapping[str, Any]) -> dict[str, Any]:
    """`clips`, the number of clips scored, and `clips_by_split` of a result.

    Results of earlier versions have the latter under the name of the former.
    """
    if not isinstance(result.get("clips"), Mapping):
        return {key: result[key] for key in ("clips", "clips_by_split") if key in result}
    counts = dict(result["clips"])
    return {"clips": counts.get(result["split"], 0), "clips_by_split": counts}


def recorded_choice(path: Path | None) -> StepChoice | None:
    """How the run of a directory takes its steps, where one was begun there.

    Raises:
        UsageError: its configuration cannot be read.
    """
    if path is None or not (path / "config.toml").exists():
        return None
    return _choice(_stored(path / "config.toml").get("data", {}).get("step"), path / "config.toml")


def _require_same(
    path: Path, config: RunConfig, features: Features, more: Mapping[str, Mapping[str, Any]]
) -> StepChoice | None:
    """Refuse a run of another making; the choice of its steps, which is no part of the making."""
    file = path / "config.toml"
    stored = _stored(file)
    data = stored.get("data", {})
    step = data.pop("step", None)
    lines = configuration.difference(
        configuration.deciding(configuration.from_dict(stored, str(file))),
        configuration.deciding(config),
    )
    own = [name for name in configuration.PASSED_OVER if name in stored and name != "data"]
    lines += configuration.difference({name: stored[name] for name in own}, more)
    found = features.identity()
    if "stored" not in data:  # runs were begun before the stored dtype was noted
        found.pop("stored", None)
    lines += [f"data.{line}" for line in configuration.difference(data, found)]
    if lines:
        raise SpecMismatch(
            f"{path}: a run of another making is there (expected: the stored one, found: the one "
            "asked for); choose another directory or overwrite it\n  " + "\n  ".join(lines)
        )
    return _choice(step, file)


def _stored(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: expected the configuration of a run; {error}") from None


def _choice(step: Any, file: Path) -> StepChoice | None:
    if step is None:
        return None
    try:
        choice = StepChoice(**step)
    except TypeError:
        raise UsageError(
            f"{file}: data.step: expected path and precision, found {step}; start the run anew in "
            "another directory"
        ) from None
    if type(choice.threads) is not int or choice.threads < 0:
        raise UsageError(
            f"{file}: data.step.threads: expected the number of threads that the run began with, "
            f"found {choice.threads!r}; write it there, or start the run anew with --overwrite"
        )
    return choice
