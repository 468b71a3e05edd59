"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msq.choices import Policy, Task

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N. Never falls back.")]
Labels = Annotated[
    str | None,
    typer.Option(help='Other words than the run\'s: a,b,c; one with a comma as "a, b".'),
]
VideoMoved = Annotated[
    str | None, typer.Option(help="Where the video encoder's weights are now, if moved.")
]
ImageMoved = Annotated[str | None, typer.Option(help="Where CLIP's weights are now, if moved.")]
TextMoved = Annotated[
    str | None, typer.Option(help="Where the text encoder's weights are now, if moved.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE…", help="Configuration overrides.")
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="A dataset's option; may be repeated."),
]
DatasetTask = Annotated[
    Task | None,
    typer.Option(help="Many labels a clip or one; the dataset's own, multilabel for a manifest."),
]
DatasetPolicy = Annotated[
    Policy | None,
    typer.Option(
        help="Lines and items that cannot be used; the dataset's own, skip for a manifest. keep "
        "joins, renames or mends what it can, and lists each."
    ),
]
Config = Annotated[Path | None, typer.Option("--config", help="A TOML file of settings.")]
TensorBoard = Annotated[
    bool,
    typer.Option("--tensorboard", help="Write TensorBoard's event file too (needs tensorboard)."),
]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes, to see that it all runs.")]
Rounds = Annotated[
    int | None, typer.Option(help="How often each side runs; the case's own.", min=1)
]
OnlyCases = Annotated[str, typer.Option("--case", help="Only cases whose name contains this.")]
