"""`msq train`: video encoder and head together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msq.choices import Classifier, Pooling, Protocol, Queries, Resize, Sampling
from msq.cli_options import (
    Config,
    DatasetPolicy,
    DatasetTask,
    Device,
    Json,
    Options,
    Overrides,
    Quiet,
    TensorBoard,
)


def train(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="A manifest, a folder per class, or a dataset's name (with --root).",
        ),
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; runs/WHAT-train by default.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Where the dataset lies.")] = None,
    option: Options = None,
    classes: Annotated[Path | None, typer.Option(help="File that fixes the class order.")] = None,
    task: DatasetTask = None,
    policy: DatasetPolicy = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N clips.", min=1)] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            help="Store of the same clips: the frozen towers' features are taken from it, and the "
            "encoder to begin with."
        ),
    ] = None,
    init_head: Annotated[
        Path | None, typer.Option(help="Run whose head is gone on with; its head.* settings hold.")
    ] = None,
    unfreeze: Annotated[
        str | None,
        typer.Option(help="backbone.unfreeze: none, norms, temporal, last:N or all."),
    ] = None,
    video_encoder: Annotated[
        str | None,
        typer.Option(help="What to begin with: the store's, else embedded; as for msq extract."),
    ] = None,
    image_encoder: Annotated[
        str | None, typer.Option(help="Frozen; as for msq extract. Must be the store's.")
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Frozen; as for msq extract. Must be the store's.")
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Option(help="Template with {}, or a set; as for msq extract.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames per clip.", min=1)] = None,
    size: Annotated[int | None, typer.Option(help="Pixels of the square crop.", min=1)] = None,
    pooling: Annotated[Pooling | None, typer.Option(help="Tokens that the head sees.")] = None,
    sampling: Annotated[
        Sampling | None,
        typer.Option(help="Segment centres (uniform, default), or as the authors' code rounds."),
    ] = None,
    resize: Annotated[
        Resize | None, typer.Option(help="torch is fast with PIL parity, pil is exact.")
    ] = None,
    protocol: Annotated[
        Protocol | None, typer.Option(help="train.protocol, and how clips are read.")
    ] = None,
    queries: Annotated[Queries | None, typer.Option(help="head.queries")] = None,
    classifier: Annotated[Classifier | None, typer.Option(help="head.classifier")] = None,
    epochs: Annotated[int | None, typer.Option(help="train.epochs", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="train.seed")] = None,
    val: Annotated[float | None, typer.Option(help="train.val: share of train held out.")] = None,
    partition: Annotated[
        str | None, typer.Option(help="Official split of the dataset: split1, split2, ….")
    ] = None,
    config: Config = None,
    device: Device = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Decode processes; 0 decodes in this one.", min=0)
    ] = None,
    tensorboard: TensorBoard = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what an earlier run left in RUN.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train video encoder and head together; writes an encoder that msq extract accepts."""
    from msq.extract.cluster import leads
    from msq.extract.datasets.options import parse_options
    from msq.extract.train_request import TrainRequest
    from msq.report import end_to_end

    settings = end_to_end.settings(
        config,
        overrides,
        {
            "unfreeze": unfreeze,
            "queries": queries,
            "classifier": classifier,
            "protocol": protocol,
            "epochs": epochs,
            "seed": seed,
            "val": val,
            "tensorboard": tensorboard or None,
            "partition": partition,
        },
        init_head,
    )
    request = TrainRequest(
        what=what,
        protocol=settings.run.train.protocol,
        root=root,
        options=parse_options(option or ()),
        classes=classes,
        task=None if task is None else task.value,
        policy=None if policy is None else policy.value,
        limit=limit,
        store=store,
        video_encoder=video_encoder,
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        prompts=tuple(prompts or ()) or None,
        frames=frames,
        size=size,
        pooling=None if pooling is None else pooling.value,
        sampling=None if sampling is None else sampling.value,
        resize=None if resize is None else resize.value,
        device=device,
        workers=workers,
    )
    speaks = leads()
    result = end_to_end.train(
        request,
        settings,
        out or Path("runs") / f"{request.name}-train",
        init_head=init_head,
        overwrite=overwrite,
        quiet=quiet or not speaks,
    )
    if speaks:  # the first of the processes that torchrun or Slurm started
        end_to_end.show(result, json=json)
        raise typer.Exit(end_to_end.exit_code(result))


def add_train_command(app: typer.Typer) -> None:
    """`msq train`."""
    app.command(
        epilog="Example: msq train clips.csv --store clips.zarr --init-head runs/a --unfreeze "
        "last:2 --out runs/tuned"
    )(train)
