"""Features computed elsewhere become an encoder of a feature store, beside msq's own.

Two passes, one video in memory at a time: the first looks at every clip's features (their hash is
part of the encoder's spec, which must stand before a row is written), the second writes the shards
that are not done.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from msq.errors import SpecMismatch, UsageError
from msq.extract import store_schema as schema
from msq.extract.claims import claim_store
from msq.extract.datasets.dataset import Dataset
from msq.extract.datasets.survey import kept_items
from msq.extract.encoders.spec import EncoderSpec
from msq.extract.extract_result import ExtractResult
from msq.extract.feature_files import FeatureSource, open_features
from msq.extract.feature_layout import Rate, parse_layout
from msq.extract.feature_rows import FeatureRows
from msq.extract.feature_survey import Survey, survey
from msq.extract.location import locate
from msq.extract.store import open_store
from msq.extract.store_writer import StoreWriter

_READABLE = (schema.OK, schema.DEGRADED)
_SHOWN = 5


@dataclass(frozen=True)
class ImportResult(ExtractResult):
    """What an import came to; see `ExtractResult` for the fields that both have.

    Attributes:
        encoder: name of the encoder in the store.
        spec: its line.
        tokens: S; 0 for vectors of kind `image`.
        channels: width.
        source: name of the folder or file.
        items: how many the source has.
        unused: how many of them belong to no clip.
        unused_items: their keys.
    """

    encoder: str = ""
    spec: str = ""
    tokens: int = 0
    channels: int = 0
    source: str = ""
    items: int = 0
    unused: int = 0
    unused_items: list[str] = field(default_factory=list)


def import_features(
    dataset: Dataset,
    out: Path,
    features: Path,
    *,
    name: str,
    kind: Literal["video", "image"] = "video",
    layout: str = "auto",
    tokens: int | None = None,
    global_token: Literal["mean", "none"] = "mean",
    seconds_per_feature: float | None = None,
    feature_offset: float | None = None,
    key_template: str | None = None,
    array: str | None = None,
    store_dtype: schema.StoreDtype = "float16",
    shard: int = 64,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> ImportResult:
    """Write features computed elsewhere into a store; what is done already is kept.

    Args:
        dataset: the clips, which are the store's rows.
        out: the store; created, or added to where it holds the same clips.
        features: a folder with a file per video, or one file; see `open_features`.
        name: of the encoder in the store, `[a-z0-9_-]+`.
        kind: `video` for tokens `[S, D]`, `image` for one vector `[D]`, the mean of all.
        layout: letters of the stored axes, or `auto`; see `feature_layout.orient`.
        tokens: pieces that a clip's features are averaged to; None keeps each feature, of which
            all clips must then have the same number.
        global_token: `mean` puts the mean of all of a clip's features before the others, as token
            0; a single vector is its own.
        seconds_per_feature: step from one feature to the next; needed for clips that are parts of
            a video whose features are of the whole.
        feature_offset: centre of the first feature in seconds; half a step where None.
        key_template: how features are named, with fields `{id}`, `{stem}`, `{parent}`, `{start}`
            and `{end}` of the clip; None looks for the id, the path and the name.
        array: which array of a file, where there are several for one video.
        store_dtype: of the features in the store.
        shard: rows of one unit of work and resume.
        progress: called now and then with `stage, done, total, failed`.

    Raises:
        FeatureError: features that cannot be read or do not fit together, or none that belongs to
            a clip.
        SpecMismatch: the store is of other clips, or has features of another making by this name.
        StoreError: another process writes the store.
        UsageError: an option that cannot be.
    """
    started = time.perf_counter()
    out = locate(out)
    rate = _rate(seconds_per_feature, feature_offset)
    letters = parse_layout(layout)
    if tokens is not None and (kind == "image" or "N" in letters or tokens < 1):
        raise UsageError(
            f"--tokens {tokens}: expected 1 or more pieces of time, for --kind video and a layout "
            f"without N; found --kind {kind}, --layout {letters}"
        )
    with closing(open_features(features, array)) as source, claim_store(out):
        # A store of other clips is refused before hours of reading, and none is made in vain.
        writer = _writer(out, dataset, store_dtype, shard) if out.exists() else None
        found = survey(dataset.clips, source, letters, rate, key_template, progress)
        making = FeatureRows(source, found, kind, tokens, global_token == "mean", rate, letters)
        spec = making.spec(name)
        writer = writer or _writer(out, dataset, store_dtype, shard)
        try:
            writer.add_encoder(spec)
        except SpecMismatch as error:
            raise SpecMismatch(
                f"{error} A difference in sha256 means that the features are others than those "
                "imported before, or belong to other clips; import them by another --name."
            ) from None
        made = making.write(writer, spec, progress)
        return _result(writer, spec, source, found, made, time.perf_counter() - started)


def _rate(seconds: float | None, offset: float | None) -> Rate | None:
    if seconds is None:
        if offset is not None:
            raise UsageError("--feature-offset goes with --seconds-per-feature or --feature-fps")
        return None
    if not (np.isfinite(seconds) and seconds > 0):
        raise UsageError(f"seconds per feature: expected more than 0, found {seconds}")
    if offset is not None and not (np.isfinite(offset) and offset >= 0):
        raise UsageError(f"--feature-offset: expected 0 or more seconds, found {offset}")
    return Rate(seconds, seconds / 2 if offset is None else offset)


def _writer(out: Path, data: Dataset, dtype: schema.StoreDtype, shard: int) -> StoreWriter:
    return StoreWriter(out, data, store_dtype=dtype, shard=shard)


def _result(
    writer: StoreWriter,
    spec: EncoderSpec,
    source: FeatureSource,
    found: Survey,
    made: int,
    seconds: float,
) -> ImportResult:
    statuses = [writer.status(spec.slug, shard) for shard in range(writer.shards)]
    done = sum(0 if s is None else int(np.isin(s, _READABLE).sum()) for s in statuses)
    recorded = [f for f in open_store(writer.path).failures() if spec.slug in f["encoders"]]
    data = writer.dataset
    skipped = [{"item": item, "reason": reason} for item, reason in data.unusable]
    left_out = [{"item": item, "reason": reason} for item, reason in data.left_out]
    warnings = [f"{data.name}: {note}" for note in data.notes]
    if found.unused:
        shown = ", ".join(map(repr, found.unused[:_SHOWN]))
        warnings.append(
            f"{len(found.unused)} of the {len(set(source.keys.values()))} items of {source.path} "
            f"belong to no clip: {shown}{', …' if len(found.unused) > _SHOWN else ''}"
        )
    return ImportResult(
        store=str(writer.path),
        clips=len(data.clips),
        done=done,
        failed=len(data.clips) - done,
        skipped=len(skipped),
        seconds=seconds,
        clips_per_second=made / seconds if seconds > 0 else 0.0,
        stages={},
        failures=recorded,
        degraded=[],
        skipped_items=skipped,
        unknown_words={},
        warnings=warnings,
        left_out=len(left_out),
        left_out_items=left_out,
        kept=len(data.kept),
        kept_items=[*kept_items(data)],
        encoder=spec.slug,
        spec=spec.line(data.name),
        tokens=spec.tokens,
        channels=spec.channels,
        source=source.name,
        items=len(set(source.keys.values())),
        unused=len(found.unused),
        unused_items=list(found.unused),
    )
