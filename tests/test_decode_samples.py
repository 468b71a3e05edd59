"""One decoding for many samplings: every result is what its own `decode_clip` gives."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

import msq.extract.video as video_module
from msq.errors import UsageError, VideoError
from msq.extract.packets import Damage, UndecodableVideo, open_stream, packet_table
from msq.extract.pipeline import extract
from msq.extract.plan import Run, plan_runs
from msq.extract.sampling import sample_indices
from msq.extract.store import open_store
from msq.extract.video import DecodedClip, decode_all, decode_clip, decode_samples

fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))

REQUESTS = [(8, "uniform"), (16, "uniform"), (10, "official"), (1, "uniform"), (8, "uniform")]
CLEAN = runpy.run_path(str(Path(__file__).with_name("test_video.py")))["CLEAN"]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every file that libav is asked to open."""
    places: list[str] = []
    av_open = av.open

    def counted(place: str, *arguments: Any, **options: Any) -> Any:
        places.append(place)
        return av_open(place, *arguments, **options)

    monkeypatch.setattr(av, "open", counted)
    return places


def outcome(
    path: Path, requests: Sequence[tuple[int, str]], **options: Any
) -> list[DecodedClip] | str:
    """The clips, one alone through `decode_clip`; or the words of the error."""
    try:
        if len(requests) == 1:
            frames, sampling = requests[0]
            return [decode_clip(path, frames, sampling=sampling, **options)]
        return decode_samples(path, requests, **options)
    except VideoError as error:
        return str(error)


def assert_each_is_its_own(
    path: Path, requests: Sequence[tuple[int, str]] = REQUESTS, **options: Any
) -> list[str | None]:
    """Together and alone are the same, errors included; returns the reasons."""
    alone = [outcome(path, [request], **options) for request in requests]
    together = outcome(path, requests, **options)
    if isinstance(together, str):
        assert together in alone
        return []
    assert len(together) == len(requests)
    for clip, result in zip(together, alone, strict=True):
        assert not isinstance(result, str), result
        expected = result[0]
        np.testing.assert_array_equal(clip.frames, expected.frames)
        np.testing.assert_array_equal(clip.times, expected.times)
        assert clip.times.dtype == np.float32
        assert clip.degraded == expected.degraded
    return [clip.degraded for clip in together]


@pytest.mark.parametrize("name", CLEAN)
def test_clean_files_are_opened_once_and_give_the_frames_of_a_full_decode(
    name: str, media: Any, opened: list[str]
) -> None:
    everything, times = decode_all(media(name))
    opened.clear()
    clips = decode_samples(media(name), REQUESTS)
    assert opened == [f"file:{media(name)}"]
    for clip, (frames, sampling) in zip(clips, REQUESTS, strict=True):
        chosen = sample_indices(len(everything), frames, sampling)
        np.testing.assert_array_equal(clip.frames, everything[chosen])
        np.testing.assert_array_equal(clip.times, times[chosen].astype(np.float32))
        assert clip.degraded is None


@pytest.mark.parametrize("name", ["gop12 b2.mp4", "open gop.mkv", "xvid b.avi", "raw.h264"])
def test_each_result_is_what_its_request_alone_gives(name: str, media: Any) -> None:
    assert_each_is_its_own(media(name))


@pytest.mark.parametrize("name", ["vfr.mp4", "packed b.avi", "stream.ts", "edit list.mp4"])
@pytest.mark.parametrize("cut", [(None, 0.5), (0.4, 0.9), (0.99, 1.07), (7.0, 8.0)])
def test_cuts_are_the_same_together_and_alone(
    name: str, cut: tuple[float | None, float], media: Any, opened: list[str]
) -> None:
    assert_each_is_its_own(media(name), start=cut[0], end=cut[1])
    opened.clear()
    if cut[1] < 7:
        decode_samples(media(name), REQUESTS, start=cut[0], end=cut[1])
        assert len(opened) == 1


