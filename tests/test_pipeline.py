from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch

from msq.errors import SpecMismatch, StoreError, UsageError, VideoError
from msq.extract import decode_task
from msq.extract.decode_pool import DecodeTask, Picture, decode, decode_in_order, without_paths
from msq.extract.pipeline import ExtractResult, extract
from msq.extract.store import open_store
from msq.extract.transforms import normalise, resize_crop
from msq.extract.video import decode_clip, decode_samples

fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    fakes.make_dataset(folder, 11)
    return folder


def run(data: Any, out: Path, **options: Any) -> ExtractResult:
    options = {"workers": 0, "shard": 4, "batch": 3} | options
    encoders = {
        "video": fakes.FakeEncoder(),
        "image": fakes.FakeEncoder(fakes.image_spec(frames=2, size=8)),
    }
    return extract(data, out, **(encoders | options))


def test_features_are_those_of_each_clip_encoded_alone(videos: Path, tmp_path: Path) -> None:
    data = fakes.make_dataset(videos, 11)
    result = run(data, tmp_path / "a.zarr", store_dtype="float32")
    assert (result.clips, result.done, result.failed, result.skipped) == (11, 11, 0, 0)
    store = open_store(tmp_path / "a.zarr")
    video, image = fakes.FakeEncoder(), fakes.FakeEncoder(fakes.image_spec(frames=2, size=8))
    for row, clip in enumerate(data.clips):
        for encoder, found in ((video, store.tokens([row])), (image, store.image([row]))):
            spec = encoder.spec
            decoded = decode_clip(clip.path, spec.frames)
            pixels = resize_crop(decoded.frames, spec.size)
            expected = encoder(normalise(pixels, spec.mean, spec.std)[None])
            expected = expected.mean(dim=1) if spec.kind == "image" else expected
            assert torch.allclose(found, expected, atol=1e-6)
            assert store.time([row], spec.slug).tolist() == [decoded.times.tolist()]
    assert store.labels().tolist() == [
        [int(k in clip.labels) for k in range(3)] for clip in data.clips
    ]


def test_worker_processes_and_runs_give_the_same_bytes(videos: Path, tmp_path: Path) -> None:
    data = fakes.make_dataset(videos, 11)
    run(data, tmp_path / "a.zarr")
    run(data, tmp_path / "b.zarr", workers=2)
    run(data, tmp_path / "c.zarr", workers=0)
    assert fakes.tree(tmp_path / "a.zarr") == fakes.tree(tmp_path / "b.zarr")
    assert fakes.tree(tmp_path / "a.zarr") == fakes.tree(tmp_path / "c.zarr")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zarr", "b.zarr", "c.zarr"]


def test_batches_are_formed_inside_a_shard_at_fixed_places(videos: Path, tmp_path: Path) -> None:
    encoder = fakes.FakeEncoder()
    data = fakes.make_dataset(videos, 11)
    run(data, tmp_path / "a.zarr", video=encoder)
    assert encoder.calls == [3, 1, 3, 1, 3]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"size": 8}, [(4, "uniform")]),
        ({"frames": 3}, [(4, "uniform"), (3, "uniform")]),
        ({"frames": 4, "sampling": "official"}, [(4, "uniform"), (4, "official")]),
    ],
)
def test_each_clip_is_opened_and_decoded_once_for_all_encoders(
    changes: dict[str, Any],
    wanted: list[tuple[int, str]],
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []
    asked: list[list[tuple[int, str]]] = []

    def counted(place: str, **options: Any) -> Any:
        opened.append(place)
        return av_open(place, **options)

    def noted(path: Path, requests: Any, **options: Any) -> Any:
        asked.append([(r.frames, r.sampling) for r in requests])
        assert all(r == (r.frames, r.sampling, 0, 1, ()) for r in requests)  # whole, no jitter
        return decode_samples(path, requests, **options)

    av_open = av.open
    monkeypatch.setattr(av, "open", counted)
    monkeypatch.setattr(decode_task, "decode_samples", noted)
    data = fakes.make_dataset(videos, 5)
    run(data, tmp_path / "a.zarr", image=fakes.FakeEncoder(fakes.image_spec(**changes)))
    assert opened == [f"file:{clip.path}" for clip in data.clips]
    assert asked == [wanted] * 5


def test_a_finished_store_is_left_alone_and_counted(videos: Path, tmp_path: Path) -> None:
    data = fakes.make_dataset(tmp_path / "v", 6, broken=(2, 5))
    first = run(data, tmp_path / "a.zarr")
    before = fakes.tree(tmp_path / "a.zarr")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "a.zarr").rglob("*")}
    encoder = fakes.FakeEncoder()
    again = run(data, tmp_path / "a.zarr", video=encoder, workers=2)
    assert encoder.calls == []
    assert fakes.tree(tmp_path / "a.zarr") == before
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a.zarr").rglob("*")} == stamps
    assert (again.clips, again.done, again.failed) == (first.clips, 4, 2) == (6, 4, 2)
    assert again.failures == first.failures
    assert again.clips_per_second == 0
    assert again.stages["bottleneck"] is None


