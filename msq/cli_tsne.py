"""`msq tsne`: clips before and after the decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msq.choices import QueryWeights
from msq.cli_options import Device, Json, Quiet


def tsne(
    run: Annotated[Path, typer.Argument(help="Run directory of a trained head.")],
    store: Annotated[Path, typer.Option(help="Feature store made by the same encoders.")],
    out: Annotated[
        Path | None, typer.Option(help="A file: .svg, .html, .csv or .json, as its name ends.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    classes: Annotated[
        str | None,
        typer.Option(help='Only clips with one of these: a,b,c; one with a comma as "a, b".'),
    ] = None,
    most: Annotated[
        int,
        typer.Option(
            help="Classes with a colour of their own, most frequent first.", min=1, max=30
        ),
    ] = 10,
    limit: Annotated[int, typer.Option(help="Clips at most, drawn by the seed.", min=4)] = 2000,
    seed: Annotated[int, typer.Option(help="Of that draw.", min=0)] = 0,
    perplexity: Annotated[
        float, typer.Option(help="Neighbours that a clip keeps, about; a third of all at most.")
    ] = 30.0,
    weights: Annotated[
        QueryWeights,
        typer.Option(help="How a clip's queries become one vector: all alike, or by their scores."),
    ] = QueryWeights.mean,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw clips by t-SNE, before and after the decoder (the paper's Figure 4)."""
    from msq.report import tsne as report

    found = report.of_run(
        run,
        store,
        out,
        split=split,
        classes=classes,
        most=most,
        limit=limit,
        seed=seed,
        perplexity=perplexity,
        weights=weights.value,
        device=device,
        json=json,
        quiet=quiet,
    )
    report.show(found, out, json=json)


def add_tsne_command(app: typer.Typer) -> None:
    """`msq tsne`."""
    app.command(epilog="Example: msq tsne runs/a --store clips.zarr --out tsne.svg")(tsne)
