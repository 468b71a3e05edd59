"""A store for another list of the same clips: what is copied, what is left, what is refused."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import msq
from msq.cli import app
from msq.errors import SpecMismatch, UsageError
from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.datasets.manifest import read_manifest
from msq.extract.store import open_store
from msq.extract.store_convert import convert_store
from msq.extract.store_relabel import relabel_store
from msq.extract.store_seal import sealed
from msq.extract.store_verify import verify_store
from msq.extract.store_versions import library_versions

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("life_stores.py"))))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stores.fill(tmp_path_factory.mktemp("whole") / "a.zarr")


def changed(data: Dataset, **by_id: dict[str, Any]) -> Dataset:
    """Some clips with other values, by their numbers as `c4`."""
    clips = tuple(replace(clip, **by_id.get(f"c{clip.path.stem}", {})) for clip in data.clips)
    return replace(data, clips=clips)


def reordered(data: Dataset, order: list[int]) -> Dataset:
    """Some clips of a dataset, in this order."""
    parts = {name: tuple(part[k] for k in order) for name, part in data.partitions.items()}
    return replace(data, clips=tuple(data.clips[k] for k in order), partitions=parts)


def bytes_of(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def relabelled(path: Path) -> dict[str, bytes]:
    """The files of a store as `relabel` writes them: its root says what copied it."""
    document = json.loads((path / "zarr.json").read_text())
    made = {"by": "relabel", "version": msq.__version__, "versions": library_versions()}
    document["attributes"]["msq"]["copied_by"] = made
    return {**bytes_of(path), "zarr.json": sealed(json.dumps(document).encode())}


def test_other_labels_splits_and_names_are_the_bytes_of_a_store_made_of_the_new_list(
    whole: Path, tmp_path: Path
) -> None:
    new = changed(
        replace(stores.dataset(), name="other", metric="map_micro"),
        c0={"labels": (1, 2)},
        c1={"split": "test"},
        c3={"unknown": ()},
        c4={"path": Path("moved") / "4.mp4"},
    )
    result = relabel_store(whole, tmp_path / "b.zarr", new)
    assert (result.relabelled, result.moved, result.left_out, result.missing) == (2, 1, 0, [])
    assert result.warnings == []
    expected = stores.fill(tmp_path / "expected.zarr", new)
    assert bytes_of(tmp_path / "b.zarr") == relabelled(expected)
    assert verify_store(tmp_path / "b.zarr").ok


def test_clips_left_out_and_in_another_order_need_the_list_of_before(
    whole: Path, tmp_path: Path
) -> None:
    old = stores.dataset()
    new = reordered(old, [6, 2, 5, 0])  # a failed and a degraded one among them
    with pytest.raises(SpecMismatch, match=r"3 of its clips are not in the new list .*--was OLD"):
        relabel_store(whole, tmp_path / "b.zarr", new)
    assert not (tmp_path / "b.zarr").exists()
    result = relabel_store(whole, tmp_path / "b.zarr", new, was=old)
    assert (result.clips, result.left_out, result.missing) == (4, 3, [])
    expected = stores.fill(tmp_path / "expected.zarr", new)
    assert bytes_of(tmp_path / "b.zarr") == relabelled(expected)


def test_the_list_of_before_is_asked_for_cuts_alone(whole: Path, tmp_path: Path) -> None:
    old = stores.dataset()
    other = changed(replace(old, classes=("a", "b", "c")), c0={"labels": ()}, c2={"split": "val"})
    relabel_store(whole, tmp_path / "b.zarr", reordered(old, [1, 0]), was=other)
    assert open_store(tmp_path / "b.zarr").clips == (old.clips[1].id, old.clips[0].id)


def test_a_clip_that_is_new_or_cut_otherwise_is_left_to_extract_with_its_shard(
    whole: Path, tmp_path: Path
) -> None:
    old = stores.dataset()
    added = Clip("ü/7 x", Path("7.mp4"), None, None, (2,), "test")
    parts = {name: (*part, "") for name, part in old.partitions.items()}
    cut = changed(old, c1={"start": 0.5})
    new = replace(cut, clips=(*cut.clips, added), partitions=parts)
    with pytest.raises(SpecMismatch, match="starts, ends or frame rates of some clips"):
        relabel_store(whole, tmp_path / "b.zarr", new)
    result = relabel_store(whole, tmp_path / "b.zarr", new, was=old)
    assert result.missing == ["ü/1 x", "ü/7 x"]
    assert "2 clips are not in" in result.warnings[0]
    store = open_store(tmp_path / "b.zarr")
    # Shards of three rows: that of the cut clip and that of the new one are not done.
    assert store.status("fake-video").tolist() == [0, 0, 0, 1, 1, 3, 0, 0]
    stores.fill(tmp_path / "b.zarr", new)
    expected = stores.fill(tmp_path / "expected.zarr", new)
    assert bytes_of(tmp_path / "b.zarr") == relabelled(expected)


def test_a_clip_of_the_same_name_and_another_file_is_another(whole: Path, tmp_path: Path) -> None:
    old = stores.dataset()
    new = changed(old, c4={"path": Path("take2.mp4")})
    assert relabel_store(whole, tmp_path / "b.zarr", new, was=old).missing == ["ü/4 x"]


def test_lists_that_do_not_prove_the_cuts_are_refused(whole: Path, tmp_path: Path) -> None:
    old = stores.dataset()
    cut = changed(old, c5={"end": 3.0})
    with pytest.raises(SpecMismatch, match="expected the very list that this store was made of"):
        relabel_store(whole, tmp_path / "b.zarr", old, was=cut)
    # A store of some splits has a hash that no list has.
    convert_store(whole, tmp_path / "test.zarr", splits=["test"])
    with pytest.raises(SpecMismatch, match="clip list: expected hash"):
        relabel_store(tmp_path / "test.zarr", tmp_path / "b.zarr", old)
    assert not (tmp_path / "b.zarr").exists()


def test_other_classes_leave_the_class_embeddings_to_extract(whole: Path, tmp_path: Path) -> None:
    new = replace(stores.dataset(), classes=("run", "jump", "dive", "swim"), groups={})
    result = relabel_store(whole, tmp_path / "b.zarr", new)
    assert "no class embeddings were copied" in result.warnings[0]
    assert result.relabelled == 2  # of class 2, which is another now
    store = open_store(tmp_path / "b.zarr")
    assert store.encoders("text") == []
    assert store.classes == new.classes
    features = stores.content(store)["fake-video clean"][1]
    assert features == stores.content(open_store(whole))["fake-video clean"][1]


def test_an_interrupted_one_goes_on_and_ends_in_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    new = changed(stores.dataset(), c0={"labels": (1,)})
    calls = []

    def stop(event: dict[str, Any]) -> None:
        calls.append(event)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        relabel_store(whole, tmp_path / "b.zarr", new, progress=stop)
    first = relabel_store(whole, tmp_path / "b.zarr", new).copied
    relabel_store(whole, tmp_path / "c.zarr", new)
    assert 0 < first < open_store(tmp_path / "c.zarr").status("fake-video").numel() * 6
    assert bytes_of(tmp_path / "b.zarr") == bytes_of(tmp_path / "c.zarr")


def test_nothing_in_common_and_the_store_itself_are_refused(whole: Path, tmp_path: Path) -> None:
    old = stores.dataset()
    with pytest.raises(UsageError, match="none of the 2 clips of the new list is in it"):
        relabel_store(whole, tmp_path / "b.zarr", stores.dataset(2, first=20), was=old)
    with pytest.raises(UsageError, match="expected another place"):
        relabel_store(whole, whole, old)


def test_the_command_with_manifests(tmp_path: Path) -> None:
    before, after = tmp_path / "before.csv", tmp_path / "after.csv"
    before.write_text("path,labels,split\n0.mp4,run,train\n1.mp4,jump,test\n2.mp4,run,test\n")
    after.write_text("path,labels,split\n2.mp4,run,train\n1.mp4,run;jump,test\n")
    for k in range(3):
        (tmp_path / f"{k}.mp4").touch()
    data = read_manifest(before)
    run = CliRunner()
    store = tmp_path / "a.zarr"
    fill_plain(store, data)
    options = [str(store), str(tmp_path / "b.zarr"), "--manifest", str(after), "--json", "--quiet"]
    refused = run.invoke(app, ["store", "relabel", *options])
    assert refused.exit_code != 0
    done = run.invoke(app, ["store", "relabel", *options, "--was", str(before)])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["clips"], said["left_out"], said["relabelled"], said["moved"]) == (2, 1, 1, 1)
    old, new = open_store(store), open_store(tmp_path / "b.zarr")
    assert new.clips == (data.clips[2].id, data.clips[1].id)
    assert new.tokens([0, 1]).equal(old.tokens([2, 1]))


def fill_plain(path: Path, data: Dataset) -> None:
    """One video encoder's features of clips in a row."""
    writer = stores.StoreWriter(path, data, shard=2)
    writer.add_encoder(stores.VIDEO)
    for shard in range(writer.shards):
        rows = list(writer.rows(shard))
        made = {stores.VIDEO.slug: stores.rows_of(stores.VIDEO, rows, "float16")}
        writer.commit(shard, made, [])
