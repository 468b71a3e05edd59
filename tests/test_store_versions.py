"""A copied store says with which versions its features were made, and what copied them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import msq
from msq.extract import copied_versions
from msq.extract.store import open_store
from msq.extract.store_convert import convert_store, merge_stores
from msq.extract.store_inspect import inspect_store
from msq.extract.store_seal import sealed
from msq.extract.store_verify import verify_store
from msq.extract.store_versions import library_versions
from msq.extract.store_writer import StoreWriter
from msq.report.store_life import show_store, show_verification

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("life_stores.py"))))
OLD: dict[str, Any] = {"version": "0.0.1", "versions": {"torch": "1.2", "av": "9.0"}}
NEW: dict[str, Any] = {"version": "0.0.2", "versions": {"torch": "1.3", "av": "9.0"}}


def root(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "zarr.json").read_text())["attributes"]["msq"]
    return found


def made_with(path: Path, making: dict[str, Any], *clips: int) -> Path:
    """A store that was begun with these versions."""
    stores.fill(path, stores.dataset(*clips))
    document = json.loads((path / "zarr.json").read_text())
    own = document["attributes"]["msq"]
    for name in ("version", "versions"):
        own.pop(name)
    own |= making
    (path / "zarr.json").write_bytes(sealed(json.dumps(document).encode()))
    return path


def versions(path: Path) -> dict[str, Any]:
    return {k: v for k, v in root(path).items() if k in ("version", "versions", "made_with")}


def test_a_converted_store_keeps_the_versions_of_its_features(tmp_path: Path) -> None:
    source = made_with(tmp_path / "a.zarr", OLD)
    convert_store(source, tmp_path / "b.zarr", shard=2)
    now = {"version": msq.__version__, "versions": library_versions()}
    assert versions(tmp_path / "b.zarr") == OLD
    assert root(tmp_path / "b.zarr")["copied_by"] == {"by": "convert", **now}
    # A copy of a copy has the last copier alone, and the features' versions still.
    convert_store(tmp_path / "b.zarr", tmp_path / "c.zarr", drop=["fake-image"], splits=["train"])
    assert versions(tmp_path / "c.zarr") == OLD
    assert root(tmp_path / "c.zarr")["copied_by"]["by"] == "convert"
    # The identity is that of a copy of before; extraction goes on in it.
    assert root(tmp_path / "b.zarr")["clip_list_hash"] == root(source)["clip_list_hash"]
    StoreWriter(tmp_path / "b.zarr", stores.dataset(), shard=2).add_encoder(
        stores.VIDEO, stores.VIEWS
    )
    assert versions(tmp_path / "b.zarr") == OLD
    assert verify_store(tmp_path / "b.zarr").ok


def test_an_interrupted_copy_goes_on_with_the_versions_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made_with(tmp_path / "a.zarr", OLD)
    convert_store(source, tmp_path / "b.zarr")
    before = (tmp_path / "b.zarr" / "zarr.json").read_bytes()
    next((tmp_path / "b.zarr/status/fake-video/c/1").iterdir()).unlink()
    monkeypatch.setattr(copied_versions, "library_versions", lambda: {"torch": "9"})
    assert convert_store(source, tmp_path / "b.zarr").copied == 3
    assert (tmp_path / "b.zarr" / "zarr.json").read_bytes() == before


def test_stores_of_one_making_are_merged_into_one(tmp_path: Path) -> None:
    parts = [made_with(tmp_path / "a.zarr", OLD), made_with(tmp_path / "b.zarr", OLD, 2, 7)]
    merge_stores(parts, tmp_path / "both.zarr")
    assert versions(tmp_path / "both.zarr") == OLD
    assert root(tmp_path / "both.zarr")["copied_by"]["by"] == "merge"


def test_merged_stores_of_several_makings_say_which_rows_are_of_which(tmp_path: Path) -> None:
    first, second = made_with(tmp_path / "a.zarr", OLD), made_with(tmp_path / "b.zarr", NEW, 2, 7)
    third = made_with(tmp_path / "c.zarr", {"version": "0.0.0"}, 1, 9)  # before there were versions
    merge_stores([first, second], tmp_path / "both.zarr")
    both = [{**OLD, "clips": 7}, {**NEW, "clips": 2}]
    encoders = ("fake-video", "fake-patch", "fake-image")
    expected = {**dict.fromkeys(encoders, both), "fake-text": [OLD]}
    assert versions(tmp_path / "both.zarr") == {"made_with": expected}
    # On it goes, through further copies, as far as their rows and encoders go.
    merge_stores([tmp_path / "both.zarr", third], tmp_path / "all.zarr")
    (runs,) = {json.dumps(root(tmp_path / "all.zarr")["made_with"][e]) for e in encoders}
    assert json.loads(runs) == [*both, {"version": "0.0.0", "clips": 1}]
    convert_store(
        tmp_path / "all.zarr", tmp_path / "some.zarr", splits=["val"], drop=["fake-image"]
    )
    ids = open_store(tmp_path / "some.zarr").clips
    assert ids == ("ü/1 x", "ü/4 x", "ü/7 x")
    some = [{**OLD, "clips": 2}, {**NEW, "clips": 1}]
    assert versions(tmp_path / "some.zarr")["made_with"] == {
        "fake-video": some, "fake-patch": some, "fake-text": [OLD]
    }  # fmt: skip
    convert_store(tmp_path / "both.zarr", tmp_path / "one.zarr", drop=["fake-text", "fake-patch"])
    assert set(versions(tmp_path / "one.zarr")["made_with"]) == {"fake-video", "fake-image"}
    assert verify_store(tmp_path / "some.zarr").ok


def test_inspect_and_verify_show_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = made_with(tmp_path / "a.zarr", OLD), made_with(tmp_path / "b.zarr", NEW, 2, 7)
    convert_store(first, tmp_path / "copy.zarr")
    merge_stores([first, second], tmp_path / "both.zarr")
    here = f"msq {msq.__version__}, torch {library_versions()['torch']}"
    show_store(tmp_path / "copy.zarr")
    said = capsys.readouterr().out
    assert f"features by msq 0.0.1, torch 1.2, av 9.0; convert by {here}" in said
    show_store(tmp_path / "both.zarr")
    said = capsys.readouterr().out
    assert ("fake-video: features of 7 clips by msq 0.0.1, torch 1.2, av 9.0; "
            "of 2 clips by msq 0.0.2, torch 1.3, av 9.0") in said  # fmt: skip
    assert f"; merge by {here}" not in said
    assert f", merge by {here}" in said
    document = inspect_store(open_store(tmp_path / "both.zarr"))
    assert (document["version"], document["versions"]) == (None, {})
    assert document["made_with"]["fake-text"] == [OLD]
    assert document["copied_by"]["by"] == "merge"
    found = verify_store(tmp_path / "copy.zarr")
    show_verification(tmp_path / "copy.zarr", found)
    said = capsys.readouterr().out
    assert f"a copy (convert by {here}" in said
    assert "of features made by msq 0.0.1, torch 1.2, av 9.0" in said
    assert any("of 2 clips by msq 0.0.2" in n for n in verify_store(tmp_path / "both.zarr").notes)
    # What was extracted is as before.
    assert inspect_store(open_store(first))["copied_by"] is None
    assert verify_store(first).notes == []
