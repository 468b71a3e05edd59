"""Rows of a store in the formats of other programs."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from msq.errors import UsageError
from msq.extract.atomic import write_file
from msq.extract.store import FeatureStore
from msq.extract.views import View

if TYPE_CHECKING:  # a zip file of a store is written without it
    import torch

_PER_ROW, _PER_FILE = 256, 2**14  # bytes of an HDF5 file beside its numbers: index, ids, head


class Rows:
    """The rows of one encoder and view that can be read, a shard at a time.

    With `image_frames` its features of each frame instead of their mean.
    """

    def __init__(
        self, store: FeatureStore, encoder: str, view: int | View, image_frames: bool = False
    ) -> None:
        self.store = store
        self.numbers: list[int] = store.ok_rows([encoder], view).tolist()
        if not self.numbers:
            raise UsageError(f"{store.path}: no row of {encoder!r} is there to be written")
        self._encoder, self._view = encoder, view
        pooled = store.tokens if encoder in store.encoders("video") else store.image
        self._read = store.image_frames if image_frames else pooled
        self._step = store.shard(encoder)
        self.shape = tuple(self._read(self.numbers[:1], encoder, view).shape[1:])

    @property
    def ids(self) -> list[str]:
        """Ids of the rows."""
        return [self.store.clips[row] for row in self.numbers]

    def parts(self) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Row numbers and their features, in order."""
        for first in range(0, len(self.numbers), self._step):
            rows = self.numbers[first : first + self._step]
            yield rows, self._read(rows, self._encoder, self._view)

    def arrays(self) -> Iterator[tuple[list[int], NDArray[np.generic]]]:
        """The same in numpy; bfloat16, which numpy lacks, as float32, which holds it exactly."""
        widened = self.store.store_dtype(self._encoder) == "bfloat16"
        for rows, values in self.parts():
            plain = values.float() if widened else values
            yield rows, plain.numpy()

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of `arrays`."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def dtype(self) -> np.dtype[Any]:
        """Number type of `arrays`."""
        stored = self.store.store_dtype(self._encoder)
        return np.dtype("float32" if stored == "bfloat16" else stored)


def write_hdf5(rows: Rows, file: Path) -> None:
    """Arrays `features` `[n, ...]` and `ids`."""
    import h5py

    _require_room(file, len(rows.numbers) * (rows.row_bytes + _PER_ROW) + _PER_FILE)
    with h5py.File(file, "w") as h5:
        shape = (len(rows.numbers), *rows.shape)
        features = h5.create_dataset("features", shape, rows.dtype, fletcher32=True,
                                     chunks=(1, *rows.shape))  # fmt: skip
        h5.create_dataset("ids", data=rows.ids, dtype=h5py.string_dtype())
        done = 0
        for _, values in rows.arrays():
            features[done : done + len(values)] = values
            done += len(values)


def _require_room(file: Path, size: int) -> None:
    """Refuse what does not fit before it is begun: h5py crashes when a disk is full.

    Raises:
        OSError: so many bytes cannot be had.
    """
    if hasattr(os, "posix_fallocate"):
        with file.open("wb") as handle:
            os.posix_fallocate(handle.fileno(), 0, size)
        file.unlink()
    elif shutil.disk_usage(file.parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_npz(rows: Rows, file: Path) -> None:
    """The same as numpy's archive, not compressed."""
    head = {"shape": (len(rows.numbers), *rows.shape), "fortran_order": False,
            "descr": np.lib.format.dtype_to_descr(rows.dtype)}  # fmt: skip
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(_entry("features.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, head)
            for _, values in rows.arrays():
                member.write(np.ascontiguousarray(values).tobytes())
        with archive.open(_entry("ids.npy"), "w") as member:
            np.lib.format.write_array(member, np.array(rows.ids), allow_pickle=False)


def write_safetensors(rows: Rows, file: Path) -> None:
    """An array per clip, as the format has no list of ids; all of them are in memory at a time."""
    from safetensors.torch import save_file

    if "__metadata__" in rows.ids:
        raise UsageError(f"{file.name}: safetensors cannot hold a clip called '__metadata__'")
    tensors = {
        rows.store.clips[row]: value.clone()
        for numbers, values in rows.parts()
        for row, value in zip(numbers, values, strict=True)
    }
    save_file(tensors, file)


def write_npy(rows: Rows, target: Path) -> None:
    """A folder with a file per clip, which a `/` in its id puts into a subfolder.

    Raises:
        UsageError: a clip's id can be no file.
    """
    for clip in rows.ids:
        parts = PurePosixPath(clip).parts
        bad = not parts or clip != "/".join(parts) or any(p.startswith(".") for p in parts)
        if bad or "\0" in clip or clip.startswith("/"):
            raise UsageError(f"{clip!r}: this id can be no file; export to .h5 or .npz")
    for numbers, values in rows.arrays():
        for row, value in zip(numbers, values, strict=True):
            head = {"shape": value.shape, "fortran_order": False,
                    "descr": np.lib.format.dtype_to_descr(value.dtype)}  # fmt: skip
            with tempfile.SpooledTemporaryFile() as buffer:
                np.lib.format.write_array_header_1_0(buffer, head)
                buffer.write(np.ascontiguousarray(value).tobytes())
                buffer.seek(0)
                write_file(target / f"{rows.store.clips[row]}.npy", [buffer.read()])


def write_zip(store: FeatureStore, file: Path) -> None:
    """Every file of the store as it is, not compressed: zarr's ZipStore and msq open it."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for path in sorted(p for p in store.path.rglob("*") if p.is_file()):
            name = str(path.relative_to(store.path))
            if not path.name.startswith("."):
                archive.writestr(_entry(name), path.read_bytes())


def _entry(name: str) -> zipfile.ZipInfo:
    """The same bytes whenever it is written: a fixed date."""
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
