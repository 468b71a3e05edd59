"""Image features of each frame that come to rows which are done, or are lost and made again."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zarr

from msq.errors import SpecMismatch, StoreError, UsageError
from msq.extract import store_writer
from msq.extract.pipeline import extract
from msq.extract.store import open_store
from msq.extract.store_convert import convert_store
from msq.extract.store_keys import metadata
from msq.extract.store_repair import repair_store
from msq.extract.store_seal import sealed
from msq.extract.store_verify import verify_store
from msq.extract.views import CLEAN, augmented_views

HERE = Path(__file__).parent
fakes = SimpleNamespace(**runpy.run_path(str(HERE / "fakes.py")))
watched = SimpleNamespace(**runpy.run_path(str(HERE / "watched_processes.py")))
IMAGE = fakes.image_spec(frames=3, size=8)
FRAMES = "image_frames/fake-image"
ARRAYS = ("image", "time", "status", "image_frames")
VIEWS = (CLEAN, *augmented_views(1))
BROKEN = 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fakes.make_dataset(tmp_path_factory.mktemp("videos"), 7, broken=(BROKEN,))


def run(data: Any, out: Any, *, frames: bool = True, **options: Any) -> Any:
    given = {"workers": 0, "shard": 3, "batch": 2, "views": VIEWS, "image_frames": frames}
    encoders = {"video": fakes.FakeEncoder(), "image": fakes.FakeEncoder(IMAGE)}
    return extract(data, out, **(given | encoders | options))


@pytest.fixture(scope="module")
def whole(data: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "a.zarr"
    run(data, folder)
    return folder


@pytest.fixture(scope="module")
def done(data: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "a.zarr"
    run(data, folder, frames=False)
    return folder


@pytest.fixture
def plain(done: Path, tmp_path: Path) -> Path:
    """A finished store without frames, to be changed."""
    return Path(shutil.copytree(done, tmp_path / "plain.zarr"))


def stamps(store: Path) -> dict[Path, int]:
    return {f: f.stat().st_mtime_ns for f in store.rglob("c/**/*") if f.is_file()}


def marks(store: Path) -> list[Any]:
    """What each array of the image encoder says of its frames; the last is theirs."""
    files = [store / group / "fake-image/zarr.json" for group in ARRAYS]
    found = [metadata(f.read_bytes())["attributes"]["msq"] for f in files if f.exists()]
    return [attributes.get("image_frames") for attributes in found]


class Died(BaseException):
    """The process ends here."""


@contextmanager
def dying_before(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process dies before it writes a file of this name below the store."""
    write = store_writer.write_file

    def wrapped(path: Path, pieces: Any) -> int:
        if str(path).endswith(name):
            raise Died
        return int(write(path, pieces))

    with monkeypatch.context() as patch:
        patch.setattr(store_writer, "write_file", wrapped)
        yield


