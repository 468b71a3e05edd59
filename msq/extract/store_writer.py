"""Writing a feature store: publish its metadata once, then commit shards, status last.

Every file appears whole or not at all. Within a shard the order is: failures, features, times,
status. A shard counts as done when its status chunk is whole, the index of each of its files fits,
and the recorded failures are those of the status: whatever a killed writer left half way is then
pending, and redoing it gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import msq
from msq.errors import StoreError, UsageError
from msq.extract import store_schema as schema
from msq.extract.atomic import remove_file, remove_temporaries, write_file
from msq.extract.datasets.dataset import Dataset
from msq.extract.encoders.prompts import Prompt
from msq.extract.encoders.spec import EncoderSpec
from msq.extract.image_frames import FramesState, asked_for, frames_in
from msq.extract.image_frames import attributes_of as frames_attributes
from msq.extract.shard import encode_chunk, encode_shard
from msq.extract.store_difference import encoder_difference, root_difference
from msq.extract.store_identity import (
    attributes_at,
    check_names,
    compare_encoder,
    dimensions_in,
    first_rows,
    refuse,
)
from msq.extract.store_keys import (
    dataset_keys,
    encoder_keys,
    image_frames_group,
    metadata,
    text_keys,
)
from msq.extract.store_records import (
    Failure,
    ShardRows,
    SmallerBatch,
    failures_document,
    same_record,
)
from msq.extract.store_seal import KEY, read_metadata
from msq.extract.store_state import StoreState
from msq.extract.store_views import joined, views_in, with_views
from msq.extract.views import CLEAN, View

__all__ = ["Failure", "ShardRows", "StoreWriter"]


class StoreWriter(StoreState):
    """Writes one store; hold its claim (`claims.claim_store`) for as long as it lives.

    Args:
        path: the store's directory; created where missing.
        dataset: whose clips are the rows.
        store_dtype: dtype of the features.
        shard: rows of one shard.
        label_known: `[clips, classes]`, False where a label is unknown; None when all are known.
        sweep: remove half-written files; not while other workers write.

    Raises:
        SpecMismatch: `path` holds a store of other clips, classes or task.
        StoreError: `path` holds something else, or a file of the store was changed.
        UsageError: `path` is a file, or the dataset has no clips.
    """

    def __init__(
        self,
        path: Path,
        dataset: Dataset,
        *,
        store_dtype: schema.StoreDtype = "float16",
        shard: int = 64,
        label_known: NDArray[np.bool_] | None = None,
        sweep: bool = True,
    ) -> None:
        if not dataset.clips:
            raise UsageError(f"{path}: dataset {dataset.name!r} has no clips to write")
        if shard < 1:
            raise UsageError(f"shard: expected at least 1 row, found {shard}")
        if store_dtype not in schema.DISK_DTYPE:
            raise UsageError(
                f"store dtype: expected {', '.join(schema.DISK_DTYPE)}, found {store_dtype}"
            )
        super().__init__(path, dataset, store_dtype, shard)
        self._sweep = sweep
        self._prepare_directory()
        self._publish_dataset(label_known)

    def add_encoder(
        self, spec: EncoderSpec, views: Sequence[View] = (CLEAN,), image_frames: bool = False
    ) -> None:
        """Publish the arrays of a video or image encoder, or check those that are there.

        Views that are not there yet are added behind those that are: the extent of `view` grows in
        the metadata, and no chunk is touched.

        Args:
            spec: of the encoder.
            views: of each clip.
            image_frames: store its features of each frame, too. Where the store has them they are
                written whether asked for or not, and it is one of `image_frames` then; also of
                `adding` where rows are done without (see `complete_frames`).

        Raises:
            SpecMismatch: an encoder of this name made its features in another way.
            StoreError: there are commit records, and no metadata that says how they were made.
            UsageError: the name is a dimension's, or the other kind of encoder has it; features of
                each frame are asked of a video encoder.
        """
        check_names(self.path, spec)
        records = self.path / "status" / spec.slug / "c"
        if not self._recorded_views(spec) and any(f.is_file() for f in records.rglob("*")):
            raise StoreError(
                f"{records}: commit records without the metadata that says how the features were "
                "made; msq store repair removes them, and they are made again"
            )
        every = joined(self._recorded_views(spec), views)
        compare_encoder(self.path, self.encoder_content(spec, every))
        state = frames_in(self.path, spec.slug) if spec.kind == "image" else ""
        if image_frames and not state:
            state = asked_for(self.path, spec)
        self.image_frames |= {spec.slug} if state else set()
        self.adding |= {spec.slug} if state == "adding" else set()
        content = self.encoder_content(spec, every)
        if state == "stored":
            # First, so that a writer killed in between leaves a store that says what was asked.
            first = f"{schema.IMAGE_FRAMES}/{spec.slug}/zarr.json"
            content = {first: content[first], **image_frames_group(), **content}
        self._publish(content)
        self._grow(spec, every)
        self.specs[spec.slug] = spec
        self.views[spec.slug] = every

    def encoder_content(self, spec: EncoderSpec, views: Sequence[View]) -> dict[str, bytes]:
        """The metadata of an encoder's arrays."""
        return encoder_keys(
            spec,
            self.dataset.name,
            len(self.dataset.clips),
            self.store_dtype,
            self.shard,
            views,
            self._frames(spec.slug),
        )

    def _frames(self, slug: str) -> FramesState:
        return "adding" if slug in self.adding else "stored" if slug in self.image_frames else ""

    def complete_frames(self) -> None:
        """Features of each frame that were added to done rows can be seen when none is without.

        To be called whenever shards were made; it does nothing while a row is left.
        """
        for slug in sorted(self.adding):
            shards = ((s, v) for s in reversed(range(self.shards)) for v in self.views[slug])
            if not all(self._has_frames(slug, shard, view) for shard, view in shards):
                continue
            self.adding.discard(slug)
            spec, views = self.specs[slug], self.views[slug]
            name = f"{schema.IMAGE_FRAMES}/{slug}/zarr.json"
            content = self.encoder_content(spec, views)
            self._publish({**image_frames_group(), name: content[name]})
            self._grow(spec, views)

    def _has_frames(self, slug: str, shard: int, view: View) -> bool:
        status = self.status(slug, shard, view)
        return status is None or self.is_whole(slug, shard, status, view, only_frames=True)

    def has_text(self, spec: EncoderSpec, prompt: str, template: Prompt) -> bool:
        """Whether the class embeddings of this prompt are there.

        Raises:
            SpecMismatch: they were made by another encoder or template.
            UsageError: the prompt's name cannot stand in a store.
        """
        schema.check_slug(spec.slug, "text encoder", dimensions_in(self.path))
        schema.check_slug(prompt, "prompt", [*dimensions_in(self.path), f"{spec.slug}_channel"])
        folder = self.path / "text" / spec.slug / prompt
        wanted = schema.text_attributes(spec, self.dataset.name, template)
        found = attributes_at(folder / "zarr.json")
        if found is not None:
            refuse(self.path, encoder_difference(wanted, found), f"text/{spec.slug}/{prompt}")
        return found is not None and (folder / "c" / "0" / "0").exists()

    def add_text(
        self,
        spec: EncoderSpec,
        prompt: str,
        template: Prompt,
        unknown_words: Mapping[str, Sequence[str]],
        values: NDArray[np.float32],
    ) -> None:
        """Publish class embeddings `[K, D]`; a no-op for keys that are there."""
        folder = self.path / "text" / spec.slug / prompt
        if not (folder / "zarr.json").exists():
            # Numbers of which nothing says any more what made them.
            remove_file(folder / "c" / "0" / "0")
        self._publish(text_keys(spec, self.dataset.name, prompt, template, unknown_words, values))

    def commit(
        self,
        shard: int,
        rows: Mapping[str, ShardRows],
        failures: Iterable[Failure],
        view: View = CLEAN,
        smaller_batches: Collection[int] = (),
    ) -> int:
        """Write one view of one shard of one or several encoders; their status goes last.

        Args:
            shard: which shard.
            rows: encoder -> its rows.
            failures: of these encoders and this view; what is recorded of others stays.
            view: which view.
            smaller_batches: clips of one forward pass where memory was too short for those asked
                for; several where the rows come from shards that were made otherwise.

        Returns:
            Bytes written.
        """
        name = str(view)
        others = [f for f in self.failures(shard) if f.encoder not in rows or f.view != name]
        batches = [b for b in self.batches(shard) if b.encoder not in rows or b.view != name]
        batches += [SmallerBatch(batch, slug, name) for slug in rows for batch in smaller_batches]
        self._write_failures(shard, [*others, *failures], batches)
        written = 0
        for slug, data in rows.items():
            written += self._write_arrays(slug, shard, data, self._number(slug, view))
        for slug, data in rows.items():
            chunk = np.zeros(self.shard, dtype=np.uint8)
            chunk[: len(data.status)] = data.status
            written += write_file(self._status_path(slug, shard, view), encode_chunk(chunk))
        return written

    def _write_arrays(self, slug: str, shard: int, data: ShardRows, view: int) -> int:
        readable = np.isin(data.status, (schema.OK, schema.DEGRADED))
        written = 0
        for array, values in zip(self.arrays(slug), data.values(), strict=True):
            if not array.sharded:
                for row, ok, value in zip(self.rows(shard), readable, values, strict=True):
                    path = self.path / array.key(row, view)
                    written += write_file(path, encode_chunk(value)) if ok else remove_file(path)
                continue
            path = self.path / array.key(shard, view)
            if readable.any():
                pieces = encode_shard(values, self.shard, array.fill, readable)
                written += write_file(path, pieces)
            else:
                remove_file(path)
        return written

    def add_frames(
        self,
        slug: str,
        shard: int,
        frames: NDArray[np.generic],
        view: View = CLEAN,
        smaller_batches: Collection[int] = (),
    ) -> int:
        """Write the features of each frame of a shard that is done without them.

        Args:
            slug: of the encoder.
            shard: which shard.
            frames: `[n, T, D'']` in the dtype on disk; of rows that failed they hold anything.
            view: which view.
            smaller_batches: as of `commit`.

        Returns:
            Bytes written.
        """
        status = self.status(slug, shard, view)
        assert status is not None, "a shard that lacks_frames"
        readable = np.isin(status, (schema.OK, schema.DEGRADED))
        batches = [SmallerBatch(batch, slug, str(view)) for batch in smaller_batches]
        if batches:
            self._write_failures(shard, self.failures(shard), [*self.batches(shard), *batches])
        array = schema.frame_array(self.specs[slug], self.store_dtype)
        path = self.path / array.key(shard, self._number(slug, view))
        return write_file(path, encode_shard(frames, self.shard, array.fill, readable))

    def _write_failures(
        self, shard: int, failures: Iterable[Failure], batches: Iterable[SmallerBatch]
    ) -> None:
        path = self._failures_path(shard)
        content = failures_document(shard, failures, batches)
        if content is None:
            remove_file(path)
        elif not path.exists() or not same_record(path.read_bytes(), content):
            write_file(path, [content])

    def _recorded_views(self, spec: EncoderSpec) -> tuple[View, ...]:
        """The views of an encoder's arrays on disk; none where it has none yet."""
        for name in reversed(schema.array_names(spec.kind, spec.slug)):
            found = attributes_at(self.path / name / "zarr.json")
            if found is not None:
                return views_in(found)
        return ()

    def _grow(self, spec: EncoderSpec, views: Sequence[View]) -> None:
        """Bring the metadata of an encoder's arrays to these views and frames, `status` last."""
        state = self._frames(spec.slug)
        wanted = frames_attributes(state)
        for name in schema.array_names(spec.kind, spec.slug, state == "stored"):
            path = self.path / name / "zarr.json"
            if path.exists():
                content = path.read_bytes()
                found = metadata(content)["attributes"]["msq"]
                marked = wanted.items() <= found.items()
                if not marked or views_in(found) != tuple(views):
                    self._replace(f"{name}/zarr.json", with_views(content, views, wanted))

    def _replace(self, key: str, content: bytes) -> None:
        """Write a key over the one that is there."""
        write_file(self.path / key, [content])

    def _prepare_directory(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path}: expected a folder for the feature store, found a file")
        if not self.path.exists():
            return
        if self._sweep:
            remove_temporaries(self.path)
        foreign = any(self.path.iterdir()) and attributes_at(self.path / "zarr.json") is None
        if foreign and not self._lost_root():
            raise StoreError(
                f"{self.path}: not a feature store of msq (no zarr.json with its attributes); "
                "choose another place for the store, or an empty folder"
            )

    def _lost_root(self) -> bool:
        """Whether all that is missing is the root's metadata, which repair may have removed."""
        known = attributes_at(self.path / schema.FAILURES / "zarr.json")
        return not (self.path / "zarr.json").exists() and known == schema.FAILURES_NOTE | {
            KEY: (known or {}).get(KEY)
        }

    def _publish_dataset(self, label_known: NDArray[np.bool_] | None) -> None:
        found = attributes_at(self.path / "zarr.json")
        if found is not None:
            lines = root_difference(schema.root_attributes(self.dataset), found)
            refuse(
                self.path,
                [*lines, *(first_rows(self.path, self.dataset) if lines else [])],
                "this store",
                "Where only the list changed (labels, splits, classes, order, its name), msq store "
                "relabel copies the features of clips that are in both.",
            )
        content = dataset_keys(self.dataset, msq.__version__, label_known)
        for key, value in content.items():
            path = self.path / key
            if key.endswith("zarr.json") or not path.exists():
                continue
            if path.read_bytes() != value:
                raise StoreError(
                    f"{path}: the bytes changed after they were written; "
                    "delete this file and run msq extract again"
                )
        self._publish(content)

    def _publish(self, content: Mapping[str, bytes]) -> list[str]:
        """Write the keys that are missing; returns those that were there.

        Raises:
            StoreError: metadata that is there is damaged.
        """
        present = []
        for key, value in content.items():
            path = self.path / key
            if path.exists():
                if key.endswith("zarr.json"):
                    read_metadata(path)
                present.append(key)
            else:
                write_file(path, [value])
        return present
