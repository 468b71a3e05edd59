"""Files that are not whole: every failure is a VideoError that says what was found."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msq.errors import VideoError
from msq.extract.packets import UndecodableVideo
from msq.extract.sampling import sample_indices
from msq.extract.video import decode_all, decode_clip

BROKEN = {
    "empty.mp4": r"found an empty file \(0 bytes\)",
    "text.mp4": "found: Invalid data found when processing input",
    "noise.mp4": "found: Invalid data found when processing input",
    "audio only.mp4": "expected a video stream, found: audio",
    "truncated.mp4": "found: Invalid data found when processing input",
}


def test_the_table_names_every_broken_file(media: Any) -> None:
    assert set(BROKEN) == set(media.broken())


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_an_error_with_file_expectation_and_finding(name: str, media: Any) -> None:
    path = media(name)
    for decode in (lambda: decode_clip(path, 4), lambda: decode_all(path)):
        with pytest.raises(VideoError, match=BROKEN[name]) as caught:
            decode()
        assert isinstance(caught.value, UndecodableVideo)
        assert str(path) in str(caught.value)
        assert str(path.parent) not in caught.value.reason
        assert caught.value.reason.startswith("expected ")


def test_an_error_survives_the_way_between_processes(media: Any) -> None:
    with pytest.raises(UndecodableVideo) as caught:
        decode_clip(media("text.mp4"), 4)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert (again.path, again.reason) == (caught.value.path, caught.value.reason)
    assert again.message == "Invalid data found when processing input"


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="found nothing at this path"):
        decode_clip(tmp_path / "absent.mp4", 4)


def test_a_file_that_may_not_be_read_is_said_to_be_so(media: Any, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = tmp_path / "secret.mp4"
    path.write_bytes(media("cfr.mp4").read_bytes())
    path.chmod(0)
    with pytest.raises(VideoError, match="Permission denied"):
        decode_clip(path, 4)


@pytest.mark.parametrize(
    "name", ['it\'s "mine" & 50%.mp4', "a:b.mp4", "ünï コ.mp4", "-i.mp4", "%03d.mp4"]
)
def test_odd_file_names_are_opened_as_they_are(name: str, media: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(media("cfr.mp4").read_bytes())
    np.testing.assert_array_equal(
        decode_clip(path, 4).frames, decode_clip(media("cfr.mp4"), 4).frames
    )


def test_a_relative_path_with_a_colon_is_no_protocol(
    media: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a:b.mp4").write_bytes(media("cfr.mp4").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert decode_clip(Path("a:b.mp4"), 4).frames.shape[0] == 4


def test_a_name_that_is_not_utf8_is_opened_or_refused_as_a_video_error(
    media: Any, tmp_path: Path
) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))
    try:
        path.write_bytes(media("cfr.mp4").read_bytes())
    except OSError:
        pytest.skip("this file system refuses names that are not UTF-8")
    assert decode_clip(path, 4).degraded is None


def test_a_file_that_points_elsewhere_is_not_followed(media: Any, tmp_path: Path) -> None:
    target = media("cfr.mp4")
    for text in (f"ffconcat version 1.0\nfile '{target}'\n", f"#EXTM3U\n#EXTINF:1,\n{target}\n"):
        path = tmp_path / "list.mp4"
        path.write_text(text)
        with pytest.raises(VideoError):
            decode_clip(path, 2)


def test_a_truncated_faststart_file_is_degraded_and_says_how_much_is_missing(media: Any) -> None:
    path = media.damaged("truncated faststart.mp4")
    for frames in (1, 4, 16, 60):
        clip = decode_clip(path, frames)
        assert clip.frames.shape[0] == frames
        assert clip.degraded is not None
        assert "truncated: the container declares 48 frames, the file holds" in clip.degraded
    whole, _ = decode_all(media("faststart.mp4"))
    assert len(decode_all(path)[0]) < len(whole)


def test_a_truncated_matroska_file_is_degraded_and_says_how_much_is_missing(media: Any) -> None:
    for name in ("open gop.mkv", "vp9.webm"):
        reason = decode_clip(media.damaged(f"truncated {name}"), 8).degraded
        assert reason is not None
        assert re.search(r"truncated: the container declares \d\.\d\d s, the file holds", reason)


def test_a_packet_that_is_not_whole_is_noticed_without_a_declared_length(media: Any) -> None:
    path = media.damaged("truncated fragmented.mp4")
    everything, _ = decode_all(path)
    clip = decode_clip(path, 8)
    assert clip.degraded is not None
    assert "packets that are not whole: 1" in clip.degraded
    np.testing.assert_array_equal(clip.frames, everything[sample_indices(len(everything), 8)])


def test_a_stream_of_an_unknown_codec_is_refused(media: Any, tmp_path: Path) -> None:
    path = tmp_path / "odd.mp4"
    data = media("cfr.mp4").read_bytes()
    assert data.count(b"avc1") >= 2
    path.write_bytes(data.replace(b"avc1", b"xyz1"))
    with pytest.raises(VideoError, match="of a known codec, found an unknown one"):
        decode_clip(path, 4)


def test_a_cover_picture_is_not_a_video(media: Any, tmp_path: Path) -> None:
    path = tmp_path / "song.mp3"
    media.song_with_cover(path)
    with pytest.raises(VideoError, match="expected a video stream, found: audio, video"):
        decode_clip(path, 4)


@pytest.mark.parametrize("name", ["flipped.mp4", "flipped.avi"])
def test_flipped_bytes_in_the_middle_are_degraded_though_nothing_raises(
    name: str, media: Any
) -> None:
    path = media.damaged(name)
    for frames in (8, 16):
        clip = decode_clip(path, frames)
        assert clip.frames.shape[0] == frames
        assert clip.degraded is not None
        assert "frames decoded with corrupt data" in clip.degraded
        assert str(path.parent) not in clip.degraded


def test_damage_is_the_same_on_every_reading(media: Any) -> None:
    for name in ("flipped.mp4", "truncated faststart.mp4"):
        first, again = (decode_clip(media.damaged(name), 16) for _ in range(2))
        np.testing.assert_array_equal(first.frames, again.frames)
        assert first.degraded == again.degraded


@pytest.mark.parametrize("seed", range(12))
def test_random_damage_ends_in_frames_or_a_video_error(
    seed: int, media: Any, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    name = ["gop12 b2.mp4", "open gop.mkv", "stream.ts", "packed b.avi"][seed % 4]
    data = bytearray(media(name).read_bytes())
    for at in rng.integers(0, len(data), 40):
        data[at] = int(rng.integers(256))
    path = tmp_path / f"damaged{Path(name).suffix}"
    path.write_bytes(data[: int(rng.integers(len(data) // 4, len(data)))])
    # Anything but frames or a VideoError fails the test by itself.
    with contextlib.suppress(VideoError):
        assert decode_clip(path, 8).frames.shape[0] == 8


def test_a_folder_without_pictures_says_so(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none here")
    with pytest.raises(VideoError, match="found no picture in it"):
        decode_clip(tmp_path, 4)


def test_a_broken_picture_in_a_folder_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"not a picture")
    whole = tmp_path / "3.jpg"
    Image.effect_noise((60, 60), 90).save(whole)
    with pytest.raises(UndecodableVideo, match=r"expected a picture in 2\.png") as caught:
        decode_clip(tmp_path, 3)
    assert str(tmp_path) not in caught.value.reason
    (tmp_path / "2.png").write_bytes(whole.read_bytes()[:500])
    with pytest.raises(UndecodableVideo, match=r"expected a picture in 2\.png, found: .*truncated"):
        decode_clip(tmp_path, 3)
