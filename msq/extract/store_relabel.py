"""A store for another list of the same clips: labels, splits, classes, order, some left out.

Features depend on the video, its cut and the encoder, and not on what a list says of them; so rows
of clips that are in both lists are copied. No store holds the cuts of its clips, only a hash of the
list that it was made of. A row is taken for a clip only where that hash proves its cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from msq.errors import SpecMismatch, UsageError
from msq.extract.copied_versions import begin_copy
from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.location import locate
from msq.extract.store import FeatureStore, open_store
from msq.extract.store_convert import CopyResult, refuse_same
from msq.extract.store_copy import Progress, Row, claim_target, copy_rows, copy_text
from msq.extract.store_problems import listed
from msq.extract.stored_dataset import StoredDataset, stored_dataset


@dataclass(frozen=True)
class RelabelResult(CopyResult):
    """What was written.

    Attributes:
        missing: ids of clips that the source does not have, or has cut otherwise.
        left_out: clips of the source that the new list does not have.
        relabelled: clips whose labels are others than in the source.
        moved: clips that are in another split than in the source.
    """

    missing: list[str]
    left_out: int
    relabelled: int
    moved: int


def relabel_store(
    source: str | Path,
    out: str | Path,
    dataset: Dataset,
    *,
    was: Dataset | None = None,
    progress: Progress | None = None,
) -> RelabelResult:
    """Write a store of `dataset` with the features that another has of its clips.

    Shards in which a clip is new stay undone: `msq extract` of `dataset` into `out` makes them. Run
    again after an interruption, it goes on.

    Args:
        source: the store, a zip file of one, or a URL.
        out: the new store: a folder or a URL.
        dataset: the new list.
        was: the list that `source` was made of; needed where `dataset` lacks some of its clips or
            has them cut otherwise. Its labels and splits do not matter.
        progress: called with `stage, done, total, failed`.

    Raises:
        SpecMismatch: the lists do not prove the cuts of the clips in `source`; or `out` is a store
            of another making.
        StoreError: rows that cannot be read.
        UsageError: `out` is `source`, or no clip is in both.
    """
    store, target = open_store(source), locate(out)
    refuse_same([store], target)
    before = _proved(store, dataset, was)
    there = {clip: row for row, clip in enumerate(store.clips)}
    rows = [
        Row(store, there[clip.id]) if _is_same(clip, before.get(clip.id)) else None
        for clip in dataset.clips
    ]
    if not any(rows):
        raise UsageError(
            f"{store.path}: none of the {len(rows)} clips of the new list is in it; expected some "
            f"of {listed(store.clips)}; msq extract makes a store of new clips"
        )
    encoders = [*store.encoders("video"), *store.encoders("image")]
    same_classes = store.classes == dataset.classes
    texts = store.encoders("text") if same_classes else []
    with claim_target(target):
        begin_copy(target, dataset, rows, list(dict.fromkeys([*encoders, *texts])), "relabel")
        copied = copy_rows(
            rows,
            target,
            dataset,
            encoders,
            store_dtype=None,
            shard=None,
            views=None,
            lossy=False,
            progress=progress,
        )
        copy_text(store, target, dataset, texts)
    missing = [clip.id for clip, row in zip(dataset.clips, rows, strict=True) if row is None]
    relabelled, moved = _changes(store, dataset, rows)
    return RelabelResult(
        store=str(target),
        sources=[str(store.path)],
        clips=len(rows),
        encoders=list(dict.fromkeys([*encoders, *texts])),
        copied=copied,
        warnings=_warnings(store, missing, same_classes=same_classes),
        missing=missing,
        left_out=len(store) - (len(rows) - len(missing)),
        relabelled=relabelled,
        moved=moved,
    )


def _proved(store: FeatureStore, dataset: Dataset, was: Dataset | None) -> dict[str, Clip]:
    """The clips of a store by id, with cuts and paths, as its hash confirms them.

    Raises:
        SpecMismatch: they cannot be told.
    """
    told = {clip.id: clip for clip in (dataset if was is None else was).clips}
    stored = stored_dataset(store)
    which = "the new list" if was is None else "--was"
    if absent := [clip.id for clip in stored.clips if clip.id not in told]:
        raise SpecMismatch(
            f"{store.path}: {len(absent)} of its clips are not in {which} ({listed(absent)}), so "
            "their cuts are unknown, and with them whether the other clips are what they were; "
            "give the list that this store was made of (--was OLD)"
        )
    clips = tuple(_with_cut(clip, told[clip.id]) for clip in stored.clips)
    found = Dataset.clip_list_hash(replace(stored, clips=clips))
    if found != stored.recorded_hash:
        raise SpecMismatch(
            f"{store.path}: starts, ends or frame rates of some clips are others in {which} than "
            f"when it was made (clip list: expected hash {stored.recorded_hash[:16]}…, found "
            f"{found[:16]}…), and no store says which; "
            + (
                "give the list that it was made of (--was OLD)"
                if was is None
                else "expected the very list that this store was made of"
            )
        )
    return {clip.id: clip for clip in clips}


def _with_cut(stored: Clip, told: Clip) -> Clip:
    return replace(
        stored, path=told.path, start=told.start, end=told.end, fps=told.fps, keep=told.keep
    )


def _is_same(clip: Clip, before: Clip | None) -> bool:
    """Whether the features of a clip are those that it had; its folder may have moved."""
    return before is not None and all(
        getattr(clip, name) == getattr(before, name) for name in ("start", "end", "fps", "keep")
    ) and clip.path.name == before.path.name  # fmt: skip


def _changes(store: FeatureStore, dataset: Dataset, rows: list[Row | None]) -> tuple[int, int]:
    """Clips whose labels, and whose splits, are others than they were."""
    stored = stored_dataset(store)
    relabelled = moved = 0
    for clip, row in zip(dataset.clips, rows, strict=True):
        if row is None:
            continue
        old = stored.clips[row.row]
        relabelled += _labels(dataset, clip) != _labels(stored, old)
        moved += clip.split != old.split
    return relabelled, moved


def _labels(dataset: Dataset | StoredDataset, clip: Clip) -> Mapping[str, bool]:
    """Class -> whether it is known, for the classes that a clip has or may have."""
    known = {dataset.classes[k]: True for k in clip.labels}
    return known | {dataset.classes[k]: False for k in clip.unknown}


def _warnings(store: FeatureStore, missing: list[str], *, same_classes: bool) -> list[str]:
    lines = []
    if missing:
        lines.append(
            f"{len(missing)} clips are not in {store.path}, or cut otherwise there: "
            f"{listed(missing)}; msq extract of the new list into this store makes the shards that "
            "hold them"
        )
    if not same_classes and store.encoders("text"):
        lines.append(
            "the classes are others, so no class embeddings were copied; msq extract of the new "
            "list into this store makes them"
        )
    return lines
