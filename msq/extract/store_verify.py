"""Reading all of a store: checksums, missing and cut files, status against data, values.

Nothing here stops at the first thing that is wrong, and nothing that cannot be read is left out:
what keeps a part from being looked at is itself a problem.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from msq.errors import MsqError, StoreError
from msq.extract import store_schema as schema
from msq.extract.atomic import TEMPORARY_SUFFIX
from msq.extract.image_frames import frames_in
from msq.extract.store_folder import StoreFolder, read_root
from msq.extract.store_problems import Kind, Problem, Verification, listed
from msq.extract.store_seal import layout_is_changed, read_metadata, recorded_digests
from msq.extract.store_versions import copy_in_words
from msq.extract.verify_rows import verify_encoder

if TYPE_CHECKING:
    from msq.extract.store import FeatureStore

_DATASET_ARRAYS = ("clip", "split", "label", "label_known")
_GROUPS = ("tokens", "image", "time", "status", "text")


def problems_in(store: FeatureStore) -> list[str]:
    """Read every row, of every encoder and view, that is recorded as done.

    Returns:
        What is wrong, one line each; nothing where all is sound. Files without a commit record,
        which an interrupted run leaves, are of no row that is recorded as done.
    """
    found = verify_store(store.path).problems
    return [str(problem) for problem in found if problem.kind != "uncommitted"]


def verify_store(path: Path) -> Verification:
    """Look at every file of a store and read every row that is recorded as done.

    Raises:
        StoreNotFound: there is no store, or nothing but the root's metadata is missing of it.
    """
    found = Verification()
    try:
        root = read_root(path)
    except StoreError as error:
        if not (path / schema.FAILURES).exists():
            raise
        found.problems.append(Problem("metadata", "zarr.json", str(error)))
        return found
    files = sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())
    found.files = len(files)
    damaged = _metadata(path, files, found)
    _strays(path, files, found)
    if (copied := copy_in_words(root)) is not None:
        found.notes.append(copied)
    store = StoreFolder(path, lenient=True)
    count = int(root["clips"])
    clips = _dataset(store, count, damaged, found)
    _lost_features(store, files, found)
    for kind in ("video", "image"):
        for slug in store.encoders(kind):
            arrays = schema.array_names(kind, slug, store.has_image_frames(slug))
            missing = [a for a in arrays if f"{a}/zarr.json" not in files]
            group = f"{schema.IMAGE_FRAMES}/zarr.json"
            if f"{schema.IMAGE_FRAMES}/{slug}" in missing and group not in files:
                _add(found, "metadata", path / group, path, "missing")
            for array in missing:
                _add(found, "metadata", path / array / "zarr.json", path, "missing", encoder=slug)
            # What cannot be told apart from a change is not read: the metadata says how to.
            if not missing and not {f"{a}/zarr.json" for a in arrays} & damaged:
                verify_encoder(store, kind, slug, clips, files, found)
    for slug in store.encoders("text"):
        _text(store, slug, damaged, found)
    return found


def _add(
    found: Verification, kind: Kind, file: Path, root: Path, message: str, encoder: str = ""
) -> None:
    inside = str(file.relative_to(root))
    found.problems.append(Problem(kind, inside, f"{file}: {message}", encoder=encoder))


def _metadata(path: Path, files: list[str], found: Verification) -> set[str]:
    """Check every `zarr.json` against its digest; returns those that are wrong."""
    damaged: set[str] = set()
    unsealed: list[str] = []
    documents = [file for file in files if file.rpartition("/")[2] == "zarr.json"]
    present = {file.rpartition("/")[0] for file in documents}
    for file in documents:
        try:
            document = read_metadata(path / file)
            if not recorded_digests(document):
                unsealed.append(file)
            elif layout_is_changed(document):
                found.notes.append(f"{path / file}: other chunks or codecs than msq wrote")
        except StoreError as error:
            damaged.add(file)
            found.problems.append(Problem("metadata", file, str(error)))
    if unsealed and "zarr.json" not in unsealed:
        # A store whose root has one was begun with them: one that lacks it has lost it.
        for file in unsealed:
            damaged.add(file)
            _add(found, "metadata", path / file, path, "its digest is missing, it was changed")
    elif unsealed:
        found.notes.append(
            f"{len(unsealed)} of {len(documents)} metadata files were written before there were "
            "digests: a changed byte in them cannot be seen"
        )
    above = {str(parent) for name in present for parent in PurePosixPath(name).parents} - {"."}
    for name in sorted({*_GROUPS, schema.FAILURES, *_DATASET_ARRAYS[:3], *above} - present):
        _add(found, "metadata", path / name / "zarr.json", path, "missing")
    return damaged


def _lost_features(store: StoreFolder, files: list[str], found: Verification) -> None:
    """Encoders whose features are gone as a whole, while the arrays beside them are there."""
    known = {*store.encoders("video"), *store.encoders("image")}
    for file in files:
        group, _, slug = file.removesuffix("/zarr.json").partition("/")
        beside = group in ("time", "status", schema.IMAGE_FRAMES) and file.count("/") == 2
        if not beside or not file.endswith("/zarr.json") or slug in known:
            continue
        try:
            spec = read_metadata(store.path / file)["attributes"]["msq"]["encoder"]
            lost = schema.FEATURE_GROUP[spec["kind"]]
        except (StoreError, KeyError, TypeError):
            continue  # damaged, which is said elsewhere
        known.add(slug)
        place = store.path / lost / slug / "zarr.json"
        _add(found, "metadata", place, store.path, "missing", encoder=slug)


def _strays(path: Path, files: list[str], found: Verification) -> None:
    """Files that belong to nothing: of killed writers, or of somebody else."""
    known = {file.rpartition("/")[0] for file in files if file.endswith("/zarr.json")}
    known |= _coming_frames(path, files, found)
    for file in files:
        folder, _, name = file.rpartition("/")
        if name.startswith(".") and name.endswith(TEMPORARY_SUFFIX):
            found.notes.append(f"{path / file}: left by a writer that was killed")
        elif name == "zarr.json" or (
            folder == schema.FAILURES and name.removesuffix(".json").isdigit()
        ):
            continue
        elif file.split("/c/")[0] not in known:
            _add(found, "stray", path / file, path, "belongs to no array of the store")


def _coming_frames(path: Path, files: list[str], found: Verification) -> set[str]:
    """Arrays of features of each frame that are being added, and have no metadata as yet."""
    group = f"{schema.IMAGE_FRAMES}/"
    chunks = Counter(f.split("/")[1] for f in files if f.startswith(group) and "/c/" in f)
    coming = {slug for slug in chunks if frames_in(path, slug) == "adding"}
    for slug in sorted(coming):
        found.notes.append(
            f"{slug}: features of each frame are being added, {chunks[slug]} shards have them and "
            "nobody sees them yet (the next msq extract with this encoder completes them)"
        )
    return {f"{group}{slug}" for slug in coming}


def _dataset(
    store: StoreFolder, count: int, damaged: set[str], found: Verification
) -> tuple[str, ...]:
    """Check clip ids, splits, partitions and labels; returns the ids, or row numbers for them."""
    names = [*_DATASET_ARRAYS, *(f"partition/{p['name']}" for p in store.attributes.get(
        "partitions", ()))]  # fmt: skip
    ids = tuple(f"row {row}" for row in range(count))
    for name in names:
        if name == "label_known" and not (store.path / name).exists():
            continue
        if f"{name}/zarr.json" in damaged:
            continue
        try:
            values = store.small_array(name)
        except MsqError as error:
            found.problems.append(Problem("dataset", name, str(error)))
            continue
        if len(values) != count:
            _add(found, "dataset", store.path / name, store.path,
                 f"expected {count} rows, found {len(values)}")  # fmt: skip
        elif name == "clip":
            ids = tuple(str(value) for value in values.tolist())
            if len({*ids}) != count:
                _add(found, "dataset", store.path / name, store.path, "an id is there twice")
    return ids


def _text(store: StoreFolder, slug: str, damaged: set[str], found: Verification) -> None:
    for entry in sorted((store.path / "text" / slug).glob("*/zarr.json")):
        name = f"text/{slug}/{entry.parent.name}"
        if f"{name}/zarr.json" in damaged:
            continue
        try:
            values = store.small_array(name)
        except MsqError as error:
            found.problems.append(Problem("text", name, str(error), encoder=slug))
            continue
        if len(values) != len(store.classes):
            _add(found, "text", store.path / name, store.path,
                 f"expected {len(store.classes)} classes, found {len(values)}", slug)  # fmt: skip
        bad = np.flatnonzero(~np.isfinite(values.astype(np.float32)).all(axis=1))
        if len(bad):
            names = listed([store.classes[k] for k in bad if k < len(store.classes)])
            _add(found, "text", store.path / name, store.path,
                 f"not finite for {len(bad)} classes: {names}", slug)  # fmt: skip
