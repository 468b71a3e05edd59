"""`msq store convert`, `relabel`, `merge` and `export`: a store written anew, or for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msq.choices import StoreType
from msq.cli_options import DatasetPolicy, DatasetTask, Json, Options, Quiet
from msq.cli_store import StorePath, store_app

__all__ = ["store_app"]

_NewStore = Annotated[str, typer.Argument(help="The new store: a folder or a URL.")]


@store_app.command(epilog="Example: msq store convert clips.zarr small.zarr --store-dtype float16")
def convert(
    store: StorePath,
    out: _NewStore,
    store_dtype: Annotated[
        StoreType | None, typer.Option(help="Number type of the features; kept if not given.")
    ] = None,
    shard: Annotated[int | None, typer.Option(help="Clips per shard.", min=1)] = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="Leave this encoder out; may be repeated.")
    ] = None,
    view: Annotated[
        list[str] | None,
        typer.Option(
            help="Keep this view beside the clean one; may be repeated; all if not given."
        ),
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Keep clips of this split only; may be repeated.")
    ] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Round numbers that the type cannot hold.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a store anew: number type, shard size, fewer encoders, views or splits. Resumes."""
    from msq.extract.store_convert import convert_store
    from msq.report import store_life

    with store_life.copying("converting", quiet=quiet) as progress:
        result = convert_store(
            store,
            out,
            store_dtype=None if store_dtype is None else store_dtype.value,
            shard=shard,
            drop=drop or (),
            views=store_life.wanted_views(view),
            splits=split,
            lossy=lossy,
            progress=progress,
        )
    store_life.show_copy(result, json=json)


@store_app.command(
    epilog="Example: msq store relabel clips.zarr new.zarr --manifest new.csv --was clips.csv"
)
def relabel(
    store: StorePath,
    out: _NewStore,
    manifest: Annotated[
        Path | None, typer.Option(help="The new list: CSV, JSONL, or a folder per class.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="A dataset's name (with --root).")] = None,
    root: Annotated[Path | None, typer.Option(help="Where the dataset lies.")] = None,
    option: Options = None,
    classes: Annotated[Path | None, typer.Option(help="File that fixes the class order.")] = None,
    task: DatasetTask = None,
    policy: DatasetPolicy = None,
    was: Annotated[
        Path | None,
        typer.Option(
            help="The manifest that the store was made of; needed where the new list lacks some "
            "of its clips, or has other starts and ends."
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A store for another list of the same clips: labels, splits, classes, order. Resumes."""
    from msq.extract.datasets.options import parse_options
    from msq.extract.request import ExtractRequest
    from msq.extract.store_relabel import relabel_store
    from msq.report import store_life

    request = ExtractRequest(
        manifest=manifest,
        dataset=dataset,
        root=root,
        options=parse_options(option or ()),
        classes=classes,
        task=None if task is None else task.value,
        policy=None if policy is None else policy.value,
    )
    before = None if was is None else ExtractRequest(manifest=was, policy=request.policy)
    with store_life.copying("relabelling", quiet=quiet) as progress:
        result = relabel_store(
            store,
            out,
            request.read_dataset(),
            was=None if before is None else before.read_dataset(),
            progress=progress,
        )
    store_life.show_relabel(result, json=json)


@store_app.command(epilog="Example: msq store merge a.zarr b.zarr --out both.zarr")
def merge(
    stores: Annotated[list[str], typer.Argument(help="Stores of different clips.")],
    out: Annotated[str, typer.Option(help="The new store: a folder or a URL.")],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """One store of the clips of several that were made in the same way. Resumes."""
    from msq.extract.store_convert import merge_stores
    from msq.report import store_life

    with store_life.copying("merging", quiet=quiet) as progress:
        result = merge_stores(stores, out, progress=progress)
    store_life.show_copy(result, json=json)


@store_app.command(epilog="Example: msq store export clips.zarr features.h5 --encoder i3d")
def export(
    store: StorePath,
    out: Annotated[
        str,
        typer.Argument(help="Ends in .h5, .npz, .safetensors or .zip, or a folder of npy files."),
    ],
    encoder: Annotated[
        str | None, typer.Option(help="Whose features; not needed for zip, or for one encoder.")
    ] = None,
    view: Annotated[int, typer.Option(help="Number of the view.", min=0)] = 0,
    image_frames: Annotated[
        bool,
        typer.Option("--image-frames", help="Image features of each frame, not their mean."),
    ] = False,
    json: Json = False,
) -> None:
    """Write features for other programs, or the whole store as one zip file."""
    from msq.extract.store_export import export_store
    from msq.report import store_life

    result = export_store(store, out, encoder=encoder, view=view, image_frames=image_frames)
    store_life.show_export(result, json=json)