def test_broken_videos_are_rows_with_a_reason_and_the_run_goes_on(tmp_path: Path) -> None:
    data = fakes.make_dataset(tmp_path / "v", 6, broken=(1,))
    gone = replace(data.clips[3], path=tmp_path / "v" / "nowhere é.mp4")
    data = replace(data, clips=(*data.clips[:3], gone, *data.clips[4:]))
    data = replace(data, skipped=(("line 9", "unknown label 'x'"),))
    result = run(data, tmp_path / "a.zarr")
    assert (result.clips, result.done, result.failed, result.skipped) == (6, 4, 2, 1)
    assert [(f["row"], f["clip"], f["status"]) for f in result.failures] == [
        (1, "clip-1-é", 2),
        (3, "clip-3-é", 2),
    ]
    assert all(f["reason"] for f in result.failures)
    assert result.skipped_items == [{"item": "line 9", "reason": "unknown label 'x'"}]
    content = "".join(p.read_text() for p in (tmp_path / "a.zarr/failures").glob("*.json"))
    assert str(tmp_path) not in content
    store = open_store(tmp_path / "a.zarr")
    assert store.status("fake-video").tolist() == [1, 2, 1, 2, 1, 1]
    with pytest.raises(StoreError, match="clip-3-é"):
        store.image()
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_shard_of_nothing_but_broken_videos_is_finished(tmp_path: Path) -> None:
    data = fakes.make_dataset(tmp_path / "v", 6, broken=(0, 1, 2, 3))
    encoder = fakes.FakeEncoder()
    assert run(data, tmp_path / "a.zarr", video=encoder).failed == 4
    assert encoder.calls == [2]
    assert run(data, tmp_path / "a.zarr", video=encoder).failed == 4
    assert encoder.calls == [2]


def test_retrying_repaired_videos_gives_the_store_that_was_never_broken(tmp_path: Path) -> None:
    broken = fakes.make_dataset(tmp_path / "v", 11, broken=(1, 2, 9))
    run(broken, tmp_path / "a.zarr")
    untouched = fakes.tree(tmp_path / "a.zarr")
    encoder = fakes.FakeEncoder()
    assert run(broken, tmp_path / "a.zarr", video=encoder, retry_failed=True).failed == 3
    assert encoder.calls == []  # nothing has changed, so nothing was encoded again
    assert fakes.tree(tmp_path / "a.zarr") == untouched
    for row in (1, 2, 9):
        fakes.write_video(broken.clips[row].path, row)
    assert run(broken, tmp_path / "a.zarr").failed == 3  # not asked to
    result = run(broken, tmp_path / "a.zarr", retry_failed=True)
    assert (result.done, result.failed) == (11, 0)
    run(broken, tmp_path / "b.zarr")
    assert fakes.tree(tmp_path / "a.zarr") == fakes.tree(tmp_path / "b.zarr")


def test_a_retry_never_loses_clips_that_were_extracted_before(tmp_path: Path) -> None:
    data = fakes.make_dataset(tmp_path / "v", 4, broken=(1,))
    run(data, tmp_path / "a.zarr")
    before = fakes.tree(tmp_path / "a.zarr")
    fakes.write_video(data.clips[1].path, 1)
    data.clips[0].path.unlink()
    result = run(data, tmp_path / "a.zarr", retry_failed=True)
    assert fakes.tree(tmp_path / "a.zarr") == before
    assert (result.done, result.failed) == (3, 1)
    assert "clip-0-é" in result.warnings[0]


def test_a_second_encoder_later_gives_the_same_store_as_both_at_once(tmp_path: Path) -> None:
    data = fakes.make_dataset(tmp_path / "v", 6, broken=(2,))
    run(data, tmp_path / "a.zarr", image=None)
    before = fakes.tree(tmp_path / "a.zarr")
    run(data, tmp_path / "a.zarr")
    run(data, tmp_path / "b.zarr")
    after = fakes.tree(tmp_path / "a.zarr")
    assert after == fakes.tree(tmp_path / "b.zarr")
    # Only the list of failures, which names the encoders, is another one.
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"failures/00000.json"}


def test_lost_and_damaged_files_are_made_again(videos: Path, tmp_path: Path) -> None:
    data = fakes.make_dataset(videos, 11)
    run(data, tmp_path / "a.zarr")
    whole = fakes.tree(tmp_path / "a.zarr")
    store = tmp_path / "a.zarr"
    (store / "tokens/fake-video/c/1/0/0/0").unlink()
    cut = store / "image/fake-image/c/0/0/0"
    cut.write_bytes(cut.read_bytes()[:-7])
    (store / "status/fake-video/c/2/0").write_bytes(b"\1\1\1\1\0\0\0\0")
    (store / "tokens/fake-video/c/2/0/0/.0.99.tmp").write_bytes(b"half")
    (store / "label/c/0/0").unlink()
    run(data, store)
    assert fakes.tree(store) == whole


