"""`msq extract`: stage one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from msq.choices import (
    ClipOutput,
    Kernels,
    OnDegraded,
    Pooling,
    Precision,
    Protocol,
    Resize,
    Sampling,
    StoreType,
    TextPooling,
)
from msq.cli_options import DatasetPolicy, DatasetTask, Device, Json, Options, Quiet
from msq.extract.extract_options import LEAST, ExtractOptions


class Usual:
    """Defaults that the command line has as choices."""

    protocol = Protocol(ExtractOptions.protocol)
    resize = Resize(ExtractOptions.resize)
    precision = Precision(ExtractOptions.precision)
    kernels = Kernels(ExtractOptions.kernels)
    store_dtype = StoreType(ExtractOptions.store_dtype)
    on_degraded = OnDegraded(ExtractOptions.on_degraded)


def extract(
    manifest: Annotated[
        Path | None, typer.Option(help="CSV or JSONL manifest, or a folder per class.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="A dataset's name (with --root).")] = None,
    root: Annotated[Path | None, typer.Option(help="Where the dataset lies.")] = None,
    option: Options = None,
    out: Annotated[Path | None, typer.Option(help="The store; NAME.zarr by default.")] = None,
    video_encoder: Annotated[
        str,
        typer.Option(
            help="embedded, none, hf-hub:ORG/NAME, local-dir:DIR, a folder, a file, a run of "
            "msq train, timm/TAG, open_clip/ARCH/TAG or torchvision/NAME; see msq encoders list."
        ),
    ] = ExtractOptions.video_encoder,
    image_encoder: Annotated[
        str,
        typer.Option(help="embedded, none, ARCH/PRETRAINED, ARCH/FILE, hf-hub:… or local-dir:…"),
    ] = ExtractOptions.image_encoder,
    text_encoder: Annotated[
        str | None,
        typer.Option(
            help="bert-base-uncased, hf-hub:ORG/NAME, local-dir:DIR or another CLIP's text tower; "
            "none for no text."
        ),
    ] = None,
    text_pooling: Annotated[
        TextPooling | None,
        typer.Option(help="Of a text model's states; what its folder says by default."),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="Template with {}, or a set that is averaged: clip, clip-simple or a file with a "
            "template a line. May be given several times."
        ),
    ] = None,
    classes: Annotated[Path | None, typer.Option(help="File that fixes the class order.")] = None,
    task: DatasetTask = None,
    protocol: Annotated[
        Protocol,
        typer.Option(help="official makes features as the authors' code does; paper fixes nothing"),
    ] = Usual.protocol,
    frames: Annotated[
        int | None, typer.Option(help="Frames per clip.", min=LEAST["frames"])
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Pixels of the square crop.", min=LEAST["size"])
    ] = None,
    short_side: Annotated[
        int | None,
        typer.Option(help="Pixels of the short side before the crop.", min=LEAST["short_side"]),
    ] = None,
    pooling: Annotated[Pooling | None, typer.Option(help="Tokens to keep; frame.")] = None,
    clip_output: Annotated[
        ClipOutput | None,
        typer.Option(help="In the joint space (projected, default), or before the projection."),
    ] = None,
    sampling: Annotated[
        Sampling | None,
        typer.Option(help="Segment centres (uniform, default), or as the authors' code rounds."),
    ] = None,
    resize: Annotated[
        Resize, typer.Option(help="torch is fast with PIL parity, pil is exact.")
    ] = Usual.resize,
    precision: Annotated[Precision, typer.Option(help="Arithmetic.")] = Usual.precision,
    kernels: Annotated[
        Kernels, typer.Option(help="TimeSformer's attention over time: torch's, or msq's kernel.")
    ] = Usual.kernels,
    store_dtype: Annotated[
        StoreType, typer.Option(help="Number type in the store.")
    ] = Usual.store_dtype,
    device: Device = ExtractOptions.device,
    devices: Annotated[
        str | None,
        typer.Option(help="A worker on each: N, auto (all GPUs), cuda:0,cuda:1 or cpu:N."),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="dask (workers here, see --devices) or the tcp://… of a dask scheduler; shards "
            "are handed out by dask.distributed."
        ),
    ] = None,
    join: Annotated[
        bool, typer.Option("--join", help="Help other processes that make the same store.")
    ] = ExtractOptions.join,
    limit: Annotated[
        int | None, typer.Option(help="Only the first N clips.", min=LEAST["limit"])
    ] = None,
    batch: Annotated[
        int, typer.Option(help="Clips per encoder call.", min=LEAST["batch"])
    ] = ExtractOptions.batch,
    shard: Annotated[
        int, typer.Option(help="Clips per shard.", min=LEAST["shard"])
    ] = ExtractOptions.shard,
    workers: Annotated[
        int | None,
        typer.Option(help="Decode processes; 0 decodes in this one.", min=LEAST["workers"]),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Do shards with failed clips again.")
    ] = ExtractOptions.retry_failed,
    on_degraded: Annotated[
        OnDegraded, typer.Option(help="Damaged videos that still give frames.")
    ] = Usual.on_degraded,
    policy: DatasetPolicy = None,
    views: Annotated[
        int,
        typer.Option(
            help="Augmented views of each clip, beside the clean one.", min=LEAST["views"]
        ),
    ] = ExtractOptions.views,
    test_views: Annotated[
        str | None,
        typer.Option(help="CLIPSxCROPS, e.g. 10x3: views for msq eval --ensemble; crops 1 or 3."),
    ] = None,
    image_frames: Annotated[
        bool,
        typer.Option(
            "--image-frames", help="Store image features of each frame beside their mean."
        ),
    ] = ExtractOptions.image_frames,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and how big it gets; no more.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Stage one: run the encoders over the videos once and write a feature store. Resumes."""
    from msq.extract.cluster import leads
    from msq.extract.datasets.options import parse_options
    from msq.extract.request import ExtractRequest
    from msq.report import stage_one

    given: dict[str, Any] = {  # None where nothing was given: the protocol's own, then
        "pooling": pooling and pooling.value,
        "clip_output": clip_output and clip_output.value,
        "sampling": sampling and sampling.value,
        "prompts": tuple(prompts or ()) or None,
        "frames": frames,
        "size": size,
        "short_side": short_side,
    }
    request = ExtractRequest(
        manifest=manifest,
        dataset=dataset,
        root=root,
        options=parse_options(option or ()),
        out=out,
        classes=classes,
        task=None if task is None else task.value,
        policy=None if policy is None else policy.value,
        limit=limit,
        video_encoder=video_encoder,
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        text_pooling=None if text_pooling is None else text_pooling.value,
        protocol=protocol.value,
        **given,
        resize=resize.value,
        precision=precision.value,
        kernels=kernels.value,
        store_dtype=store_dtype.value,
        device=device,
        shard=shard,
        batch=batch,
        workers=workers,
        retry_failed=retry_failed,
        on_degraded=on_degraded.value,
        views=views,
        test_views=test_views,
        devices=devices,
        scheduler=scheduler,
        join=join,
        image_frames=image_frames,
    )
    if dry_run:
        stage_one.show_dry_run(request, json=json)
        return
    speaks = leads()
    result = stage_one.run(request, quiet=quiet or not speaks)
    if speaks:  # the first of the workers that torchrun or Slurm started
        stage_one.show(result, json=json)
        raise typer.Exit(stage_one.exit_code(result))


def add_extract_command(app: typer.Typer) -> None:
    """Register `extract`."""
    app.command(epilog="Example: msq extract --manifest clips.csv --out clips.zarr")(extract)
