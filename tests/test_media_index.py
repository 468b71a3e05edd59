"""Where clips are found: kinds, spellings, order of folders, and where a missing one belongs."""

from __future__ import annotations

import os

import pytest

from msq.extract.datasets.media_index import MediaIndex, Place


@pytest.fixture
def root(tmp_path):
    for name in (
        "videos/a.mp4", "videos/b.avi", "videos/B.mkv", "videos/run/c.webm", "videos/notes.txt",
        "frames/a/1.jpg", "frames/d.mp4/1.jpg", "e.mp4", "e/1.jpg",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "folders", "path", "kind"),
    [
        ("a.mp4", ["videos", "frames"], "videos/a.mp4", "video"),
        ("a.mp4", ["frames", "videos"], "frames/a", "frames"),
        ("a.mp4", [("frames", "video"), "videos"], "videos/a.mp4", "video"),
        ("a.mp4", [("videos", "frames"), ("frames", "frames")], "frames/a", "frames"),
        ("b.mp4", ["videos"], "videos/b.avi", "video"),  # another type, the same letters first
        ("B.mp4", ["videos"], "videos/B.mkv", "video"),
        ("A.mp4", ["videos"], "videos/a.mp4", "video"),
        ("d.mp4", ["frames"], "frames/d.mp4", "frames"),  # a folder of that very name
        ("e.mp4", [""], "e.mp4", "video"),  # the video before a folder of its frames
        ("e", [""], "e", "frames"),  # unless it is named so
        ("e", [("", "video")], "e.mp4", "video"),
        ("e.mp4", [("", "frames")], "e", "frames"),
        ("run/c.mp4", ["", "videos"], "videos/run/c.webm", "video"),
        ("walk/a.mp4", ["videos"], "videos/a.mp4", "video"),  # flat
        ("notes.txt", ["videos"], "videos/notes.txt", "missing"),
        ("x.mp4", ["", "elsewhere", "frames", "videos"], "frames/x.mp4", "missing"),
        ("x.mp4", [("elsewhere", "video"), ("frames", "frames")], "frames/x", "missing"),
        ("x.mp4", ["elsewhere", ""], "elsewhere/x.mp4", "missing"),
    ],
)
def test_a_clip_is_found_or_its_place_is_named(root, name, folders, path, kind):
    media = MediaIndex(root, folders)
    assert media.find(name) == Place(root / path, kind)
    assert media.missing == ((name,) if kind == "missing" else ())


def test_without_flat_only_the_names_own_folders_count(root):
    assert MediaIndex(root, ["videos"], flat=False).find("walk/a.mp4").kind == "missing"
    assert MediaIndex(root, ["videos"], flat=False).find("run/c.mp4").kind == "video"


def test_other_names_come_after_all_folders_of_the_first(root):
    media = MediaIndex(root, ["videos", "frames"])
    assert media.find("x.mp4", "a.mp4").path == root / "videos/a.mp4"
    assert media.find("d.mp4", "a.mp4").path == root / "frames/d.mp4"
    assert media.missing == ()


def test_each_folder_is_listed_once(root, monkeypatch):
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    media = MediaIndex(root, ["videos", "frames", "elsewhere"])
    for name in ("a.mp4", "b.mp4", "x.mp4", "y.mp4") * 3:
        media.find(name)
    assert sorted(folder.name for folder in listed) == ["elsewhere", "frames", "videos"]
