"""Image features of each frame, stored on request: what is written, resumed, refused and read."""

from __future__ import annotations

import hashlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

from msq.bench import scale
from msq.cli import main
from msq.errors import StoreError, UsageError
from msq.extract import store_writer
from msq.extract.pipeline import ExtractResult, extract
from msq.extract.plan_run import dry_run
from msq.extract.request import ExtractRequest
from msq.extract.request_text import read_request, write_request
from msq.extract.store import open_store
from msq.extract.store_seal import sealed
from msq.extract.store_verify import verify_store
from msq.extract.transforms import normalise, resize_crop
from msq.extract.video import decode_clip
from msq.extract.views import CLEAN, augmented_views
from msq.head.grid_stores import extraction_source

HERE = Path(__file__).parent
fakes = SimpleNamespace(**runpy.run_path(str(HERE / "fakes.py")))
watched = SimpleNamespace(**runpy.run_path(str(HERE / "watched_processes.py")))
IMAGE = fakes.image_spec(frames=3, size=8)  # other frames than the video encoder
FRAMES = "image_frames/fake-image"
BROKEN, CUT = 1, 4  # rows
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Seven clips, one that is no video and one that is cut short and gives some of its frames."""
    folder = tmp_path_factory.mktemp("videos")
    made = fakes.make_dataset(folder, 7, broken=(BROKEN,))
    cut = folder / "cut.mp4"
    fakes.write_video(cut, 2, frames=40, width=96, height=64)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    clips = [replace(c, path=cut) if row == CUT else c for row, c in enumerate(made.clips)]
    return replace(made, clips=tuple(clips))


def run(data: Any, out: Path, *, frames: bool = True, **options: Any) -> ExtractResult:
    options = {"workers": 0, "shard": 3, "batch": 2, "video": fakes.FakeEncoder()} | options
    options = {"image": fakes.FakeEncoder(IMAGE)} | options
    return extract(data, out, image_frames=frames, **options)


def without_frames(store: Path) -> dict[str, str]:
    """Digests of all files but those of frames, and of what says that these are there."""
    tree = {n: x for n, x in fakes.tree(store).items() if not n.startswith("image_frames/")}
    for name in (name for name in tree if name.endswith("/fake-image/zarr.json")):
        document = json.loads((store / name).read_bytes())
        assert document["attributes"]["msq"].pop("image_frames") == "stored"
        tree[name] = hashlib.sha256(sealed(json.dumps(document).encode())).hexdigest()
    return tree


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_frames_stand_beside_their_mean_and_change_nothing_else(
    data: Any, tmp_path: Path, dtype: Any
) -> None:
    views = (CLEAN, *augmented_views(1))
    run(data, tmp_path / "a.zarr", store_dtype=dtype, views=views)
    plain = run(data, tmp_path / "b.zarr", store_dtype=dtype, views=views, frames=False)
    assert without_frames(tmp_path / "a.zarr") == fakes.tree(tmp_path / "b.zarr")
    assert (plain.done, plain.failed, len(plain.degraded)) == (6, 1, 1)
    store = open_store(tmp_path / "a.zarr")
    for view in (0, 1):
        rows = store.ok_rows(view=view)
        assert rows.tolist() == [row for row in range(7) if row != BROKEN]
        frames, mean = store.image_frames(rows, view=view), store.image(rows, view=view)
        assert frames.shape == (6, 3, 6)
        assert frames.dtype == mean.dtype == getattr(torch, dtype)
        each, pooled = frames.double(), mean.double()
        # Each was rounded once, by half a step at most.
        bound = EPSILON[dtype] / 2 * (each.abs().mean(dim=1) + pooled.abs()) + 2.0**-24
        assert ((each.mean(dim=1) - pooled).abs() <= bound).all()
        assert (each.std(dim=1) > 0.01).any()  # the frames of a clip are not all alike
    assert verify_store(tmp_path / "a.zarr").ok


def test_each_frame_is_what_the_encoder_makes_of_it(data: Any, tmp_path: Path) -> None:
    run(data, tmp_path / "a.zarr", store_dtype="float32")
    store, encoder = open_store(tmp_path / "a.zarr"), fakes.FakeEncoder(IMAGE)
    for row in store.ok_rows().tolist():
        if row == CUT:
            continue
        decoded = decode_clip(data.clips[row].path, IMAGE.frames)
        pixels = resize_crop(decoded.frames, IMAGE.size)
        expected = encoder(normalise(pixels, IMAGE.mean, IMAGE.std)[None])
        assert torch.allclose(store.image_frames([row]), expected, atol=1e-6)
        assert store.time([row], "fake-image").tolist() == [decoded.times.tolist()]


def test_zarr_and_xarray_read_it_by_its_names(data: Any, tmp_path: Path) -> None:
    out = tmp_path / "a.zarr"
    run(data, out, views=(CLEAN, *augmented_views(1)))
    array = zarr.open_array(out / FRAMES, mode="r")
    assert (array.shape, array.chunks, array.shards) == ((7, 2, 3, 6), (1, 1, 3, 6), (3, 1, 3, 6))
    mean = zarr.open_array(out / "image/fake-image", mode="r")
    own = {k: v for k, v in array.attrs["msq"].items() if k != "metadata_sha256"}
    assert own == {k: v for k, v in mean.attrs["msq"].items() if k != "metadata_sha256"}
    found = np.asarray(array[:, 1])
    assert not found[BROKEN].any()  # a failed clip is the fill value, as everywhere
    rows = open_store(out).ok_rows()
    assert np.array_equal(found[rows.numpy()], open_store(out).image_frames(rows, view=1).numpy())
    tree = xr.open_datatree(out, engine="zarr", consolidated=False)
    named = tree[FRAMES]
    assert named.dims == ("clip", "view", "fake-image_frame", "fake-image_channel")
    assert np.array_equal(named.isel(view=1).values, found)
    assert zarr.open_group(out, mode="r")["image_frames"].metadata.node_type == "group"
    # The bytes are those that zarr itself writes.
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "zarr.json").write_bytes((out / FRAMES / "zarr.json").read_bytes())
    zarr.open_array(copy)[...] = array[...]
    assert fakes.tree(copy) == fakes.tree(out / FRAMES)


def test_frames_that_overflow_fail_the_clip_though_their_mean_would_not(
    data: Any, tmp_path: Path
) -> None:
    class Swings(type(fakes.FakeEncoder())):  # type: ignore[misc]
        """Its frames are large and cancel each other."""

        def __call__(self, video: torch.Tensor) -> torch.Tensor:
            frames = super().__call__(video)
            return frames + torch.tensor([9e4, -9e4, 0.0])[:, None]

    result = run(data, tmp_path / "a.zarr", image=Swings(IMAGE))
    assert (result.done, result.failed) == (0, 7)
    (reason,) = {f["reason"][:73] for f in result.failures if f["encoders"] == ["fake-image"]}
    assert reason == "features of each frame of fake-image are not finite as float16 (largest m"
    assert open_store(tmp_path / "a.zarr").tokens([0]).shape == (1, 5, 6)
    assert run(data, tmp_path / "b.zarr", image=Swings(IMAGE), frames=False).done == 6
    assert run(data, tmp_path / "c.zarr", image=Swings(IMAGE), store_dtype="float32").done == 6


def test_a_store_with_frames_goes_on_with_them_unasked(data: Any, tmp_path: Path) -> None:
    out, views = tmp_path / "a.zarr", (CLEAN, *augmented_views(2))
    run(data, out)
    again = fakes.FakeEncoder(IMAGE)
    before = fakes.tree(out)
    assert run(data, out, image=again).warnings == []
    (told,) = run(data, out, image=again, frames=False).warnings
    assert "holds its features of each frame" in told
    assert (again.calls, fakes.tree(out)) == ([], before)  # all of it is there
    (out / FRAMES / "c/1/0/0/0").unlink()  # lost: this shard is made again
    run(data, out, image=again, frames=False)
    assert (again.calls, fakes.tree(out)) == ([2, 1], before)
    run(data, out, frames=False, views=views)
    run(data, tmp_path / "b.zarr", views=views)
    assert fakes.tree(out) == fakes.tree(tmp_path / "b.zarr")
    assert open_store(out).image_frames([0], view=2).shape == (1, 3, 6)


def test_views_are_added_later_without_touching_those_that_are_there(
    data: Any, tmp_path: Path
) -> None:
    out = tmp_path / "a.zarr"
    run(data, out)
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("c/**/*") if p.is_file()}
    run(data, out, views=(CLEAN, *augmented_views(1)))
    assert {p: p.stat().st_mtime_ns for p in stamps if "failures" not in p.parts} == stamps
    assert open_store(out).image_frames([0], view=1).shape == (1, 3, 6)
    run(data, tmp_path / "b.zarr", views=(CLEAN, *augmented_views(1)))
    assert fakes.tree(out) == fakes.tree(tmp_path / "b.zarr")


def test_another_image_encoder_may_have_them_beside_one_that_has_none(
    data: Any, tmp_path: Path
) -> None:
    out = tmp_path / "a.zarr"
    run(data, out, frames=False)
    other = fakes.FakeEncoder(replace(IMAGE, slug="other"))
    run(data, out, image=other)
    store = open_store(out)
    assert (store.has_image_frames("other"), store.has_image_frames("fake-image")) == (True, False)
    assert store.image_frames([0], "other").shape == (1, 3, 6)


def test_where_nothing_was_committed_yet_they_can_still_be_asked_for(
    data: Any, tmp_path: Path
) -> None:
    out = tmp_path / "a.zarr"
    run(data, tmp_path / "whole.zarr")
    run(data, out, frames=False)
    shutil.rmtree(out / "status/fake-image/c")
    run(data, out)
    assert fakes.tree(out) == fakes.tree(tmp_path / "whole.zarr")


def test_what_cannot_be_read_is_refused_as_image_features_are(data: Any, tmp_path: Path) -> None:
    run(data, tmp_path / "a.zarr", frames=False)
    store = open_store(tmp_path / "a.zarr")
    with pytest.raises(StoreError, match=r"no features of each frame of 'fake-image'.*--image-fra"):
        store.image_frames([0])
    run(data, tmp_path / "b.zarr")
    store = open_store(tmp_path / "b.zarr")
    for rows, options in (
        ([BROKEN, 0], {}),  # failed
        ([7], {}),  # no such row
        ([0], {"view": 1}),
        ([0], {"encoder": "fake-video"}),
        ([0], {"encoder": "nobody"}),
    ):
        said = []
        for read in (store.image, store.image_frames):
            with pytest.raises(StoreError) as refused:
                read(rows, **options)
            said.append(str(refused.value))
        assert said[0] == said[1]
    assert store.image_frames([]).shape == (0, 3, 6)
    order = [6, 0, 5]
    assert torch.equal(store.image_frames(order), store.image_frames(store.ok_rows())[[5, 0, 4]])
    run(data, tmp_path / "b.zarr", image=fakes.FakeEncoder(replace(IMAGE, slug="other")))
    with pytest.raises(StoreError, match=r"expected one image encoder, found fake-image, other"):
        open_store(tmp_path / "b.zarr").image_frames([0])


def test_death_before_any_single_write_and_a_resume_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = fakes.make_dataset(tmp_path / "v", 3, broken=(1,))
    views = (CLEAN, *augmented_views(1))
    options: dict[str, Any] = {"video": None, "shard": 2, "views": views}
    run(data, tmp_path / "whole.zarr", **options)
    run(data, tmp_path / "plain.zarr", **options, frames=False)
    whole, plain = (fakes.tree(tmp_path / f"{name}.zarr") for name in ("whole", "plain"))
    write, call, died, ends = store_writer.write_file, 0, True, set()
    while died:
        call, died = call + 1, False
        out = tmp_path / f"{call}.zarr"
        monkeypatch.setattr(store_writer, "write_file", fakes.dying_at(call, write))
        try:
            run(data, out, **options)
        except fakes.Killed:
            died = True
        monkeypatch.setattr(store_writer, "write_file", write)
        other = Path(shutil.copytree(out, tmp_path / f"{call}-unasked.zarr"))
        run(data, out, **options)
        assert fakes.tree(out) == whole, f"died in write {call}"
        # Gone on with unasked it is one store or the other, and never one in between.
        run(data, other, **options, frames=False)
        assert fakes.tree(other) in (whole, plain), f"died in write {call}"
        ends.add(fakes.tree(other) == whole)
    assert call > 25
    assert ends == {True, False}


@pytest.mark.slow
def test_kill_9_at_random_moments_then_resume(tmp_path: Path) -> None:
    data = fakes.make_dataset(tmp_path / "v", 8, broken=(5,))
    lines = [f'"{clip.path}","run",{clip.split}' for clip in data.clips]
    (tmp_path / "clips.csv").write_text("\n".join(["path,labels,split", *lines]) + "\n")

    def start(out: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "msq", "extract", "--manifest", "clips.csv", "--out", out,
             "--video-encoder", "none", "--image-frames", "--frames", "4", "--shard", "1",
             "--batch", "1", "--workers", "0", "--views", "1"],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def finish(process: subprocess.Popen[bytes]) -> dict[str, str]:
        _, words = process.communicate(timeout=watched.PATIENCE)
        assert process.returncode == 3, words.decode()  # done, with one failure recorded
        return dict(fakes.tree(tmp_path / process.args[7]))  # type: ignore[index]

    def begun(out: Path, process: subprocess.Popen[bytes]) -> None:
        watched.until(lambda: watched.writes(process, out), process)

    process = start("whole.zarr")
    begun(tmp_path / "whole.zarr", process)
    since = time.perf_counter()
    expected = finish(process)
    duration = time.perf_counter() - since
    assert any(name.startswith("image_frames/") for name in expected)
    chance, kills = random.Random(20261121), 0
    out = tmp_path / "killed.zarr"
    while kills < 2:
        process = start("killed.zarr")
        begun(out, process)
        time.sleep(chance.uniform(0, duration / 2))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=watched.PATIENCE)
        if process.returncode == -signal.SIGKILL:
            kills += 1
            continue
        assert fakes.tree(out) == expected  # it was quicker than the signal
        shutil.rmtree(out)
    assert finish(start("killed.zarr")) == expected
    assert verify_store(out).ok


@pytest.fixture
def request_(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExtractRequest:
    """A request for frames of the five sound clips, with encoders that take no time."""
    both = fakes.FakeEncoder(), fakes.FakeEncoder(IMAGE), fakes.FakeText()
    monkeypatch.setattr(ExtractRequest, "load_encoders", lambda _: both)
    lines = [
        f'"{c.path}",run,{c.split}' for row, c in enumerate(data.clips) if row not in (BROKEN, CUT)
    ]
    (tmp_path / "clips.csv").write_text("\n".join(["path,labels,split", *lines]) + "\n")
    return ExtractRequest(
        manifest=tmp_path / "clips.csv", out=tmp_path / "s.zarr", shard=4, workers=0,
        image_frames=True,
    )  # fmt: skip


def stored_bytes(store: Path) -> int:
    return sum(p.stat().st_size for p in store.rglob("*") if p.is_file())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_dry_run_says_to_the_byte_what_they_take(request_: ExtractRequest, dtype: Any) -> None:
    asked = replace(request_, store_dtype=dtype, views=1)
    assert asked.out is not None
    before, plain = dry_run(asked), dry_run(replace(asked, image_frames=False))
    width = np.dtype(dtype).itemsize
    index = 2 * 2 * (4 * 16 + 4)  # two shards of two views
    assert before["bytes"]["image_frames"] == 2 * 5 * (3 * 6 * width + 4) + index
    assert plain["bytes"]["image_frames"] == 0
    assert before["bytes"]["features"] == plain["bytes"]["features"]
    assert asked.run().done == 5
    assert stored_bytes(asked.out) == before["bytes"]["total"] == before["bytes"]["pending"]
    # What the store holds counts, whether it is asked for or not.
    after = dry_run(replace(asked, image_frames=False))
    assert after["bytes"] == {**before["bytes"], "pending": 0}


def test_a_dry_run_says_what_is_added_to_rows_that_are_done(request_: ExtractRequest) -> None:
    asked = replace(request_, views=1)
    replace(asked, image_frames=False).run()
    assert asked.out is not None
    before, size = fakes.tree(asked.out), stored_bytes(asked.out)
    plain, said = dry_run(replace(asked, image_frames=False)), dry_run(request_)
    assert fakes.tree(asked.out) == before
    image = said["encoders"]["fake-image"]
    assert image["shards"] == {"total": 4, "done": 0, "pending": 4}  # those of both views
    assert image["frames"] == {"total": 2 * 5 * 3, "pending": 2 * 5 * 3}
    assert said["encoders"]["fake-video"]["shards"]["pending"] == 0
    assert plain["bytes"]["pending"] == 0
    metadata = ("image", "time", "status")
    again = [asked.out / name / "fake-image/zarr.json" for name in metadata]
    before_bytes = sum(file.stat().st_size for file in again)  # they are written anew
    assert request_.run().done == 5
    total = stored_bytes(asked.out)
    assert said["bytes"]["total"] == total
    assert said["bytes"]["pending"] == total - size + before_bytes


def test_room_for_the_frames_is_asked_for_before_the_first_clip(
    request_: ExtractRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = (5 * 6 * 2 + 4) + (6 * 2 + 4) + (3 * 6 * 2 + 4)
    usage = SimpleNamespace(free=5 * row - 1)
    monkeypatch.setattr("msq.extract.plan_run.shutil.disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match="expected room for"):
        request_.run()
    assert request_.out is not None
    assert not request_.out.exists()
    usage.free += 1
    assert request_.run().done == 5


def code_of(*arguments: object) -> Any:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def test_the_command_line_makes_and_shows_them(
    request_: ExtractRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    out = request_.out
    command = ["extract", "--manifest", request_.manifest, "--out", out, "--workers", 0]
    assert code_of(*command, "--image-frames", "--dry-run") == 0
    assert ", of each frame " in capsys.readouterr().out
    assert code_of(*command, "--image-frames", "--quiet") == 0
    capsys.readouterr()
    assert code_of("store", "inspect", out) == 0
    assert "5x1x6, of each frame 5x1x3x6" in capsys.readouterr().out
    assert code_of("store", "inspect", out, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    encoder = said["encoders"]["fake-image"]
    assert encoder["shapes"][FRAMES] == [5, 1, 3, 6]
    assert said["bytes"]["image_frames"] == stored_bytes(out / "image_frames")  # type: ignore[operator]
    assert encoder["bytes"] == sum(
        stored_bytes(out / name)  # type: ignore[operator]
        for name in ("image/fake-image", FRAMES, "time/fake-image", "status/fake-image")
    )
    refused = code_of(*command, "--image-frames", "--image-encoder", "none")
    assert refused == 2
    assert "--image-frames: expected an --image-encoder" in capsys.readouterr().err


def test_requests_of_every_kind_carry_them(request_: ExtractRequest, data: Any) -> None:
    assert read_request(write_request(request_)).image_frames
    with pytest.raises(UsageError, match="expected an image encoder, found none"):
        extract(data, Path("x.zarr"), video=fakes.FakeEncoder(), image=None, image_frames=True)
    with pytest.raises(UsageError, match="--image-frames"):
        replace(request_, image_encoder="none")
    # Grids: stores without have the names that they had before there was a choice.
    plain = {"manifest": str(request_.manifest)}
    stores = [
        extraction_source({**plain, **more}, Path("stores"))
        for more in ({}, {"image_frames": False}, {"image_frames": True})
    ]
    assert stores[0].store == stores[1].store != stores[2].store
    assert "image_frames" not in stores[0].identity["extract"]


def test_the_arithmetic_of_many_clips_is_that_of_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "_specs", lambda _: (fakes.SPEC, IMAGE))
    run(fakes.make_dataset(tmp_path / "v", 7), tmp_path / "s.zarr")
    chunks = [p.stat().st_size for p in (tmp_path / "s.zarr" / FRAMES / "c").rglob("*/0/0/0")]
    assert sum(chunks) == scale.frame_bytes(7, shard=3)