def test_half_committed_shards_are_made_again(tmp_path: Path) -> None:
    data = fakes.make_dataset(tmp_path / "v", 4, broken=(1,))
    run(data, tmp_path / "a.zarr")
    whole = fakes.tree(tmp_path / "a.zarr")
    (tmp_path / "a.zarr/failures/00000.json").unlink()
    result = run(data, tmp_path / "a.zarr")
    assert fakes.tree(tmp_path / "a.zarr") == whole
    assert len(result.failures) == 1


def test_features_that_overflow_the_stored_type_count_as_failed(
    videos: Path, tmp_path: Path
) -> None:
    data = fakes.make_dataset(videos, 4)
    loud = fakes.FakeEncoder(scale=1e6)
    result = run(data, tmp_path / "a.zarr", video=loud)
    assert (result.done, result.failed) == (0, 4)
    assert "not finite as float16" in result.failures[0]["reason"]
    assert result.failures[0]["encoders"] == ["fake-video"]
    assert open_store(tmp_path / "a.zarr").image().isfinite().all()
    assert run(data, tmp_path / "b.zarr", video=loud, store_dtype="float32").done == 4


def truncated(folder: Path) -> Any:
    """Four clips, the third cut short in the middle of its frames (still decodable in part)."""
    data = fakes.make_dataset(folder, 4)
    path = folder / "cut.mp4"
    fakes.write_video(path, 2, frames=40, width=96, height=64)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    clips = (*data.clips[:2], replace(data.clips[2], path=path), data.clips[3])
    return replace(data, clips=clips)


def test_degraded_videos_are_kept_skipped_or_fatal_as_asked(tmp_path: Path) -> None:
    data = truncated(tmp_path / "v")
    kept = run(data, tmp_path / "a.zarr")
    assert (kept.done, kept.failed, len(kept.degraded)) == (4, 0, 1)
    assert (kept.degraded[0]["clip"], kept.degraded[0]["status"]) == ("clip-2-é", 3)
    assert kept.degraded[0]["reason"]
    assert open_store(tmp_path / "a.zarr").tokens().shape == (4, 5, 6)
    skipped = run(data, tmp_path / "b.zarr", on_degraded="skip")
    assert (skipped.done, skipped.failed) == (3, 1)
    assert skipped.failures[0]["reason"] == kept.degraded[0]["reason"]
    with pytest.raises(VideoError, match=r"cut\.mp4"):
        run(data, tmp_path / "c.zarr", on_degraded="fail")
    with pytest.raises(StoreError, match="not extracted yet"):
        open_store(tmp_path / "c.zarr").tokens()


def test_text_is_encoded_once_and_unknown_words_are_named(videos: Path, tmp_path: Path) -> None:
    data = fakes.make_dataset(videos, 4)
    text = fakes.FakeText()
    prompts = {"plain": "{}", "long": "a video of {}"}
    result = run(data, tmp_path / "a.zarr", text=text, prompts=prompts)
    assert result.unknown_words == {"feed a zorilla": ["zorilla"]}
    store = open_store(tmp_path / "a.zarr")
    assert torch.equal(store.text(prompt="long"), text(list(data.classes), prompt=prompts["long"]))
    assert store.unknown_words(prompt="plain") == result.unknown_words
    calls = text.calls
    assert run(data, tmp_path / "a.zarr", text=text, prompts=prompts).done == 4
    assert text.calls == calls
    with pytest.raises(SpecMismatch, match="template"):
        run(data, tmp_path / "a.zarr", text=text, prompts={"plain": "the {}"})


def test_class_embeddings_alone_need_no_video(tmp_path: Path) -> None:
    data = fakes.make_dataset(tmp_path / "v", 4)
    for clip in data.clips:
        clip.path.unlink()
    text = fakes.FakeText()
    options = {"video": None, "image": None, "text": text, "prompts": {"plain": "{}"}}
    result = run(data, tmp_path / "a.zarr", **options)
    assert (result.done, result.failed) == (4, 0)
    store = open_store(tmp_path / "a.zarr")
    assert torch.equal(store.text(), text(list(data.classes), prompt="{}"))
    assert store.encoders("video") == store.encoders("image") == []


