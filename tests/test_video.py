"""Clean files: what `decode_clip` returns is what a full sequential decode shows, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import msq.extract.video as video_module
from msq.errors import UsageError, VideoError
from msq.extract.packets import Damage, open_stream, packet_table
from msq.extract.plan import plan_runs
from msq.extract.sampling import sample_indices
from msq.extract.video import decode_all, decode_clip

# (file, may the plan be used): everything a data set is likely to hold. The plan's speed is
# worth nothing where it silently falls back, so that is a part of the contract.
CLEAN = {
    "cfr.mp4": True,
    "gop12 b2.mp4": True,
    "gop7 no b.mp4": True,
    "all intra.mov": True,
    "vfr.mp4": True,
    "open gop.mp4": True,
    "open gop.mkv": True,
    "edit list.mp4": True,
    "edit list tail.mp4": True,
    "edit list open gop.mp4": True,
    "xvid b.avi": False,
    "packed b.avi": False,
    "divx.avi": False,
    "h264.avi": False,
    "motion.avi": False,
    "mpeg4.mp4": False,
    "mpeg2.mpg": False,
    "fragmented.mp4": True,
    "faststart.mp4": True,
    "pipe.mkv": True,
    "stream.ts": True,
    "raw.h264": False,
    "five.mp4": True,
    "one.mp4": True,
    "rotated 90.mp4": True,
    "rotated 180.mp4": True,
    "hevc.mp4": True,
    "hevc open gop.mkv": True,
    "vp8.webm": False,
    "vp9.webm": True,
    "av1.mp4": True,
    "ten bit.mp4": True,
    "yuv422.mp4": True,
    "grey.mp4": True,
    "odd size.mp4": True,
    "full range.mp4": True,
}


def plain_decode(path: Path) -> np.ndarray:
    """The shortest possible use of the decoder, sharing nothing with msq."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def forbid_full_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the plan was given up")

    monkeypatch.setattr(video_module, "_decode_in_full", refuse)


def test_the_table_names_every_clean_file(media: Any) -> None:
    assert set(CLEAN) == set(media.clean())


@pytest.mark.parametrize("name", CLEAN)
def test_sampled_frames_equal_a_full_sequential_decode(name: str, media: Any) -> None:
    path = media(name)
    everything, times = decode_all(path)
    assert len(everything) == len(times)
    for frames in (1, 8, 16, len(everything), len(everything) + 7):
        for sampling in ("uniform", "official"):
            clip = decode_clip(path, frames, sampling=sampling)
            expected = sample_indices(len(everything), frames, sampling)
            assert clip.degraded is None
            assert clip.frames.dtype == np.uint8
            np.testing.assert_array_equal(clip.frames, everything[expected])
            np.testing.assert_array_equal(clip.times, times[expected].astype(np.float32))


@pytest.mark.parametrize("name", [n for n in CLEAN if not n.startswith("rotated")])
def test_the_reference_is_what_the_decoder_shows(name: str, media: Any) -> None:
    np.testing.assert_array_equal(decode_all(media(name))[0], plain_decode(media(name)))


