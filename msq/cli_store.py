"""`msq store`: look at a feature store, or add to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from msq.choices import FeatureKind, GlobalToken, StoreType
from msq.cli_options import DatasetPolicy, DatasetTask, Device, Json, Options, Quiet

store_app = typer.Typer(help="Look at a feature store, or add to it.", no_args_is_help=True)


StorePath = Annotated[str, typer.Argument(help="Feature store: a folder, a zip file or a URL.")]


@store_app.command(epilog="Example: msq store inspect clips.zarr")
def inspect(store: StorePath, json: Json = False) -> None:
    """Say what a store is, how it was made, how complete and how large it is, what failed."""
    from msq.report import store_life

    store_life.show_store(store, json=json)


@store_app.command(epilog="Example: msq store verify clips.zarr --sample 20 --manifest clips.csv")
def verify(
    store: StorePath,
    sample: Annotated[
        int, typer.Option(help="Extract so many rows again and compare; needs the videos.", min=0)
    ] = 0,
    manifest: Annotated[
        Path | None, typer.Option(help="CSV or JSONL manifest, or a folder per class.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="A dataset's name (with --root).")] = None,
    root: Annotated[Path | None, typer.Option(help="Where the dataset lies.")] = None,
    option: Options = None,
    classes: Annotated[Path | None, typer.Option(help="File that fixes the class order.")] = None,
    task: DatasetTask = None,
    policy: DatasetPolicy = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N clips.", min=1)] = None,
    batch: Annotated[int, typer.Option(help="The --batch of the extraction.", min=1)] = 8,
    weights: Annotated[
        list[str] | None,
        typer.Option(metavar="ENCODER=PLACE", help="Where weights are that moved."),
    ] = None,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read everything and compare: checksums, files, status, values (exit code 4 if wrong)."""
    from msq.extract.datasets.options import parse_options
    from msq.extract.request import ExtractRequest
    from msq.report import store_life

    request = None
    if sample:
        request = ExtractRequest(
            manifest=manifest,
            dataset=dataset,
            root=root,
            options=parse_options(option or ()),
            classes=classes,
            task=None if task is None else task.value,
            policy=None if policy is None else policy.value,
            limit=limit,
            batch=batch,
            device=device,
        )
    moved = parse_options(weights or ())
    found = store_life.verify(store, sample, request, moved, quiet=quiet)
    store_life.show_verification(store, found, json=json)
    if not found.ok:
        raise typer.Exit(4)


@store_app.command(epilog="Example: msq store repair clips.zarr --dry-run")
def repair(
    store: StorePath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say it, and touch nothing.")] = False,
    json: Json = False,
) -> None:
    """Mark bad shards so that the next msq extract makes just these again."""
    from msq.report import store_life

    raise typer.Exit(store_life.repair(store, dry_run=dry_run, json=json))


@store_app.command(
    "import",
    epilog="Example: msq store import clips.zarr i3d_features --name i3d --manifest clips.csv "
    "--tokens 16",
)
def import_(
    store: Annotated[Path, typer.Argument(help="Feature store; made, or added to.")],
    features: Annotated[
        Path, typer.Argument(help="Folder of npy, npz, pt, safetensors or h5, or one such file.")
    ],
    name: Annotated[str, typer.Option(help="The encoder's name in the store, e.g. i3d.")],
    kind: Annotated[
        FeatureKind, typer.Option(help="video for tokens, image for one vector a clip.")
    ] = FeatureKind.video,
    manifest: Annotated[
        Path | None, typer.Option(help="CSV or JSONL manifest, or a folder per class.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="A dataset's name (with --root).")] = None,
    root: Annotated[Path | None, typer.Option(help="Where the dataset lies.")] = None,
    option: Options = None,
    classes: Annotated[Path | None, typer.Option(help="File that fixes the class order.")] = None,
    task: DatasetTask = None,
    policy: DatasetPolicy = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N clips.", min=1)] = None,
    layout: Annotated[
        str,
        typer.Option(
            help="auto, or the stored axes: D width, T time, N tokens kept, V H W averaged."
        ),
    ] = "auto",
    tokens: Annotated[
        int | None, typer.Option(help="Average each clip's features to so many pieces.", min=1)
    ] = None,
    global_token: Annotated[
        GlobalToken, typer.Option("--global", help="Token 0: the mean of all, or none.")
    ] = GlobalToken.mean,
    seconds_per_feature: Annotated[
        float | None, typer.Option(help="Step in time; needed where clips are parts of videos.")
    ] = None,
    feature_fps: Annotated[
        float | None, typer.Option(help="The same as features per second.")
    ] = None,
    feature_offset: Annotated[
        float | None, typer.Option(help="Centre of the first feature, seconds; half a step.")
    ] = None,
    key_template: Annotated[
        str | None,
        typer.Option(help="Names of features, from {id}, {stem}, {parent}, {start}, {end}."),
    ] = None,
    array: Annotated[
        str | None, typer.Option(help="Which array, where a file has several for a video.")
    ] = None,
    store_dtype: Annotated[
        StoreType, typer.Option(help="Number type in the store.")
    ] = StoreType.float16,
    shard: Annotated[int, typer.Option(help="Clips per shard.", min=1)] = 64,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put features computed elsewhere into a store, as an encoder beside msq's own. Resumes."""
    from msq.extract.datasets.options import parse_options
    from msq.extract.request import ExtractRequest
    from msq.report import stage_one, store_import

    request = ExtractRequest(
        manifest=manifest,
        dataset=dataset,
        root=root,
        options=parse_options(option or ()),
        classes=classes,
        task=None if task is None else task.value,
        policy=None if policy is None else policy.value,
        limit=limit,
    )
    settings: dict[str, Any] = {
        "name": name,
        "kind": kind.value,
        "layout": layout,
        "tokens": tokens,
        "global_token": global_token.value,
        "seconds_per_feature": store_import.step(seconds_per_feature, feature_fps),
        "feature_offset": feature_offset,
        "key_template": key_template,
        "array": array,
        "store_dtype": store_dtype.value,
        "shard": shard,
    }
    result = store_import.run(store, features, request, settings, quiet=quiet)
    store_import.show(result, json=json)
    raise typer.Exit(stage_one.exit_code(result))
