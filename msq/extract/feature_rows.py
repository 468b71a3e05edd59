"""From features that were found for every clip to the rows of an encoder in a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from msq.extract import store_schema as schema
from msq.extract.encoders.spec import IMPORTED, EncoderSpec
from msq.extract.feature_files import FeatureSource
from msq.extract.feature_layout import Rate, cut_into, mean_of, to_tokens
from msq.extract.feature_survey import ClipFeatures, Survey
from msq.extract.store_writer import Failure, ShardRows, StoreWriter
from msq.extract.stored_numbers import to_disk


@dataclass(frozen=True)
class FeatureRows:
    """How the rows of one encoder are made of the features that a survey found.

    Attributes:
        source: where they lie.
        found: what it has for each clip.
        kind: `video` for tokens, `image` for one vector.
        pieces: see `feature_layout.to_tokens`.
        global_token: likewise; a single vector is its own.
        rate: when the features are, or None.
        letters: layout of the stored arrays, or `auto`.
    """

    source: FeatureSource
    found: Survey
    kind: Literal["video", "image"]
    pieces: int | None
    global_token: bool
    rate: Rate | None
    letters: str

    def spec(self, name: str) -> EncoderSpec:
        """The encoder's spec.

        Raises:
            FeatureError: clips with different numbers of features, and no number of pieces.
        """
        moments = 1 if self.kind == "image" else self.pieces or self.found.common_count()
        video = self.kind == "video"
        ahead = video and self._has_global(moments)
        every = "" if self.rate is None else f"every {self.rate.seconds:.8g}s"
        first = "" if self.rate is None else f" from {self.rate.offset:.8g}s"
        return EncoderSpec(
            slug=name,
            kind=self.kind,
            architecture="imported" + ("" if self.letters == "auto" else f" {self.letters}"),
            weights=f"{IMPORTED}{self.source.name}",
            sha256=self.found.sha256,
            frames=moments,
            size=0,
            mean=(),
            std=(),
            pooling="mean" if not video else "none" if self.pieces is None else "segments",
            precision="fp32",
            sampling=every + first,
            resize="",
            output="global mean" if ahead else "",
            tokens=ahead + moments * self.found.per_moment if video else 0,
            channels=self.found.channels,
        )

    def write(
        self,
        writer: StoreWriter,
        spec: EncoderSpec,
        progress: Callable[[dict[str, Any]], None] | None,
    ) -> int:
        """Commit the shards that are not done; returns how many rows that made."""
        made = failed = 0
        total = len(writer.dataset.clips)
        for shard in range(writer.shards):
            rows = writer.rows(shard)
            if not writer.is_done(spec.slug, shard):
                data, failures = self._shard(writer, spec, rows)
                writer.commit(shard, {spec.slug: data}, failures)
                failed += len(failures)
                made += len(rows)
            if progress is not None:
                progress({"stage": "write", "done": rows.stop, "total": total, "failed": failed})
        return made

    def _shard(
        self, writer: StoreWriter, spec: EncoderSpec, rows: range
    ) -> tuple[ShardRows, list[Failure]]:
        array, times = schema.feature_arrays(spec, writer.store_dtype)
        data = ShardRows(
            np.zeros((len(rows), *array.row), dtype=array.dtype),
            np.full((len(rows), *times.row), np.nan, dtype=np.float32),
            np.full(len(rows), schema.OK, dtype=np.uint8),
        )
        failures = []
        for place, row in enumerate(rows):
            clip = self.found.clips[row]
            reason, message = clip.reason, clip.message
            if reason is None:
                values = self._features(clip, spec)
                reason = _overflow(values, writer.store_dtype)
            if reason is None:
                data.features[place] = to_disk(torch.from_numpy(values), writer.store_dtype)
                data.times[place] = self._times(clip, spec.frames)
            else:
                data.status[place] = schema.UNDECODABLE
                name = writer.dataset.clips[row].id
                failures.append(Failure(row, name, schema.UNDECODABLE, reason, message, spec.slug))
        return data, failures

    def _features(self, clip: ClipFeatures, spec: EncoderSpec) -> NDArray[np.float32]:
        values = self.found.read_again(clip)
        if spec.kind == "image":
            return mean_of(values)
        return to_tokens(values, self.pieces, self._has_global(spec.frames))

    def _has_global(self, moments: int) -> bool:
        single = self.pieces is None and moments * self.found.per_moment == 1
        return self.global_token and not single

    def _times(self, clip: ClipFeatures, moments: int) -> NDArray[np.float32]:
        """Centre of each piece: the mean of the centres of its features; NaN where unknown."""
        if self.rate is None or clip.rows is None:
            return np.full(moments, np.nan, dtype=np.float32)
        centres = clip.begin + self.rate.centres(int(clip.rows[-1]) + 1)[clip.rows]
        return cut_into(centres.astype(np.float32), moments)


def _overflow(values: NDArray[np.float32], store_dtype: str) -> str | None:
    if bool(torch.isfinite(torch.from_numpy(values).to(getattr(torch, store_dtype))).all()):
        return None
    return (
        f"features are not finite as {store_dtype} (largest magnitude "
        f"{float(np.abs(values).max()):.4g}); try --store-dtype float32"
    )
