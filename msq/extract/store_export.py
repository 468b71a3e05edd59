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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msq.errors import UsageError
from msq.extract.atomic import write_file
from msq.extract.export_formats import (
    Rows,
    write_hdf5,
    write_npy,
    write_npz,
    write_safetensors,
    write_zip,
)
from msq.extract.location import is_local, locate, upload
from msq.extract.store import open_store
from msq.extract.views import View


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
    source: str | Path,
    out: str | Path,
    *,
    encoder: str | None = None,
    view: int | View = 0,
    image_frames: bool = False,
) -> ExportResult:
    """Write one encoder's features to a file, or the whole store to one zip file.

    Args:
        source: the store.
        out: ends in `.h5`, `.hdf5`, `.npz`, `.safetensors` or `.zip`; without a suffix it is a
            folder with an npy file per clip. A URL is written by one call per file.
        encoder: name of the video or image encoder; not needed where there is one.
        view: which view of it.
        image_frames: an image encoder's features of each frame `[T, D'']` instead of their mean;
            a zip file has both.

    Raises:
        StoreError: rows that cannot be read, or no features of each frame.
        UsageError: another suffix, something is there already, or a clip's id can be no file.
    """
    store, target = open_store(source), locate(out)
    if target.exists():
        raise UsageError(f"{target}: expected a new file or folder, this one is there already")
    suffix = target.suffix.lower()
    if suffix == ".zip":
        _deliver(target, lambda file: write_zip(store, file))
        return ExportResult(str(target), "zip", "", "", len(store), [], "", "")
    write = _WRITERS.get(suffix)
    if write is None:
        known = ", ".join((*_WRITERS, ".zip"))
        raise UsageError(f"{target}: expected a name that ends in {known}, or without a suffix")
    kinds = ("image",) if image_frames else ("video", "image")
    names = [name for kind in kinds for name in store.encoders(kind)]
    if encoder is None and len(names) == 1:
        encoder = names[0]
    if encoder not in names:
        raise UsageError(
            f"{store.path}: --encoder {encoder or ''}: expected one of "
            f"{', '.join(names) or 'the image encoders, found none'}"
        )
    rows = Rows(store, encoder, view, image_frames)
    if suffix:
        _deliver(target, lambda file: write(rows, file))
    else:
        write_npy(rows, target)
    manifest, classes = _companions(rows, target)
    missing = sorted({*range(len(store))} - {*rows.numbers})
    return ExportResult(
        str(target), suffix.lstrip(".").replace("hdf5", "h5") or "npy", encoder,
        str(view if isinstance(view, View) else store.views(encoder)[view]), len(rows.numbers),
        [store.clips[row] for row in missing], manifest, classes,
    )  # fmt: skip


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
    ".h5": write_hdf5,
    ".hdf5": write_hdf5,
    ".npz": write_npz,
    ".safetensors": write_safetensors,
    "": write_npy,
}
