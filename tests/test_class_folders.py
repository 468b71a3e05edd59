"""Trees with a folder per class: which folders are splits, and that nothing is lost unsaid."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from msq.errors import DatasetError
from msq.extract.datasets import read_folder
from msq.extract.datasets.registry import find_adapter


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def clips(root: Path) -> list[tuple[str, str]]:
    return [(clip.id, clip.split) for clip in read_folder(root).clips]


def test_split_folders_by_other_names_are_split_folders(tmp_path: Path) -> None:
    root = tree(tmp_path, "Testing/run/c.mp4", "train/run/a.mp4", "validation/eat/b.mp4")
    expected = [("train/run/a", "train"), ("validation/eat/b", "val"), ("Testing/run/c", "test")]
    assert clips(root) == expected
    assert read_folder(root).skipped == ()


def test_what_lies_beside_split_folders_is_skipped_and_said(tmp_path: Path) -> None:
    root = tree(tmp_path, "train/run/a.mp4", "holdout/run/b.mp4", "holdout/run/deep/c.mp4",
                "notes.txt", ".cache/x.mp4", "test/run/.hidden.mp4")  # fmt: skip
    assert clips(root) == [("train/run/a", "train")]
    skipped = read_folder(root).skipped
    assert [item for item, _ in skipped] == [
        *("holdout/run/b.mp4", "holdout/run/deep/c.mp4", "notes.txt")
    ]
    assert {reason for _, reason in skipped} == {
        "beside the split folders train, test: expected <class>/<video> in one of them"
    }
    assert [item for item, _ in read_folder(root).left_out] == ["notes.txt"]  # no video at all


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    root = tree(tmp_path, "bus/a.mp4", "car/b.mp4", "train/c.mp4", "train/deep/notes.txt")
    dataset = read_folder(root)
    assert dataset.classes == ("bus", "car", "train")
    assert [clip.id for clip in dataset.clips] == ["bus/a", "car/b", "train/c"]
    assert [item for item, _ in dataset.skipped] == ["train/deep/notes.txt"]
    survey = find_adapter("folder").survey(root, {})
    assert any("without split folders" in note for note in survey.notes)


def test_split_folders_without_classes_are_no_classes(tmp_path: Path) -> None:
    root = tree(tmp_path, "train/a.mp4", "test/b.mp4", "papers/notes.pdf")
    with pytest.raises(DatasetError, match="found none"):
        read_folder(root)


def test_links_to_folders_are_followed_and_links_to_nothing_are_said(tmp_path: Path) -> None:
    far = tree(tmp_path / "far", "a.mp4", "b.mp4")
    root = tree(tmp_path / "root", "eat/c.mp4")
    (root / "run").symlink_to(far)
    (far / "loop").symlink_to(root)
    (root / "eat" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    dataset = read_folder(root)
    assert [clip.id for clip in dataset.clips] == ["eat/c", "run/a", "run/b"]
    assert dataset.skipped == (("eat/gone.mp4", "not a file, or a link to none"),)


def test_a_file_whose_name_is_not_utf8_is_skipped_and_said(tmp_path: Path) -> None:
    root = tree(tmp_path, "eat/a.mp4", "run/b.mp4")
    try:
        (root / os.fsdecode(b"run/l\xf6we.mp4")).write_bytes(b"x")
        (root / os.fsdecode(b"f\xfctter")).mkdir()
        (root / os.fsdecode(b"f\xfctter/c.mp4")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    dataset = read_folder(root)
    assert [clip.id for clip in dataset.clips] == ["eat/a", "run/b"]
    assert dataset.classes == ("eat", "run")
    assert dataset.skipped == (
        ("f\\udcfctter/c.mp4", "the name is not UTF-8 (as Latin-1 it reads 'fütter/c.mp4'); "
                               "rename it"),
        ("run/l\\udcf6we.mp4", "the name is not UTF-8 (as Latin-1 it reads 'run/löwe.mp4'); "
                               "rename it"),
    )  # fmt: skip
    json.dumps(dataset.skipped, ensure_ascii=False).encode()