@pytest.mark.parametrize(
    "name",
    ["truncated faststart.mp4", "truncated open gop.mkv", "truncated vp9.webm",
     "truncated fragmented.mp4", "flipped.mp4", "flipped.avi"],
)  # fmt: skip
def test_damaged_files_are_the_same_together_and_alone(name: str, media: Any) -> None:
    assert any(assert_each_is_its_own(media.damaged(name)))


@pytest.mark.parametrize("seed", range(8))
def test_random_damage_is_the_same_together_and_alone(
    seed: int, media: Any, tmp_path: Path
) -> None:
    rng = np.random.default_rng(100 + seed)
    name = ["gop12 b2.mp4", "open gop.mkv", "stream.ts", "packed b.avi"][seed % 4]
    data = bytearray(media(name).read_bytes())
    for at in rng.integers(len(data) // 10, len(data) * 9 // 10, 8):
        data[at] = int(rng.integers(256))
    path = tmp_path / f"damaged{Path(name).suffix}"
    path.write_bytes(data)
    assert_each_is_its_own(path, [(3, "uniform"), (16, "uniform"), (1, "official")])


def test_a_broken_file_is_one_error(media: Any) -> None:
    for name in media.broken():
        assert assert_each_is_its_own(media(name)) == []
    with pytest.raises(UndecodableVideo, match="found nothing at this path"):
        decode_samples(media.folder / "absent.mp4", REQUESTS)


def damage_one_gop(source: Path, target: Path) -> None:
    """Overwrite parts of frame 30 and of what follows it in its group of pictures (24 to 35)."""
    with av.open(str(source)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    data = bytearray(source.read_bytes())
    for packet in packets[27:34]:
        middle = packet.pos + packet.size // 2
        data[middle : middle + 12] = bytes(b ^ 0x5A for b in data[middle : middle + 12])
    target.write_bytes(data)


def test_damage_stands_only_in_the_results_that_would_have_met_it_alone(
    media: Any, tmp_path: Path
) -> None:
    path = tmp_path / "one gop.mp4"
    damage_one_gop(media("gop12 b2.mp4"), path)
    reasons = assert_each_is_its_own(path, [(1, "uniform"), (16, "uniform")])
    assert reasons[0] is None, "frame 24 is a keyframe: nothing before or after it matters"
    assert reasons[1] is not None
    assert "corrupt" in reasons[1] or "errors" in reasons[1]
    # What the plan cannot do cleanly is a full decode, whose frames are the reference.
    everything, _ = decode_all(path)
    clip = decode_samples(path, [(1, "uniform"), (16, "uniform")])[1]
    np.testing.assert_array_equal(clip.frames, everything[sample_indices(len(everything), 16)])


def test_a_change_of_size_stands_in_the_results_that_hold_both_sizes(media: Any) -> None:
    reasons = assert_each_is_its_own(media.changing_size(), [(1, "uniform"), (6, "uniform")])
    assert reasons == [None, "frames change size (64x48, 96x64) and were brought to one"]


def test_a_stream_refreshed_bit_by_bit_is_not_entered_in_the_middle(
    media: Any, tmp_path: Path
) -> None:
    path = tmp_path / "refresh.mp4"
    media.encode(path, 60, bframes=0, extra=":intra-refresh=1")
    with av.open(str(path)) as container:
        keys = [i for i, p in enumerate(container.demux(video=0)) if p.size and p.is_keyframe]
    assert len(keys) == 5, "no refresh points: the test shows nothing"
    everything, times = decode_all(path)
    for at in (13, 20, 49, 52, 59):
        clip = decode_clip(path, 1, start=times[at] - 0.01, end=times[at] + 0.01)
        np.testing.assert_array_equal(clip.frames[0], everything[at])
        assert clip.degraded is None
    assert assert_each_is_its_own(path, [(1, "uniform"), (2, "uniform")]) == [None, None]


def test_a_keyframe_and_what_leads_it_are_decoded_from_the_keyframe_before(media: Any) -> None:
    with open_stream(media("open gop.mkv")) as (container, stream):
        packets = packet_table(container, stream, Damage()).packets
    keys = [i for i, p in enumerate(packets) if p.is_keyframe]
    leading = keys[2] + 1
    assert packets[leading].pts < packets[keys[2]].pts, "no open GOP: the test shows nothing"
    wanted = [keys[1] + 2, keys[2], leading]
    assert plan_runs(packets, wanted) == [Run(keys[1], leading)]


def test_a_video_too_long_to_be_held_is_read_a_second_time_for_all_requests(
    media: Any, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    expected = decode_samples(media("packed b.avi"), REQUESTS)
    monkeypatch.setattr(video_module, "HELD_BYTES", 5 * 96 * 64)
    opened.clear()
    again = decode_samples(media("packed b.avi"), REQUESTS)
    assert len(opened) == 2
    for a, b in zip(again, expected, strict=True):
        np.testing.assert_array_equal(a.frames, b.frames)
        np.testing.assert_array_equal(a.times, b.times)


def test_each_picture_of_a_folder_is_read_once(
    media: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, picture in enumerate(media.pictures(12, 40, 30)):
        Image.fromarray(picture).save(tmp_path / f"frame_{i}.png")
    assert_each_is_its_own(tmp_path)
    assert_each_is_its_own(tmp_path, start=0.5, end=1.25, fps=8)
    assert_each_is_its_own(tmp_path, start=0.5)  # no frame rate: an error
    read: list[str] = []

    def noted(folder: Path, file: Path) -> Any:
        read.append(file.name)
        return read_frame(folder, file)

    read_frame = video_module.read_frame
    monkeypatch.setattr(video_module, "read_frame", noted)
    decode_samples(tmp_path, [(4, "uniform"), (6, "official"), (12, "uniform")])
    assert read == [f"frame_{i}.png" for i in range(12)]


def test_bad_requests_are_refused_before_any_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="uniform, official"):
        decode_samples(tmp_path / "absent.mp4", [(4, "uniform"), (4, "random")])
    with pytest.raises(ValueError, match="at least one frame"):
        decode_samples(tmp_path / "absent.mp4", [(4, "uniform"), (0, "uniform")])
    assert decode_samples(tmp_path / "absent.mp4", []) == []


def test_a_store_of_damaged_videos_does_not_depend_on_which_encoders_ran_together(
    media: Any, tmp_path: Path
) -> None:
    damage_one_gop(media("gop12 b2.mp4"), tmp_path / "one gop.mp4")
    data = fakes.make_dataset(tmp_path / "v", 3)
    damaged = replace(data.clips[1], path=tmp_path / "one gop.mp4")
    data = replace(data, clips=(data.clips[0], damaged, data.clips[2]))
    video = fakes.FakeEncoder(replace(fakes.SPEC, frames=16, tokens=17))
    image = fakes.FakeEncoder(fakes.image_spec(frames=1))
    for policy in ("keep", "skip"):
        both, apart = tmp_path / f"both {policy}.zarr", tmp_path / f"apart {policy}.zarr"
        options: dict[str, Any] = {"workers": 0, "on_degraded": policy}
        extract(data, both, video=video, image=image, **options)
        extract(data, apart, video=None, image=image, **options)
        extract(data, apart, video=video, image=None, **options)
        assert fakes.tree(both) == fakes.tree(apart)
        store = open_store(both)
        assert store.status("fake-image").tolist() == [1, 1, 1]
        assert store.status("fake-video").tolist() == [1, 3 if policy == "keep" else 2, 1]
    with pytest.raises(VideoError, match="one gop"):
        extract(data, tmp_path / "c.zarr", video=video, image=image, workers=0, on_degraded="fail")
