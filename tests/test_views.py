"""Stores with several views: made at once or later, killed anywhere, read back, looked at."""

from __future__ import annotations

import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
import xarray as xr
import zarr

from msq.cli import main
from msq.errors import StoreError, UsageError
from msq.extract import shard_making, shard_plan, store_writer
from msq.extract.decode_pool import DecodeTask, Picture, decode
from msq.extract.pipeline import ExtractResult, extract
from msq.extract.plan_run import dry_run
from msq.extract.request import ExtractRequest
from msq.extract.store import open_store
from msq.extract.store_seal import sealed
from msq.extract.store_views import summary, with_views
from msq.extract.transforms import normalise
from msq.extract.views import CLEAN, View, augmented_views, clips_by_crops, parse_clips_by_crops

fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))
VIEWS = (CLEAN, *augmented_views(2), *clips_by_crops(2, 3))
NAMES = [str(view) for view in VIEWS]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    fakes.make_dataset(folder, 7)
    return folder


def run(data: Any, out: Path, views: Any = VIEWS, **options: Any) -> ExtractResult:
    options = {"workers": 0, "shard": 3, "batch": 2} | options
    encoders = {
        "video": fakes.FakeEncoder(),
        "image": fakes.FakeEncoder(fakes.image_spec(frames=2, size=8)),
    }
    return extract(data, out, views=views, **(encoders | options))


def names_with_views(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob("*.json") if '"views"' in p.read_text()]


def test_each_view_of_a_clip_is_that_view_decoded_and_encoded_alone(
    videos: Path, tmp_path: Path
) -> None:
    data = fakes.make_dataset(videos, 7)
    result = run(data, tmp_path / "a.zarr", store_dtype="float32")
    assert (result.clips, result.done, result.failed, result.views) == (7, 7, 0, NAMES)
    store = open_store(tmp_path / "a.zarr")
    assert store.views("fake-video") == store.views("fake-image") == VIEWS
    video, image = fakes.FakeEncoder(), fakes.FakeEncoder(fakes.image_spec(frames=2, size=8))
    different = set()
    for number, view in enumerate(VIEWS):
        for row in (0, 4):
            clip = data.clips[row]
            for encoder, read in ((video, store.tokens), (image, store.image)):
                picture = Picture.of(encoder.spec, view)
                task = DecodeTask(row, clip.path, None, None, (picture,), id=clip.id)
                alone = decode(task)
                pixels = normalise(
                    torch.from_numpy(alone.frames[0]), encoder.spec.mean, encoder.spec.std
                )
                expected = encoder(pixels[None])
                expected = expected.mean(dim=1) if encoder is image else expected
                found = read([row], view=number)
                assert torch.allclose(found, expected, atol=1e-6), (view, row)
                assert torch.equal(found, read([row], view=view))
                slug = encoder.spec.slug
                assert store.time([row], slug, number).tolist() == [alone.times[0].tolist()]
        different.add(store.tokens([0], view=number).numpy().tobytes())
    assert len(different) == len(VIEWS)


