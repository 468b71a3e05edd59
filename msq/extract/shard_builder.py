"""Decoded clips -> the rows of one shard: encode in fixed windows, cast, note what failed.

On a GPU the features of one window are fetched when the next one has been sent, so that it never
waits for the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from msq.errors import VideoError
from msq.extract import store_schema as schema
from msq.extract.datasets.dataset import Clip
from msq.extract.decode_pool import Decoded, Picture
from msq.extract.device_batches import Arriving, Moment, Sender
from msq.extract.encoders import ImageEncoder, VideoEncoder
from msq.extract.store_records import Failure, ShardRows
from msq.extract.stored_numbers import STORED, as_array
from msq.extract.transforms import normalise
from msq.extract.views import CLEAN, View

OnDegraded = Literal["keep", "skip", "fail"]
FrameEncoder = VideoEncoder | ImageEncoder
Part: TypeAlias = tuple[str, View]  # one encoder's features of one view
Timed: TypeAlias = Callable[[str, int, float], None]  # encoder, frames, seconds


def encode(encoder: FrameEncoder, frames: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
    """Features of a batch of clips, uint8 `[T, 3, h, w]` each; see `encode_pixels`."""
    return encode_pixels(encoder, torch.from_numpy(np.stack(frames)).to(encoder.device))


def encode_pixels(encoder: FrameEncoder, pixels: torch.Tensor) -> torch.Tensor:
    """Features of a batch, float32 on the encoder's device.

    Args:
        encoder: video or image encoder.
        pixels: uint8 `[B, T, 3, h, w]` on its device.

    Returns:
        Tokens `[B, S, D']`, or image features averaged over frames `[B, D'']`.
    """
    return _pooled(encoder, _forward(encoder, pixels))


def _forward(encoder: FrameEncoder, pixels: torch.Tensor) -> torch.Tensor:
    """What an encoder gives: tokens `[B, S, D']`, or image features of each frame `[B, T, D'']`."""
    return encoder(normalise(pixels, encoder.spec.mean, encoder.spec.std))


def _pooled(encoder: FrameEncoder, features: torch.Tensor) -> torch.Tensor:
    return features.mean(dim=1) if encoder.spec.kind == "image" else features


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
        senders: device -> what brings frames there; made here where it is missing.
        timed: told of every batch that was encoded.
        image_frames: names of the image encoders whose features of each frame are kept, too.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        first: int,
        encoders: Mapping[str, FrameEncoder],
        store_dtype: schema.StoreDtype,
        on_degraded: OnDegraded,
        parts: Sequence[Part] | None = None,
        *,
        senders: dict[torch.device, Sender] | None = None,
        timed: Timed | None = None,
        image_frames: Collection[str] = (),
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
        self._senders = {} if senders is None else senders
        self._timed = timed
        self._image_frames = image_frames
        self._arriving: deque[tuple[Part, list[Decoded], Arriving, Arriving | None]] = deque()
        self.rows: dict[Part, ShardRows] = {}
        self.failures: list[Failure] = []
        for part in self.parts:
            arrays = schema.large_arrays(
                encoders[part[0]].spec, store_dtype, part[0] in image_frames
            )
            self.rows[part] = ShardRows.blank(arrays, len(clips))

    def add(self, window: Sequence[Decoded]) -> None:
        """Encode one window of rows; its frames may be overwritten afterwards.

        Windows are fixed places in the shard, so that a clip's batch, and with it the last bits
        of its features, depends on the clips beside it alone: a batch is of one view. Encoders
        that want the same pictures share their way to the device.

        Raises:
            VideoError: a clip is degraded and the run is to fail on that.
        """
        sent: dict[tuple[int, torch.device, tuple[int, ...]], torch.Tensor] = {}
        before = len(self._arriving)
        for part in self.parts:
            usable = [clip for clip in window if self._is_usable(part, clip)]
            if usable:
                self._encode(part, usable, sent)
        for _ in range(before):
            self._fetch()
        if not any(encoder.device.type == "cuda" for encoder in self._encoders.values()):
            self.finish()

    def finish(self) -> None:
        """Wait for the features of what was added; the rows are complete afterwards."""
        while self._arriving:
            self._fetch()

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

    def _encode(
        self,
        part: Part,
        clips: list[Decoded],
        sent: dict[tuple[int, torch.device, tuple[int, ...]], torch.Tensor],
    ) -> None:
        which, encoder = self._picture[part], self._encoders[part[0]]
        device = encoder.device
        began = Moment(device)
        key = which, device, tuple(clip.row for clip in clips)
        if key not in sent:
            sender = self._senders.setdefault(device, Sender(device))
            sent[key] = sender.send([clip.frames[which] for clip in clips])
        features, dtype = _forward(encoder, sent[key]), STORED[self._store_dtype]
        arriving = Arriving(_pooled(encoder, features), dtype, began)
        frames = Arriving(features, dtype, began) if part[0] in self._image_frames else None
        self._arriving.append((part, clips, arriving, frames))

    def _fetch(self) -> None:
        """The oldest features under way into their rows."""
        part, clips, arriving, frames = self._arriving.popleft()
        which, slug = self._picture[part], part[0]
        fetched, finite, seconds = arriving.fetch()
        if self._timed is not None:
            self._timed(slug, len(clips) * self._encoders[slug].spec.frames, seconds)
        rows, values = self.rows[part], as_array(fetched)
        made = [(f"features of {slug}", arriving, finite)]
        if frames is not None and rows.frames is not None:
            fetched, finite, _ = frames.fetch()
            made.append((f"features of each frame of {slug}", frames, finite))
            rows.frames[[clip.row - self._first for clip in clips]] = as_array(fetched)
        for place, (clip, value) in enumerate(zip(clips, values, strict=True)):
            if (reason := self._overflow(made, place)) is not None:
                self._mark(part, clip.row, schema.UNDECODABLE, reason, "")
                continue
            rows.features[clip.row - self._first] = value
            rows.times[clip.row - self._first] = clip.times[which]
            degraded = self._degraded(part, clip)
            if degraded is None:
                rows.status[clip.row - self._first] = schema.OK
            else:
                self._mark(part, clip.row, schema.DEGRADED, degraded, clip.message)

    def _overflow(self, made: Sequence[tuple[str, Arriving, list[bool]]], place: int) -> str | None:
        """Why the features of one clip of a batch cannot be stored; None where they can."""
        for what, arriving, finite in made:
            if not finite[place]:
                return (
                    f"{what} are not finite as {self._store_dtype} "
                    f"(largest magnitude {arriving.largest(place):.4g}); try --store-dtype float32"
                )
        return None

    def _mark(self, part: Part, row: int, status: int, reason: str, message: str) -> None:
        place = row - self._first
        self.rows[part].status[place] = status
        clip, (slug, view) = self._clips[place].id, part
        self.failures.append(Failure(row, clip, status, reason, message, slug, str(view)))
