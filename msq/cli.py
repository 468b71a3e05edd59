"""The command line. A command parses, calls one function, renders; nothing heavy at import."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from msq import __version__
from msq.choices import (
    Classifier,
    Ensemble,
    Loss,
    Queries,
)
from msq.cli_attention import add_attention_command
from msq.cli_bench import bench_app
from msq.cli_encoders import encoders_app
from msq.cli_extract import add_extract_command
from msq.cli_options import (
    Config,
    Device,
    Json,
    Options,
    Overrides,
    Quiet,
    TensorBoard,
)
from msq.cli_predict import add_predict_command
from msq.cli_store_copy import store_app  # and with it those of cli_store
from msq.cli_sweeps import add_sweep_commands
from msq.cli_train import add_train_command
from msq.cli_tsne import add_tsne_command
from msq.errors import MsqError, PeerError, UsageError

app = typer.Typer(
    name="msq",
    help="Multi-label action recognition with multi-modal queries: extract once, learn many times.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(store_app, name="store")
app.add_typer(encoders_app, name="encoders")
datasets_app = typer.Typer(help="What can be read, and is it all there.", no_args_is_help=True)
app.add_typer(datasets_app, name="datasets")
app.add_typer(bench_app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"msq {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: msq demo --out demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the world, the store, runs and page.")] = (
        Path("demo")
    ),
    seed: Annotated[int, typer.Option(help="Seed of the world and of the training.")] = 0,
    small: Annotated[bool, typer.Option("--small", help="A few clips, for a quick look.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole pipeline on a small world generated on the spot; needs no network."""
    from msq.demo import Demo
    from msq.report import demo_page, terminal

    result = Demo(out=out, seed=seed, small=small, quiet=quiet).run()
    if json:
        terminal.print_json(result)
    else:
        demo_page.print_tables(result)


