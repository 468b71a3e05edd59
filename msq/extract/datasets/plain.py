"""Adapters around the plain ways in: a folder per class, and a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from msq.errors import DatasetError
from msq.extract.datasets.adapter import Adapter, Survey
from msq.extract.datasets.dataset import Dataset, Task
from msq.extract.datasets.folder import read_folder, split_folders
from msq.extract.datasets.manifest import Policy, read_manifest
from msq.extract.datasets.options import check_options, choice
from msq.extract.datasets.survey import survey_dataset

MANIFESTS = ("manifest.csv", "manifest.jsonl", "manifest.tsv")
POLICIES = ("skip", "error", "keep")
FOLDER_OPTIONS = {
    "name": "the dataset's name (default: the folder's)",
    "policy": "skip (default), error, or keep, which takes a.mp4 beside a.avi as a~2",
}
MANIFEST_OPTIONS = {
    "classes": "file that fixes the class order (default: sorted names)",
    "task": "multilabel (default) or singlelabel",
    "policy": "skip (default), error, or keep: what becomes of a line that cannot be used; keep "
    "joins duplicates of one clip, renames those of others, leaves unknown labels off, and lists "
    "each",
    "name": "the dataset's name (default: the file's)",
}


def _read_folder(root: Path, options: Mapping[str, str]) -> Dataset:
    check_options("folder", options, FOLDER_OPTIONS)
    policy = choice("folder", options, "policy", POLICIES, "skip")
    data = read_folder(
        root, name=options.get("name"), policy="keep" if policy == "keep" else "skip"
    )
    if policy == "error" and data.unusable:
        item, reason = data.unusable[0]
        raise DatasetError(
            f"dataset folder, {item}: {reason} (--policy error; {len(data.unusable)} such items)"
        )
    return data


def _survey_folder(root: Path, options: Mapping[str, str]) -> Survey:
    note = "train and test without split folders: by a hash of the id, a fifth is test"
    data = _read_folder(root, options)
    return survey_dataset("folder", data, root, notes=() if split_folders(root) else (note,))


def _read_manifest(root: Path, options: Mapping[str, str]) -> Dataset:
    check_options("manifest", options, MANIFEST_OPTIONS)
    classes = options.get("classes")
    return read_manifest(
        _manifest_file(root),
        classes=Path(classes) if classes else None,
        task=cast(
            Task, choice("manifest", options, "task", ("multilabel", "singlelabel"), "multilabel")
        ),
        name=options.get("name"),
        policy=cast(Policy, choice("manifest", options, "policy", POLICIES, "skip")),
    )


def _survey_manifest(root: Path, options: Mapping[str, str]) -> Survey:
    data = _read_manifest(root, options)
    return survey_dataset("manifest", data, _manifest_file(root).parent)


def _manifest_file(root: Path) -> Path:
    """The manifest itself, or the one that a folder holds."""
    root = Path(root)
    if not root.is_dir():
        return root
    there = [root / name for name in MANIFESTS if (root / name).is_file()]
    if len(there) != 1:
        raise DatasetError(
            f"{root}: expected one of {', '.join(MANIFESTS)}, found "
            f"{', '.join(p.name for p in there) or 'none'}; name the file itself as --root"
        )
    return there[0]


FOLDER = Adapter(
    name="folder",
    title="A folder per class",
    needs="CLASS/VIDEO or {train,val,test}/CLASS/VIDEO",
    access="your own videos",
    options=FOLDER_OPTIONS,
    read=_read_folder,
    survey=_survey_folder,
)
MANIFEST = Adapter(
    name="manifest",
    title="A CSV or JSONL of paths, labels and splits",
    needs="the manifest (as --root), or a folder with manifest.csv",
    access="your own videos",
    options=MANIFEST_OPTIONS,
    read=_read_manifest,
    survey=_survey_manifest,
)
