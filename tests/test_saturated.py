"""One worker, saturated: frames through shared memory, commits beside encoding, too little memory.

What is broken on purpose here is memory: an encoder that cannot take more than some clips at once.
"""

from __future__ import annotations

import json
import os
import runpy
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from msq.errors import MsqError, is_out_of_memory
from msq.extract import dask_cluster, decode_pool, extraction
from msq.extract.commits import Commits
from msq.extract.decode_pool import DecodeTask, Picture, decode, decode_in_order
from msq.extract.extract_result import add_stages
from msq.extract.frame_arena import FrameArena, attach, write
from msq.extract.pipeline import ExtractResult, extract
from msq.extract.request import ExtractRequest
from msq.extract.shard_builder import encode
from msq.extract.store import open_store
from msq.extract.store_problems import Verification
from msq.extract.store_sample import check_sample
from msq.extract.store_writer import StoreWriter
from msq.report.stage_one import note, precision_hint

fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))
PICTURES = (Picture(4, "uniform", 16, "torch"), Picture(2, "uniform", 8, "torch"))
MESSAGES = {
    torch.OutOfMemoryError: "CUDA out of memory. Tried to allocate 2.00 GiB.",
    MemoryError: "",
    RuntimeError: "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried",
    ValueError: "shapes differ",
}
SHORT = (torch.OutOfMemoryError, MemoryError, RuntimeError)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    fakes.make_dataset(folder, 12)
    return folder


class Small(fakes.FakeEncoder):  # type: ignore[misc,name-defined]
    """Has memory for `room` clips, and adds the batch to its features, as rounding would."""

    def __init__(
        self, room: int, error: type[Exception] = torch.OutOfMemoryError, *, after: int = 0
    ) -> None:
        super().__init__()
        self.room, self.error, self.after = room, error, after

    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        if len(video) > self.room and len(self.calls) >= self.after:
            raise self.error(MESSAGES[self.error])
        return super().__call__(video) + len(video)


def run(data: Any, out: Path, video: Any, **options: Any) -> ExtractResult:
    options = {"workers": 0, "shard": 6, "batch": 4, "store_dtype": "float32"} | options
    image = fakes.FakeEncoder(fakes.image_spec(frames=2, size=8))
    return extract(data, out, **({"video": video, "image": image} | options))


@pytest.mark.parametrize("error", SHORT)
def test_too_little_memory_halves_the_batch_and_is_recorded(
    error: type[Exception], videos: Path, tmp_path: Path
) -> None:
    data = fakes.make_dataset(videos, 12)
    encoder, events = Small(1, error), []
    result = run(data, tmp_path / "a.zarr", encoder, progress=events.append)
    assert (result.done, result.failed) == (12, 0)
    assert encoder.calls == [1] * 12
    assert result.smaller_batches == {"0": 1, "1": 1}
    said = [w for w in result.warnings if "out of memory in shard 0" in w]
    assert ["with 4 clips" in said[0], "with 2 clips" in said[1]] == [True, True]
    assert "--batch 1" in said[1]
    assert "out of memory, batches of 1" in note(events[-1])
    record = json.loads((tmp_path / "a.zarr/failures/00000.json").read_text())
    assert record["clips"] == []
    assert record["batches"] == [
        {"batch": 1, "encoders": ["fake-image"]}, {"batch": 1, "encoders": ["fake-video"]},
    ]  # fmt: skip
    # All that it changes is the batch: the same as if 1 had been asked for, but for the record.
    run(data, tmp_path / "b.zarr", Small(1, error), batch=1)
    one, other = (fakes.tree(tmp_path / name) for name in ("a.zarr", "b.zarr"))
    assert {k: v for k, v in one.items() if not k.startswith("failures/0")} == other
    assert open_store(tmp_path / "a.zarr").verify() == []
    # A second run finds everything done, and says what was recorded.
    again = run(data, tmp_path / "a.zarr", Small(1, error))
    assert again.smaller_batches == {"0": 1, "1": 1}
    assert fakes.tree(tmp_path / "a.zarr") == one


