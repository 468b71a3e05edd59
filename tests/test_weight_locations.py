"""Weights given as a folder or file are found again by their hash."""

import os

from msq.extract.encoders.locations import recall, remember

HASH = "ab" * 32


def test_a_relative_folder_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    remember(HASH, "local-dir:weights")
    monkeypatch.chdir("/")
    assert recall(HASH) == (f"local-dir:{tmp_path / 'weights'}", None)


def test_an_architecture_keeps_its_file(tmp_path):
    (tmp_path / "clip.pt").write_bytes(b"x")
    remember(HASH, "ViT-B-16", str(tmp_path / "clip.pt"))
    assert recall(HASH) == ("ViT-B-16", str(tmp_path / "clip.pt"))


def test_names_of_the_hub_and_of_tags_are_not_noted(tmp_path, monkeypatch):
    monkeypatch.setenv("MSQ_CACHE", str(tmp_path))
    remember(HASH, "hf-hub:org/name")
    remember(HASH, "ViT-B-16", "openai")
    assert recall(HASH) is None
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_gone_and_broken_notes_are_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MSQ_CACHE", str(tmp_path / "cache"))
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"x")
    remember(HASH, str(weights))
    assert recall(HASH) == (str(weights), None)
    (tmp_path / "cache" / "weights" / f"{HASH}.json").write_text("{")
    assert recall(HASH) is None
    remember(HASH, str(weights))
    weights.unlink()
    assert recall(HASH) is None


def test_a_cache_that_cannot_be_written_loses_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way of a folder")
    monkeypatch.setenv("MSQ_CACHE", str(tmp_path / "file"))
    remember(HASH, str(tmp_path))
    assert recall(HASH) is None


def test_the_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("MSQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remember(HASH, str(tmp_path))
    assert (tmp_path / "msq" / "weights" / f"{HASH}.json").is_file()
    assert "MSQ_CACHE" not in os.environ