def test_options_that_cannot_be_are_refused_before_anything_is_written(
    videos: Path, tmp_path: Path
) -> None:
    data = fakes.make_dataset(videos, 4)
    for options, message in (
        ({"video": None, "image": None}, "nothing to extract"),
        ({"batch": 0}, "batch"),
        ({"workers": -1}, "workers"),
        ({"on_degraded": "ignore"}, "keep, skip or fail"),
        ({"image": fakes.FakeEncoder(fakes.image_spec(slug="fake-video"))}, "both named"),
    ):
        with pytest.raises(UsageError, match=message):
            run(data, tmp_path / "a.zarr", **options)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_up_to_the_total(videos: Path, tmp_path: Path) -> None:
    data = fakes.make_dataset(videos, 11)
    events: list[dict[str, Any]] = []
    result = run(data, tmp_path / "a.zarr", progress=events.append)
    counts = [event["done"] for event in events]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == events[-1]["total"] == 11
    assert result.stages["encode"]["fake-video"] > 0
    assert events[-1]["stages"]["bottleneck"] == result.stages["bottleneck"]


class Interrupting(type(fakes.FakeEncoder())):  # type: ignore[misc]
    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        if len(self.calls) == 3:
            raise KeyboardInterrupt
        return super().__call__(video)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupt_drops_the_shard_under_way_and_nothing_else(
    videos: Path, tmp_path: Path, workers: int
) -> None:
    data = fakes.make_dataset(videos, 11)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "a.zarr", video=Interrupting(), workers=workers)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]
    status = open_store(tmp_path / "a.zarr").status("fake-video")
    assert status.tolist() == [1] * 4 + [0] * 7
    run(data, tmp_path / "a.zarr")
    run(data, tmp_path / "b.zarr")
    assert fakes.tree(tmp_path / "a.zarr") == fakes.tree(tmp_path / "b.zarr")


def test_the_number_of_threads_is_put_back(videos: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    run(fakes.make_dataset(videos, 4), tmp_path / "a.zarr")
    assert torch.get_num_threads() == before


PICTURE = Picture(4, "uniform", 16, "torch")


def test_a_crashing_decoder_costs_one_clip_and_no_order(videos: Path, tmp_path: Path) -> None:
    # A worker unpickles its task before it decodes; this path ends the process at that moment.
    data = fakes.make_dataset(videos, 8)
    tasks = [DecodeTask(row, c.path, None, None, (PICTURE,)) for row, c in enumerate(data.clips)]
    tasks[3] = replace(tasks[3], path=Deadly())
    results = list(decode_in_order(tasks, 2))
    assert [result.row for result in results] == list(range(8))
    assert results[3].reason is not None
    assert "process died" in results[3].reason
    expected = decode(tasks[4])
    assert all(result.reason is None for result in results if result.row != 3)
    assert np.array_equal(results[4].frames[0], expected.frames[0])


class Deadly:
    """Kills whichever process unpickles it."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return os._exit, (3,)


def test_frames_that_wait_are_bounded(videos: Path) -> None:
    started: list[int] = []

    def tasks() -> Any:
        for row in range(20):
            started.append(row)
            yield DecodeTask(row, videos / "none.mp4", None, None, (PICTURE,))

    stream = decode_in_order(tasks(), 1, look_ahead=5 * PICTURE.bytes)
    assert next(stream).reason is not None
    assert len(started) == 5
    assert len(list(stream)) == 19


def test_reasons_hold_no_place_on_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "it's" / "a clip.mp4"
    assert without_paths(f"{path}: cannot open {str(path)!r}", path) == 'cannot open "a clip.mp4"'
    assert without_paths(f"no frames in {path.parent}/x", path) == "no frames in x"


KILLED = """
import sys, runpy
from pathlib import Path
from msq.extract.pipeline import extract
import os, time

def main():
    fakes = runpy.run_path(sys.argv[1])
    class Slow(fakes["FakeEncoder"]):
        def __call__(self, video):
            print("encoding", flush=True)
            time.sleep(600)
    extract(fakes["make_dataset"](Path(sys.argv[2]), 11), Path(sys.argv[3]),
            video=Slow(), image=None, workers=2, shard=4)

if __name__ == "__main__":
    main()
"""


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            names = task.read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
            continue
        for child in names:
            found += [int(child), *children(int(child))]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_die_with_a_killed_parent(videos: Path, tmp_path: Path) -> None:
    if not any(Path("/proc/self/task").glob("*/children")):
        pytest.skip("needs /proc to list processes")
    script = tmp_path / "run.py"
    script.write_text(KILLED)
    arguments = [str(Path(__file__).with_name("fakes.py")), str(videos), str(tmp_path / "a.zarr")]
    with subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"encoding\n"
        workers = children(process.pid)
        assert len(workers) >= 3  # the fork server and two workers
        process.send_signal(signal.SIGKILL)
    for _ in range(6000):
        if not any(alive(pid) for pid in workers):
            break
        signal.sigtimedwait([], 0.1)
    assert not [pid for pid in workers if alive(pid)]
