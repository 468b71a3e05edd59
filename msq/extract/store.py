"""Reading a feature store: `open_store`.

Rows of status 1 (ok) and 3 (degraded, kept) are read; rows of status 0 (not extracted) and 2
(failed) are refused by name, since every Zarr library would read zeros for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from msq.errors import StoreError
from msq.extract import store_schema as schema
from msq.extract.location import locate
from msq.extract.row_index import Rows
from msq.extract.shard import read_chunk
from msq.extract.store_array import StoreArray
from msq.extract.store_folder import StoreFolder, as_tensor
from msq.extract.store_verify import problems_in
from msq.extract.store_views import number_of, views_in
from msq.extract.views import View

if TYPE_CHECKING:  # they are loaded where a tensor is asked for
    import torch

    from msq.extract.row_reader import RowReader

__all__ = ["FeatureStore", "Rows", "open_store"]

_SHOWN = 5


class FeatureStore(StoreFolder):
    """A feature store on disk, opened for reading; see `open_store`.

    Attributes:
        path: its folder.
        name: name of the dataset.
        task: `multilabel` or `singlelabel`.
        metric: what the field reports for the dataset.
        classes: K class names.
        attributes: `attributes.msq` of the root.
    """

    def views(self, encoder: str | None = None) -> tuple[View, ...]:
        """The views of a video or image encoder; the place of each is its number.

        Raises:
            StoreError: no such encoder, several and none named, or its arrays do not agree.
        """
        names = [*self.encoders("video"), *self.encoders("image")]
        array = self._array(f"status/{self._choose(names, encoder, 'encoder')}")
        views = views_in(array.attributes)
        if len(views) != array.shape[1]:
            raise StoreError(
                f"{array.path}: expected {array.shape[1]} views in its attributes, as many as the "
                f"array has, found {len(views)}; the metadata was changed after it was written"
            )
        return views

    def status(self, encoder: str, view: int | View = 0, rows: Rows = None) -> torch.Tensor:
        """Status `[n]` uint8: 0 missing, 1 ok, 2 failed, 3 degraded but kept.

        Args:
            encoder: name of a video or image encoder.
            view: which view of it.
            rows: the rows asked for; None for all. Only the commit records of their shards are
                read.

        Raises:
            StoreError: no such encoder, view or row, or a commit record is damaged.
        """
        return as_tensor(self.status_codes(encoder, view, rows))

    def status_codes(
        self, encoder: str, view: int | View = 0, rows: Rows = None
    ) -> NDArray[np.uint8]:
        """As `status`, for who needs no tensor."""
        self._need(encoder, [*self.encoders("video"), *self.encoders("image")], "encoder")
        number = self._number(encoder, view)
        return self._array(f"status/{encoder}").status(number, self._rows(rows))

    def ok_rows(self, encoders: Sequence[str] | None = None, view: int | View = 0) -> torch.Tensor:
        """Rows `[n]` int64 that can be read for all the named encoders (or all there are).

        A number means the view of that number of each encoder; name it by a `View` where their
        lists differ.

        Raises:
            StoreError: an encoder does not have this view, or it has another one of this number.
        """
        names = encoders or [*self.encoders("video"), *self.encoders("image")]
        readable = np.ones(len(self), dtype=np.bool_)
        meant = {slug: self.views(slug)[self._number(slug, view)] for slug in names}
        if len({*meant.values()}) > 1:
            said = ", ".join(f"{str(v)!r} of {slug}" for slug, v in meant.items())
            raise StoreError(
                f"{self.path}: view {view} is {said}; name it by msq.extract.views.View"
            )
        for encoder in names:
            status = self.status_codes(encoder, view)
            readable &= (status == schema.OK) | (status == schema.DEGRADED)
        return as_tensor(np.flatnonzero(readable))

    def tokens(
        self, rows: Rows = None, encoder: str | None = None, view: int | View = 0
    ) -> torch.Tensor:
        """Video tokens `[n, S, D']` in the stored dtype; all rows where `rows` is None.

        Raises:
            StoreError: an asked-for row is missing or failed; a file is missing or damaged; no
                such view; no or several video encoders and none named.
        """
        return self._features("video", rows, encoder, view)

    def token_reader(
        self, encoder: str | None = None, view: int | View = 0, threads: int = 2
    ) -> RowReader:
        """Reads tokens of one view straight into the caller's memory; see `RowReader`.

        Unlike `tokens` it does not look at the status: ask it for `ok_rows()` only.

        Raises:
            StoreError: no or several video encoders and none named, or a layout that msq does not
                write.
        """
        from msq.extract.row_reader import RowReader

        slug = self._choose(self.encoders("video"), encoder, "video encoder")
        array = self._array(f"tokens/{slug}")
        number = self._number(slug, view)
        return RowReader(array, number, self.clips.__getitem__, threads)

    def image(
        self, rows: Rows = None, encoder: str | None = None, view: int | View = 0
    ) -> torch.Tensor:
        """Image features, mean over frames, `[n, D'']` in the stored dtype; as `tokens`."""
        return self._features("image", rows, encoder, view)

    def image_frames(
        self, rows: Rows = None, encoder: str | None = None, view: int | View = 0
    ) -> torch.Tensor:
        """Image features of each frame `[n, T, D'']` in the stored dtype; as `tokens`.

        `image` is their mean over T, taken before both were rounded to the stored dtype; `time`
        has the seconds of the frames.

        Raises:
            StoreError: as `tokens`, or the store holds the mean alone.
        """
        slug = self._choose(self.encoders("image"), encoder, "image encoder")
        if not self.has_image_frames(slug):
            raise StoreError(
                f"{self.path}: no features of each frame of {slug!r} (expected "
                f"{schema.IMAGE_FRAMES}/{slug}): it was extracted without --image-frames, or they "
                f"are still being added, and image/{slug} holds their mean; the same msq extract "
                "with --image-frames adds them"
            )
        return self._read(schema.IMAGE_FRAMES, rows, slug, view)

    def time(
        self, rows: Rows = None, encoder: str | None = None, view: int | View = 0
    ) -> torch.Tensor:
        """Seconds of the sampled frames `[n, T]` float32, NaN where unknown; as `tokens`."""
        names = [*self.encoders("video"), *self.encoders("image")]
        slug = self._choose(names, encoder, "encoder")
        return self._read("time", rows, slug, view)

    def text(self, encoder: str | None = None, prompt: str | None = None) -> torch.Tensor:
        """Class embeddings `[K, D]` float32 of one prompt.

        Raises:
            StoreError: no or several encoders or prompts and none named; a damaged file.
        """
        array = self._text_array(encoder, prompt)
        payload = read_chunk(
            array.path / "c" / "0" / "0", int(np.prod(array.shape)) * array.dtype.itemsize
        )
        return as_tensor(payload.view(array.dtype).reshape(array.shape).copy())

    def prompts(self, encoder: str | None = None) -> dict[str, str]:
        """Prompt name -> template of one text encoder; a set's templates are joined by ` | `."""
        slug = self._choose(self.encoders("text"), encoder, "text encoder")
        names = sorted(p.parent.name for p in (self.path / "text" / slug).glob("*/zarr.json"))
        return {name: str(self._making(f"text/{slug}/{name}")["template"]) for name in names}

    def templates(self, encoder: str | None = None, prompt: str | None = None) -> tuple[str, ...]:
        """The templates of one prompt: one, or those of a set, which were averaged."""
        return schema.templates_in(self._text_array(encoder, prompt).attributes)

    def unknown_words(
        self, encoder: str | None = None, prompt: str | None = None
    ) -> dict[str, list[str]]:
        """Class -> words of it that the text encoder's tokenizer does not know."""
        return dict(self._text_array(encoder, prompt).attributes["unknown_words"])

    def verify(self) -> list[str]:
        """Read every row that is recorded as done; returns what is wrong, one line each."""
        return problems_in(self)

    def _features(
        self, kind: str, rows: Rows, encoder: str | None, view: int | View
    ) -> torch.Tensor:
        slug = self._choose(self.encoders(kind), encoder, f"{kind} encoder")
        return self._read(schema.FEATURE_GROUP[kind], rows, slug, view)

    def _read(self, group: str, rows: Rows, slug: str, view: int | View) -> torch.Tensor:
        import torch

        wanted, number = self._rows(rows), self._number(slug, view)
        self._refuse_unreadable(wanted, slug, number)
        array = self._array(f"{group}/{slug}")
        values = torch.from_numpy(array.read(wanted, number, self.clips.__getitem__))
        bits = values.dtype == torch.uint16 and self.store_dtype(slug) == "bfloat16"
        return values.view(torch.bfloat16) if bits else values

    def _refuse_unreadable(self, rows: NDArray[np.int64], slug: str, view: int) -> None:
        status = self.status_codes(slug, view, rows)
        for code, words in (
            (schema.UNDECODABLE, "failed (see failures(), or msq extract --retry-failed)"),
            (schema.MISSING, "were not extracted yet (run msq extract again)"),
        ):
            bad = rows[status == code].tolist()
            if bad:
                shown = ", ".join(repr(self.clips[row]) for row in bad[:_SHOWN])
                more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
                raise StoreError(
                    f"{self.path}: {len(bad)} of the {len(rows)} rows asked for of {slug!r} "
                    f"{words}: {shown}{more}; ok_rows() lists the rows that can be read"
                )

    def _number(self, slug: str, view: int | View) -> int:
        """The number of a view of one encoder, which is there."""
        return number_of(view, self.views(slug), f"{self.path}: {slug}")

    def _text_array(self, encoder: str | None, prompt: str | None) -> StoreArray:
        slug = self._choose(self.encoders("text"), encoder, "text encoder")
        name = self._choose(list(self.prompts(slug)), prompt, "prompt")
        return self._array(f"text/{slug}/{name}")


def open_store(path: str | Path) -> FeatureStore:
    """Open a feature store for reading.

    Args:
        path: its folder, a zip file of it, or a URL that fsspec opens (`s3://bucket/NAME.zarr`).

    Raises:
        StoreError: there is no store, it is of another schema, or its metadata was changed.
    """
    return FeatureStore(locate(path))
