"""Many cuts from one pass over a video: each is what it would be alone."""

from __future__ import annotations

import itertools
import runpy
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

import msq.extract.cut_jobs as jobs_module
import msq.extract.cuts as cuts_module
import msq.extract.cuts_together as together_module
import msq.extract.forward as forward_module
import msq.extract.video_survey as survey_module
from msq.errors import VideoError
from msq.extract.cuts import Look, Taken, decode_cuts
from msq.extract.packets import UndecodableVideo
from msq.extract.sampling import FrameChoice
from msq.extract.shared_pictures import SharedPictures
from msq.extract.timeline import Cut, Moments
from msq.extract.transforms import resize_crop
from msq.extract.video import DecodedClip, decode_samples, frame_times
from msq.extract.video_survey import survey

CLEAN = runpy.run_path(str(Path(__file__).with_name("test_video.py")))["CLEAN"]
REQUESTS = [(4, "uniform"), (3, "official")]


def windows(times: np.ndarray, every: float, length: float) -> list[Cut]:
    """From before the first frame to past the last one."""
    return [Cut(s, s + length) for s in np.arange(-every, times.max() + 2 * every, every).tolist()]


def alone(
    path: Path, cut: Cut, requests: list[tuple[int, str]], **options: Any
) -> list[DecodedClip] | str:
    try:
        return decode_samples(path, requests, start=cut.start, end=cut.end, **options)
    except VideoError as error:
        return str(error)


def assert_equal_to_each_alone(
    path: Path,
    cuts: list[Cut],
    *,
    requests: list[tuple[int, str]] = REQUESTS,
    **options: Any,
) -> list[Taken]:
    taken = list(decode_cuts(survey(path, **options), cuts, requests))
    pairs = [(one.cut, one.request) for one in taken]
    assert sorted(pairs) == [(k, r) for k in range(len(cuts)) for r in range(len(requests))]
    for one in taken:
        expected = alone(path, cuts[one.cut], requests, **options)
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
            module,
            "shown_frames",
            lambda *a, whole=whole, **o: decodings.append(path) or whole(*a, **o),
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
    held = watch_pictures(monkeypatch)
    converted = watch_frames(monkeypatch)
    taken = list(decode_cuts(video, cuts, [(4, "uniform")]))
    assert len(taken) == len(cuts) == 43
    assert len(opened) == 2  # for the packets and for the decoder, however many cuts
    assert max(held) <= 12  # pictures of the two or three windows that are open at a time
    assert len(converted) == len(set(converted)) < 400  # each frame once, for all that share it
    assert sum(isinstance(one.clip, DecodedClip) for one in taken) == 41


def watch_pictures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures were held each time that one was added."""
    held: list[int] = []
    add = SharedPictures.add

    def watched(self: SharedPictures, *arguments: Any) -> None:
        add(self, *arguments)
        held.append(len(self._held))

    monkeypatch.setattr(SharedPictures, "add", watched)
    return held


def watch_frames(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The times of frames that were made RGB in a pass that cuts share."""
    times: list[int] = []
    to_rgb = together_module.to_rgb
    monkeypatch.setattr(
        together_module, "to_rgb", lambda frame: times.append(frame.pts) or to_rgb(frame)
    )
    return times


class Counted(Sequence):
    """Packets' marks that count how often one is looked at."""

    looked = 0

    def __init__(self, marks: Sequence[Any]) -> None:
        self.marks = marks

    def __len__(self) -> int:
        return len(self.marks)

    def __getitem__(self, place: Any) -> Any:
        Counted.looked += 1
        return self.marks[place]