def test_a_shard_begins_again_with_the_clips_it_had_encoded(videos: Path, tmp_path: Path) -> None:
    """Memory becomes short in the second window of the second shard."""
    data = fakes.make_dataset(videos, 12)
    encoder, plain = Small(2, after=3), fakes.FakeEncoder()
    result = run(data, tmp_path / "a.zarr", encoder, batch=3, workers=1)
    # 3 + 3 clips of shard 0; 3 of shard 1 and 3 that are refused; then 2 + 2 + 2.
    assert encoder.calls == [3, 3, 3, 2, 2, 2]
    assert result.smaller_batches == {"1": 2}
    tokens = open_store(tmp_path / "a.zarr").tokens(range(12))
    for row, clip in enumerate(data.clips):
        task = DecodeTask(row, clip.path, None, None, PICTURES[:1])
        expected = encode(plain, [decode(task).frames[0]])[0] + (3 if row < 6 else 2)
        assert torch.allclose(tokens[row], expected, atol=1e-6)


def test_too_little_for_one_clip_ends_the_run_and_names_the_knobs(
    videos: Path, tmp_path: Path
) -> None:
    data = fakes.make_dataset(videos, 12)
    with pytest.raises(MsqError, match=r"shard 0: .*single clip.*--precision bf16.*--frames"):
        run(data, tmp_path / "a.zarr", Small(0))
    assert not list((tmp_path / "a.zarr").rglob("status/*/c/*/*"))
    encoder = Small(2, ValueError)
    with pytest.raises(ValueError, match="shapes differ"):
        run(data, tmp_path / "b.zarr", encoder)
    assert encoder.calls == []


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_too_little_memory(error: Exception, wanted: bool) -> None:
    assert is_out_of_memory(error) is wanted


def test_another_encoder_keeps_what_is_recorded_of_the_first(videos: Path, tmp_path: Path) -> None:
    data = fakes.make_dataset(videos, 12)
    video = Small(2)
    extract(data, tmp_path / "a.zarr", video=video, image=None, workers=0, shard=6, batch=4)
    result = run(data, tmp_path / "a.zarr", fakes.FakeEncoder(), store_dtype="float16")
    record = json.loads((tmp_path / "a.zarr/failures/00001.json").read_text())
    assert record["batches"] == [{"batch": 2, "encoders": ["fake-video"]}]
    assert result.smaller_batches == {"0": 2, "1": 2}


def test_a_sample_is_extracted_again_in_the_batch_that_is_recorded(
    videos: Path, tmp_path: Path
) -> None:
    data = fakes.make_dataset(videos, 12)
    run(data, tmp_path / "a.zarr", Small(2, after=2), shard=6, batch=4)  # shard 1 alone
    found = Verification()
    check_sample(
        open_store(tmp_path / "a.zarr"), data, {"fake-video": Small(99)}, 12, found, batch=4
    )
    assert (found.sampled, found.equal, found.problems) == (12, 12, [])


def tasks(videos: Path, count: int) -> list[DecodeTask]:
    clips = fakes.make_dataset(videos, count).clips
    return [DecodeTask(row, c.path, None, None, PICTURES) for row, c in enumerate(clips)]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no such memory here")
def test_frames_come_through_shared_memory_and_stay_until_they_are_released(
    videos: Path,
) -> None:
    expected = [decode(task) for task in tasks(videos, 12)]
    stream = decode_in_order(tasks(videos, 12), 1, look_ahead=3 * tasks(videos, 1)[0].bytes)
    kept = [next(stream) for _ in range(3)]
    assert all(result.shared for result in kept)
    late = []
    for result in stream:
        late.append([array.copy() for array in result.frames])
        result.release()
        assert result.frames == []
    for found, wanted in zip([*(k.frames for k in kept), *late], expected, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(found, wanted.frames, strict=True))


def test_small_clips_do_not_pile_up(videos: Path) -> None:
    started: list[int] = []

    def many() -> Iterator[DecodeTask]:
        for row in range(400):
            started.append(row)
            yield DecodeTask(row, videos / "none.mp4", None, None, PICTURES)

    with closing(decode_in_order(many(), 1)) as stream:
        assert next(stream).reason is not None
        assert len(started) == decode_pool.LOOK_AHEAD_CLIPS


