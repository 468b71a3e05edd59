"""End-to-end training as a person sees it: what is read, the live line, what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.report import stage_one, stage_two, terminal
from msq.report.scores import metric_rows
from msq.run_settings import assignments

if TYPE_CHECKING:
    from msq.extract.train_request import TrainRequest
    from msq.head.end_to_end_config import EndToEndConfig
    from msq.head.material import Material

SHOWN = 20


def settings(
    file: Path | None,
    overrides: Sequence[str] | None,
    options: Mapping[str, Any],
    init_head: Path | None = None,
) -> EndToEndConfig:
    """The configuration: defaults, the file, `key=value`, the command's options.

    The head's own settings are those of `init_head` where there is one.

    Raises:
        UsageError: an unknown key, a value of another type, one that the protocol excludes, or
            another head than that of `init_head`, or TensorBoard is asked for and not there.
    """
    from msq.head.end_to_end_config import end_to_end_settings
    from msq.head.event_file import require_tensorboard
    from msq.head.inherited_head import inherited_settings

    asked = assignments(overrides, options)
    taken = [] if init_head is None else inherited_settings(init_head, file, asked)
    config = end_to_end_settings(file, [*taken, *asked])
    require_tensorboard(config.run.train.tensorboard)
    return config


def train(
    request: TrainRequest,
    config: EndToEndConfig,
    out: Path,
    *,
    init_head: Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Read the clips, train encoder and head; as in `result.json`, with all that failed.

    Raises:
        MsqError: as `load_material` and `train_end_to_end`.
        KeyboardInterrupt: also by SIGTERM; the last checkpoint is kept.
    """
    from msq.extract.cluster import terminated_as_interrupted
    from msq.head.device import step_in_words
    from msq.head.end_to_end import train_end_to_end
    from msq.head.ranks import joined
    from msq.head.train_material import load_material

    with terminated_as_interrupted(), joined(request.device) as ranks:
        request = dataclasses.replace(request, device=str(ranks.device))
        if not quiet:
            recorded = None if overwrite else out
            words = step_in_words(config.run.train, ranks.device, recorded)
            several = f", {ranks.world} processes" if ranks.world > 1 else ""
            terminal.say(f"training on {words}{several}")
            if not overwrite:
                stage_two.say_threads(out)
        with _Line("encoding with the frozen towers", quiet) as line:
            material = load_material(
                request, config, out, line.extracting, overwrite=overwrite, ranks=ranks
            )
        if not quiet:
            _say_material(request, material)
        with _Line("training", quiet) as line:
            run = train_end_to_end(
                material,
                config,
                out,
                progress=line.training,
                overwrite=overwrite,
                device=ranks.device,
                init_head=init_head,
                workers=request.workers,
                ranks=ranks,
            )
    specs = material.features.specs
    return _with_losses(run.result, material) | {
        "extract": request.extract_command(out, material.video.spec, _spec(specs.get("image")))
    }


class _Line:
    """A line of progress that begins with its first event: often there is nothing to be made."""

    def __init__(self, title: str, quiet: bool) -> None:
        self._title, self._quiet, self._stack = title, quiet, ExitStack()
        self._update: terminal.Update | None = None

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def extracting(self, event: Mapping[str, Any]) -> None:
        """An event of stage one."""
        self._show(event["done"], event["total"], stage_one.note(dict(event)))

    def training(self, event: Mapping[str, Any]) -> None:
        """An event of `train_end_to_end`."""
        if event.get("event") == "note":
            if not self._quiet:
                terminal.say(str(event["text"]))
            return
        self._show(event["epoch"], event["epochs"], epoch_note(event))

    def _show(self, done: int, total: int, note: str) -> None:
        if self._update is None:
            self._update = self._stack.enter_context(
                terminal.progress(self._title, quiet=self._quiet)
            )
        self._update(done, total, note)


def epoch_note(event: Mapping[str, Any]) -> str:
    """An epoch's event in a few words: loss, validation, time, the share that input took."""
    note = stage_two.epoch_note(event)
    if event.get("seconds"):
        note += f", {stage_one.duration(event['seconds'] / event['epoch'])} an epoch"
    share = event.get("waited_share")
    return note if share is None else f"{note}, {share:.0%} of it waiting for clips"


def _spec(values: Mapping[str, Any] | None) -> Any:
    from msq.extract.encoders import EncoderSpec

    return None if values is None else EncoderSpec.from_dict(values)


def _say_material(request: TrainRequest, material: Material) -> None:
    spec = material.video.spec
    terminal.say(f"{request.what}: {material.features.coverage()}")
    terminal.say(
        f"training {spec.slug} ({spec.weights}): {spec.frames} frames of {spec.size} pixels, "
        f"{spec.pooling} pooling, {spec.tokens} tokens of width {spec.channels}"
    )
    for note in material.notes:
        terminal.say(f"note: {note}")


def _with_losses(result: Mapping[str, Any], material: Material) -> dict[str, Any]:
    """The result with everything that could not be used: before the first step, and in it."""
    earlier = [dict(entry) for entry in material.failures]
    met = {entry["clip"] for entry in earlier}
    failures = earlier + [e for e in result.get("failures", ()) if e["clip"] not in met]
    skipped = [{"item": item, "reason": reason} for item, reason in material.skipped]
    return {
        **result,
        "failures": failures,
        "failed": len(failures),
        "skipped": len(skipped),
        "skipped_items": skipped,
        "kept_items": [{"item": item, "change": change} for item, change in material.kept],
    }


def show(result: Mapping[str, Any], *, json: bool = False) -> None:
    """The tables of a head, then what was trained beside it, what failed, where the encoder is."""
    degraded = [{"clip": clip, "reason": "decoded in part, kept"} for clip in result["degraded"]]
    for title, items in (
        ("failed", result["failures"]),
        ("degraded", degraded),
        ("skipped", result["skipped_items"]),
        ("kept", result.get("kept_items", ())),
    ):
        for item in items[:SHOWN]:
            terminal.say(f"{title}: {stage_one.item_line(item)}")
        if len(items) > SHOWN:
            terminal.say(f"{title}: … and {len(items) - SHOWN} more (all of them with --json)")
    stage_two.show(result, json=json)
    if json:
        return
    learned, encoder = result["parameters"] / 1e6, result["encoder_parameters"] / 1e6
    terminal.say(
        f"unfrozen: {result['unfrozen']}; {learned:.2f} M parameters of encoder and head learned, "
        f"the encoder has {encoder:.2f} M"
    )
    if views := result.get("test_views"):
        header, rows = metric_rows({**result, **views})
        terminal.table(f"{result['run']}: mean over the test views {views['views']}", header, rows)
    if result.get("input"):
        terminal.say(str(result["input"]["line"]))
    if result["replaced"]:
        terminal.say(
            f"{result['replaced']} times another clip was shown in place of one that cannot be "
            "decoded"
        )
    terminal.say(f"encoder: {result['encoder']}; features with it: {result['extract']}")


def exit_code(result: Mapping[str, Any]) -> int:
    """0 done, 3 where a clip failed or an item could not be used."""
    return 3 if result["failed"] or result["skipped"] else 0
