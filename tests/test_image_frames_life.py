"""What becomes of a store with image features of each frame: verify, repair, copies, exports."""

from __future__ import annotations

import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from msq.errors import SpecMismatch, StoreError, UsageError
from msq.extract.datasets.manifest import read_manifest
from msq.extract.feature_import import import_features
from msq.extract.location import locate
from msq.extract.pipeline import extract
from msq.extract.store import open_store
from msq.extract.store_convert import convert_store, merge_stores
from msq.extract.store_export import export_store
from msq.extract.store_problems import Verification
from msq.extract.store_records import ShardRows
from msq.extract.store_repair import repair_store
from msq.extract.store_sample import check_sample, tolerance
from msq.extract.store_verify import verify_store
from msq.extract.store_writer import StoreWriter
from msq.extract.views import CLEAN, augmented_views

fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))
IMAGE = fakes.image_spec(frames=3, size=8)
FRAMES = "image_frames/fake-image"
VIEWS = (CLEAN, *augmented_views(1))
BROKEN = 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fakes.make_dataset(tmp_path_factory.mktemp("videos"), 7, broken=(BROKEN,))


def run(data: Any, out: Any, **options: Any) -> Any:
    given = {"workers": 0, "shard": 3, "batch": 2, "views": VIEWS, "image_frames": True}
    encoders = {"video": fakes.FakeEncoder(), "image": fakes.FakeEncoder(IMAGE)}
    extract(data, out, **(given | encoders | options))
    return out


@pytest.fixture(scope="module")
def whole(data: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(run(data, tmp_path_factory.mktemp("whole") / "a.zarr"))


def content(store: Any) -> dict[str, torch.Tensor]:
    """All features of an open store, by what they are."""
    said = {}
    for view in store.views("fake-image"):
        rows = store.ok_rows(["fake-image"], view)
        said[f"rows {view}"] = rows
        for read in (store.image, store.image_frames):
            said[f"{read.__name__} {view}"] = read(rows, "fake-image", view)
    return said


def same(mine: Any, theirs: Any) -> None:
    ours, others = content(mine), content(theirs)
    assert ours.keys() == others.keys()
    for name, values in ours.items():
        assert torch.equal(values, others[name]), name


def files_of_frames(store: Path) -> list[str]:
    """One of each kind: metadata of array and group, a chunk."""
    return ["image_frames/zarr.json", f"{FRAMES}/zarr.json", f"{FRAMES}/c/1/1/0/0"]


@pytest.mark.parametrize("fault", ["cut", "gone", "flip"])
def test_a_damaged_file_is_found_and_repaired_to_the_same_bytes(
    data: Any, whole: Path, tmp_path: Path, fault: str
) -> None:
    right = fakes.tree(whole)
    store = Path(shutil.copytree(whole, tmp_path / "a.zarr"))
    for file in files_of_frames(whole):
        before = (store / file).read_bytes()
        if fault == "gone":
            (store / file).unlink()
        elif fault == "cut":
            (store / file).write_bytes(before[: len(before) // 2])
        else:
            middle = len(before) // 2
            changed = before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :]
            (store / file).write_bytes(changed)
        found = verify_store(store)
        assert any(file in str(problem) for problem in found.problems), (file, found.problems)
        if "/fake-image/" in file:
            with pytest.raises(StoreError, match=FRAMES):
                open_store(store).image_frames([3, 4, 5], view=1)
        assert open_store(store).image([3, 4, 5], view=1).shape == (3, 6)  # the mean is whole
        planned, tree = repair_store(store, dry_run=True), fakes.tree(store)
        done = repair_store(store)
        assert planned.actions == done.actions != []
        assert tree != fakes.tree(store)
        run(data, store, image_frames=False)  # it remembers what it holds
        assert fakes.tree(store) == right, file


@pytest.mark.parametrize("folder", ["image/fake-image", "tokens/fake-video"])
def test_features_that_are_gone_as_a_whole_are_found_and_made_again(
    data: Any, whole: Path, tmp_path: Path, folder: str
) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "a.zarr"))
    shutil.rmtree(store / folder)
    found = verify_store(store)
    assert [problem.file for problem in found.problems] == [f"{folder}/zarr.json"]
    assert repair_store(store).left == []
    run(data, store, image_frames=False)
    assert fakes.tree(store) == fakes.tree(whole)


def test_metadata_that_all_arrays_lost_is_made_again(
    data: Any, whole: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "a.zarr"))
    for group in ("image", "image_frames", "time", "status"):
        (store / group / "fake-image/zarr.json").write_bytes(b"{}")
    repair_store(store)
    assert not (store / "status/fake-image/c/0/0").exists()
    run(data, store)
    assert fakes.tree(store) == fakes.tree(whole)


