"""Stage two as a person sees it: training and scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msq import config as configuration
from msq.config import RunConfig
from msq.config_values import toml_value
from msq.errors import UsageError
from msq.extract.devices import resolve_device
from msq.report import terminal
from msq.report.scores import counts, metric_rows, say_exports, scope


def settings(
    file: Path | None,
    overrides: Sequence[str] | None,
    options: Mapping[str, Any],
) -> RunConfig:
    """The configuration: defaults, then the file, then `key=value`, then the command's options.

    Raises:
        UsageError: an unknown key, a value of another type or one that the protocol excludes, a
            key with two values, or TensorBoard is asked for and not there.
    """
    config = RunConfig() if file is None else configuration.load(file)
    # In one call: a protocol among them changes the defaults, not what is given beside it.
    config = configuration.override(config, assignments(overrides, options))
    if config.train.tensorboard:
        from msq.head.event_file import require_tensorboard

        require_tensorboard(True)
    return config


def assignments(overrides: Sequence[str] | None, options: Mapping[str, Any]) -> list[str]:
    """`key=value` of the command line, and its options in the same form.

    Raises:
        UsageError: a key is given two values: neither may be passed over without a word.
    """
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    found: dict[str, str] = {}
    for text in (*(overrides or ()), *given):
        key, equals, value = text.partition("=")
        key, value = key.strip(), value.strip()
        before = found.setdefault(key, value)
        if equals and toml_value(before) != toml_value(value):
            raise UsageError(f"{key}: expected one value, found {before!r} and {value!r} (an "
                             "option of the command is such a key too)")  # fmt: skip
    return [*(overrides or ()), *given]


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
    said = f"{counts(metrics)}; {result['coverage']}"
    if result["epochs"] is not None:
        said += f"; {result['epochs']} epochs in {result['seconds']:.1f} s "
        said += f"({result['seconds_per_epoch']:.2f} s each)"
    terminal.say(said)