def test_views_at_once_or_later_or_in_several_passes_give_the_same_bytes(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = fakes.make_dataset(videos, 7)
    run(data, tmp_path / "once.zarr")
    expected = fakes.tree(tmp_path / "once.zarr")
    later = tmp_path / "later.zarr"
    for known in (1, 2, 3, len(VIEWS)):
        run(data, later, VIEWS[:known], workers=int(known == 3))
    assert fakes.tree(later) == expected
    monkeypatch.setattr(shard_plan, "FRAMES_AT_ONCE", 1)  # every view in a pass of its own
    opened: list[str] = []
    av_open = av.open
    monkeypatch.setattr(av, "open", lambda p, **o: (opened.append(p), av_open(p, **o))[1])
    run(data, tmp_path / "passes.zarr")
    assert len(opened) == len(VIEWS) * len(data.clips)
    assert fakes.tree(tmp_path / "passes.zarr") == expected


def test_a_clip_is_decoded_once_for_all_its_views_and_encoders(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = fakes.make_dataset(videos, 4)
    opened: list[str] = []
    av_open = av.open
    monkeypatch.setattr(av, "open", lambda p, **o: (opened.append(p), av_open(p, **o))[1])
    run(data, tmp_path / "a.zarr")
    assert opened == [f"file:{clip.path}" for clip in data.clips]


def test_a_pass_holds_no_more_than_it_may(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = fakes.make_dataset(videos, 2)
    seen: list[int] = []

    class Noted(shard_making.ShardBuilder):  # type: ignore[misc,name-defined]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            seen.append(len({view for _, view in self.parts}))

    monkeypatch.setattr(shard_making, "ShardBuilder", Noted)
    run(data, tmp_path / "a.zarr", shard=2)
    # A view takes 4 + 2 frames; the three crops of a test clip share theirs.
    monkeypatch.setattr(shard_plan, "FRAMES_AT_ONCE", 12)
    run(data, tmp_path / "b.zarr", shard=2)
    monkeypatch.setattr(shard_plan, "FRAMES_AT_ONCE", 192)
    per_view = 4 * 3 * 16**2 + 2 * 3 * 8**2
    monkeypatch.setattr(shard_plan, "WINDOW_BYTES", 2 * 4 * per_view)  # batches of two clips
    run(data, tmp_path / "c.zarr", shard=2)
    monkeypatch.setattr(shard_plan, "WINDOW_BYTES", 2**30)
    row = 2 * (5 * 6 + 6) + 4 * (4 + 2)  # float16 tokens and image, float32 times
    monkeypatch.setattr(shard_plan, "SHARD_BYTES", 2 * 5 * row)
    run(data, tmp_path / "d.zarr", shard=2)
    assert seen == [9, 2, 4, 3, 4, 4, 1, 5, 4]


def test_adding_views_and_encoders_touches_no_chunk(videos: Path, tmp_path: Path) -> None:
    data = fakes.make_dataset(videos, 7)
    out = tmp_path / "a.zarr"
    run(data, out, (CLEAN,))
    assert not names_with_views(out)  # as stores were written before there were views
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("*") if p.is_file()}
    run(data, out, VIEWS[:3])
    changed = {p for p, (content, stamp) in before.items() if p.stat().st_mtime_ns != stamp}
    arrays = ("tokens/fake-video", "image/fake-image")
    arrays += tuple(f"{a}/fake-{e}" for a in ("time", "status") for e in ("video", "image"))
    assert changed == {out / name / "zarr.json" for name in arrays}
    for path in changed:
        old, new = json.loads(before[path][0]), json.loads(path.read_bytes())
        assert (old["shape"][1], new["shape"][1]) == (1, 3)
        assert new["attributes"]["msq"].pop("views") == NAMES[:3]
        for document in (old, new):  # the digests are of what differs
            del document["attributes"]["msq"]["metadata_sha256"]
        assert {**new, "shape": old["shape"]} == old
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    encoder = fakes.FakeEncoder()
    again = run(data, out, VIEWS[:2], video=encoder)  # all of it is there
    assert encoder.calls == []
    assert (again.done, again.views) == (7, NAMES[:2])
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == stamps
    second = fakes.FakeEncoder(replace(fakes.SPEC, slug="other"))
    run(data, out, (CLEAN, *clips_by_crops(2, 1)), video=second, image=None)
    assert {p: s for p, s in stamps.items() if p.stat().st_mtime_ns != s and p.is_file()} == {}
    store = open_store(out)
    assert store.views("other") == (CLEAN, *clips_by_crops(2, 1))
    assert store.views("fake-video") == VIEWS[:3]
    assert store.verify() == []


def test_zarr_and_xarray_see_the_views(videos: Path, tmp_path: Path) -> None:
    data = fakes.make_dataset(videos, 7)
    out = tmp_path / "a.zarr"
    run(data, out, (CLEAN,))
    run(data, out)
    store = open_store(out)
    plain = zarr.open_array(out / "tokens" / "fake-video", mode="r")
    assert plain.shape == (7, 9, 5, 6)
    assert plain.shards == (3, 1, 5, 6)
    tree = xr.open_datatree(out, engine="zarr", consolidated=False)
    assert tree["tokens"].ds["fake-video"].dims[:2] == ("clip", "view")
    for number in range(len(VIEWS)):
        found = store.tokens(view=number).numpy()
        assert np.array_equal(np.asarray(plain[:, number]), found)
        assert np.array_equal(tree["tokens"].ds["fake-video"].isel(view=number).values, found)
        assert zarr.open_array(out / "status" / "fake-image")[:, number].tolist() == [1] * 7
    # The metadata of an array that has grown is what zarr writes for one of that size.
    run(data, tmp_path / "once.zarr")
    assert (out / "tokens/fake-video/zarr.json").read_bytes() == (
        tmp_path / "once.zarr/tokens/fake-video/zarr.json"
    ).read_bytes()


def test_all_tokens_of_a_view_are_files_of_their_own(videos: Path, tmp_path: Path) -> None:
    data = fakes.make_dataset(videos, 4)
    spec = replace(fakes.SPEC, slug="patchy", pooling="patch")
    out, events = tmp_path / "a.zarr", []
    run(data, out, (CLEAN,), video=fakes.FakeEncoder(spec), image=None)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("c/**/*") if p.is_file()}
    run(data, out, VIEWS[:3], video=fakes.FakeEncoder(spec), image=None, progress=events.append)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert [event["done"] for event in events][-1] == 4
    files = sorted(p.relative_to(out / "tokens/patchy/c") for p in out.glob("tokens/patchy/c/*/*"))
    assert [str(p) for p in files] == [f"{row}/{view}" for row in range(4) for view in range(3)]
    same = tmp_path / "b.zarr"
    run(data, same, VIEWS[:3], video=fakes.FakeEncoder(spec), image=None)
    assert fakes.tree(out) == fakes.tree(same)
    store = open_store(out)
    run(data, tmp_path / "c.zarr", VIEWS[:3], image=None)  # the same numbers, sharded
    for view in range(3):
        assert torch.equal(
            store.tokens(view=view), open_store(tmp_path / "c.zarr").tokens(view=view)
        )
    (out / "tokens/patchy/c/2/1/0/0").unlink()
    assert open_store(out).tokens([2]).shape == (1, 5, 6)
    with pytest.raises(StoreError, match="clip-2-é"):
        open_store(out).tokens([2], view=1)
    run(data, out, VIEWS[:3], video=fakes.FakeEncoder(spec), image=None)
    assert fakes.tree(out) == fakes.tree(same)


@pytest.mark.parametrize("later", [False, True])
def test_death_before_any_single_write_and_a_resume_give_the_same_bytes(
    later: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = fakes.make_dataset(tmp_path / "v", 3, broken=(1,))
    views = (CLEAN, *augmented_views(1), *clips_by_crops(1, 3)[:1])
    options: dict[str, Any] = {"image": None, "shard": 2}
    run(data, tmp_path / "whole.zarr", views, **options)
    expected = fakes.tree(tmp_path / "whole.zarr")
    run(data, tmp_path / "clean.zarr", (CLEAN,), **options)
    write, call, died = store_writer.write_file, 0, True
    while died:
        call, died = call + 1, False
        out = tmp_path / f"{call}.zarr"
        if later:
            shutil.copytree(tmp_path / "clean.zarr", out)
        monkeypatch.setattr(store_writer, "write_file", fakes.dying_at(call, write))
        try:
            run(data, out, views, **options)
        except fakes.Killed:
            died = True
        monkeypatch.setattr(store_writer, "write_file", write)
        if later:  # what was there before can be read at any moment
            assert open_store(out).tokens([0, 2]).shape == (2, 5, 6)
            assert open_store(out).verify() == []
        run(data, out, views, **options)
        assert fakes.tree(out) == expected, f"died in write {call}"
    assert call > (14 if later else 20)


def test_a_crash_between_the_metadata_files_leaves_a_store_that_opens_and_resumes(
    videos: Path, tmp_path: Path
) -> None:
    data = fakes.make_dataset(videos, 4)
    out = tmp_path / "a.zarr"
    run(data, out, (CLEAN,), image=None)
    grown = out / "tokens" / "fake-video" / "zarr.json"
    grown.write_bytes(with_views(grown.read_bytes(), VIEWS))
    store = open_store(out)
    assert store.views() == (CLEAN,)  # status counts, and it is written last
    assert store.tokens().shape == (4, 5, 6)
    with pytest.raises(StoreError, match="no view 1"):
        store.tokens(view=1)
    wanted = (CLEAN, *clips_by_crops(1, 3))  # other views than those of the crash
    run(data, out, wanted, image=None)
    run(data, tmp_path / "b.zarr", wanted, image=None)
    assert fakes.tree(out) == fakes.tree(tmp_path / "b.zarr")


def test_metadata_that_does_not_agree_is_refused(videos: Path, tmp_path: Path) -> None:
    data = fakes.make_dataset(videos, 2)
    run(data, tmp_path / "a.zarr", VIEWS[:2], image=None)
    status = tmp_path / "a.zarr/status/fake-video/zarr.json"
    content = json.loads(status.read_bytes())
    content["shape"][1] = 4
    status.write_bytes(sealed(json.dumps(content).encode()))
    with pytest.raises(StoreError, match=r"expected 4 views .* found 2"):
        open_store(tmp_path / "a.zarr").tokens()


def test_failures_name_their_views_and_clips_are_counted_once(tmp_path: Path) -> None:
    data = fakes.make_dataset(tmp_path / "v", 4, broken=(1,))
    out = tmp_path / "a.zarr"
    assert run(data, out, (CLEAN,)).failed == 1
    assert not names_with_views(out)
    result = run(data, out, VIEWS[:3])
    assert (result.clips, result.done, result.failed) == (4, 3, 1)
    (failure,) = result.failures
    assert failure["views"] == NAMES[:3]
    assert failure["encoders"] == ["fake-image", "fake-video"]
    store = open_store(out)
    for view in VIEWS[:3]:
        assert store.status("fake-video", view).tolist() == [1, 2, 1, 1]
    encoder = fakes.FakeEncoder()
    before = fakes.tree(out)
    run(data, out, VIEWS[:3], video=encoder, retry_failed=True)
    assert encoder.calls == []
    assert fakes.tree(out) == before
    fakes.write_video(data.clips[1].path, 1)
    # Only the views asked for are made again.
    partly = run(data, out, VIEWS[:2], retry_failed=True)
    assert (partly.done, partly.failed) == (4, 0)
    assert open_store(out).status("fake-video", 2).tolist() == [1, 2, 1, 1]
    assert [f["views"] for f in open_store(out).failures()] == [["augmented 2"]]
    run(data, out, VIEWS[:3], retry_failed=True)
    run(data, tmp_path / "b.zarr", VIEWS[:3])
    assert fakes.tree(out) == fakes.tree(tmp_path / "b.zarr")


def test_a_clip_that_fails_in_one_view_alone_counts_as_failed(videos: Path, tmp_path: Path) -> None:
    class Loud(type(fakes.FakeEncoder())):  # type: ignore[misc]
        """Its features overflow float16 for the second view that it sees."""

        def __call__(self, video: torch.Tensor) -> torch.Tensor:
            tokens = super().__call__(video)
            return tokens * 1e9 if len(self.calls) == 2 else tokens

    data = fakes.make_dataset(videos, 2)
    result = run(data, tmp_path / "a.zarr", VIEWS[:3], video=Loud(), image=None, shard=2)
    assert (result.done, result.failed) == (0, 2)
    assert [f["views"] for f in result.failures] == [["augmented 1"]] * 2
    store = open_store(tmp_path / "a.zarr")
    assert [store.status("fake-video", v).tolist() for v in range(3)] == [[1, 1], [2, 2], [1, 1]]
    with pytest.raises(StoreError, match="2 of the 2 rows"):
        store.tokens(view=1)
    # Asked for the others alone, nothing has failed.
    quiet = fakes.FakeEncoder()
    assert run(data, tmp_path / "a.zarr", (CLEAN,), video=quiet, image=None, shard=2).failed == 0
    assert quiet.calls == []


def test_views_that_are_not_there_are_refused_with_what_is(videos: Path, tmp_path: Path) -> None:
    data = fakes.make_dataset(videos, 3)
    out = tmp_path / "a.zarr"
    run(data, out, VIEWS, image=None)
    image = fakes.FakeEncoder(fakes.image_spec())
    run(data, out, (CLEAN, *clips_by_crops(1, 1)), video=None, image=image)
    store = open_store(out)
    said = "0 clean, 1-2 augmented, 3-8 test 2 clips x 3 crops"
    assert summary(VIEWS) == said
    for read in (store.tokens, store.time, store.token_reader):
        options = {} if read == store.tokens else {"encoder": "fake-video"}
        with pytest.raises(StoreError, match=rf"no view 9; its views: {said}.*--views"):
            read(view=9, **options)
    with pytest.raises(StoreError, match="no view -1"):
        store.status("fake-video", -1)
    with pytest.raises(StoreError, match="fake-image: no view 'augmented 1'; its views: 0 clean, "):
        store.image(view=View("augmented", 1))
    with pytest.raises(StoreError, match=r"'augmented 1' of fake-video, 'test clip 1/1 crop 1/1'"):
        store.ok_rows(view=1)
    assert store.ok_rows(view=0).tolist() == [0, 1, 2]
    with store.token_reader("fake-video", VIEWS[4]) as reader:
        raw = np.empty((3, reader.row_bytes), dtype=np.uint8)
        reader.read([0, 1, 2], raw)
    assert raw.tobytes() == store.tokens(view=4).numpy().tobytes()


def test_verify_and_inspect_cover_all_views(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = fakes.make_dataset(videos, 4)
    out = tmp_path / "a.zarr"
    run(data, out)
    main_code(["store", "verify", str(out), "--json"], 0)
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["checked"]) == (True, 2 * 4 * len(VIEWS))
    main_code(["store", "inspect", str(out), "--json"], 0)
    listed = json.loads(capsys.readouterr().out)["encoders"]["fake-video"]
    assert [view["view"] for view in listed["views"]] == NAMES
    assert {view["ok"] for view in listed["views"]} == {4}
    main_code(["store", "inspect", str(out)], 0)
    shown = capsys.readouterr().out
    assert "augmented (2)" in shown
    assert "test 2 clips x 3 crops (6)" in shown
    damaged = out / "tokens/fake-video/c/1/5/0/0"
    content = bytearray(damaged.read_bytes())
    content[3] ^= 1
    damaged.write_bytes(content)
    main_code(["store", "verify", str(out), "--json"], 4)
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert str(damaged) in problem
    assert "clip-3-é" in problem


def main_code(arguments: list[str], expected: int) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == expected, arguments


@pytest.fixture
def request_(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExtractRequest:
    """A manifest of four clips; every request gets encoders that take no time."""
    video = fakes.FakeEncoder()
    image = fakes.FakeEncoder(fakes.image_spec(frames=2, size=8))
    monkeypatch.setattr(ExtractRequest, "load_encoders", lambda _: (video, image, fakes.FakeText()))
    clips = fakes.make_dataset(videos, 4).clips
    lines = [f'"{clip.path}",run,{clip.split}' for clip in clips]
    (tmp_path / "clips.csv").write_text("\n".join(["path,labels,split", *lines]) + "\n")
    return ExtractRequest(
        manifest=tmp_path / "clips.csv", out=tmp_path / "s.zarr", shard=3, workers=0
    )


def stored_bytes(store: Path) -> int:
    return sum(p.stat().st_size for p in store.rglob("*") if p.is_file())


def test_dry_run_says_what_views_take(request_: ExtractRequest) -> None:
    out = request_.out
    assert out is not None
    request_.run()
    clean = stored_bytes(out)
    more = replace(request_, views=2, test_views="2x3")
    plan = dry_run(more)
    assert plan["shards"] == {"total": 2, "done": 0, "pending": 2}
    video = plan["encoders"]["fake-video"]
    assert video["views"] == NAMES
    assert video["shards"] == {"total": 18, "done": 2, "pending": 16}
    assert video["frames"] == {"total": 4 * 9 * 4, "pending": 4 * 8 * 4}
    assert plan["encoders"]["fake-image"]["frames"] == {"total": 4 * 9 * 2, "pending": 4 * 8 * 2}
    assert stored_bytes(out) == clean
    assert more.run().views == NAMES
    assert stored_bytes(out) == plan["bytes"]["total"]
    grown = sum(p.stat().st_size for a in ("tokens", "image", "time", "status")
                for p in out.glob(f"{a}/*/zarr.json"))  # fmt: skip
    chunks = sum(
        p.stat().st_size
        for p in out.rglob("c/*/*")
        if p.is_file() or p.is_dir()
        if p.is_file() and int(p.name) > 0 and "status" in p.parts
    ) + sum(p.stat().st_size for a in ("tokens", "image", "time")
            for p in out.glob(f"{a}/*/c/*/[1-8]/**/*") if p.is_file())  # fmt: skip
    assert plan["bytes"]["pending"] == grown + chunks
    assert dry_run(more)["bytes"]["pending"] == 0
    fewer = dry_run(replace(request_, views=1))
    assert fewer["bytes"] == dry_run(more)["bytes"]


def test_the_command_line_adds_views(
    request_: ExtractRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["extract", "--manifest", str(request_.manifest), "--out", str(request_.out)]
    arguments += ["--workers", "0", "--quiet", "--json"]
    main_code([*arguments, "--views", "1"], 0)
    assert json.loads(capsys.readouterr().out)["views"] == ["clean", "augmented 1"]
    main_code([*arguments, "--test-views", "2x1"], 0)
    capsys.readouterr()
    assert [str(v) for v in open_store(request_.out or "").views("fake-video")] == [
        "clean", "augmented 1", "test clip 1/2 crop 1/1", "test clip 2/2 crop 1/1"
    ]  # fmt: skip
    for wrong in ("10by3", "0x3", "10x2", "x"):
        main_code([*arguments, "--test-views", wrong], 2)
        assert "test views" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--views"):
        replace(request_, views=-1).asked_views()
    assert parse_clips_by_crops(" 10X3 ") == clips_by_crops(10, 3)
