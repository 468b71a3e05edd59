"""Decoded clips -> the rows of one shard: encode in fixed windows, cast, note what failed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from msq.errors import VideoError
from msq.extract import store_schema as schema
from msq.extract.datasets.dataset import Clip
from msq.extract.decode_pool import Decoded, Picture
from msq.extract.encoders import ImageEncoder, VideoEncoder
from msq.extract.store_records import Failure, ShardRows
from msq.extract.transforms import normalise
from msq.extract.views import CLEAN, View

OnDegraded = Literal["keep", "skip", "fail"]
FrameEncoder = VideoEncoder | ImageEncoder
Part: TypeAlias = tuple[str, View]  # one encoder's features of one view
_TORCH = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


def encode(encoder: FrameEncoder, frames: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
    """Features of a batch, float32 on the encoder's device.

    Args:
        encoder: video or image encoder.
        frames: per clip uint8 `[T, 3, h, w]`.

    Returns:
        Tokens `[B, S, D']`, or image features averaged over frames `[B, D'']`.
    """
    spec = encoder.spec
    pixels = torch.from_numpy(np.stack(frames)).to(encoder.device)
    features = encoder(normalise(pixels, spec.mean, spec.std))
    return features.mean(dim=1) if spec.kind == "image" else features


def to_disk(features: torch.Tensor, store_dtype: str) -> NDArray[np.generic]:
    """Float32 features in the dtype of the array on disk; bfloat16 as its bits, uint16."""
    cast = features.to(_TORCH[store_dtype]).cpu().contiguous()
    if store_dtype == "bfloat16":
        return cast.view(torch.uint16).numpy()
    return cast.numpy()


def pictures_of(parts: Sequence[Part], encoders: Mapping[str, FrameEncoder]) -> tuple[Picture, ...]:
    """What is wanted of a clip for these parts, each picture once."""
    return tuple(dict.fromkeys(Picture.of(encoders[slug].spec, view) for slug, view in parts))


class ShardBuilder:
    """Collects the rows of one shard for the encoders and views that need it.

    Args:
        clips: the shard's clips.
        first: row of the first of them.
        encoders: name -> encoder.
        store_dtype: dtype of the features.
        on_degraded: what to do with a clip that decoded only in part: `keep` it (status 3),
            `skip` it (status 2, with its reason) or `fail` the run.
        parts: which encoders and views; None for the clean view of all encoders.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        first: int,
        encoders: Mapping[str, FrameEncoder],
        store_dtype: schema.StoreDtype,
        on_degraded: OnDegraded,
        parts: Sequence[Part] | None = None,
    ) -> None:
        self._clips = clips
        self._first = first
        self._encoders = encoders
        self._store_dtype = store_dtype
        self._on_degraded = on_degraded
        self.parts = [(slug, CLEAN) for slug in encoders] if parts is None else list(parts)
        self.pictures = pictures_of(self.parts, encoders)
        self._picture = {
            (slug, view): self.pictures.index(Picture.of(encoders[slug].spec, view))
            for slug, view in self.parts
        }
        self.rows: dict[Part, ShardRows] = {}
        self.failures: list[Failure] = []
        for part in self.parts:
            features, times = schema.feature_arrays(encoders[part[0]].spec, store_dtype)
            count = len(clips)
            self.rows[part] = ShardRows(
                np.zeros((count, *features.row), dtype=features.dtype),
                np.full((count, *times.row), np.nan, dtype=np.float32),
                np.zeros(count, dtype=np.uint8),
            )

    def add(self, window: Sequence[Decoded]) -> dict[str, float]:
        """Encode one window of rows; returns seconds spent in each encoder.

        Windows are fixed places in the shard, so that a clip's batch, and with it the last bits
        of its features, depends on the clips beside it alone: a batch is of one view.

        Raises:
            VideoError: a clip is degraded and the run is to fail on that.
        """
        seconds = dict.fromkeys(self._encoders, 0.0)
        for part in self.parts:
            usable = [clip for clip in window if self._is_usable(part, clip)]
            started = time.perf_counter()
            if usable:
                self._encode(part, usable)
            seconds[part[0]] += time.perf_counter() - started
        return seconds

    def _is_usable(self, part: Part, clip: Decoded) -> bool:
        path = self._clips[clip.row - self._first].path
        reason, degraded = clip.reason, self._degraded(part, clip)
        if degraded is not None and self._on_degraded == "fail":
            raise VideoError(
                f"{path}: {degraded}; expected a clean file (--on-degraded keep goes on)"
            )
        if degraded is not None and self._on_degraded == "skip":
            reason = degraded
        if reason is not None:
            self._mark(part, clip.row, schema.UNDECODABLE, reason, clip.message)
        return reason is None

    def _degraded(self, part: Part, clip: Decoded) -> str | None:
        """What was wrong with the frames that this encoder gets for this view."""
        return clip.degraded[self._picture[part]] if clip.reason is None else None

    def _encode(self, part: Part, clips: Sequence[Decoded]) -> None:
        which, slug = self._picture[part], part[0]
        features = encode(self._encoders[slug], [clip.frames[which] for clip in clips])
        values = to_disk(features, self._store_dtype)
        finite = torch.isfinite(features.to(_TORCH[self._store_dtype])).flatten(1).all(dim=1)
        rows = self.rows[part]
        for clip, value, ok, feature in zip(clips, values, finite.tolist(), features, strict=True):
            if not ok:
                largest = float(feature.abs().max())
                reason = (
                    f"features of {slug} are not finite as {self._store_dtype} "
                    f"(largest magnitude {largest:.4g}); try --store-dtype float32"
                )
                self._mark(part, clip.row, schema.UNDECODABLE, reason, "")
                continue
            rows.features[clip.row - self._first] = value
            rows.times[clip.row - self._first] = clip.times[which]
            degraded = self._degraded(part, clip)
            if degraded is None:
                rows.status[clip.row - self._first] = schema.OK
            else:
                self._mark(part, clip.row, schema.DEGRADED, degraded, clip.message)

    def _mark(self, part: Part, row: int, status: int, reason: str, message: str) -> None:
        place = row - self._first
        self.rows[part].status[place] = status
        clip, (slug, view) = self._clips[place].id, part
        self.failures.append(Failure(row, clip, status, reason, message, slug, str(view)))
