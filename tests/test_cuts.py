"""Many cuts from one pass over a video: each is what it would be alone."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

import msq.extract.cuts as cuts_module
import msq.extract.video_survey as survey_module
from msq.errors import VideoError
from msq.extract.cuts import Taken, decode_cuts
from msq.extract.packets import UndecodableVideo
from msq.extract.timeline import Cut
from msq.extract.video import DecodedClip, decode_samples, frame_times
from msq.extract.video_survey import survey

CLEAN = runpy.run_path(str(Path(__file__).with_name("test_video.py")))["CLEAN"]
REQUESTS = [(4, "uniform"), (3, "official")]


def windows(times: np.ndarray, every: float, length: float) -> list[Cut]:
    """From before the first frame to past the last one."""
    return [Cut(s, s + length) for s in np.arange(-every, times.max() + 2 * every, every).tolist()]


def alone(path: Path, cut: Cut, **options: Any) -> list[DecodedClip] | str:
    try:
        return decode_samples(path, REQUESTS, start=cut.start, end=cut.end, **options)
    except VideoError as error:
        return str(error)


def assert_equal_to_each_alone(path: Path, cuts: list[Cut], **options: Any) -> list[Taken]:
    taken = list(decode_cuts(survey(path, **options), cuts, REQUESTS))
    pairs = [(one.cut, one.request) for one in taken]
    assert sorted(pairs) == [(k, r) for k in range(len(cuts)) for r in range(len(REQUESTS))]
    for one in taken:
        expected = alone(path, cuts[one.cut], **options)
        if isinstance(expected, str):
            assert str(one.clip) == expected
            continue
        assert isinstance(one.clip, DecodedClip), one.clip
        clip = expected[one.request]
        np.testing.assert_array_equal(one.clip.frames, clip.frames)
        np.testing.assert_array_equal(one.clip.times, clip.times)
        assert one.clip.degraded == clip.degraded
    return taken


@pytest.mark.parametrize("name", CLEAN)
def test_every_cut_of_every_container_is_what_it_is_alone(media: Any, name: str) -> None:
    path = media(name)
    times = frame_times(path)
    np.testing.assert_array_equal(survey(path).times, times)
    if np.isnan(times).any():
        (one, _) = decode_cuts(survey(path), [Cut(0, 1)], REQUESTS)
        assert "without time stamps" in str(one.clip)
        assert_equal_to_each_alone(path, [Cut(None, None)])
        return
    step = max(float(times.max()) / 4, 0.1)
    taken = assert_equal_to_each_alone(path, windows(times, step, 1.5 * step))
    assert any(isinstance(one.clip, DecodedClip) for one in taken)


@pytest.mark.parametrize("name", ["flipped.mp4", "flipped.avi", "truncated gop12 b2.mkv"])
def test_damage_stays_with_the_cuts_that_have_it(media: Any, name: str) -> None:
    if name.startswith("truncated"):
        source = media.folder / "gop12 b2.mkv"
        media.encode(source)
        path = media.folder / name
        path.write_bytes(source.read_bytes()[: source.stat().st_size * 6 // 10])
    else:
        path = media.damaged(name)
    taken = assert_equal_to_each_alone(path, windows(frame_times(path), 0.5, 0.5))
    found = {one.clip.degraded for one in taken if isinstance(one.clip, DecodedClip)}
    assert any(found)
    if name == "flipped.mp4":  # its beginning is whole
        assert None in found


def test_what_a_plan_cannot_decode_is_taken_from_one_decoding_of_the_file(
    media: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = media.folder / "refreshed.mp4"  # keyframes that are none: no plan holds
    media.encode(path, 60, gop=10, bframes=0, extra=":intra-refresh=1")
    times = frame_times(path)
    cuts = windows(times, 0.1, 0.1)
    video = survey(path)
    assert video.order is not None  # the packets promise a plan
    decodings: list[Path] = []
    for module in (cuts_module, survey_module):
        whole = module.shown_frames
        monkeypatch.setattr(
            module, "shown_frames", lambda *a, whole=whole: decodings.append(path) or whole(*a)
        )
    taken = list(decode_cuts(video, cuts, [(2, "uniform")]))
    assert sum(isinstance(one.clip, DecodedClip) for one in taken) == 24
    assert len(decodings) == 2  # to count, and to take; not one for each of the cuts
    assert_equal_to_each_alone(path, cuts)


def test_a_folder_of_frames_is_cut_too_and_a_broken_picture_is_one_cuts_own(tmp_path: Path) -> None:
    for i in range(12):
        Image.fromarray(np.full((8, 12, 3), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
    cuts = [Cut(0, 1), Cut(1, 2), Cut(2, 3)]
    assert_equal_to_each_alone(tmp_path, cuts, fps=4.0)
    (tmp_path / "5.png").write_bytes(b"no picture")
    taken = assert_equal_to_each_alone(tmp_path, cuts, fps=4.0)
    failed = {one.cut for one in taken if isinstance(one.clip, UndecodableVideo)}
    assert failed == {1}


def test_a_long_video_is_opened_twice_and_held_in_part(
    media: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = media.folder / "long.mp4"
    media.encode(path, 400, size=(48, 32), gop=10, fps=10)
    video = survey(path)
    cuts = windows(video.times, 1, 2)
    opened: list[str] = []
    av_open = av.open
    monkeypatch.setattr(av, "open", lambda *a, **o: opened.append(a[0]) or av_open(*a, **o))
    held, pictures = [], []
    packets, planned = cuts_module._Forward.packets, cuts_module.decode_planned

    def watched(self: Any, *arguments: Any) -> Any:
        found = packets(self, *arguments)
        held.append(len(self._held))
        return found

    def counted(*arguments: Any) -> Any:
        found = planned(*arguments)
        pictures.append(len(found))
        return found

    monkeypatch.setattr(cuts_module._Forward, "packets", watched)
    monkeypatch.setattr(cuts_module, "decode_planned", counted)
    monkeypatch.setattr(cuts_module, "_GROUP_BYTES", 12 * video.picture_bytes)
    taken = list(decode_cuts(video, cuts, [(4, "uniform")]))
    assert len(taken) == len(cuts) == 43
    assert len(opened) == 2  # for the packets and for the decoder, however many cuts
    assert max(held) <= 40  # packets of three or four seconds; the file has 400
    assert max(pictures) <= 12
    assert sum(isinstance(one.clip, DecodedClip) for one in taken) == 41
