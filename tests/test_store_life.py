"""inspect, verify, convert, merge, export, URLs: what becomes of a store after it is made."""

from __future__ import annotations

import json
import runpy
import shutil
import zipfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import fsspec
import numpy as np
import pytest
import torch
import zarr
from fsspec.implementations.memory import MemoryFileSystem

import msq
from msq.errors import SpecMismatch, StoreError, UsageError
from msq.extract.datasets.manifest import read_manifest
from msq.extract.feature_import import import_features
from msq.extract.location import locate
from msq.extract.pipeline import extract
from msq.extract.store import open_store
from msq.extract.store_convert import convert_store, merge_stores
from msq.extract.store_export import export_store
from msq.extract.store_inspect import inspect_store
from msq.extract.store_problems import Verification
from msq.extract.store_sample import check_sample, tolerance
from msq.extract.store_seal import sealed
from msq.extract.store_verify import verify_store
from msq.extract.store_versions import library_versions
from msq.extract.store_writer import ShardRows, StoreWriter
from msq.extract.views import CLEAN, augmented_views
from msq.report import store_life
from msq.report.store_life import show_store, show_verification

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("life_stores.py"))))
fakes = stores.fakes
tree = fakes.tree


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stores.fill(tmp_path_factory.mktemp("whole") / "a.zarr")


@pytest.fixture
def bucket() -> Any:
    name = "memory://bucket"
    yield name
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def remote_tree(url: str) -> dict[str, bytes]:
    files = fsspec.filesystem("memory")
    root = "/" + url.removeprefix("memory://")
    return {f.removeprefix(f"{root}/"): files.cat_file(f) for f in files.find(root)}


