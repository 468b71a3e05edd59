"""Which shards of a store are done, for whoever fills it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msq.errors import StoreError
from msq.extract import store_schema as schema
from msq.extract.datasets.dataset import Dataset
from msq.extract.encoders.spec import EncoderSpec
from msq.extract.shard import read_chunk, read_index
from msq.extract.store_records import Failure, SmallerBatch, read_batches, read_failures
from msq.extract.views import CLEAN, View


class StoreState:
    """The shards of a store on disk: their rows, their status, what is left to do.

    A shard counts as done when its status chunk is whole, the index of each of its files fits, and
    the recorded failures are those of the status.

    Attributes:
        path: the store's directory.
        dataset: whose clips are the rows.
        store_dtype: dtype of the features.
        shard: rows of one shard.
        specs: encoder -> how its features are made.
        views: encoder -> its views, in the order of `view`.
        image_frames: names of the encoders whose features of each frame are stored, too.
        adding: those of them whose features of each frame are being added to done rows.
    """

    def __init__(
        self, path: Path, dataset: Dataset, store_dtype: schema.StoreDtype, shard: int
    ) -> None:
        self.path = path
        self.dataset = dataset
        self.store_dtype = store_dtype
        self.shard = shard
        self.specs: dict[str, EncoderSpec] = {}
        self.views: dict[str, tuple[View, ...]] = {}
        self.image_frames: set[str] = set()
        self.adding: set[str] = set()

    def arrays(self, slug: str) -> tuple[schema.FeatureArray, ...]:
        """The arrays of an encoder but `status`, in the order they are written."""
        frames = slug in self.image_frames
        return schema.large_arrays(self.specs[slug], self.store_dtype, frames)

    @property
    def shards(self) -> int:
        """How many shards cover the dataset."""
        return -(-len(self.dataset.clips) // self.shard)

    def rows(self, shard: int) -> range:
        """The rows of one shard."""
        return range(shard * self.shard, min((shard + 1) * self.shard, len(self.dataset.clips)))

    def status(self, slug: str, shard: int, view: View = CLEAN) -> NDArray[np.uint8] | None:
        """Status `[n]` of a shard's rows; None where there is no whole commit record."""
        path = self._status_path(slug, shard, view)
        if not path.exists():
            return None
        try:
            return read_chunk(path, self.shard)[: len(self.rows(shard))]
        except StoreError:
            return None

    def is_whole(
        self,
        slug: str,
        shard: int,
        status: NDArray[np.uint8],
        view: View = CLEAN,
        *,
        only_frames: bool | None = None,
    ) -> bool:
        """Whether each file that the status asks for is there and its index fits.

        Args:
            slug: of the encoder.
            shard: which shard.
            status: `[n]` of its rows.
            view: which view.
            only_frames: look at the features of each frame alone; False at all but these.
        """
        readable = np.isin(status, (schema.OK, schema.DEGRADED))
        number = self._number(slug, view)
        for array in self.arrays(slug):
            if only_frames not in (None, array.name.startswith(f"{schema.IMAGE_FRAMES}/")):
                continue
            try:
                if array.sharded:
                    if readable.any():
                        path = self.path / array.key(shard, number)
                        read_index(path, self.shard, array.row_bytes)
                    continue
                for row in np.asarray(self.rows(shard))[readable]:
                    path = self.path / array.key(row, number)
                    if path.stat().st_size != array.row_bytes + 4:
                        return False
            except (StoreError, FileNotFoundError):
                return False
        return True

    def is_done(self, slug: str, shard: int, view: View = CLEAN) -> bool:
        """Whether nothing is left to do for this encoder, shard and view."""
        status = self._recorded(slug, shard, view)
        return status is not None and self.is_whole(slug, shard, status, view)

    def lacks_frames(self, slug: str, shard: int, view: View = CLEAN) -> bool:
        """Whether the features of each frame are all that is left to do."""
        if slug not in self.image_frames:
            return False
        status = self._recorded(slug, shard, view)
        return (
            status is not None
            and not self.is_whole(slug, shard, status, view, only_frames=True)
            and self.is_whole(slug, shard, status, view, only_frames=False)
        )

    def _recorded(self, slug: str, shard: int, view: View) -> NDArray[np.uint8] | None:
        """Status of a shard of which it is recorded what became of each row; else None."""
        status = self.status(slug, shard, view)
        if status is None or (status == schema.MISSING).any():
            return None
        bad = {
            (row, int(code))
            for row, code in zip(self.rows(shard), status, strict=True)
            if code != schema.OK
        }
        recorded = {
            (f.row, f.status)
            for f in self.failures(shard)
            if f.encoder == slug and f.view == str(view)
        }
        return status if bad == recorded else None

    def failures(self, shard: int) -> list[Failure]:
        """What is recorded for one shard, one entry for each encoder and view."""
        path = self._failures_path(shard)
        return read_failures(path.read_bytes()) if path.exists() else []

    def batches(self, shard: int) -> list[SmallerBatch]:
        """What of a shard was made in smaller batches than were asked for."""
        path = self._failures_path(shard)
        return read_batches(path.read_bytes()) if path.exists() else []

    def _number(self, slug: str, view: View) -> int:
        """The place of a view along `view` of an encoder's arrays."""
        return self.views[slug].index(view)

    def _status_path(self, slug: str, shard: int, view: View) -> Path:
        return self.path / "status" / slug / "c" / str(shard) / str(self._number(slug, view))

    def _failures_path(self, shard: int) -> Path:
        return self.path / schema.FAILURES / f"{shard:05d}.json"
