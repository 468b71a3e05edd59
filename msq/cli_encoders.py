"""`msq encoders`: what can encode, and does it."""

from __future__ import annotations

from typing import Annotated

import typer

from msq.choices import EncoderKind, Precision
from msq.cli_options import Device, Json

encoders_app = typer.Typer(help="What can encode.", no_args_is_help=True)


@encoders_app.command("list", epilog="Example: msq encoders list")
def list_encoders(json: Json = False) -> None:
    """Say what each encoder needs and under what licence its weights are."""
    from msq.report import stage_one

    stage_one.show_encoders(json=json)


@encoders_app.command("check", epilog="Example: msq encoders check timm/TAG --precision bf16")
def check_encoder(
    name: Annotated[
        str, typer.Argument(help="As --video-encoder or --image-encoder of msq extract takes it.")
    ],
    weights: Annotated[
        str | None, typer.Option(help="Of an architecture in NAME: a file, a folder or a tag.")
    ] = None,
    kind: Annotated[
        EncoderKind, typer.Option(help="auto takes the name of a CLIP for an image encoder.")
    ] = EncoderKind.auto,
    precision: Annotated[Precision, typer.Option(help="Arithmetic.")] = Precision.fp32,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Load an encoder, run one small batch; exit code 4 where its output is not finite."""
    from msq.report import encoder_check

    found = encoder_check.check(
        name, weights, kind=kind.value, precision=precision.value, device=device
    )
    raise typer.Exit(encoder_check.show(found, json=json))
