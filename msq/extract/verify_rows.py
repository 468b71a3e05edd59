"""The rows of one encoder: what the commit records say against what the files hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msq.errors import MsqError, StoreError
from msq.extract import store_schema as schema
from msq.extract.image_frames import apart
from msq.extract.shard import MISSING, read_chunk, read_index
from msq.extract.store_array import StoreArray
from msq.extract.store_folder import StoreFolder
from msq.extract.store_problems import Kind, Problem, Verification, listed
from msq.extract.store_records import Failure, read_failures
from msq.extract.store_seal import RECORD_KEY, record_is_whole
from msq.extract.store_views import views_in
from msq.extract.views import View

_READABLE = (schema.OK, schema.DEGRADED)
_BFLOAT16_EXPONENT = 0x7F80
_EACH = "features of each frame"


def verify_encoder(
    store: StoreFolder,
    kind: str,
    slug: str,
    clips: Sequence[str],
    files: Iterable[str],
    found: Verification,
) -> None:
    """Read all of an encoder that is recorded as done, and compare the records with the files.

    Args:
        store: where.
        kind: `video` or `image`.
        slug: the encoder.
        clips: ids of the rows.
        files: every file of the store, relative to it.
        found: gets what is wrong, and what was read.
    """
    try:
        store.spec(slug, kind)
        names = schema.array_names(kind, slug, store.has_image_frames(slug))
        features, *frames, times, status = arrays = [StoreArray(store.path / n) for n in names]
        views = views_in(status.attributes)
        _check_shapes(arrays, len(clips), len(views))
    except MsqError as error:
        found.problems.append(Problem("metadata", f"{names[0]}/zarr.json", str(error), (), slug))
        return
    data = {"features": features, "times": times, **({_EACH: frames[0]} if frames else {})}
    look = _Look(store, slug, clips, data, status, frozenset(files), found)
    pending = 0
    for number, view in enumerate(views):
        for shard in range(-(-len(clips) // look.size)):
            pending += look.shard(number, view, shard)
    if pending:
        total = len(views) * -(-len(clips) // look.size)
        found.notes.append(f"{slug}: {pending} of {total} shards are not extracted yet")
    look.beyond(len(views))


def _check_shapes(arrays: Sequence[StoreArray], rows: int, views: int) -> None:
    """Refuse arrays that do not go together; `status`, the last, is the one whose views count."""
    for array in arrays:
        # While views are added the features have them first.
        fits = array.shape[1] >= views if array is not arrays[-1] else array.shape[1] == views
        if array.shape[0] != rows or not fits:
            raise StoreError(
                f"{array.path / 'zarr.json'}: expected {rows} clips and {views} views, found "
                f"{array.shape[:2]}"
            )
        if array.attributes.get("spec_hash") != arrays[0].attributes.get("spec_hash"):
            raise StoreError(
                f"{array.path / 'zarr.json'}: its spec is not that of {arrays[0].path}"
            )


@dataclass(frozen=True)
class _Look:
    store: StoreFolder
    slug: str
    clips: Sequence[str]
    data: Mapping[str, StoreArray]  # all but the status, by what is in them
    status: StoreArray
    files: frozenset[str]
    found: Verification

    @property
    def size(self) -> int:
        """Rows of a shard."""
        return max(1, int(self.status.attributes.get("shard", 64)))

    def shard(self, view: int, named: View, shard: int) -> int:
        """Look at one shard of one view; returns 1 where it was not extracted yet."""
        rows = range(shard * self.size, min((shard + 1) * self.size, len(self.clips)))
        record = self.status.file(shard, view)
        if not self._is_there(record):
            if files := self._data_files(shard, view, rows):
                self._add("uncommitted", files[0], view, shard, [],
                          f"{len(files)} files of this shard are there and it has no commit record "
                          "(msq extract makes it again)")  # fmt: skip
            return 1
        try:
            codes = read_chunk(record, self.size)[: len(rows)]
        except StoreError as error:
            self._add("status", record, view, shard, [], str(error))
            return 0
        if (unknown := codes[codes > schema.DEGRADED]).size:
            self._add("status", record, view, shard, [], f"{record}: unknown status {unknown[0]}")
        readable = np.isin(codes, _READABLE)
        here = np.asarray(rows)[readable]
        self._contradictions(view, shard, rows, readable)
        read = {what: self._read(array, what, here, view, shard)
                for what, array in self.data.items()}  # fmt: skip
        if (pooled := read["features"]) is not None and (each := read.get(_EACH)) is not None:
            self._mean(pooled, each, here, view, shard)
        self.found.checked += len(here)
        self._failures(view, named, shard, rows, codes)
        return int((codes == schema.MISSING).any())

    def beyond(self, views: int) -> None:
        """Files of rows and views that the arrays do not have."""
        for array in (*self.data.values(), self.status):
            ours = array.rows_per_record if array is self.status else array.rows_per_file
            if ours is None:
                continue
            name = str(array.path.relative_to(self.store.path))
            counts = (-(-len(self.clips) // (ours or 1)), views, *(1 for _ in array.shape[2:]))
            for file in sorted(f for f in self.files if f.startswith(f"{name}/c/")):
                parts = file.removeprefix(f"{name}/c/").split("/")
                if not parts[-1].startswith(".") and not _is_chunk(parts, counts):
                    self._add("stray", self.store.path / file, 0, -1, [],
                              f"{self.store.path / file}: of no clip or view of the store"
                              )  # fmt: skip

    def _read(
        self, array: StoreArray, what: str, rows: NDArray[np.int64], view: int, shard: int
    ) -> NDArray[np.generic] | None:
        """Read rows, one by one where they cannot be read at once, and look at their values.

        Returns:
            All of them; None where there are none, or not all can be read.
        """
        if not len(rows):
            return None
        name = self.clips.__getitem__
        try:
            self._values(what, values := array.read(rows, view, name), rows, view, shard)
            return values
        except StoreError as error:
            first = error
        bad: list[int] = []
        for row in rows.tolist():
            one = np.array([row])
            try:
                self._values(what, array.read(one, view, name), one, view, shard)
            except StoreError as error:
                first = error if not bad else first
                bad.append(row)
        file = array.file(shard if array.rows_per_file != 0 else bad[0], view)
        more = f" ({len(bad)} clips: {listed([name(r) for r in bad])})" if len(bad) > 1 else ""
        self._add("data", file, view, shard, bad, f"{first}{more}")
        return None

    def _mean(
        self,
        pooled: NDArray[np.generic],
        each: NDArray[np.generic],
        rows: NDArray[np.int64],
        view: int,
        shard: int,
    ) -> None:
        """Rows whose features of each frame are not those of their image features."""
        dtype = str(self.data["features"].attributes.get("store_dtype"))
        if (off := apart(pooled, each, dtype)).any():
            these = rows[off].tolist()
            file = self.data[_EACH].file(shard, view)
            self._add("values", file, view, shard, these,
                      f"{file}: the mean of {_EACH} is not what image/{self.slug} holds: "
                      f"{listed([self.clips[r] for r in these])}")  # fmt: skip

    def _values(
        self,
        what: str,
        values: NDArray[np.generic],
        rows: NDArray[np.int64],
        view: int,
        shard: int,
    ) -> None:
        flat = values.reshape(len(values), -1)
        if what == "times":  # NaN where unknown
            bad = np.isinf(flat.astype(np.float32)).any(axis=1)
        elif self.data["features"].attributes.get("store_dtype") == "bfloat16":
            bits = flat.astype(np.uint16) & _BFLOAT16_EXPONENT
            bad = (bits == _BFLOAT16_EXPONENT).any(axis=1)
        else:
            bad = ~np.isfinite(flat).all(axis=1)
        array = self.data[what]
        if bad.any():
            these = rows[bad].tolist()
            file = array.file(shard if array.rows_per_file != 0 else these[0], view)
            self._add("values", file, view, shard, these,
                      f"{file}: {what} are not finite though their status is ok: "
                      f"{listed([self.clips[r] for r in these])}")  # fmt: skip
        zeros = rows[(flat == 0).all(axis=1)] if what == "features" else rows[:0]
        if len(zeros):
            names = listed([self.clips[r] for r in zeros.tolist()])
            self.found.notes.append(
                f"{self.slug}, view {view}: all features are zero for {len(zeros)} clips: {names}"
            )

    def _contradictions(
        self, view: int, shard: int, rows: range, readable: NDArray[np.bool_]
    ) -> None:
        """Rows that the files hold and the status says are not there."""
        for array in self.data.values():
            if array.rows_per_file is None:
                continue
            if array.rows_per_file == 0:
                there = np.array([self._is_there(array.file(row, view)) for row in rows])
            elif self._is_there(path := array.file(shard, view)):
                width = int(np.prod(array.shape[2:])) * array.dtype.itemsize
                try:
                    index = read_index(path, self.size, width)[: len(rows), 0]
                except StoreError as error:
                    if not readable.any():  # else reading the rows says so
                        self._add("data", path, view, shard, [], str(error))
                    continue
                there = index != MISSING
            else:
                continue
            extra = np.asarray(rows)[there & ~readable].tolist()
            if extra:
                file = array.file(shard if array.rows_per_file else extra[0], view)
                self._add("contradiction", file, view, shard, extra,
                          f"{file}: holds rows whose status says that they are not there: "
                          f"{listed([self.clips[r] for r in extra])}")  # fmt: skip

    def _failures(
        self, view: int, named: View, shard: int, rows: range, codes: NDArray[np.uint8]
    ) -> None:
        file = self.store.path / schema.FAILURES / f"{shard:05d}.json"
        recorded: list[Failure] = []
        if self._is_there(file):
            content = file.read_bytes()
            try:
                document = json.loads(content)
                said_anything = document["clips"] or document.get("batches")
                whole = record_is_whole(document) and bool(said_anything)
                # A store with digests has them in every file of failures.
                sealed = "metadata_sha256" in self.store.attributes
                whole = whole and (RECORD_KEY in document or not sealed)
            except (ValueError, KeyError, TypeError, AttributeError):
                whole = False
            if not whole:
                self._add("failures", file, view, shard, [],
                          f"{file}: checksum wrong, or no list of failures; it was changed after "
                          "it was written")  # fmt: skip
                return
            recorded = read_failures(content)
        said = {
            (f.row, f.clip, f.status)
            for f in recorded
            if f.encoder == self.slug and f.view == str(named)
        }
        wanted = {
            (row, self.clips[row], int(code))
            for row, code in zip(rows, codes, strict=True)
            if code in (schema.UNDECODABLE, schema.DEGRADED)
        }
        if said != wanted:
            these = sorted({row for row, *_ in said ^ wanted if row < len(self.clips)})
            names = listed([self.clips[r] for r in these])
            self._add("failures", file, view, shard, these,
                      f"{file}: not what the status of {self.slug} says, for {names}")  # fmt: skip

    def _is_there(self, path: Path) -> bool:
        return str(path.relative_to(self.store.path)) in self.files

    def _data_files(self, shard: int, view: int, rows: range) -> list[Path]:
        found = []
        for array in self.data.values():
            units = rows if array.rows_per_file == 0 else [shard]
            paths = [array.file(unit, view) for unit in units]
            found += [path for path in paths if self._is_there(path)]
        return found

    def _add(
        self, kind: Kind, file: Path, view: int, shard: int, rows: Sequence[int], message: str
    ) -> None:
        inside = str(file.relative_to(self.store.path))
        text = message if str(file) in message else f"{file}: {message}"
        clips = tuple(self.clips[row] for row in rows)
        problem = Problem(kind, inside, text, clips, self.slug, view, shard)
        if problem not in self.found.problems:
            self.found.problems.append(problem)


def _is_chunk(parts: Sequence[str], counts: Sequence[int]) -> bool:
    """Whether the names below an array's `c/` are a chunk's, of so many along each dimension."""
    return len(parts) == len(counts) and all(
        part.isascii() and part.isdecimal() and str(int(part)) == part and int(part) < count
        for part, count in zip(parts, counts, strict=True)
    )
