"""A store for other programs: one encoder's features as h5, npz, npy files or safetensors; or zip.

All but the zip file are what `msq store import` reads, bit by bit: beside the features lie a
manifest (ids, labels, splits; no paths) and the classes in their order.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from msq.errors import UsageError
from msq.extract.atomic import write_file
from msq.extract.location import is_local, locate, upload
from msq.extract.store import FeatureStore, open_store
from msq.extract.views import View

_PER_ROW, _PER_FILE = 256, 2**14  # bytes of an HDF5 file beside its numbers: index, ids, head


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        out: the file or folder.
        format: `h5`, `npz`, `safetensors`, `npy` or `zip`.
        encoder: whose features; "" for a zip file, which holds the whole store.
        view: which view of them.
        clips: rows written.
        left_out: ids of clips that have no features, and are not there.
        manifest: file with ids, labels and splits; "" for a zip file.
        classes: file with the class names in order; "" for a zip file.
    """

    out: str
    format: str
    encoder: str
    view: str
    clips: int
    left_out: list[str]
    manifest: str
    classes: str

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return asdict(self)


def export_store(
    source: str | Path, out: str | Path, *, encoder: str | None = None, view: int | View = 0
) -> ExportResult:
    """Write one encoder's features to a file, or the whole store to one zip file.

    Args:
        source: the store.
        out: ends in `.h5`, `.hdf5`, `.npz`, `.safetensors` or `.zip`; without a suffix it is a
            folder with an npy file per clip. A URL is written by one call per file.
        encoder: name of the video or image encoder; not needed where there is one.
        view: which view of it.

    Raises:
        StoreError: rows that cannot be read.
        UsageError: another suffix, something is there already, or a clip's id can be no file.
    """
    store, target = open_store(source), locate(out)
    if target.exists():
        raise UsageError(f"{target}: expected a new file or folder, this one is there already")
    suffix = target.suffix.lower()
    if suffix == ".zip":
        _deliver(target, lambda file: _write_zip(store, file))
        return ExportResult(str(target), "zip", "", "", len(store), [], "", "")
    write = _WRITERS.get(suffix)
    if write is None:
        known = ", ".join((*_WRITERS, ".zip"))
        raise UsageError(f"{target}: expected a name that ends in {known}, or without a suffix")
    names = [*store.encoders("video"), *store.encoders("image")]
    if encoder is None and len(names) == 1:
        encoder = names[0]
    if encoder not in names:
        raise UsageError(
            f"{store.path}: --encoder {encoder or ''}: expected one of {', '.join(names)}"
        )
    rows = Rows(store, encoder, view)
    if suffix:
        _deliver(target, lambda file: write(rows, file))
    else:
        _write_npy(rows, target)
    manifest, classes = _companions(rows, target)
    missing = sorted({*range(len(store))} - {*rows.numbers})
    return ExportResult(
        str(target), suffix.lstrip(".").replace("hdf5", "h5") or "npy", encoder,
        str(view if isinstance(view, View) else store.views(encoder)[view]), len(rows.numbers),
        [store.clips[row] for row in missing], manifest, classes,
    )  # fmt: skip


class Rows:
    """The rows of one encoder and view that can be read, a shard at a time."""

    def __init__(self, store: FeatureStore, encoder: str, view: int | View) -> None:
        self.store = store
        self.numbers: list[int] = store.ok_rows([encoder], view).tolist()
        if not self.numbers:
            raise UsageError(f"{store.path}: no row of {encoder!r} is there to be written")
        self._encoder, self._view = encoder, view
        self._read = store.tokens if encoder in store.encoders("video") else store.image
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
        for rows, values in self.parts():
            plain = values.float() if values.dtype == torch.bfloat16 else values
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


def _write_hdf5(rows: Rows, file: Path) -> None:
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


def _write_npz(rows: Rows, file: Path) -> None:
    head = {"shape": (len(rows.numbers), *rows.shape), "fortran_order": False,
            "descr": np.lib.format.dtype_to_descr(rows.dtype)}  # fmt: skip
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(_entry("features.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, head)
            for _, values in rows.arrays():
                member.write(np.ascontiguousarray(values).tobytes())
        with archive.open(_entry("ids.npy"), "w") as member:
            np.lib.format.write_array(member, np.array(rows.ids), allow_pickle=False)


def _write_safetensors(rows: Rows, file: Path) -> None:
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


def _write_npy(rows: Rows, target: Path) -> None:
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


def _write_zip(store: FeatureStore, file: Path) -> None:
    """Every file of the store as it is, not compressed: zarr's ZipStore and msq open it."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for path in sorted(p for p in store.path.rglob("*") if p.is_file()):
            name = str(path.relative_to(store.path))
            if not path.name.startswith("."):
                archive.writestr(_entry(name), path.read_bytes())


def _entry(name: str) -> zipfile.ZipInfo:
    """The same bytes whenever it is written: a fixed date."""
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))


def _companions(rows: Rows, target: Path) -> tuple[str, str]:
    store = rows.store
    labels, known = store.labels().tolist(), store.label_known()
    lines = []
    for row in rows.numbers:
        if known is not None and not bool(known[row].all()):
            names = [store.classes[k] for k in range(len(store.classes)) if not known[row, k]]
            extra = {"unknown": names}
        else:
            extra = {}
        chosen = [name for name, one in zip(store.classes, labels[row], strict=True) if one]
        line = {"id": store.clips[row], "path": store.clips[row], "labels": chosen,
                "split": store.splits[row], **extra}  # fmt: skip
        lines.append(json.dumps(line, ensure_ascii=False))
    manifest = target.with_name(f"{target.name}.manifest.jsonl")
    classes = target.with_name(f"{target.name}.classes.txt")
    write_file(manifest, ["".join(f"{line}\n" for line in lines).encode()])
    write_file(classes, ["".join(f"{name}\n" for name in store.classes).encode()])
    return str(manifest), str(classes)


def _deliver(target: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name and publish it whole; to a URL in one call.

    Raises:
        OSError: naming `target`: the disk is full, say; nothing is left of it.
    """
    from safetensors import SafetensorError

    with tempfile.TemporaryDirectory(dir=_beside(target), prefix=".msq-export-") as folder:
        file = Path(folder) / target.name
        try:
            write(file)
            if is_local(target):
                shutil.move(file, target)
            else:
                upload(file, target)
        except (OSError, SafetensorError) as error:
            named = getattr(error, "filename", None)
            if named is not None and not str(named).startswith(folder):
                raise  # of the store that is read
            # Libraries name no file, or the temporary one, and some give no number either.
            number = getattr(error, "errno", None) or _number_in(error)
            raise OSError(number, os.strerror(number), str(target)) from error


def _number_in(error: Exception) -> int:
    """The system's number of an error, from what a library says of it."""
    known = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return next((number for number in known if os.strerror(number) in str(error)), errno.EIO)


def _beside(target: Path) -> Path | None:
    if not is_local(target):
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent


_WRITERS: dict[str, Callable[[Rows, Path], None]] = {
    ".h5": _write_hdf5,
    ".hdf5": _write_hdf5,
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
    "": _write_npy,
}
