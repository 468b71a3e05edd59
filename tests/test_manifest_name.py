"""A manifest's dataset has the name of its file, or the one that is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from msq.errors import UsageError
from msq.extract.plan_run import dry_run
from msq.extract.request import ExtractRequest


def test_two_manifests_of_one_name_can_be_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("day", "night"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "clips.csv").write_text("path,labels,split\nv/a.mp4,run,train\n")
    day, night = (Path(folder) / "clips.csv" for folder in ("day", "night"))
    plain = ExtractRequest(manifest=night).read_dataset()
    assert plain.name == ExtractRequest(manifest=day).read_dataset().name == "clips"
    named = ExtractRequest(dataset="manifest", root=night, options={"name": "night"})
    assert named.read_dataset() == replace(plain, name="night")
    assert dry_run(replace(named, video_encoder="none"))["store"] == "night.zarr"


def test_who_asks_for_a_name_beside_a_manifest_is_told_how(tmp_path: Path) -> None:
    manifest = tmp_path / "clips.csv"
    with pytest.raises(UsageError) as refused:
        ExtractRequest(manifest=manifest, options={"name": "night"}).read_dataset()
    assert f"--dataset manifest --root {manifest}," in str(refused.value)
    with pytest.raises(UsageError, match=f"--dataset folder --root {tmp_path},"):
        ExtractRequest(manifest=tmp_path, options={"name": "night"}).read_dataset()
