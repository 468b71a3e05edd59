"""A store written anew: another number type, other shards, fewer encoders, views or clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msq.errors import SpecMismatch, StoreError, UsageError
from msq.extract import store_schema as schema
from msq.extract.copied_versions import begin_copy
from msq.extract.location import locate
from msq.extract.store import FeatureStore, open_store
from msq.extract.store_copy import Progress, Row, claim_target, copy_rows, copy_text
from msq.extract.store_difference import encoder_difference, sequence_difference
from msq.extract.store_problems import listed
from msq.extract.stored_dataset import joined_hash, stored_dataset
from msq.extract.views import CLEAN, View

_COMPARED = ("schema", "dataset", "task", "metric", "classes", "groups", "variant")


@dataclass(frozen=True)
class CopyResult:
    """What was written.

    Attributes:
        store: path of the new store.
        sources: paths of those it was made of.
        clips: rows.
        encoders: names of the encoders in it.
        copied: rows copied in this run, over all encoders and views.
        warnings: what the user should know, one line each.
    """

    store: str
    sources: list[str]
    clips: int
    encoders: list[str]
    copied: int
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return asdict(self)


def convert_store(
    source: str | Path,
    out: str | Path,
    *,
    store_dtype: schema.StoreDtype | None = None,
    shard: int | None = None,
    drop: Sequence[str] = (),
    views: Sequence[View] | None = None,
    splits: Sequence[str] | None = None,
    lossy: bool = False,
    progress: Progress | None = None,
) -> CopyResult:
    """Write a store anew. Run again after an interruption, it goes on.

    Args:
        source: the store, a zip file of one, or a URL.
        out: the new store: a folder or a URL.
        store_dtype: `float16`, `float32` or `bfloat16`; None keeps each encoder's.
        shard: clips of a shard; None keeps each encoder's.
        drop: names of encoders (video, image or text) to leave out.
        views: those to keep; the clean one always is.
        splits: keep clips of these splits only.
        lossy: round numbers that the new type cannot hold. What overflows it is always refused.
        progress: called with `stage, done, total, failed`.

    Raises:
        StoreError: rows that cannot be read, or that would be rounded.
        SpecMismatch: `out` is a store of another making.
        UsageError: an encoder, view or split that is not there.
    """
    store, target = open_store(source), locate(out)
    refuse_same([store], target)
    if absent := sorted({*drop} - {*store.encoders()}):
        raise UsageError(
            f"--drop {absent[0]}: expected one of {', '.join(store.encoders())}, found no such "
            f"encoder in {store.path}"
        )
    rows = list(range(len(store)))
    if splits is not None:
        rows = [row for row in rows if store.splits[row] in splits]
        if not rows:
            have = ", ".join(dict.fromkeys(store.splits))
            raise UsageError(f"{store.path}: no clip is of {', '.join(splits)}; it has {have}")
    kept_views = None if views is None else tuple(dict.fromkeys((CLEAN, *views)))
    kept = [s for kind in ("video", "image") for s in store.encoders(kind) if s not in drop]
    for view in kept_views or ():
        if not any(view in store.views(slug) for slug in kept):
            raise UsageError(f"{store.path}: no encoder has the view {str(view)!r}")
    dataset = stored_dataset(store, None if splits is None else rows)
    warnings = []
    if dataset.clip_list_hash() != store.attributes["clip_list_hash"]:
        warnings.append(
            "some clips were left out: msq extract does not add to such a store, since it knows "
            "the cuts of none; extract into the whole one and convert again"
        )
    sources = [Row(store, row) for row in rows]
    with claim_target(target):
        begin_copy(
            target, dataset, sources, [s for s in store.encoders() if s not in drop], "convert"
        )
        copied = copy_rows(
            sources,
            target,
            dataset,
            kept,
            store_dtype=store_dtype,
            shard=shard,
            views=kept_views,
            lossy=lossy,
            progress=progress,
        )
        texts = [slug for slug in store.encoders("text") if slug not in drop]
        copy_text(store, target, dataset, texts)
    encoders = [*kept, *(t for t in texts if t not in kept)]
    return CopyResult(str(target), [str(store.path)], len(rows), encoders, copied, warnings)


def merge_stores(
    sources: Sequence[str | Path], out: str | Path, *, progress: Progress | None = None
) -> CopyResult:
    """One store of the clips of several, in the order given.

    All must be of the same dataset with the same classes in the same order, and hold the same
    encoders, made in the same way, with the same views, number type and class embeddings; no clip
    may be in two of them.

    Raises:
        SpecMismatch: the difference.
        StoreError: a clip is in two of them, or rows cannot be read.
        UsageError: fewer than two stores.
    """
    if len(sources) < 2:
        raise UsageError(f"merge: expected 2 or more stores, found {len(sources)}")
    stores, target = [open_store(source) for source in sources], locate(out)
    refuse_same(stores, target)
    first = stores[0]
    for other in stores[1:]:
        if lines := _difference(first, other):
            raise SpecMismatch(
                f"{other.path} does not go with {first.path}:\n  " + "\n  ".join(lines)
            )
    seen: dict[str, FeatureStore] = {}
    for store in stores:
        if twice := [clip for clip in store.clips if clip in seen]:
            raise StoreError(
                f"{store.path}: {len(twice)} clips are in {seen[twice[0]].path} too: "
                f"{listed(twice)}; expected stores without a clip in common"
            )
        seen |= dict.fromkeys(store.clips, store)
    parts = [stored_dataset(store) for store in stores]
    dataset = type(parts[0])(
        first.name,
        first.classes,
        parts[0].task,
        tuple(clip for part in parts for clip in part.clips),
        first.metric,
        partitions={k: sum((p.partitions[k] for p in parts), ()) for k in first.partitions},
        groups=first.groups,
        variant=first.variant,
        recorded_hash=joined_hash("merge", [part.recorded_hash for part in parts]),
    )
    encoders = [*first.encoders("video"), *first.encoders("image")]
    rows = [Row(store, row) for store in stores for row in range(len(store))]
    with claim_target(target):
        begin_copy(target, dataset, rows, first.encoders(), "merge")
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
        copy_text(first, target, dataset, first.encoders("text"))
    return CopyResult(
        str(target), [str(s.path) for s in stores], len(dataset.clips), first.encoders(), copied, []
    )


def _difference(first: FeatureStore, other: FeatureStore) -> list[str]:
    """Lines that tell two stores apart but for their clips."""
    roots = first.attributes, other.attributes
    lines = [
        f"{name}: {roots[0].get(name)} in the first, {roots[1].get(name)} here"
        for name in _COMPARED
        if name != "classes" and roots[0].get(name) != roots[1].get(name)
    ]
    lines += sequence_difference("classes", first.classes, other.classes)
    if [*first.partitions] != [*other.partitions]:
        lines.append(f"partitions: {[*first.partitions]} in the first, {[*other.partitions]} here")
    for kind in ("video", "image", "text"):
        mine, theirs = first.encoders(kind), other.encoders(kind)
        if mine != theirs:
            lines.append(
                f"{kind} encoders: expected {', '.join(mine) or 'none'}, "
                f"found {', '.join(theirs) or 'none'}"
            )
            continue
        for slug in mine:
            lines += _encoder_difference(first, other, slug, kind)
    return lines


def _encoder_difference(
    first: FeatureStore, other: FeatureStore, slug: str, kind: str
) -> list[str]:
    mine, theirs = dict(first.making(slug, kind)), other.making(slug, kind)
    mine["shard"] = theirs.get("shard")  # any will do
    if kind == "text":
        if first.prompts(slug) != other.prompts(slug):
            return [f"{slug}: prompts {first.prompts(slug)} in the first, {other.prompts(slug)}"]
        for prompt in first.prompts(slug):
            if not first.text(slug, prompt).equal(other.text(slug, prompt)):
                return [f"{slug}: other class embeddings for prompt {prompt!r}"]
        mine.pop("template", None)
    lines = encoder_difference(mine, theirs)
    if kind == "image" and first.has_image_frames(slug) != other.has_image_frames(slug):
        words = ["with" if s.has_image_frames(slug) else "without" for s in (first, other)]
        lines.append(f"{slug}: {words[0]} features of each frame in the first, {words[1]} here")
    if kind != "text" and first.views(slug) != other.views(slug):
        views = [", ".join(map(str, store.views(slug))) for store in (first, other)]
        lines.append(f"{slug}: views {views[0]} in the first, {views[1]} here")
    return lines


def refuse_same(sources: Sequence[FeatureStore], target: Path) -> None:
    """Refuse to write a store over one that it is made of.

    Raises:
        UsageError: `target` is one of `sources`.
    """
    for store in sources:
        if str(target) == str(store.path) or (
            isinstance(target, Path)
            and isinstance(store.path, Path)
            and target.resolve() == store.path.resolve()
        ):
            raise UsageError(f"{target}: expected another place than the store that is read")