def test_files_beyond_the_arrays_and_without_a_record_are_named(
    whole: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "a.zarr"))
    shutil.copytree(store / FRAMES / "c/0/0", store / FRAMES / "c/0/7")
    (problem,) = verify_store(store).problems
    assert (problem.kind, problem.file) == ("stray", f"{FRAMES}/c/0/7/0/0")
    repair_store(store)
    assert fakes.tree(store) == fakes.tree(whole)
    for group in ("image", "time", "status"):
        shutil.rmtree(store / group / "fake-image/c/2")
    found = verify_store(store).problems
    assert {(p.kind, p.shard) for p in found if p.encoder == "fake-image"} == {("uncommitted", 2)}
    assert any(FRAMES in problem.file for problem in found)


def test_frames_of_other_clips_are_not_those_of_the_mean(
    data: Any, whole: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "a.zarr"))
    chunk = store / FRAMES / "c/1/0/0/0"
    chunk.write_bytes((store / FRAMES / "c/1/1/0/0").read_bytes())  # whole, of the other view
    (problem,) = verify_store(store).problems
    assert (problem.kind, problem.file) == ("values", f"{FRAMES}/c/1/0/0/0")
    assert "the mean of features of each frame is not what image/fake-image holds" in str(problem)
    assert problem.clips == ("clip-3-é", "clip-4-é", "clip-5-é")
    repair_store(store)
    run(data, store)
    assert fakes.tree(store) == fakes.tree(whole)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_frames_that_are_not_finite_are_found(tmp_path: Path, data: Any, value: float) -> None:
    out = run(data, tmp_path / "a.zarr", views=(CLEAN,))
    rows = rewritten(out, data, lambda frames: frames.__setitem__((0, 2, 1), value))
    problems = [p for p in verify_store(out).problems if "not finite" in str(p)]
    assert [p.clips for p in problems] == [(data.clips[rows[0]].id,)]


def rewritten(out: Path, data: Any, change: Any) -> range:
    """Shard 1 of the clean view committed again after `change` of its frames; returns its rows."""
    writer = StoreWriter(out, data, shard=3)
    writer.add_encoder(IMAGE)
    rows, store = writer.rows(1), open_store(out)
    blank = ShardRows.blank(writer.arrays("fake-image"), len(rows))
    frames = store.image_frames(list(rows)).numpy()
    change(frames)
    made = replace(
        blank,
        features=store.image(list(rows)).numpy(),
        times=store.time(list(rows), "fake-image").numpy(),
        status=np.ones(len(rows), dtype=np.uint8),
        frames=frames,
    )
    writer.commit(1, {"fake-image": made}, [])
    return rows


def test_a_commit_without_frames_is_impossible_where_the_store_has_them(
    data: Any, whole: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "a.zarr"))
    writer = StoreWriter(store, data, shard=3)
    writer.add_encoder(IMAGE)
    rows = open_store(store)
    mean = ShardRows(
        rows.image([3, 4, 5]).numpy(), rows.time([3, 4, 5], "fake-image").numpy(),
        np.ones(3, dtype=np.uint8),
    )  # fmt: skip
    with pytest.raises(ValueError, match="shorter"):
        writer.commit(1, {"fake-image": mean}, [])


def test_rows_extracted_again_are_compared_frame_by_frame(data: Any, tmp_path: Path) -> None:
    out = run(data, tmp_path / "a.zarr")
    encoders = {"fake-image": fakes.FakeEncoder(IMAGE)}
    found = Verification()
    check_sample(open_store(out), data, encoders, 100, found, batch=2)
    assert (found.sampled, found.equal, found.problems) == (12, 12, [])
    # Frames in another order have the same mean, and are not what the encoder makes.
    rewritten(out, data, lambda frames: np.copyto(frames, frames[:, ::-1].copy()))
    assert verify_store(out).ok
    found = Verification()
    check_sample(open_store(out), data, encoders, 100, found, batch=2)
    assert (found.sampled, found.equal) == (12, 9)
    assert {p.file for p in found.problems} == {FRAMES}
    assert [p.clips for p in found.problems] == [(data.clips[row].id,) for row in (3, 4, 5)]
    # A last bit or two is another machine's.
    close = {"fake-image": fakes.FakeEncoder(IMAGE, scale=1 + tolerance(IMAGE, "float16") / 4)}
    found = Verification()
    check_sample(open_store(run(data, tmp_path / "b.zarr")), data, close, 100, found, batch=2)
    assert found.ok
    assert found.equal < 12


def test_copies_have_the_frames_too(whole: Path, tmp_path: Path) -> None:
    convert_store(whole, tmp_path / "b.zarr", shard=2)
    same(open_store(tmp_path / "b.zarr"), open_store(whole))
    assert verify_store(tmp_path / "b.zarr").ok
    assert convert_store(whole, tmp_path / "b.zarr", shard=2).copied == 0
    convert_store(tmp_path / "b.zarr", tmp_path / "c.zarr", shard=3)
    mine, theirs = (fakes.tree(p) for p in (tmp_path / "c.zarr", whole))
    frames = {k: v for k, v in theirs.items() if k.startswith("image_frames/")}
    assert frames.items() <= mine.items()
    convert_store(whole, tmp_path / "clean.zarr", views=[])
    assert open_store(tmp_path / "clean.zarr").shape(FRAMES) == (7, 1, 3, 6)
    convert_store(whole, tmp_path / "none.zarr", drop=["fake-image"])
    assert not (tmp_path / "none.zarr/image_frames").exists()