@pytest.mark.parametrize("name", [n for n, planned in CLEAN.items() if planned])
def test_the_plan_is_used_where_packets_tell_the_order(
    name: str, media: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_full_decode(monkeypatch)
    for frames in (1, 3, 16):
        decode_clip(media(name), frames)


@pytest.mark.parametrize("name", [n for n, planned in CLEAN.items() if not planned])
def test_everything_is_decoded_where_packets_do_not_tell_the_order(
    name: str, media: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_full_decode(monkeypatch)
    with pytest.raises(AssertionError, match="given up"):
        decode_clip(media(name), 4)


@pytest.mark.parametrize(
    ("name", "frames"),
    [("cfr.mp4", 48), ("vfr.mp4", 48), ("edit list.mp4", 31), ("edit list tail.mp4", 20),
     ("packed b.avi", 48), ("five.mp4", 5)],
)  # fmt: skip
def test_every_frame_put_in_comes_out(name: str, frames: int, media: Any) -> None:
    assert len(decode_all(media(name))[0]) == frames


def test_an_edit_list_shows_the_frames_from_its_start_on(media: Any) -> None:
    whole, _ = decode_all(media("gop12 b2.mp4"))
    cut, times = decode_all(media("edit list.mp4"))
    np.testing.assert_array_equal(cut, whole[17:48])
    np.testing.assert_allclose(times, np.arange(31) / 25, atol=1e-9)
    with open_stream(media("edit list.mp4")) as (container, stream):
        table = packet_table(container, stream, Damage())
    assert any(p.is_discard for p in table.packets), "nothing to discard: the test shows nothing"


def test_times_follow_the_file_and_start_at_zero(media: Any) -> None:
    for name in ("cfr.mp4", "packed b.avi", "stream.ts", "pipe.mkv", "xvid b.avi"):
        np.testing.assert_allclose(decode_all(media(name))[1], np.arange(48) / 25, atol=2e-3)
    steps = np.diff(decode_all(media("vfr.mp4"))[1])
    expected = np.random.default_rng(5).integers(10, 90, 48)[1:] / 1000
    np.testing.assert_allclose(steps, expected, atol=1e-9)
    assert np.isnan(decode_all(media("raw.h264"))[1]).all()


def test_rotation_metadata_turns_the_picture_as_a_player_does(media: Any) -> None:
    stored = plain_decode(media("cfr.mp4"))
    # The display matrix (0, 1, -1, 0) maps the stored left edge to the top: a clockwise turn.
    np.testing.assert_array_equal(
        decode_all(media("rotated 90.mp4"))[0], np.rot90(stored, -1, axes=(1, 2))
    )
    np.testing.assert_array_equal(decode_all(media("rotated 180.mp4"))[0], stored[:, ::-1, ::-1])
    assert decode_clip(media("rotated 90.mp4"), 2).frames.shape == (2, 96, 64, 3)


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((-1, 0, 0, 1), lambda v: v[:, :, ::-1]),
        ((1, 0, 0, -1), lambda v: v[:, ::-1]),
        ((0, 1, 1, 0), lambda v: v.transpose(0, 2, 1, 3)),
        ((0, -1, -1, 0), lambda v: v[:, ::-1, ::-1].transpose(0, 2, 1, 3)),
    ],
    ids=["left to right", "upside down", "diagonal", "other diagonal"],
)
def test_a_display_matrix_that_mirrors_mirrors_the_picture(
    media: Any, tmp_path: Path, matrix: tuple[int, int, int, int], turn: Any
) -> None:
    # (x, y) goes to (a x + c y, b x + d y): what a player shows, by the standard of the container.
    media.with_rotation(media("cfr.mp4"), tmp_path / "mirrored.mp4", matrix)
    stored = plain_decode(media("cfr.mp4"))
    np.testing.assert_array_equal(decode_all(tmp_path / "mirrored.mp4")[0], turn(stored))


CUT = ["gop12 b2.mp4", "vfr.mp4", "open gop.mkv", "packed b.avi", "stream.ts", "edit list.mp4"]


@pytest.mark.parametrize("name", [*CUT, "pipe.mkv", "hevc open gop.mkv"])
@pytest.mark.parametrize("cut", [(None, 0.5), (0.5, None), (0.4, 0.9), (0.0, 0.02), (0.99, 1.07)])
def test_a_cut_applies_the_same_rule_to_the_frames_inside_it(
    name: str, cut: tuple[float | None, float | None], media: Any
) -> None:
    start, end = cut
    everything, times = decode_all(media(name))
    inside = np.ones(len(times), bool)
    inside &= True if start is None else times >= start
    inside &= True if end is None else times < end
    chosen = np.flatnonzero(inside)
    for frames in (1, 4, 40):
        if not len(chosen):
            with pytest.raises(VideoError, match="at least one frame in the cut"):
                decode_clip(media(name), frames, start=start, end=end)
            continue
        clip = decode_clip(media(name), frames, start=start, end=end)
        expected = chosen[sample_indices(len(chosen), frames)]
        np.testing.assert_array_equal(clip.frames, everything[expected])
        np.testing.assert_array_equal(clip.times, times[expected].astype(np.float32))


@pytest.mark.parametrize("name", ["cfr.mp4", "divx.avi"])
@pytest.mark.parametrize("cut", [(5.0, 9.0), (1.0, 1.0), (1.5, 0.5), (None, -1.0)])
def test_a_cut_without_a_frame_is_an_error_that_says_so(
    name: str, cut: tuple[float | None, float], media: Any
) -> None:
    with pytest.raises(VideoError, match=r"in the cut .* found none .*from 0\.000 to 1\.880 s"):
        decode_clip(media(name), 4, start=cut[0], end=cut[1])


def test_a_stream_without_times_cannot_be_cut(media: Any) -> None:
    with pytest.raises(VideoError, match="without time stamps"):
        decode_clip(media("raw.h264"), 4, start=0.5)


