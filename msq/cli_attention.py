"""`msq attention`: pictures of what is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msq.class_list import class_names
from msq.cli_options import Device, ImageMoved, Json, Labels, TextMoved, VideoMoved


def attention(
    video: Annotated[Path, typer.Argument(help="A file, or a folder of frames.")],
    run: Annotated[Path, typer.Option(help="Run directory of a trained head.")],
    labels: Labels = None,
    top: Annotated[
        int | None,
        typer.Option(help="Only the best N labels; 5 of the run's own classes by default.", min=1),
    ] = None,
    start: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Look from here on.")
    ] = None,
    end: Annotated[float | None, typer.Option(metavar="SECONDS", help="Look up to here.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE|DIR", help="FILE.html or FILE.png; a folder takes both."),
    ] = None,
    head_only: Annotated[
        bool,
        typer.Option(
            "--head-only", help="Leave weights where the tokens lie; any encoder will do."
        ),
    ] = False,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second of a folder of pictures.")
    ] = None,
    video_encoder: VideoMoved = None,
    image_encoder: ImageMoved = None,
    text_encoder: TextMoved = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Show where in a video the encoders and each class's query look (attention rollout)."""
    from msq.report import attention as report

    report.require_place(out)
    words = class_names(labels)
    maps = report.look(
        run,
        video,
        words,
        start=start,
        end=end,
        top=top,
        head_only=head_only,
        fps=fps,
        weights={"video": video_encoder, "image": image_encoder, "text": text_encoder},
        device=device,
    )
    title = report.title(video, run, start, end)
    written = [] if out is None else report.write(maps, out, title)
    report.show(maps, written, json=json)


def add_attention_command(app: typer.Typer) -> None:
    """Puts `msq attention` on the command line."""
    app.command(epilog="Example: msq attention new.mp4 --run runs/a --top 3 --out new.html")(
        attention
    )