def test_a_copy_rounds_frames_only_when_told_to(data: Any, tmp_path: Path) -> None:
    wide = run(data, tmp_path / "w.zarr", store_dtype="float32", video=None)
    with pytest.raises(StoreError, match="without rounding"):
        convert_store(wide, tmp_path / "n.zarr", store_dtype="float16")
    for dtype, kind in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        narrow = tmp_path / f"{dtype}.zarr"
        convert_store(wide, narrow, store_dtype=dtype, lossy=True)
        rows = open_store(wide).ok_rows()
        expected = open_store(wide).image_frames(rows).to(kind)
        assert torch.equal(open_store(narrow).image_frames(rows), expected)
        assert verify_store(narrow).ok
        convert_store(narrow, tmp_path / f"{dtype}-wide.zarr", store_dtype="float32")
        again = open_store(tmp_path / f"{dtype}-wide.zarr")
        assert torch.equal(again.image_frames(rows), expected.float())
        assert verify_store(again.path).ok


def test_stores_are_merged_with_frames_or_without_and_not_both(data: Any, tmp_path: Path) -> None:
    halves = [replace(data, clips=data.clips[:4]), replace(data, clips=data.clips[4:])]
    one, two = (run(half, tmp_path / f"{k}.zarr") for k, half in enumerate(halves))
    run(data, tmp_path / "whole.zarr")
    merge_stores([one, two], tmp_path / "m.zarr")
    same(open_store(tmp_path / "m.zarr"), open_store(tmp_path / "whole.zarr"))
    assert verify_store(tmp_path / "m.zarr").ok
    plain = run(halves[1], tmp_path / "plain.zarr", image_frames=False)
    with pytest.raises(SpecMismatch, match="with features of each frame in the first, without her"):
        merge_stores([one, plain], tmp_path / "x.zarr")
    with pytest.raises(SpecMismatch, match="without features of each frame in the first, with her"):
        merge_stores([plain, one], tmp_path / "x.zarr")
    assert not (tmp_path / "x.zarr").exists()


def test_a_copy_without_frames_does_not_go_into_a_store_with_them(
    data: Any, whole: Path, tmp_path: Path
) -> None:
    convert_store(whole, tmp_path / "b.zarr")
    (tmp_path / "b.zarr/status/fake-image/c/1/0").unlink()
    plain = run(data, tmp_path / "plain.zarr", image_frames=False)
    with pytest.raises(SpecMismatch, match="has none to copy"):
        convert_store(plain, tmp_path / "b.zarr")


@pytest.mark.parametrize("name", ["f.h5", "f.npz", "f.safetensors", "f"])
def test_exported_frames_come_back_as_tokens_bit_by_bit(
    whole: Path, tmp_path: Path, name: str
) -> None:
    done = export_store(
        whole, tmp_path / "out" / name, encoder="fake-image", view=1, image_frames=True
    )
    assert (done.clips, done.left_out, done.view) == (6, ["clip-1-é"], "augmented 1")
    data = read_manifest(Path(done.manifest), classes=Path(done.classes))
    import_features(
        data, tmp_path / "new.zarr", Path(done.out), name="each", kind="video", global_token="none"
    )
    theirs = open_store(whole)
    expected = theirs.image_frames(theirs.ok_rows(), view=1)
    assert torch.equal(open_store(tmp_path / "new.zarr").tokens(), expected)


def test_what_has_no_frames_is_not_exported(data: Any, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected one of fake-image"):
        export_store(whole, tmp_path / "f.h5", encoder="fake-video", image_frames=True)
    assert export_store(whole, tmp_path / "f.h5", image_frames=True).encoder == "fake-image"
    plain = run(data, tmp_path / "plain.zarr", image_frames=False)
    with pytest.raises(StoreError, match="no features of each frame"):
        export_store(plain, tmp_path / "g.h5", encoder="fake-image", image_frames=True)
    assert not (tmp_path / "g.h5").exists()


def test_zip_files_and_urls_hold_them(data: Any, whole: Path, tmp_path: Path) -> None:
    export_store(whole, tmp_path / "a.zarr.zip")
    url = "memory://frames/a.zarr"
    try:
        run(data, url)
        for place in (tmp_path / "a.zarr.zip", url):
            assert verify_store(locate(place)).ok
            same(open_store(place), open_store(whole))
        run(data, url, image_frames=False)  # nothing is left to do there
        files = fsspec.filesystem("memory")
        for name in ("a.zarr/" + FRAMES, "a.zarr/image_frames"):
            assert files.exists(f"/frames/{name}/zarr.json")
        plain = run(data, "memory://frames/plain.zarr", image_frames=False)
        same(open_store(run(data, plain)), open_store(whole))
    finally:
        fsspec.filesystem("memory").rm("/frames", recursive=True)
