"""Commands that train many heads, and the tables of what they gave."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msq.choices import Classifier, TableFormat
from msq.cli_options import Config, Json, Overrides, Quiet
from msq.errors import UsageError
from msq.zeroshot_options import ALL, SEEN, ZeroShotOptions, zero_shot_options

SweepOut = Annotated[Path | None, typer.Option(help="Folder of the sweep; runs/NAME by default.")]
Devices = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, or cuda:0,cuda:1: a worker on each.")
]
Workers = Annotated[
    int | None, typer.Option(help="Processes; one for each device by default.", min=1)
]
Threads = Annotated[int | None, typer.Option(help="Threads of each; its share of cores.", min=1)]
Stack = Annotated[
    int | None,
    typer.Option(
        help="Heads trained at once, at most; 1 for one after another. By default a measurement "
        "decides on a GPU, and it is 1 on a CPU.",
        min=1,
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(help="dask (local workers) or tcp://HOST:PORT; only ids of trials go through it."),
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Try trials again that failed.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="List the trials and estimate their time; no more.")
]


def zero_shot(
    store: Annotated[Path, typer.Argument(help="Feature store.")],
    overrides: Overrides = None,
    out: SweepOut = None,
    seen: Annotated[str, typer.Option(help="Shares of seen classes: 50,75 or 10..90.")] = SEEN,
    splits: Annotated[
        int, typer.Option(help="Random class splits for each share.", min=1)
    ] = ZeroShotOptions.splits,
    split_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with train/split_I.list and test/split_I.list, to use instead."),
    ] = None,
    class_order: Annotated[
        bool, typer.Option("--class-order", help="The first classes are seen, as the authors do.")
    ] = False,
    seen_classes: Annotated[
        Path | None, typer.Option(help="A list of the classes to train; all others are unseen.")
    ] = None,
    actors: Annotated[
        Path | None,
        typer.Option(help="CSV clip,actor: each actor in turn is held out, not classes."),
    ] = None,
    train_actors: Annotated[str | None, typer.Option(help="Only these are trained on.")] = None,
    test_actors: Annotated[str | None, typer.Option(help="Only these are scored.")] = None,
    queries: Annotated[str, typer.Option(help="vanilla, text, multimodal or all.")] = ALL,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts of the store to compare, or all.")
    ] = None,
    text_encoders: Annotated[
        str | None, typer.Option(help="Text encoders of the store to compare, or all.")
    ] = None,
    classifier: Annotated[
        Classifier | None,
        typer.Option(help="shared or text; by default shared for vanilla queries, else text."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="train.epochs", min=1)] = None,
    patience: Annotated[
        int | None, typer.Option(help="train.patience: epochs without gain, then stop.", min=0)
    ] = None,
    choose: Annotated[
        list[str] | None,
        typer.Option(help="KEY=V1,V2: validation clips of seen classes choose; may be repeated."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="train.seed: start and order.")] = None,
    config: Config = None,
    device: Devices = "auto",
    workers: Workers = None,
    threads: Threads = None,
    stack: Stack = None,
    scheduler: Scheduler = None,
    retry_failed: RetryFailed = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train on some classes, score on classes never trained; mean ± std over class splits."""
    from msq.head.zeroshot_on_store import plan_on_store
    from msq.report import sweep_dry_run, sweeps, terminal, zero_shot
    from msq.run_settings import run_settings

    place = sweeps.Workplace.of(device, workers, threads, stack, scheduler)
    asked = zero_shot_options(
        {
            "seen": seen,
            "splits": splits,
            "queries": queries,
            "classifier": None if classifier is None else classifier.value,
            "split_dir": split_dir,
            "class_order": class_order,
            "seen_classes": seen_classes,
            "actors": actors,
            "train_actors": train_actors,
            "test_actors": test_actors,
            "prompts": prompts,
            "text_encoders": text_encoders,
            "choose": choose,
        }
    )
    options = {"epochs": epochs, "seed": seed, "patience": patience}
    settings = run_settings(config, overrides, options)
    planned = plan_on_store(store, settings, asked, threads=place.threads, say=terminal.say)
    out = out or Path("runs") / f"{store.stem}-zero-shot"
    if dry_run:
        sweep_dry_run.show(
            planned, out, place.workers, place.devices[0], retry_failed=retry_failed, json=json
        )
        return
    found = zero_shot.run(planned, out, place, retry_failed=retry_failed, quiet=quiet)
    zero_shot.show(found, out, json=json)
    raise typer.Exit(sweeps.exit_code(found))


def grid(
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="A grid file, or a preset's name.")
    ] = None,
    overrides: Overrides = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the presets and leave.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the file and leave.")] = False,
    out: SweepOut = None,
    stores: Annotated[
        Path, typer.Option(help="Where stores are made that the grid extracts.")
    ] = Path("stores"),
    device: Devices = "auto",
    workers: Workers = None,
    threads: Threads = None,
    stack: Stack = None,
    scheduler: Scheduler = None,
    retry_failed: RetryFailed = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train every combination of a grid file, of either stage; extracts each store once."""
    from msq.head.grid import plan_grid
    from msq.head.grid_file import read_grid
    from msq.report import grids, sweep_dry_run, sweeps, terminal

    if list_:
        grids.show_list(json=json)
        return
    if file is None:
        raise UsageError("expected a grid file or the name of a preset (msq grid --list)")
    if show:
        grids.show_file(file, json=json)
        return
    place = sweeps.Workplace.of(device, workers, threads, stack, scheduler)
    asked = read_grid(file, overrides or ())
    planned = plan_grid(asked, stores, place.threads, terminal.say)
    out = out or Path("runs") / asked.name
    if dry_run:
        sweep_dry_run.show(
            planned, out, place.workers, place.devices[0], retry_failed=retry_failed, json=json
        )
        return
    found = grids.run(
        planned, out, retry_failed=retry_failed, quiet=quiet, engine=place.engine, **place.how
    )
    grids.show(found, out, json=json)
    raise typer.Exit(sweeps.exit_code(found))


def report(
    paths: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Folders of sweeps, grids and runs.")
    ],
    format_: Annotated[
        TableFormat | None,
        typer.Option(
            "--format",
            help="terminal by default, or as --out ends: .md, .tex, .csv, .html or .json.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Columns: map, map_official, unseen, …; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A file, instead of stdout.")] = None,
    json: Json = False,
) -> None:
    """Results in one table beside the paper's numbers, or one HTML page with curves and bars."""
    from msq.report import reports

    kind = None if format_ is None else format_.value
    reports.report(paths, kind, tuple(metric or ()), out, json=json)


def add_sweep_commands(app: typer.Typer) -> None:
    """`msq zero-shot`, `msq grid`, `msq report`."""
    app.command("zero-shot", epilog="Example: msq zero-shot clips.zarr --seen 50,75 --splits 10")(
        zero_shot
    )
    app.command(epilog="Example: msq grid table3-charades extract.root=DIR --dry-run")(grid)
    app.command(epilog="Example: msq report runs/table3-charades --out table3.tex")(report)
