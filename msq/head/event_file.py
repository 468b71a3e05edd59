"""TensorBoard's event file of a run: what stands in its other files, for whoever looks there.

It is written from the lines of `metrics.jsonl`, and from nothing else: whole whenever a run begins
or goes on, then a line at a time. So after a crash it holds no stray steps, and a run that was
trained without it can be given one afterwards. Its records are those of `tensorboard` itself; its
name holds a time and a number, where TensorBoard's own writer would put the machine's name.

| tag | is | step |
|---|---|---|
| `train/loss`, `train/lr`, `train/seconds` | of the line of an epoch | of the optimiser |
| `train/clips_per_second` | training clips over the epoch's time, validation included | |
| `val/mAP_macro`, `val/official` | of the validation clips, where there are any | |
| `test/mAP_macro`, `test/map_micro`, … | all of the result but counts | the last |
| `config` | `config.toml`, as text | 0 |
"""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.errors import UsageError

if TYPE_CHECKING:
    from msq.head.batches import Batches

PREFIX, SUFFIX = "events.out.tfevents.", ".msq"
TAGS = {"val_map": "val/mAP_macro", "val_official": "val/official"}  # others: train/KEY
NEEDS = "TensorBoard's event files need the package tensorboard: pip install 'msq[tensorboard]'"


def require_tensorboard(asked: bool, run: Path | None = None) -> None:
    """Refuse to begin what could not be written.

    Args:
        asked: whether event files are asked for.
        run: a directory; a run in it that has begun one goes on with it.

    Raises:
        UsageError: they are, or it has, and the package is not there.
    """
    begun = [] if asked or run is None else event_files(run)
    if not asked and not begun:
        return
    try:
        import tensorboard.summary.writer.record_writer  # noqa: F401
    except ImportError as error:
        way = f"delete {begun[-1]}" if begun else "leave --tensorboard (train.tensorboard) out"
        raise UsageError(f"{NEEDS}, or {way}; found: {error}") from None


def event_files(run: Path) -> list[Path]:
    """Those that msq wrote in a run's directory, in the order of their names."""
    return sorted(run.glob(f"{PREFIX}*{SUFFIX}"))


class EventFile:
    """The event file of a run; that of before it was resumed stays as an empty one.

    Args:
        run: its directory.
        batches: of the run; they say how many steps and clips an epoch has.
        config: text of `config.toml`.
        settings: section -> key -> value, for TensorBoard's table of hyperparameters.
        history: the epochs so far, as in `metrics.jsonl`.
        result: of a run that is finished already.

    Raises:
        UsageError: the package `tensorboard` is not there.
    """

    def __init__(
        self,
        run: Path,
        batches: Batches,
        config: str,
        settings: Mapping[str, Mapping[str, Any]],
        history: Sequence[Mapping[str, float | None]],
        result: Mapping[str, Any] | None = None,
    ) -> None:
        require_tensorboard(True)
        self._steps = batches.epoch_steps
        self._clips = batches.epoch_clips or batches.epoch_steps * batches.size
        self._seconds = 0.0  # of the epochs so far
        now, spent = time.time(), _seconds(history[-1], 0.0) if history else 0.0
        events = [*_opening(now - spent), _described(now - spent, config, settings)]
        events += [self._epoch(line, now - spent + _seconds(line, 0.0)) for line in history]
        if result is not None:
            events += self._end(result, now)
        before = event_files(run)
        self.path = run / f"{PREFIX}{_number(before):010d}{SUFFIX}"
        # TensorBoard reads whatever has tfevents in its name.
        temporary = run / f".events.{os.getpid()}"
        temporary.write_bytes(_records(events))
        temporary.replace(self.path)
        for (
            path
        ) in before:  # a reader stays for ever at a file that is gone, and leaves an empty one
            if path.stat().st_size:
                os.truncate(path, 0)
            else:
                path.unlink()

    def add(self, line: Mapping[str, float | None]) -> None:
        """Add an epoch, as its line in `metrics.jsonl` has it."""
        self._append([self._epoch(line, time.time())])

    def finish(self, result: Mapping[str, Any]) -> None:
        """Add the scores of a finished run, as `result.json` has them."""
        self._append(self._end(result, time.time()))

    def _epoch(self, line: Mapping[str, float | None], wall_time: float) -> Any:
        from tensorboard.compat.proto.event_pb2 import Event

        values = {TAGS.get(key, f"train/{key}"): x for key, x in line.items() if key != "epoch"}
        seconds = _seconds(line, self._seconds)
        if seconds > self._seconds:
            values["train/clips_per_second"] = self._clips / (seconds - self._seconds)
        self._seconds = seconds
        step = self._steps * int(line["epoch"] or 0)
        return Event(wall_time=wall_time, step=step, summary=_scalars(values))

    def _end(self, result: Mapping[str, Any], wall_time: float) -> list[Any]:
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard import summary

        place = "test" if result["split"] == "test" else f"final_{result['split']}"
        found = {
            f"{place}/{'mAP_macro' if key == 'map' else key}": value
            for key, value in result["metrics"].items()
            if isinstance(value, float)
        }
        step, ended = self._steps * int(result["epochs"]), summary.hparams({}, {})[2]
        return [
            Event(wall_time=wall_time, step=step, summary=one) for one in (_scalars(found), ended)
        ]

    def _append(self, events: Sequence[Any]) -> None:
        with self.path.open("ab") as file:
            file.write(_records(events))


def _records(events: Iterable[Any]) -> bytes:
    """Events as TensorBoard's files hold them."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        writer.write(event.SerializeToString())
    return buffer.getvalue()


def _number(before: Sequence[Path]) -> int:
    """The seconds of now, or more: readers take files in the order of their names."""
    last = before[-1].name[len(PREFIX) : -len(SUFFIX)] if before else ""
    return max(int(time.time()), int(last) + 1 if last.isdecimal() else 0)


def _opening(wall_time: float) -> list[Any]:
    """What each file begins with: whoever has read an earlier one forgets its steps from 0 on."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    return [
        Event(wall_time=wall_time, file_version="brain.Event:2"),
        Event(wall_time=wall_time, session_log=SessionLog(status=SessionLog.START)),
    ]


def _described(wall_time: float, config: str, settings: Mapping[str, Mapping[str, Any]]) -> Any:
    """The configuration, as a text and for TensorBoard's table of hyperparameters."""
    from tensorboard.compat.proto.event_pb2 import Event
    from torch.utils.tensorboard import summary

    whole = "\n".join(f"    {line}" for line in config.splitlines())  # Markdown: as it is
    flat = {f"{section}.{k}": x for section, values in settings.items() for k, x in values.items()}
    _, made, _ = summary.hparams(flat, {})
    made.MergeFrom(summary.text("config", whole))
    return Event(wall_time=wall_time, step=0, summary=made)


def _scalars(values: Mapping[str, float | None]) -> Any:
    """Numbers by their tags; those that are none are left out."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(
        value=[
            Summary.Value(tag=tag, simple_value=float(x))
            for tag, x in values.items()
            if x is not None and math.isfinite(x)
        ]
    )


def _seconds(line: Mapping[str, float | None], other: float) -> float:
    found = line.get("seconds")
    return other if found is None else float(found)