def half_added(data: Any, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of shard 0 of both views are there, those of the others are not."""
    with dying_before(f"{FRAMES}/c/1/0/0/0", monkeypatch), pytest.raises(Died):
        run(data, plain)


def test_frames_are_added_to_done_rows_by_the_image_encoder_alone(
    data: Any, whole: Path, plain: Path
) -> None:
    video, image, before = fakes.FakeEncoder(), fakes.FakeEncoder(IMAGE), stamps(plain)
    result = run(data, plain, video=video, image=image)
    assert (result.done, result.failed, result.warnings) == (6, 1, [])
    assert video.calls == []
    assert sum(image.calls) == 2 * 6
    after = stamps(plain)
    assert {f: after[f] for f in before} == before  # no chunk that was there is written again
    assert fakes.tree(plain) == fakes.tree(whole)
    assert verify_store(plain).ok
    run(data, plain, image=image)
    assert sum(image.calls) == 2 * 6


def test_they_come_to_all_views_also_those_not_asked_for(
    data: Any, whole: Path, plain: Path
) -> None:
    run(data, plain, views=(CLEAN,))
    assert fakes.tree(plain) == fakes.tree(whole)


def test_new_views_and_frames_are_added_at_once(data: Any, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.zarr"
    run(data, out, frames=False, views=(CLEAN,))
    run(data, out)
    assert fakes.tree(out) == fakes.tree(whole)


def test_rows_not_done_are_made_with_them(data: Any, whole: Path, plain: Path) -> None:
    (plain / "status/fake-image/c/1/0").unlink()
    run(data, plain)
    assert fakes.tree(plain) == fakes.tree(whole)


def test_half_way_nobody_sees_them_and_nothing_is_wrong(
    data: Any, whole: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_added(data, plain, monkeypatch)
    assert marks(plain) == ["adding"] * 3
    assert (plain / FRAMES / "c/0/1/0/0").exists()
    store = open_store(plain)
    assert not store.has_image_frames("fake-image")
    with pytest.raises(StoreError, match=r"still being added.*--image-frames adds them"):
        store.image_frames([0])
    assert store.image([0]).equal(open_store(whole).image([0]))
    with pytest.raises((KeyError, FileNotFoundError)):
        zarr.open_array(plain / FRAMES, mode="r")
    found = verify_store(plain)
    assert found.ok, found.problems
    (note,) = (note for note in found.notes if "are being added" in note)
    assert "2 shards have them" in note
    before = fakes.tree(plain)
    assert repair_store(plain).actions == []
    assert fakes.tree(plain) == before
    convert_store(plain, plain.with_name("copy.zarr"))
    assert not (plain.with_name("copy.zarr") / "image_frames").exists()
    assert marks(plain.with_name("copy.zarr")) == [None] * 3
    # Also who does not ask goes on with what was begun, and says so.
    (told,) = run(data, plain, frames=False).warnings
    assert "holds its features of each frame" in told
    assert fakes.tree(plain) == fakes.tree(whole)


def test_death_before_any_single_write_of_the_adding_and_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = fakes.make_dataset(tmp_path / "v", 3, broken=(1,))
    options: dict[str, Any] = {"video": None, "shard": 2}
    run(data, tmp_path / "whole.zarr", **options)
    run(data, tmp_path / "plain.zarr", **options, frames=False)
    write, call, died = store_writer.write_file, 0, True
    expected, done = fakes.tree(tmp_path / "whole.zarr"), open_store(tmp_path / "plain.zarr")
    while died:
        call, died = call + 1, False
        out = Path(shutil.copytree(tmp_path / "plain.zarr", tmp_path / f"{call}.zarr"))
        monkeypatch.setattr(store_writer, "write_file", fakes.dying_at(call, write))
        try:
            run(data, out, **options)
        except fakes.Killed:
            died = True
        monkeypatch.setattr(store_writer, "write_file", write)
        found, store = verify_store(out), open_store(out)
        assert found.ok, (call, found.problems)
        assert store.image([0, 2]).equal(done.image([0, 2]))
        if store.has_image_frames("fake-image"):
            assert store.image_frames([0, 2], view=1).shape == (2, 3, 6)
        run(data, out, **options)
        assert fakes.tree(out) == expected, f"died in write {call}"
    assert call == 3 + 4 + 2 + 3 + 1  # marks, chunks, metadata, marks; and one that lived


def test_a_run_that_died_before_it_could_show_them_leaves_no_clip_to_encode(
    data: Any, whole: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dying_before("image_frames/zarr.json", monkeypatch), pytest.raises(Died):
        run(data, plain)
    assert len([f for f in (plain / FRAMES / "c").rglob("*") if f.is_file()]) == 6
    image = fakes.FakeEncoder(IMAGE)
    run(data, plain, image=image)
    assert image.calls == []
    assert fakes.tree(plain) == fakes.tree(whole)


def test_rows_that_come_out_otherwise_keep_what_they_have_and_are_named(
    data: Any, done: Path, plain: Path, tmp_path: Path
) -> None:
    other, gone = tmp_path / "other.mp4", tmp_path / "gone.mp4"
    fakes.write_video(other, 99)
    clips = list(data.clips)
    clips[0], clips[6] = replace(clips[0], path=other), replace(clips[6], path=gone)
    changed = replace(data, clips=tuple(clips))
    before = {n: x for n, x in fakes.tree(done).items() if "/c/" in n}
    with pytest.raises(StoreError) as refused:
        run(changed, plain)
    said = str(refused.value)
    assert "their mean is not what image/fake-image holds: 'clip-0-é'" in said
    assert "cannot be extracted now: 'clip-6-é': expected a video file" in said
    assert f"msq store convert {plain} NEW.zarr" in said
    for row in range(1, 6):
        assert f"clip-{row}-é" not in said
    # The shard between them has its frames, the others have none, and all else is what it was.
    tree = fakes.tree(plain)
    added = {n for n in tree if n.startswith(FRAMES)}
    assert added == {f"{FRAMES}/c/1/0/0/0", f"{FRAMES}/c/1/1/0/0"}
    assert before.items() <= tree.items()
    assert not open_store(plain).has_image_frames("fake-image")
    run(data, plain)  # with the clips as they were
    assert open_store(plain).has_image_frames("fake-image")


def test_a_frame_that_overflows_is_no_frame_of_a_done_row(data: Any, tmp_path: Path) -> None:
    class Swings(type(fakes.FakeEncoder())):  # type: ignore[misc]
        def __call__(self, video: torch.Tensor) -> torch.Tensor:
            frames = super().__call__(video)
            return frames + torch.tensor([9e4, -9e4, 0.0])[:, None]

    out, views = tmp_path / "a.zarr", (CLEAN,)
    run(data, out, image=Swings(IMAGE), frames=False, views=views)
    with pytest.raises(StoreError, match=r"features of each frame of fake-image are not finite"):
        run(data, out, image=Swings(IMAGE), views=views)
    assert verify_store(out).ok


def test_failed_clips_that_can_be_read_now_are_made_with_their_frames(
    data: Any, plain: Path, tmp_path: Path
) -> None:
    clips = list(data.clips)
    clips[BROKEN] = replace(clips[BROKEN], path=data.clips[0].path)
    sound = replace(data, clips=tuple(clips))
    run(sound, plain)
    assert open_store(plain).ok_rows().tolist() == [0, 2, 3, 4, 5, 6]
    again = Path(shutil.copytree(plain, tmp_path / "again.zarr"))
    run(sound, again, retry_failed=True)
    once = tmp_path / "once.zarr"
    run(sound, once)
    assert fakes.tree(again) == fakes.tree(once)


def test_frames_and_failed_clips_come_in_one_run(data: Any, plain: Path, tmp_path: Path) -> None:
    clips = list(data.clips)
    clips[BROKEN] = replace(clips[BROKEN], path=data.clips[0].path)
    sound = replace(data, clips=tuple(clips))
    run(sound, plain, retry_failed=True)
    run(sound, tmp_path / "once.zarr")
    assert fakes.tree(plain) == fakes.tree(tmp_path / "once.zarr")


def test_a_mean_that_cannot_be_read_is_not_compared(data: Any, plain: Path) -> None:
    chunk = plain / "image/fake-image/c/1/0/0"
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(StoreError, match=r"image/fake-image/c/1/0/0.*checksum"):
        run(data, plain)
    assert not (plain / FRAMES / "c/1/0").exists()


@pytest.mark.parametrize("lost", [FRAMES, "image_frames", f"{FRAMES}/c", f"{FRAMES}/zarr.json"])
def test_lost_frames_are_found_and_made_again(
    data: Any, whole: Path, tmp_path: Path, lost: str
) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "a.zarr"))
    gone = store / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    found = verify_store(store)
    assert any(lost in problem.file for problem in found.problems), found.problems
    with pytest.raises(StoreError, match=FRAMES):
        open_store(store).image_frames([0])
    assert open_store(store).image([0]).shape == (1, 6)
    planned = repair_store(store, dry_run=True)
    done = repair_store(store)
    assert planned.actions == done.actions != []
    assert done.left == []
    run(data, store, frames=False)
    assert fakes.tree(store) == fakes.tree(whole)


def test_lost_frames_come_back_without_a_repair_and_the_mean_stays(
    data: Any, whole: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(whole, tmp_path / "a.zarr"))
    shutil.rmtree(store / "image_frames")
    before = stamps(store)
    run(data, store, frames=False)
    assert fakes.tree(store) == fakes.tree(whole)
    after = stamps(store)
    assert {f: after[f] for f in before} == before


def test_a_store_from_before_there_were_marks_is_read_and_gets_them(
    data: Any, whole: Path, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(whole, tmp_path / "a.zarr"))
    for group in ARRAYS:
        file = old / group / "fake-image/zarr.json"
        document = metadata(file.read_bytes())
        assert document["attributes"]["msq"].pop("image_frames") == "stored"
        file.write_bytes(sealed(json.dumps(document).encode()))
    assert verify_store(old).ok
    rows = open_store(old).ok_rows()
    assert open_store(old).image_frames(rows).equal(open_store(whole).image_frames(rows))
    image = fakes.FakeEncoder(IMAGE)
    run(data, old, image=image, frames=False)
    assert image.calls == []
    assert fakes.tree(old) == fakes.tree(whole)


def test_rows_of_another_store_with_frames_do_not_come_to_rows_without(
    whole: Path, plain: Path
) -> None:
    before = fakes.tree(plain)
    with pytest.raises(SpecMismatch, match="has rows of fake-image without features of each frame"):
        convert_store(whole, plain)
    assert fakes.tree(plain) == before


def test_a_video_encoder_has_none(data: Any, plain: Path) -> None:
    writer = store_writer.StoreWriter(plain, data, shard=3)
    with pytest.raises(UsageError, match="expected an image encoder, found fake-video"):
        writer.add_encoder(fakes.SPEC, VIEWS, image_frames=True)


@pytest.mark.slow
def test_kill_9_at_several_moments_of_the_adding(tmp_path: Path) -> None:
    data = fakes.make_dataset(tmp_path / "v", 8, broken=(5,))
    lines = [f'"{clip.path}","run",{clip.split}' for clip in data.clips]
    (tmp_path / "clips.csv").write_text("\n".join(["path,labels,split", *lines]) + "\n")

    def start(out: Path, *more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "msq", "extract", "--manifest", "clips.csv", "--out", str(out),
             "--video-encoder", "none", "--frames", "4", "--shard", "1", "--batch", "1",
             "--workers", "0", "--views", "1", *more],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def finish(process: subprocess.Popen[bytes]) -> None:
        _, words = process.communicate(timeout=watched.PATIENCE)
        assert process.returncode == 3, words.decode()  # done, with one failure recorded

    def chunks(out: Path) -> int:
        found = (out / "image_frames").rglob("c/*/*/0/0")
        return sum(not file.name.startswith(".") for file in found)

    whole, plain, out = (tmp_path / name for name in ("whole.zarr", "plain.zarr", "killed.zarr"))
    finish(start(whole, "--image-frames"))
    finish(start(plain))
    expected, kills = fakes.tree(whole), 0
    shutil.copytree(plain, out)
    for there in (0, 3, 9):
        process = start(out, "--image-frames")
        watched.until(
            lambda process=process, there=there: (  # type: ignore[misc]
                watched.writes(process, out) and chunks(out) >= there
            ),
            process,
        )
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=watched.PATIENCE)
        kills += process.returncode == -signal.SIGKILL
        assert verify_store(out).ok
    finish(start(out, "--image-frames"))
    assert fakes.tree(out) == expected
    assert verify_store(out).ok
    assert kills  # all of them, unless this process had no turn while that one worked