def test_a_video_too_long_to_be_held_is_decoded_twice_with_the_same_result(
    media: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decode_clip(media("packed b.avi"), 16)
    monkeypatch.setattr(video_module, "HELD_BYTES", 5 * 96 * 64)
    again = decode_clip(media("packed b.avi"), 16)
    np.testing.assert_array_equal(again.frames, expected.frames)
    np.testing.assert_array_equal(again.times, expected.times)
    assert again.degraded is None


def test_only_what_the_wanted_frames_need_is_decoded(media: Any) -> None:
    with open_stream(media("gop12 b2.mp4")) as (container, stream):
        table = packet_table(container, stream, Damage())
    order = table.display_order()
    assert order is not None
    runs = plan_runs(table.packets, [order[13], order[40]])
    keys = [i for i, p in enumerate(table.packets) if p.is_keyframe]
    assert keys == [0, 12, 24, 36]
    assert [(r.first, r.last) for r in runs] == [(12, order[13]), (36, order[40])]


def test_a_leading_picture_of_an_open_gop_starts_one_keyframe_earlier(media: Any) -> None:
    with open_stream(media("open gop.mkv")) as (container, stream):
        packets = packet_table(container, stream, Damage()).packets
    keys = [i for i, p in enumerate(packets) if p.is_keyframe]
    key = keys[2]
    leading = [i for i in range(key + 1, keys[3]) if packets[i].pts < packets[key].pts]
    assert leading, "no leading picture: the encoder made no open GOP"
    assert plan_runs(packets, [leading[0]])[0].first == keys[1]
    assert plan_runs(packets, [key])[0].first == key


def test_a_change_of_size_is_brought_to_one_size_and_said(media: Any) -> None:
    clip = decode_clip(media.changing_size(), 6)
    assert clip.frames.shape == (6, 64, 96, 3)
    assert clip.degraded == "frames change size (64x48, 96x64) and were brought to one"
    assert decode_clip(media.changing_size(), 1, sampling="uniform").degraded is None


@given(
    length=st.integers(1, 70),
    gop=st.integers(1, 30),
    bframes=st.integers(0, 4),
    open_gop=st.booleans(),
    frames=st.integers(1, 20),
)
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_gop_structure_gives_the_frames_of_a_full_decode(
    length: int, gop: int, bframes: int, open_gop: bool, frames: int, media: Any, tmp_path: Path
) -> None:
    path = tmp_path / "any.mp4"
    media.encode(
        path, length, size=(64, 48), gop=gop, bframes=bframes, extra=f":open-gop={int(open_gop)}"
    )
    everything = plain_decode(path)
    clip = decode_clip(path, frames)
    np.testing.assert_array_equal(clip.frames, everything[sample_indices(length, frames)])
    assert clip.degraded is None


@pytest.fixture
def folder(media: Any, tmp_path: Path) -> Path:
    for i, picture in enumerate(media.pictures(12, 40, 30)):
        Image.fromarray(picture).save(tmp_path / f"frame_{i}.png")  # not padded: 10 after 9
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / ".frame_3.png").write_bytes(b"left by an editor")
    Image.new("L", (40, 30)).save(tmp_path / "flow_x_00001.jpg")  # as mmaction2 dumps it
    return tmp_path


def test_a_frame_folder_is_read_in_natural_order(folder: Path, media: Any) -> None:
    expected = np.stack(media.pictures(12, 40, 30))
    np.testing.assert_array_equal(decode_all(folder)[0], expected)
    clip = decode_clip(folder, 5)
    np.testing.assert_array_equal(clip.frames, expected[sample_indices(12, 5)])
    assert np.isnan(clip.times).all()
    assert clip.degraded is None


def test_a_frame_folder_with_a_known_rate_can_be_cut(folder: Path, media: Any) -> None:
    clip = decode_clip(folder, 3, start=0.5, end=1.25, fps=8)
    np.testing.assert_array_equal(clip.frames, np.stack(media.pictures(12, 40, 30))[[5, 7, 9]])
    np.testing.assert_allclose(clip.times, np.array([5, 7, 9]) / 8)
    with pytest.raises(VideoError, match=r"0\.5 s to the end.*without time stamps.*frame rate"):
        decode_clip(folder, 3, start=0.5)


def test_pictures_of_other_modes_and_sizes_become_rgb_of_the_first_size(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), (10, 20, 30)).save(tmp_path / "1.png")
    Image.new("L", (20, 10), 77).save(tmp_path / "2.png")
    Image.new("RGBA", (10, 10), (1, 2, 3, 255)).save(tmp_path / "3.png")
    clip = decode_clip(tmp_path, 3)
    assert clip.frames.shape == (3, 10, 20, 3)
    assert clip.frames[:, 0, 0].tolist() == [[10, 20, 30], [77, 77, 77], [1, 2, 3]]
    assert clip.degraded is not None
    assert "10x10, 20x10" in clip.degraded


def test_bad_arguments_are_refused_before_any_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="uniform, official"):
        decode_clip(tmp_path / "absent.mp4", 4, sampling="random")
    with pytest.raises(ValueError, match="at least one frame"):
        decode_clip(tmp_path / "absent.mp4", 0)
