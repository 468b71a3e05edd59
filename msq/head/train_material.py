"""The material of `msq train`: clips read anew, an encoder to train, features of frozen towers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msq.errors import UsageError, VideoError
from msq.head.encoder_file import require_trainable
from msq.head.end_to_end_config import EndToEndConfig
from msq.head.feature_set import Features
from msq.head.finite import require_finite_features
from msq.head.material import Material
from msq.head.ranks import ALONE, Ranks
from msq.head.stored_towers import stored_towers, video_record
from msq.head.train_towers import Progress, Towers, class_texts, extracted_towers, needed

if TYPE_CHECKING:
    from msq.extract.datasets import Dataset
    from msq.extract.encoders import VideoEncoder
    from msq.extract.train_request import TrainRequest


def load_material(
    request: TrainRequest,
    config: EndToEndConfig,
    out: Path,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
) -> Material:
    """Read the clips, load the encoder to train, find or make the frozen towers' features.

    Args:
        request: which clips, which encoders.
        config: of the run: what the head needs of the towers, and which partition.
        out: the run directory, for `towers.zarr`.
        progress: called with the events of stage one, where it has something to do.
        overwrite: replace a `towers.zarr` of another making.
        ranks: the processes that read it together.

    Raises:
        UsageError: clips that cannot be read, none to train on, a tower that the head needs and
            nobody named, or an encoder that cannot be trained.
        SpecMismatch: a store of other clips or other towers; the message holds the difference.
        VideoError: no clip has its file, or none can be decoded.
        MsqError: as stage one, and as the encoders' loading.
    """
    from msq.extract.store import open_store

    data = request.read_dataset()
    partition, splits = _splits(data, config.run.features.partition)
    if "train" not in splits:
        raise UsageError(_no_training(data, splits))
    there = _files(request, data)
    store = None if request.store is None else open_store(request.store)
    video = request.load_video(None if store is None else video_record(request, config, store))
    require_trainable(video)
    if store is not None:
        towers = stored_towers(request, config, data, store, splits, partition)
    elif needed(config.run.head)[0]:
        towers = extracted_towers(
            request,
            config,
            data,
            out,
            video.spec.frames,
            progress,
            overwrite=overwrite,
            ranks=ranks,
        )
    else:
        towers = class_texts(request, config, data)
    return _assembled(data, splits, partition, _without(towers, data, there), video)


def _splits(data: Dataset, wanted: str | None) -> tuple[str | None, tuple[str, ...]]:
    """The partition in use, and the split of each clip in it, "" where it has none."""
    if wanted is not None and wanted not in data.partitions:
        raise UsageError(
            f"{data.name}: no partition {wanted!r}; it has "
            f"{', '.join(data.partitions) or 'none: its clips have one split each'}"
        )
    name = wanted or next(iter(data.partitions), None)
    plain = tuple(str(clip.split) for clip in data.clips)
    return name, plain if name is None else tuple(data.partitions[name])


def _no_training(data: Dataset, splits: Sequence[str]) -> str:
    counts = {name: splits.count(name) for name in ("val", "test") if name in splits}
    found = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no clip at all"
    why = f"; {len(data.unusable)} items could not be used" if data.unusable else ""
    return f"{data.name}: expected clips of split train, found {found}{why}"


def _files(request: TrainRequest, data: Dataset) -> Tensor:
    """Which clips [N] have their file (a store of their features says nothing of that now).

    Raises:
        VideoError: not a single one.
    """
    from msq.extract.datasets.survey import require_media

    there = torch.tensor([clip.path.exists() for clip in data.clips])
    if not bool(there.any()):
        if request.root is not None:
            require_media(data, request.root)  # knows of archives that were not unpacked
        raise VideoError(
            f"{data.name}: expected videos or frame folders such as {data.clips[0].path}, found "
            f"none of its {len(there)} clips"
        )
    return there


def _without(towers: Towers, data: Dataset, there: Tensor) -> Towers:
    """The same without clips that have no file."""
    gone = ~there & ~torch.stack([*towers.lost.values()]).any(0)
    failures = [
        {"clip": data.clips[row].id, "reason": "no such file"}
        for row in gone.nonzero().flatten().tolist()
    ]
    lost = {**towers.lost, "failed": towers.lost["failed"] | gone}
    return dataclasses.replace(towers, lost=lost, failures=(*towers.failures, *failures))


def _assembled(
    data: Dataset,
    splits: Sequence[str],
    partition: str | None,
    towers: Towers,
    video: VideoEncoder,
) -> Material:
    """The clips that are used and can be shown, with what goes with them."""
    from msq.extract.store_schema import known_matrix, label_matrix

    used = torch.tensor([bool(split) for split in splits])
    usable = used & ~torch.stack([*towers.lost.values()]).any(0)
    left_out = {reason: int((lost & used).sum()) for reason, lost in towers.lost.items()}
    if not bool(used.all()):
        left_out["unused"] = int((~used).sum())
    rows = usable.nonzero().flatten()
    listed = rows.tolist()
    ids, known, spec = tuple(data.clips[row].id for row in listed), known_matrix(data), video.spec
    kept = set(ids)
    features = Features(
        name=data.name,
        task=data.task,
        classes=tuple(data.classes),
        ids=ids,
        splits=tuple(splits[row] for row in listed),
        tokens=torch.empty(len(listed), spec.tokens, spec.channels, device="meta"),
        labels=torch.from_numpy(label_matrix(data))[rows],
        image=None if towers.image is None else towers.image[rows],
        text=towers.text,
        specs={"video": spec.to_dict(), **towers.specs},
        prompt=towers.prompt,
        left_out=left_out,
        degraded=tuple(clip for clip in towers.degraded if clip in kept),
        known=None if known is None else torch.from_numpy(known).to(torch.uint8)[rows],
        groups={name: tuple(members) for name, members in data.groups.items()},
        partition=partition,
        variant=data.variant,
        stored=towers.stored,
    )
    require_finite_features(dataclasses.replace(features, tokens=torch.empty(len(ids), 0, 0)))
    return Material(
        features=features,
        clips=tuple(data.clips[row] for row in listed),
        video=video,
        image=towers.tower,
        failures=towers.failures,
        skipped=data.unusable,
        kept=data.kept,
        notes=(*(f"{data.name}: {note}" for note in data.notes), *towers.notes),
    )