def local_tree(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def copied(path: Path, *, by: str = "convert") -> dict[str, bytes]:
    """The files of a copy of a store: the same bytes, but for what copied it in the root."""
    document = json.loads((path / "zarr.json").read_text())
    made = {"by": by, "version": msq.__version__, "versions": library_versions()}
    document["attributes"]["msq"]["copied_by"] = made
    return {**local_tree(path), "zarr.json": sealed(json.dumps(document).encode())}


def same_rows(mine: Any, theirs: Any) -> None:
    """All that two stores say, but for where their shards begin."""
    assert stores.content(mine) == stores.content(theirs)


def test_inspect_says_what_a_store_is(whole: Path) -> None:
    said = json.loads(json.dumps(inspect_store(open_store(whole))))
    video = said["encoders"]["fake-video"]
    assert video["shapes"]["tokens/fake-video"] == [7, 2, 5, 6]
    assert (video["ok"], video["failed"], video["degraded"], video["missing"]) == (5, 1, 1, 0)
    assert video["coverage"] == 12 / 14
    assert [view["view"] for view in video["views"]] == ["clean", "augmented 1"]
    assert said["reasons"] == [
        {"status": "failed", "reason": "moov atom not found", "clips": 1},
        {"status": "degraded", "reason": "3 frames lost", "clips": 1},
    ]
    files = [p for p in whole.rglob("*") if p.is_file()]
    assert (said["files"], said["bytes"]["total"]) == (
        len(files), sum(p.stat().st_size for p in files),
    )  # fmt: skip
    assert said["bytes"]["tokens"] == sum(
        p.stat().st_size for p in (whole / "tokens").rglob("*") if p.is_file()
    )


def test_a_store_says_with_which_libraries_it_was_begun(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {"torch": metadata.version("torch"), "av": av.__version__}
    versions["libavcodec"] = ".".join(map(str, av.library_versions["libavcodec"]))
    assert (
        json.loads((whole / "zarr.json").read_text())["attributes"]["msq"]["versions"] == versions
    )
    assert inspect_store(open_store(whole))["versions"] == versions
    # A store of an earlier version has none; it opens, goes on and merges as before.
    old = tmp_path / "old.zarr"
    shutil.copytree(whole, old)
    document = json.loads((old / "zarr.json").read_text())
    del document["attributes"]["msq"]["versions"]
    (old / "zarr.json").write_bytes(sealed(json.dumps(document).encode()))
    assert verify_store(old).ok
    StoreWriter(old, stores.dataset(), shard=3)
    assert "versions" not in open_store(old).attributes
    other = stores.fill(tmp_path / "other.zarr", stores.dataset(2, 7))
    merge_stores([old, other], tmp_path / "both.zarr")
    assert len(open_store(tmp_path / "both.zarr")) == 9
    for path, words in ((whole, f", torch {versions['torch']}, av {av.__version__}"), (old, "")):
        show_store(path)
        said = capsys.readouterr()
        assert said.err == ""
        lines = said.out.splitlines()
        assert any("begun by msq" in line and words in line for line in lines)
        assert ("libavcodec" in said.out) == bool(words)


def test_all_of_inspect_and_verify_is_on_stdout(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_store(whole)
    said = capsys.readouterr()
    assert said.err == ""
    for words in ("failed: 1 clips: moov atom not found", "85.7 % there", "stored as float16"):
        assert words in said.out, words
    broken = tmp_path / "broken.zarr"
    shutil.copytree(whole, broken)
    chunks = (p for p in (broken / "tokens/fake-video/c").rglob("*") if p.is_file())
    next(chunks).write_bytes(b"x")
    found = verify_store(broken)
    show_verification(broken, found)
    said = capsys.readouterr()
    assert said.err == ""
    assert str(found.problems[0]) in said.out
    show_verification(broken, found, json=True)
    said = capsys.readouterr()
    assert json.loads(said.out)["ok"] is False
    assert str(found.problems[0]) in said.err
    assert store_life.repair(broken, dry_run=True) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "nothing touched" in said.out


def rewritten(path: Path, spec: Any, change: Any, view: int = 0) -> Path:
    """A store whose writer made a mistake in shard 1 of an encoder: `change` of its rows."""
    stores.fill(path, specs=(spec,), views=(CLEAN,))
    writer = StoreWriter(path, stores.dataset(), shard=3)
    writer.add_encoder(spec)
    good = stores.rows_of(spec, [3, 4, 5], "float16")
    good.status[2] = 3
    writer.commit(1, {spec.slug: change(good)}, writer.failures(1))
    return path


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_verify_finds_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    def change(rows: ShardRows) -> ShardRows:
        rows.features[1, 0] = value
        return rows

    path = rewritten(tmp_path / "a.zarr", stores.IMAGE, change)
    (problem,) = verify_store(path).problems
    assert (problem.kind, problem.clips) == ("values", ("ü/4 x",))
    assert problem.file == "image/fake-image/c/1/0/0"


def test_verify_finds_overflow_of_bfloat16(tmp_path: Path) -> None:
    path = stores.fill(tmp_path / "a.zarr", specs=(stores.IMAGE,), views=(CLEAN,), dtype="bfloat16")
    assert verify_store(path).ok
    writer = StoreWriter(path, stores.dataset(), store_dtype="bfloat16", shard=3)
    writer.add_encoder(stores.IMAGE)
    rows = stores.rows_of(stores.IMAGE, [6], "bfloat16")
    rows.features[0, 1] = 0xFF80  # minus infinity
    writer.commit(2, {"fake-image": rows}, [])
    assert [p.clips for p in verify_store(path).problems] == [("ü/6 x",)]


@pytest.mark.parametrize("spec", [stores.VIDEO, stores.PATCH], ids=["shards", "files"])
def test_verify_compares_status_with_data(tmp_path: Path, spec: Any) -> None:
    path = stores.fill(tmp_path / "a.zarr", specs=(spec,), views=(CLEAN,))
    keep = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    record = path / f"status/{spec.slug}/c/1/0"
    record.unlink()  # rows are there, and no status
    (found,) = [p for p in verify_store(path).problems if p.kind == "uncommitted"]
    assert (found.encoder, found.shard) == (spec.slug, 1)
    record.write_bytes(keep[record])
    record.write_bytes((path / f"status/{spec.slug}/c/0/0").read_bytes())  # ok, ok, failed
    kinds = {p.kind for p in verify_store(path).problems}
    assert kinds == {"contradiction", "failures"}
    record.write_bytes(keep[record])
    files = sorted((path / f"tokens/{spec.slug}/c").rglob("*"))
    gone = next(f for f in files if f.is_file())
    gone.unlink()  # status says ok, and the row is not there
    problems = verify_store(path).problems
    assert {p.kind for p in problems} == {"data"}
    assert str(gone) in str(problems[0])
    assert "ü/0 x" in problems[0].clips


def test_verify_names_every_bad_clip_of_a_shard(tmp_path: Path) -> None:
    path = stores.fill(tmp_path / "a.zarr", specs=(stores.VIDEO,), views=(CLEAN,))
    file = path / "tokens/fake-video/c/1/0/0/0"
    content = bytearray(file.read_bytes())
    for row in (0, 2):  # 60 bytes and 4 of checksum a row
        content[64 * row + 7] ^= 1
    file.write_bytes(bytes(content))
    (problem,) = verify_store(path).problems
    assert problem.clips == ("ü/3 x", "ü/5 x")


def test_rows_that_are_not_extracted_are_a_note_and_strays_a_problem(tmp_path: Path) -> None:
    path = stores.fill(tmp_path / "a.zarr", specs=(), views=(CLEAN,))
    writer = StoreWriter(path, stores.dataset(), shard=3)
    writer.add_encoder(stores.VIDEO)
    found = verify_store(path)
    assert found.ok
    assert any("3 of 3 shards are not extracted yet" in note for note in found.notes)
    (path / "thesis.txt").write_text("three years")
    (problem,) = verify_store(path).problems
    assert (problem.kind, problem.file) == ("stray", "thesis.txt")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


def test_rows_extracted_again_are_bit_by_bit_the_same_or_a_problem(
    videos: Path, tmp_path: Path
) -> None:
    data, out = fakes.make_dataset(videos, 5), tmp_path / "a.zarr"
    encoder = fakes.FakeEncoder()
    views = (CLEAN, *augmented_views(1))
    extract(data, out, video=encoder, image=None, workers=0, shard=3, batch=2, views=views)
    store, found = open_store(out), Verification()
    check_sample(store, data, {"fake-video": encoder}, 100, found, batch=2)
    assert (found.sampled, found.equal, found.problems) == (10, 10, [])
    # Another encoder under the same name: what the store holds is not what it makes.
    wrong = fakes.FakeEncoder(scale=1.0 + 2 * tolerance(encoder.spec, "float16"))
    found = Verification()
    check_sample(store, data, {"fake-video": wrong}, 4, found, batch=2)
    assert [p.kind for p in found.problems] == ["sample"] * 4
    assert all(p.clips[0] in str(p) and "tokens/fake-video" in p.file for p in found.problems)
    # A last bit or two is another machine's, which is said.
    close = fakes.FakeEncoder(scale=1.0 + 2.0**-12)
    found = Verification()
    check_sample(store, data, {"fake-video": close}, 10, found, batch=2)
    assert found.ok
    assert found.equal < 10
    assert "within the tolerance" in found.notes[0]
    with pytest.raises(SpecMismatch, match="clips: expected 4, found 5"):
        check_sample(store, data.limited(4), {"fake-video": encoder}, 1, Verification())


def test_convert_changes_shards_and_leaves_out_what_is_dropped(whole: Path, tmp_path: Path) -> None:
    result = convert_store(whole, tmp_path / "b.zarr", shard=2, drop=["fake-patch"])
    assert result.encoders == ["fake-video", "fake-image", "fake-text"]
    store, before = open_store(tmp_path / "b.zarr"), open_store(whole)
    mine, theirs = stores.content(store), stores.content(before)
    assert mine == {k: v for k, v in theirs.items() if not k.startswith("fake-patch")} | {
        "failures": mine["failures"]
    }
    assert {f["row"] for f in mine["failures"]} == {2, 5}
    assert store.shard("fake-video") == 2
    assert verify_store(store.path).ok
    assert convert_store(whole, tmp_path / "b.zarr", shard=2, drop=["fake-patch"]).copied == 0
    # And back: the same bytes as before.
    convert_store(whole, tmp_path / "c.zarr", shard=2)
    convert_store(tmp_path / "c.zarr", tmp_path / "d.zarr", shard=3)
    assert local_tree(tmp_path / "d.zarr") == copied(whole)


def test_smaller_batches_are_shown_and_go_along_with_the_rows(tmp_path: Path) -> None:
    specs, view = (stores.VIDEO, stores.IMAGE), augmented_views(1)[0]
    path = stores.fill(tmp_path / "a.zarr", specs=specs)
    writer = StoreWriter(path, stores.dataset(), shard=3)
    writer.add_encoder(stores.VIDEO)
    rows = stores.rows_of(stores.VIDEO, [3, 4, 5], "float16", 1)
    rows.status[2] = 3
    failures = [f for f in writer.failures(1) if f.encoder == "fake-video" and f.view == str(view)]
    writer.commit(1, {"fake-video": rows}, failures, view, (2,))

    def said(out: Path) -> list[tuple[int, int, str, str]]:
        found = inspect_store(open_store(out))["smaller_batches"]
        return [(b["shard"], b["batch"], b["encoder"], b["view"]) for b in found]

    mine = (2, "fake-video", "augmented 1")
    assert said(path) == [(1, *mine)]
    convert_store(path, tmp_path / "same.zarr")
    assert local_tree(tmp_path / "same.zarr") == copied(path)
    for shard, expected in ((1, [3, 4, 5]), (2, [1, 2]), (6, [0])):
        convert_store(path, tmp_path / f"{shard}.zarr", shard=shard)
        assert said(tmp_path / f"{shard}.zarr") == [(s, *mine) for s in expected]
        assert verify_store(tmp_path / f"{shard}.zarr").ok
    convert_store(path, tmp_path / "clean.zarr", views=[])
    convert_store(path, tmp_path / "image.zarr", drop=["fake-video"])
    assert said(tmp_path / "clean.zarr") == said(tmp_path / "image.zarr") == []
    other = stores.fill(tmp_path / "b.zarr", stores.dataset(2, 7), specs=specs)
    merge_stores([other, path], tmp_path / "m.zarr")
    assert said(tmp_path / "m.zarr") == [(1, *mine), (2, *mine)]  # rows 5 to 7 now


def test_convert_to_fewer_digits_is_refused_unless_it_may_round(tmp_path: Path) -> None:
    wide = stores.fill(tmp_path / "w.zarr", dtype="float32", specs=(stores.VIDEO,))
    with pytest.raises(StoreError, match=r"without rounding \(--lossy.*'ü/0 x'"):
        convert_store(wide, tmp_path / "n.zarr", store_dtype="float16")
    convert_store(wide, tmp_path / "n.zarr", store_dtype="float16", lossy=True)
    rows = open_store(wide).ok_rows()
    narrow = open_store(tmp_path / "n.zarr").tokens(rows)
    assert torch.equal(narrow, open_store(wide).tokens(rows).half())
    convert_store(tmp_path / "n.zarr", tmp_path / "wn.zarr", store_dtype="float32")
    again = open_store(tmp_path / "wn.zarr")
    assert torch.equal(again.tokens(rows), narrow.float())
    # It says that it holds no more digits than before: extraction in float32 does not add to it.
    assert again.making("fake-video")["converted_from"] == "float16"
    with pytest.raises(SpecMismatch, match="converted: expected nothing, found float16"):
        stores.fill(tmp_path / "wn.zarr", dtype="float32", specs=(stores.VIDEO,))
    convert_store(tmp_path / "wn.zarr", tmp_path / "n2.zarr", store_dtype="float16")
    assert tree(tmp_path / "n2.zarr") == tree(tmp_path / "n.zarr")


def test_convert_refuses_what_overflows_even_when_it_may_round(tmp_path: Path) -> None:
    path = stores.fill(tmp_path / "a.zarr", dtype="float32", specs=(stores.IMAGE,), views=(CLEAN,))
    writer = StoreWriter(path, stores.dataset(), store_dtype="float32", shard=3)
    writer.add_encoder(stores.IMAGE)
    rows = stores.rows_of(stores.IMAGE, [6], "float32")
    rows.features[0, 0] = 70_000
    writer.commit(2, {"fake-image": rows}, [])
    with pytest.raises(StoreError, match=r"overflow float16: 'ü/6 x'"):
        convert_store(path, tmp_path / "b.zarr", store_dtype="float16", lossy=True)


def test_convert_selects_splits_and_views(whole: Path, tmp_path: Path) -> None:
    result = convert_store(whole, tmp_path / "b.zarr", splits=["val", "test"], views=[])
    assert "some clips were left out" in result.warnings[0]
    store, before = open_store(tmp_path / "b.zarr"), open_store(whole)
    kept = [1, 2, 4, 5]
    assert store.clips == tuple(before.clips[row] for row in kept)
    assert store.views("fake-video") == (CLEAN,)
    assert torch.equal(store.labels(), before.labels(kept))
    assert store.partitions == {"split1": ("", "test", "", "test")}
    assert [(f["clip"], f["row"]) for f in store.failures()] == [("ü/2 x", 1), ("ü/5 x", 3)]
    rows = store.ok_rows(["fake-video"])
    assert torch.equal(store.tokens(rows, "fake-video"), before.tokens([1, 4, 5], "fake-video"))
    assert verify_store(store.path).ok
    with pytest.raises(SpecMismatch, match="clips"):
        stores.fill(tmp_path / "b.zarr")
    with pytest.raises(UsageError, match="another place"):
        convert_store(whole, whole)
    with pytest.raises(UsageError, match="--drop nobody"):
        convert_store(whole, tmp_path / "x.zarr", drop=["nobody"])


def test_merge_of_two_halves_is_the_whole(whole: Path, tmp_path: Path) -> None:
    one = stores.fill(tmp_path / "1.zarr", stores.dataset(3))
    two = stores.fill(tmp_path / "2.zarr", stores.dataset(4, 3), shard=2)
    merge_stores([one, two], tmp_path / "m.zarr")
    merged = open_store(tmp_path / "m.zarr")
    mine, theirs = stores.content(merged), stores.content(open_store(whole))
    assert mine == theirs
    assert verify_store(merged.path).ok
    with pytest.raises(StoreError, match=r"3 clips are in .*1\.zarr too: 'ü/0 x'"):
        merge_stores([one, whole], tmp_path / "x.zarr")
    other = stores.fill(
        tmp_path / "3.zarr", stores.dataset(2, 7, classes=("run", "swim", "jump")), dtype="float32",
        specs=(stores.VIDEO, stores.IMAGE),
    )  # fmt: skip
    with pytest.raises(SpecMismatch) as refused:
        merge_stores([one, other], tmp_path / "x.zarr")
    for part in ("classes, first difference at row 1", "video encoders: expected fake-patch",
                 "store_dtype: expected 'float16', found 'float32'"):  # fmt: skip
        assert part in str(refused.value)
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize("name", ["f.h5", "f.npz", "f.safetensors", "f"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_exported_imports_as_the_same_bits(tmp_path: Path, name: str, dtype: str) -> None:
    path = stores.fill(tmp_path / "a.zarr", dtype=dtype, specs=(stores.VIDEO, stores.IMAGE))
    for encoder, kind in (("fake-video", "video"), ("fake-image", "image")):
        out = tmp_path / kind / name
        done = export_store(path, out, encoder=encoder, view=1)
        assert (done.clips, done.left_out, done.view) == (6, ["ü/2 x"], "augmented 1")
        data = read_manifest(Path(done.manifest), classes=Path(done.classes))
        new = tmp_path / f"{kind}.zarr"
        import_features(
            data, new, out, name="back", kind=kind, global_token="none",
            store_dtype=dtype, shard=4,
        )  # fmt: skip
        mine, theirs = open_store(new), open_store(path)
        rows = theirs.ok_rows([encoder], 1)
        assert mine.clips == tuple(theirs.clips[row] for row in rows)
        read = ("tokens", "image")[kind == "image"]
        found = getattr(mine, read)(None, "back")
        expected = getattr(theirs, read)(rows, encoder, 1)
        assert found.dtype == expected.dtype
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
        assert torch.equal(mine.labels(), theirs.labels(rows))
        known, wanted = mine.label_known(), theirs.label_known(rows)
        assert torch.equal(known, wanted)
    with pytest.raises(UsageError, match="is there already"):
        export_store(path, out, encoder="fake-image")
    with pytest.raises(UsageError, match=r"--encoder .*expected one of fake-video, fake-image"):
        export_store(path, tmp_path / "new.h5")


def test_a_zip_of_a_store_is_read_by_msq_and_by_plain_zarr(whole: Path, tmp_path: Path) -> None:
    zipped = tmp_path / "a.zarr.zip"
    export_store(whole, zipped)
    same_rows(open_store(zipped), open_store(whole))
    assert verify_store(locate(zipped)).ok
    group = zarr.open_group(zarr.storage.ZipStore(zipped, mode="r"), mode="r")
    plain = zarr.open_group(whole, mode="r")
    for name, array in plain.members(max_depth=None):
        if isinstance(array, zarr.Array):
            assert np.array_equal(group[name][...], array[...], equal_nan=name.startswith("time"))
    export_store(whole, tmp_path / "b.zarr.zip")
    assert (tmp_path / "b.zarr.zip").read_bytes() == zipped.read_bytes()
    convert_store(zipped, tmp_path / "back.zarr")
    assert local_tree(tmp_path / "back.zarr") == copied(whole)
    with pytest.raises(UsageError, match="zip"):
        convert_store(whole, zipped)
    content = bytearray(zipped.read_bytes())
    with zipfile.ZipFile(zipped) as archive:
        info = archive.getinfo("tokens/fake-video/c/0/0/0/0")
    content[info.header_offset + len(info.FileHeader()) + 9] ^= 1
    zipped.write_bytes(bytes(content))
    with pytest.raises(StoreError, match=r"tokens/fake-video/c/0/0/0/0.*CRC-32"):
        open_store(zipped).tokens([0], "fake-video")
    assert any(info.filename in str(p) for p in verify_store(locate(zipped)).problems)
    zipped.write_bytes(bytes(content[:-40]))
    with pytest.raises(StoreError, match="not a zip file"):
        open_store(zipped)


def test_a_store_in_an_object_store_has_the_same_objects_put_once_status_last(
    whole: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    puts: list[str] = []
    real = MemoryFileSystem.pipe_file

    def put(self: Any, path: str, value: bytes, **options: Any) -> Any:
        puts.append(str(path).split("a.zarr/")[-1])
        return real(self, path, value, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", put)
    for name in ("mv", "copy", "cp_file", "_rm", "rm_file"):
        monkeypatch.setattr(MemoryFileSystem, name, lambda *a, **k: pytest.fail("no rename"))
    url = f"{bucket}/a.zarr"
    stores.fill(locate(url))
    assert remote_tree(url) == local_tree(whole)
    records = [p for p in puts if p.startswith("failures/0")]  # rewritten as encoders come in
    assert len([p for p in puts if p not in records]) == len({*puts} - {*records})
    for name in (p for p in puts if p.startswith("status/") and "/c/" in p):
        _, slug, _, shard, view = name.split("/")
        of = [k for k, p in enumerate(puts) if p.startswith((f"tokens/{slug}/c/{shard}/{view}",
              f"image/{slug}/c/{shard}/{view}", f"time/{slug}/c/{shard}/{view}"))]  # fmt: skip
        assert max(of) < puts.index(name)
    puts.clear()
    stores.fill(locate(url))
    assert puts == []  # all of it is there


def test_a_url_is_read_like_a_folder(whole: Path, bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/a.zarr"
    convert_store(whole, url)
    assert remote_tree(url) == copied(whole)
    same_rows(open_store(url), open_store(whole))
    same_rows(open_store(Path(url)), open_store(whole))  # a slash is lost, as on the command line
    same_rows(open_store(whole.as_uri()), open_store(whole))
    assert torch.equal(
        open_store(url).tokens([4, 0], "fake-video"), open_store(whole).tokens([4, 0], "fake-video")
    )
    assert verify_store(locate(url)).ok
    with pytest.raises(StoreError, match="only a store on a disk can be streamed"):
        open_store(url).token_reader("fake-video")
    export_store(url, f"{bucket}/a.zarr.zip")
    export_store(url, f"{bucket}/f.npz", encoder="fake-image")
    export_store(whole, tmp_path / "f.npz", encoder="fake-image")
    files = fsspec.filesystem("memory")
    assert files.cat_file("/bucket/f.npz") == (tmp_path / "f.npz").read_bytes()
    files.rm_file("/bucket/a.zarr/tokens/fake-video/c/1/0/0/0")
    with pytest.raises(StoreError, match=r"memory://bucket/a\.zarr/tokens.*missing although"):
        open_store(url).tokens([4], "fake-video")
    problem = verify_store(locate(url)).problems[0]
    assert problem.file == "tokens/fake-video/c/1/0/0/0"
    with pytest.raises(UsageError, match="cannot be opened by fsspec"):
        open_store("nosuch://bucket/a.zarr")


def test_extraction_into_a_url_gives_the_bytes_of_a_folder(
    videos: Path, tmp_path: Path, bucket: str
) -> None:
    data = fakes.make_dataset(videos, 4, broken=(3,))
    options: dict[str, Any] = {"image": None, "text": fakes.FakeText(), "workers": 0, "shard": 2}
    url = f"{bucket}/x.zarr"
    done = extract(data, Path(url), video=fakes.FakeEncoder(), **options)
    assert (done.store, done.done, done.failed) == (url, 3, 1)
    extract(data, tmp_path / "x.zarr", video=fakes.FakeEncoder(), **options)
    assert remote_tree(url) == local_tree(tmp_path / "x.zarr")


@pytest.mark.parametrize("old", [True, False])
def test_an_encoder_and_views_are_added_and_nothing_that_is_there_changes(
    tmp_path: Path, old: bool
) -> None:
    path = stores.fill(tmp_path / "a.zarr", specs=(stores.VIDEO,), views=(CLEAN,))
    if old:
        stores.unsealed(path)
        notes = verify_store(path).notes
        assert any("before there were digests" in note for note in notes)
    before, said = tree(path), stores.content(open_store(path))
    writer = StoreWriter(path, stores.dataset(), shard=3)
    writer.add_encoder(stores.IMAGE, (CLEAN,))
    writer.add_encoder(stores.VIDEO, augmented_views(2))
    # Its arrays' metadata say that there are more views; nothing else was touched.
    grown = {f"{group}/fake-video/zarr.json" for group in ("tokens", "time", "status")}
    assert {k for k, v in tree(path).items() if k in before and before[k] != v} == grown
    store = open_store(path)
    assert {k: v for k, v in stores.content(store).items() if k in said} == said
    for slug, view in (("fake-image", 0), ("fake-video", 1), ("fake-video", 2)):
        read = store.tokens if slug == "fake-video" else store.image
        with pytest.raises(StoreError, match="were not extracted yet"):
            read([0], slug, view)
        assert len(store.ok_rows([slug], view)) == 0
    # A shard in which nothing failed leaves the list of what did as it is, old or not.
    writer.commit(0, {"fake-image": stores.rows_of(stores.IMAGE, [0, 1, 2], "float16")}, [])
    assert tree(path)["failures/00000.json"] == before["failures/00000.json"]
    stores.add(writer, stores.dataset(), stores.IMAGE, (CLEAN,), "float16")
    stores.add(writer, stores.dataset(), stores.VIDEO, (CLEAN, *augmented_views(2)), "float16")
    changed = {k for k, v in tree(path).items() if k in before and before[k] != v}
    assert changed == grown | {"failures/00000.json", "failures/00001.json"}
    assert stores.content(open_store(path)) | {"failures": 0} == {
        **stores.content(open_store(path)), **said, "failures": 0,
    }  # fmt: skip
    assert verify_store(path).ok


def test_a_root_that_is_gone_comes_back_only_over_the_same_rows(
    whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "a.zarr")
    (tmp_path / "a.zarr/zarr.json").unlink()
    clips = stores.dataset().clips
    other = stores.dataset(clips=(replace(clips[0], labels=(2,)), *clips[1:]))
    with pytest.raises(StoreError, match="label/c/0/0: the bytes changed"):
        stores.fill(tmp_path / "a.zarr", other)
    assert not (tmp_path / "a.zarr/zarr.json").exists()
    stores.fill(tmp_path / "a.zarr")
    assert tree(tmp_path / "a.zarr") == tree(whole)