def test_without_room_frames_come_through_the_pipe(
    videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrameArena, "take", lambda self, count: None)
    results = list(decode_in_order(tasks(videos, 3), 1))
    assert not any(result.shared for result in results)
    assert np.array_equal(results[2].frames[1], decode(tasks(videos, 3)[2]).frames[1])


def test_pieces_of_an_arena_do_not_overlap_and_come_back() -> None:
    arena = FrameArena(1000)
    first, second, third = (arena.take(300) for _ in range(3))
    assert (first, second, third) == (0, 320, 640)
    assert arena.take(300) is None
    assert arena.take(0) is None
    arena.give(second)
    assert arena.take(321) is None
    assert arena.take(320) == 320
    memory = attach(arena.address)
    assert memory is not None
    frames = [np.arange(12, dtype=np.uint8).reshape(3, 4), np.full((2, 5), 7, np.uint8)]
    write(memory, 640, frames)
    found = arena.read(640, [(3, 4), (2, 5)])
    assert all(np.array_equal(a, b) for a, b in zip(found, frames, strict=True))
    arena.close()
    assert found[1][1, 4] == 7  # the memory stays for as long as an array is on it
    assert arena.take(10) is None


def test_commits_are_in_order_beside_the_caller_and_raise_there() -> None:
    ready, order = threading.Event(), []
    queue = Commits()
    queue.submit(lambda: ready.wait(600) and order.append("first"))
    queue.then(lambda: order.append("after first"))
    queue.poll()
    assert order == []
    ready.set()
    queue.submit(lambda: order.append("second"))
    queue.then(lambda: order.append("after second"))
    queue.settle()
    assert order == ["first", "after first", "second", "after second"]

    def full() -> None:
        raise OSError("disk full")

    queue.submit(full)
    queue.then(lambda: order.append("never"))
    with pytest.raises(OSError, match="disk full"):
        queue.settle()
    queue.close()
    assert "never" not in order


def test_a_shard_is_committed_while_the_next_is_encoded(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    plain = StoreWriter.commit

    def slow(self: StoreWriter, shard: int, *arguments: Any, **options: Any) -> int:
        if shard == 0:
            begun.set()
            assert go_on.wait(600), "the next shard was not begun meanwhile"
        return plain(self, shard, *arguments, **options)

    class Watching(fakes.FakeEncoder):  # type: ignore[misc,name-defined]
        def __call__(self, video: torch.Tensor) -> torch.Tensor:
            if len(self.calls) == 2:  # the first batch of shard 1
                assert begun.wait(600)
                assert not list(tmp_path.rglob("status/fake-video/c/*/*"))
                go_on.set()
            return super().__call__(video)

    monkeypatch.setattr(StoreWriter, "commit", slow)
    data = fakes.make_dataset(videos, 12)
    result = run(data, tmp_path / "a.zarr", Watching())
    assert result.done == 12
    monkeypatch.setattr(StoreWriter, "commit", plain)
    run(data, tmp_path / "b.zarr", fakes.FakeEncoder())
    assert fakes.tree(tmp_path / "a.zarr") == fakes.tree(tmp_path / "b.zarr")


def test_an_interrupt_waits_for_the_commit_under_way(videos: Path, tmp_path: Path) -> None:
    class Interrupted(fakes.FakeEncoder):  # type: ignore[misc,name-defined]
        def __call__(self, video: torch.Tensor) -> torch.Tensor:
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().__call__(video)

    data = fakes.make_dataset(videos, 12)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "a.zarr", Interrupted())
    assert not [t for t in threading.enumerate() if t.name.startswith("commit")]
    assert (tmp_path / "a.zarr/status/fake-video/c/0/0").exists()
    assert not (tmp_path / "a.zarr/status/fake-video/c/1/0").exists()