def operations(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What is done for windows of two seconds, one a second."""
    video = survey(path)
    cuts = windows(video.times, 1, 2)
    Counted.looked, read, asked = 0, [], []
    with monkeypatch.context() as patch:
        patch.setattr(together_module, "in_place_of_packets", Counted)
        packets = forward_module.read_packets

        def counted(*arguments: Any) -> Any:
            for packet in packets(*arguments):
                read.append(packet.pts)
                yield packet

        patch.setattr(forward_module, "read_packets", counted)
        planned = together_module.planned_frames

        def decoded(context: Any, feed: Any, *rest: Any) -> Any:
            return planned(context, (asked.append(p.pts) or p for p in feed), *rest)

        patch.setattr(together_module, "planned_frames", decoded)
        frames = watch_frames(patch)
        taken = list(decode_cuts(video, cuts, REQUESTS))
    assert len(taken) == 2 * len(cuts)
    assert sum(isinstance(one.clip, DecodedClip) for one in taken) > len(cuts)
    return {"marks": Counted.looked, "packets": len(read), "decoded": len(asked),
            "pictures": len(frames)}  # fmt: skip


@pytest.mark.parametrize("gop", [10, 100_000])
def test_what_is_done_grows_as_the_length_of_the_video(
    media: Any, monkeypatch: pytest.MonkeyPatch, gop: int
) -> None:
    """With keyframes each second, and with a single one at the beginning."""
    counts = []
    for length in (200, 400, 800):
        path = media.folder / f"of {length} by {gop}.mp4"
        media.encode(path, length, size=(48, 32), gop=gop, fps=10)
        counts.append(operations(path, monkeypatch))
    for one, length in zip(counts, (200, 400, 800), strict=True):
        assert one["packets"] <= length  # each packet is read once
        assert one["decoded"] <= length  # and decoded at most once
        assert one["pictures"] <= length
    for short, long in itertools.pairwise(counts):
        for name in short:
            assert long[name] < 2.2 * short[name], (name, counts)


@pytest.mark.parametrize("name", ["gop12 b2.mp4", "open gop.mkv", "h264.avi", "hevc.mp4"])
def test_cuts_that_find_no_room_wait_for_another_pass(
    media: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = media(name)
    picture = 96 * 64 * 3
    monkeypatch.setattr(jobs_module, "HELD_PICTURES", 9 * picture)
    held = watch_pictures(monkeypatch)
    times = frame_times(path)
    taken = assert_equal_to_each_alone(path, windows(times, 0.1, 1.0))
    assert sum(isinstance(one.clip, DecodedClip) for one in taken) > 20
    assert 4 <= max(held) <= 14  # one cut more where it is alone in its time


def test_a_file_without_keyframes_is_damaged_in_the_middle(
    media: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was shown before the damage stays as it is; what follows is found out once."""
    source, path = media.folder / "one key.mp4", media.folder / "one key damaged.mp4"
    media.encode(source, 240, gop=100_000, bframes=0, fps=25)
    with av.open(str(source)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(source.read_bytes())
    at, size = packets[150]
    data[at + 40 : at + size] = bytes(size - 40)  # the slice begins well and breaks off
    path.write_bytes(data)
    opened: list[Path] = []
    new = together_module.new_decoder
    monkeypatch.setattr(together_module, "new_decoder", lambda *a: opened.append(path) or new(*a))
    alone: list[int] = []
    tried = cuts_module.decode_alone

    def counted(video: Any, order: Any, jobs: Any, *rest: Any) -> Any:
        alone.extend(job.cut for job in jobs)
        return tried(video, order, jobs, *rest)

    monkeypatch.setattr(cuts_module, "decode_alone", counted)
    cuts = windows(frame_times(path), 0.2, 0.4)
    taken = list(decode_cuts(survey(path), cuts, REQUESTS))
    clean = {one.cut for one in taken
             if isinstance(one.clip, DecodedClip) and one.clip.degraded is None}  # fmt: skip
    assert clean == set(range(30))  # up to 6 s
    assert len(opened) <= 5
    assert len(set(alone)) <= 4  # the windows around the damage, and not all that follow it
    monkeypatch.undo()
    assert_equal_to_each_alone(path, cuts)


def test_cuts_behind_a_damaged_frame_that_nothing_refers_to_come_from_another_pass(
    media: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = media.folder / "one key b.mp4", media.folder / "one key b damaged.mp4"
    media.encode(source, 200, gop=100_000, bframes=2)
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        idle = [p for p in packets[90:] if not data[p.pos + 4] & 0x60]  # nal_ref_idc is 0
        damaged = idle[0].pts * idle[0].time_base
        at, size = idle[0].pos, idle[0].size
    data[at + 8 : at + size] = bytes(size - 8)
    path.write_bytes(data)
    passes: list[list[int]] = []
    together, alone = cuts_module.decode_together, cuts_module.decode_alone
    full: list[int] = []

    def counted(video: Any, order: Any, jobs: Any, *rest: Any) -> Any:
        passes.append([job.cut for job in jobs])
        return together(video, order, jobs, *rest)

    def tried(video: Any, order: Any, jobs: Any, *rest: Any) -> Any:
        full.extend(job.cut for job in jobs)
        return alone(video, order, jobs, *rest)

    monkeypatch.setattr(cuts_module, "decode_together", counted)
    monkeypatch.setattr(cuts_module, "decode_alone", tried)
    cuts = windows(frame_times(path), 0.2, 0.4)
    every = [(10, "uniform")]  # all frames of a window
    taken = assert_equal_to_each_alone(path, cuts, requests=every)
    clean = {one.cut for one in taken if getattr(one.clip, "degraded", "error") is None}
    holding = {k for k, cut in enumerate(cuts) if cut.start <= damaged < cut.end}
    assert holding
    assert holding.isdisjoint(clean)
    assert len(clean) > len(cuts) - 8
    assert len(passes) == 2
    assert max(clean) in passes[1]  # behind the damage, without those that hold it
    assert holding <= set(full)
    assert len(set(full)) < 6


def test_pictures_of_several_sizes_are_brought_to_one_as_ever(media: Any) -> None:
    path = changing_size(media)
    video = survey(path)
    assert video.order is not None
    cuts = windows(video.times, 0.2, 0.4)
    taken = assert_equal_to_each_alone(path, cuts)
    degraded = {one.cut for one in taken if getattr(one.clip, "degraded", None)}
    assert degraded
    assert len(degraded) < len(cuts) / 2
    taken = assert_equal_to_each_alone(media.changing_size(), [Cut(None, None)])  # in full
    assert all("change size" in str(one.clip.degraded) for one in taken)
    for one in decode_cuts(video, cuts, looks()):
        if isinstance(one.clip, DecodedClip):
            cut = cuts[one.cut]
            (whole,) = decode_samples(path, [REQUESTS[one.request]], start=cut.start, end=cut.end)
            expected = resize_crop(whole.frames, 24, ("torch", "pil")[one.request]).numpy()
            np.testing.assert_array_equal(one.clip.frames, expected)
            assert one.clip.degraded == whole.degraded


def changing_size(media: Any) -> Path:
    """A transport stream that goes from 96x64 to 64x48 after a second and a half."""
    path = media.folder / "change.ts"
    if path.exists():
        return path
    with av.open(str(path), "w") as target:
        stream, at = None, 0
        for size, count in (((96, 64), 36), ((64, 48), 36)):
            part = media.folder / f"change {size[0]}.h264"
            media.encode(part, count, size=size, bframes=0, format="h264")
            with av.open(str(part)) as source:
                if stream is None:
                    stream = target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.pts = packet.dts = at
                        packet.time_base, packet.stream, at = Fraction(1, 25), stream, at + 1
                        target.mux(packet)
    return path


def looks() -> list[Look]:
    """Small pictures, by both ways of resizing."""

    def look(resize: str) -> Any:
        return lambda picture: resize_crop(picture[None], 24, resize).numpy()[0]

    return [
        Look(FrameChoice(*request), look(resize), 3 * 24 * 24)
        for request, resize in zip(REQUESTS, ("torch", "pil"), strict=True)
    ]


@pytest.mark.parametrize("name", ["vfr.mp4", "odd size.mp4", "rotated 90.mp4", "xvid b.avi"])
def test_what_is_kept_of_each_picture_is_what_is_made_of_a_clip_of_them(
    media: Any, name: str
) -> None:
    path = media(name)
    video = survey(path)
    cuts = windows(video.times, 0.2, 0.5)
    good = 0
    for one in decode_cuts(video, cuts, looks()):
        if isinstance(one.clip, DecodedClip):
            good += 1
            cut = cuts[one.cut]
            (whole,) = decode_samples(path, [REQUESTS[one.request]], start=cut.start, end=cut.end)
            expected = resize_crop(whole.frames, 24, ("torch", "pil")[one.request]).numpy()
            np.testing.assert_array_equal(one.clip.frames, expected)
            np.testing.assert_array_equal(one.clip.times, whole.times)
    assert good > 4


def test_cuts_are_found_in_times_that_go_back() -> None:
    path, times = Path("a.mp4"), np.array([0.0, 0.4, 0.2, 0.6, 0.6, 1.0])
    for start in (None, -1.0, 0.0, 0.2, 0.3, 0.6, 1.0):
        for end in (None, 0.2, 0.4, 0.6, 1.0, 2.0):
            low, high = -np.inf if start is None else start, np.inf if end is None else end
            expected = np.flatnonzero((times >= low) & (times < high)).tolist()
            cut = Cut(start, end)
            if expected:
                assert cut.inside(times, path).tolist() == expected
                assert Moments(times, path).inside(cut).tolist() == expected
            else:
                with pytest.raises(VideoError, match=r"from 0\.000 to 1\.000 s"):
                    cut.inside(times, path)
    keep = Cut(0.0, 1.0, keep=((0.3, 0.7), (0.9, 2.0)))
    assert keep.inside(times, path).tolist() == [1, 3, 4]


def test_whoever_watches_can_end_it(media: Any) -> None:
    class Enough(Exception):
        pass

    calls = 0

    def watch() -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise Enough

    for name in ("gop12 b2.mp4", "xvid b.avi"):
        calls, video = 0, survey(media(name))
        with pytest.raises(Enough):
            list(decode_cuts(video, windows(video.times, 0.5, 0.5), REQUESTS, watch))
