"""`msq predict`: a trained head on new videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msq.choices import RowFormat
from msq.class_list import class_names
from msq.cli_options import Device, ImageMoved, Json, Labels, Quiet, TextMoved, VideoMoved
from msq.errors import UsageError


def predict(
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEO…", help="Files or folders.")],
    run: Annotated[Path, typer.Option(help="Run directory of a trained head.")],
    labels: Labels = None,
    top: Annotated[int | None, typer.Option(help="Only the best N labels.", min=1)] = None,
    every: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Score windows too: one begins so often."),
    ] = None,
    window: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Length of a window; as --every.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(metavar="P", help="Only labels of this score or more, 0 to 1.")
    ] = None,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Join windows that meet and have a label (--threshold)."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Rows into FILE.csv or FILE.jsonl as they come."),
    ] = None,
    format_: Annotated[
        RowFormat | None,
        typer.Option("--format", help="Rows on stdout as they come, or in --out."),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second of folders of pictures (--every).")
    ] = None,
    video_encoder: VideoMoved = None,
    image_encoder: ImageMoved = None,
    text_encoder: TextMoved = None,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what is done in new videos, with the run's classes or any other words."""
    from msq.report import prediction_rows, predictions

    words = class_names(labels)
    weights = {"video": video_encoder, "image": image_encoder, "text": text_encoder}
    if out is not None or format_ is not None:
        if json:
            raise UsageError("--json prints one document, --out and --format write rows: "
                             "expected one of them")  # fmt: skip
        code = prediction_rows.write_predictions(
            run,
            videos,
            prediction_rows.Wanted(words, top, every, window, fps, threshold, merge),
            weights=weights,
            out=out,
            kind=None if format_ is None else format_.value,
            device=device,
            quiet=quiet,
        )
        raise typer.Exit(code)
    result = predictions.predict(
        run,
        videos,
        words,
        weights=weights,
        top=top,
        device=device,
        every=every,
        window=window,
        fps=fps,
        threshold=threshold,
        merge=merge,
        quiet=quiet,
    )
    predictions.show_predictions(result, json=json)
    raise typer.Exit(predictions.prediction_exit_code(result))


def add_predict_command(app: typer.Typer) -> None:
    """`msq predict`."""
    app.command(
        epilog='Example: msq predict new.mp4 --run runs/a --labels "bird flying,dog eating"'
    )(predict)