def test_the_live_line_says_how_fast_how_long_and_what_it_waits_for(
    videos: Path, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    data = fakes.make_dataset(tmp_path / "v", 8, broken=(2,))
    result = run(data, tmp_path / "a.zarr", fakes.FakeEncoder(), progress=events.append, workers=1)
    done = [event["done"] for event in events]
    assert done == sorted(done)
    assert done[-1] == 8
    assert events[-1]["seconds_left"] == 0
    middle = next(event for event in events if 0 < event["done"] < 8)
    assert middle["seconds_left"] > 0
    line = note(middle | {"seconds_left": 4000.0, "failed": 1})
    for word in ("videos/s", "66.7 min left", "decode", "frames/s", "waiting for", "1 failed"):
        assert word in line
    stages = result.stages
    assert stages["bottleneck"] in stages["busy_seconds"]
    assert stages["busy_seconds"]["write"] > 0
    assert stages["cpu_seconds"] > 0


def test_workers_together_wait_for_what_took_longest_in_all_of_them() -> None:
    def said(decode: float, encode: float) -> dict[str, Any]:
        busy = {"decode": decode, "encode fake-video": encode, "write": 0.5}
        slowest = max(busy, key=lambda stage: busy[stage])
        return {
            "decode": 8.0, "encode": {"fake-video": 4.0}, "write": None, "bottleneck": slowest,
            "cpu_seconds": 3.0, "busy_seconds": busy,
        }  # fmt: skip

    both = add_stages(said(3, 2), said(1, 6))
    assert both["bottleneck"] == "encode fake-video"
    assert (both["decode"], both["encode"], both["write"]) == (16.0, {"fake-video": 8.0}, None)
    assert both["busy_seconds"] == {"decode": 4, "encode fake-video": 8, "write": 1.0}
    assert add_stages({}, said(3, 2)) == said(3, 2)
    # Dask hears of shards only when a task ends; its line says the same.
    events: list[dict[str, Any]] = []
    told = {"a": {"failed": 1, "stages": said(3, 2)}, "b": {"failed": 0, "stages": said(1, 6)}}
    dask_cluster._tell(events.append, 40, 100, 0.5, told)
    line = note(events[0])
    for words in ("0.5 videos/s", "2.0 min left", "decode 16 frames/s",
                  "encode fake-video 8 frames/s", "waiting for encode", "1 failed"):  # fmt: skip
        assert words in line


def test_precision_is_hinted_at_where_the_processor_makes_it_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large = ExtractRequest(manifest=Path("clips.csv"), video_encoder="local-dir:x", device="cpu")
    low = replace(large, precision="bf16")
    monkeypatch.setattr(decode_pool, "multiplies_bf16", lambda: True)
    assert "--precision bf16 is likely faster" in precision_hint(large)
    assert precision_hint(low) == ""
    assert precision_hint(replace(large, video_encoder="embedded")) == ""
    monkeypatch.setattr(decode_pool, "multiplies_bf16", lambda: False)
    assert precision_hint(large) == ""
    assert "--precision fp32 is likely" in precision_hint(low)
    monkeypatch.setattr(decode_pool, "multiplies_bf16", lambda: None)
    assert precision_hint(low) == precision_hint(large) == ""


def test_encoders_get_all_cores_and_decode_processes_give_way(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "cores", lambda: 3)
    threads: list[int] = []

    class Threads(fakes.FakeEncoder):  # type: ignore[misc,name-defined]
        def __call__(self, video: torch.Tensor) -> torch.Tensor:
            threads.append(torch.get_num_threads())
            return super().__call__(video)

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for workers in (0, 2):
            run(fakes.make_dataset(videos, 12), tmp_path / str(workers), Threads(), workers=workers)
    finally:
        torch.set_num_threads(before)
    # Whatever the number of processes is: the same threads, hence the same bytes.
    assert set(threads) == {3}
    with decode_pool._Pool(1) as pool:
        lowest = 19  # the system's own: these tests may give way to others themselves
        expected = min(os.nice(0) + decode_pool.NICENESS, lowest)
        assert pool._executor.submit(os.nice, 0).result() == expected