@app.command(epilog="Example: msq world world --train 600 --test 200 --seed 7")
def world(
    out: Annotated[Path, typer.Argument(help="Folder to write the videos and manifests to.")],
    train: Annotated[int, typer.Option(min=1, help="Training videos.")] = 600,
    val: Annotated[int, typer.Option(min=0, help="Validation videos.")] = 0,
    test: Annotated[int, typer.Option(min=1, help="Test videos.")] = 200,
    seed: Annotated[int, typer.Option(help="Same seed, same videos.")] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Generate the synthetic world: H.264 videos of actors and their manifests."""
    from msq.report import terminal
    from msq.world import generate_world

    with terminal.progress("rendering videos", quiet=quiet) as update:
        made = generate_world(out, train=train, val=val, test=test, seed=seed, progress=update)
    if json:
        terminal.print_json({"manifest": str(made.manifest), "videos": train + val + test})
    else:
        typer.echo(made.manifest)


add_extract_command(app)


@app.command("train-head", epilog="Example: msq train-head clips.zarr --out runs/a optim.lr=3e-4")
def train_head(
    store: Annotated[Path, typer.Argument(help="Feature store.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; runs/STORE by default.")] = None,
    queries: Annotated[Queries | None, typer.Option(help="head.queries")] = None,
    classifier: Annotated[Classifier | None, typer.Option(help="head.classifier")] = None,
    loss: Annotated[Loss | None, typer.Option(help="train.loss")] = None,
    protocol: Annotated[str | None, typer.Option(help="train.protocol: paper or official.")] = None,
    epochs: Annotated[int | None, typer.Option(help="train.epochs", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="train.seed")] = None,
    val: Annotated[float | None, typer.Option(help="train.val: share of train held out.")] = None,
    partition: Annotated[
        str | None,
        typer.Option(help="Official split of the store: split1, split2, …, or all and their mean."),
    ] = None,
    config: Config = None,
    device: Device = "auto",
    tensorboard: TensorBoard = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what an earlier run left in RUN.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Stage two: train a head on a feature store. Goes on with an unfinished run."""
    from msq.report import stage_two
    from msq.run_settings import run_settings

    settings = run_settings(
        config,
        overrides,
        {
            "queries": queries,
            "classifier": classifier,
            "loss": loss,
            "protocol": protocol,
            "epochs": epochs,
            "seed": seed,
            "val": val,
            "tensorboard": tensorboard or None,
            "partition": partition,
        },
    )
    result = stage_two.train(store, settings, out, device=device, overwrite=overwrite, quiet=quiet)
    stage_two.show(result, json=json)


add_train_command(app)


@app.command("eval", epilog="Example: msq eval runs/a clips.zarr --split test")
def evaluate(
    run: Annotated[
        Path | None, typer.Argument(help="Run directory of a trained head (not with --submission).")
    ] = None,
    store: Annotated[
        Path | None, typer.Argument(help="Feature store made by the same encoders.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    export: Annotated[
        Path | None,
        typer.Option(help="Write the scores, a line a clip, for the official Charades scorer."),
    ] = None,
    ensemble: Annotated[
        Ensemble,
        typer.Option(help="Combine the probabilities over all test views of the store."),
    ] = Ensemble.none,
    test_views: Annotated[
        str | None, typer.Option(help="Which, e.g. 10x3, where the store has several sets.")
    ] = None,
    submission: Annotated[
        Path | None,
        typer.Option(help="Score such a file of anyone's: with STORE, or --dataset and --root."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="A dataset's name (--submission).")] = None,
    root: Annotated[Path | None, typer.Option(help="Where its annotation lies.")] = None,
    partition: Annotated[
        str | None, typer.Option(help="Official split that the file is of (--submission).")
    ] = None,
    option: Options = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Score a trained head on a store, or a file of predictions, under every protocol's metrics."""
    from msq.extract.datasets.options import parse_options
    from msq.head.on_store import evaluate_on_store
    from msq.report import stage_two

    if submission is not None:
        from msq.report.submission import evaluate_submission, show_submission

        if run is not None and store is not None:
            raise UsageError("--submission FILE needs no RUN: expected a STORE alone")
        options = parse_options(option or ())
        found = evaluate_submission(
            submission, store or run, dataset, root, options, split, partition
        )
        show_submission(found, json=json)
        return
    if run is None or store is None:
        raise UsageError("expected RUN and STORE, or --submission FILE")
    if dataset is not None or root is not None or option or partition is not None:
        raise UsageError(
            "--dataset, --root, --option and --partition go with --submission FILE; a head is "
            "scored on the partition that it was trained on"
        )
    result = evaluate_on_store(
        run,
        store,
        split,
        device=device,
        export=export,
        ensemble=ensemble.value,
        test_views=test_views,
    )
    stage_two.show(result, json=json)


add_predict_command(app)
add_attention_command(app)
add_sweep_commands(app)
add_tsne_command(app)


@app.command(epilog="Example: msq doctor")
def doctor(json: Json = False) -> None:
    """Say what this machine has of what msq needs (exit code 1 where msq cannot be used)."""
    from msq.report import doctor as report

    raise typer.Exit(report.show(report.examine(), json=json))


@datasets_app.command("list", epilog="Example: msq datasets list")
def list_datasets(json: Json = False) -> None:
    """Say which datasets and annotation formats can be read, and what each needs."""
    from msq.report import datasets

    datasets.show_list(json=json)


@datasets_app.command("check", epilog="Example: msq datasets check charades --root /data/charades")
def check_dataset(
    name: Annotated[str, typer.Argument(help="As in msq datasets list.")],
    root: Annotated[Path, typer.Option(help="Where the dataset lies.")],
    option: Options = None,
    json: Json = False,
) -> None:
    """Say what is there and what is missing, count it, and count every known oddity."""
    from msq.report import datasets

    datasets.show_survey(name, root, option or (), json=json)


# Of a file that is open already the system's message names none.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: list[str] | None = None) -> Any:
    """The entry point: run a command; errors made for people print without a traceback.

    Exit codes: 0 done, 1 failed, 2 usage, 3 finished with failures, 4 verification failed,
    130 interrupted.
    """
    # Two pools of spinning threads on few cores are many times slower than one that waits.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(arguments)
    except PeerError as error:  # the process that it is about has said it
        sys.exit(error.exit_code)
    except MsqError as error:
        sys.stderr.write(f"msq: {error}\n")
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a folder that may not be written
        if error.strerror is None or (error.filename is None and error.errno not in _NO_SPACE):
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        sys.stderr.write(f"msq: {where}{error.strerror}; what was finished is kept\n")
        sys.exit(1)
    except SystemExit as end:  # typer makes this of a KeyboardInterrupt
        if end.code == 130:
            sys.stderr.write("msq: interrupted; what was finished is kept, run again to go on\n")
        raise
