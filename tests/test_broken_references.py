"""A frame predicted from a destroyed one is called degraded, however it is read."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import av
import numpy as np
import pytest
from av.packet import PacketSideData

from msq.errors import VideoError
from msq.extract.cuts import decode_cuts
from msq.extract.decode_task import DecodeTask, Picture, decode
from msq.extract.h264 import References, _units
from msq.extract.hidden import revealed
from msq.extract.packets import open_stream
from msq.extract.plan import Run, places_by_time, planned_frames
from msq.extract.sampling import sample_indices
from msq.extract.timeline import Cut
from msq.extract.video import DecodedClip, decode_all, decode_clip, decode_samples, frame_times
from msq.extract.video_survey import survey
from msq.extract.views import View
from msq.head.predict_windows import Windows, scored_windows

fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))
GOP = 24

Destroy = Callable[[bytearray, int, int], None]


def no_picture(data: bytearray, at: int, size: int) -> None:
    """A NAL unit of an unknown kind that nothing refers to: libav skips it without a word."""
    data[at + 4] = 0x1F


def no_kind(data: bytearray, at: int, size: int) -> None:
    """As it was, but for its kind: libav is quiet about it while it may skip anything."""
    data[at + 4] |= 0x1F


def no_length(data: bytearray, at: int, size: int) -> None:
    data[at] = 0xFF


def no_content(data: bytearray, at: int, size: int) -> None:
    """The second half is zeros."""
    data[at + size // 2 : at + size] = bytes(size - size // 2)


def no_reference(data: bytearray, at: int, size: int) -> None:
    """Two bits say that nothing refers to it."""
    assert data[at + 4] & 0x60
    data[at + 4] &= 0x9F


DESTROYED: list[Destroy] = [no_picture, no_kind, no_length, no_content, no_reference]


class File:
    """48 frames of two groups, P, B and B that others refer to; and its packets."""

    def __init__(self, path: Path, media: Any) -> None:
        self.path = path
        if not path.exists():
            media.encode(path, 48, gop=GOP, bframes=3)
        self.data = path.read_bytes()
        with av.open(str(path)) as container:
            packets = [p for p in container.demux(video=0) if p.size]
            self.places = [(p.pos, p.size) for p in packets]
            stamps = [p.pts for p in packets]
            self.times = [float(p.pts * p.time_base) for p in packets]
        assert [i for i, p in enumerate(packets) if p.is_keyframe] == [0, GOP]
        self.idle = {  # the first packet begins with words of the encoder
            i for i, (at, _) in enumerate(self.places) if i and not self.data[at + 4] & 0x60
        }
        self.frames = [sorted(stamps).index(pts) for pts in stamps]

    def reference(self, kind: str) -> int:
        """Place of a packet amid the first group that others refer to."""
        found = [i for i in range(4, GOP - 8) if i not in self.idle]
        b = [i for i in found if self.times[i] < max(self.times[:i])]
        return b[0] if kind == "b" else next(i for i in found if i not in b)

    def without(self, destroy: Destroy, place: int, target: Path) -> Path:
        data = bytearray(self.data)
        destroy(data, *self.places[place])
        assert data != self.data
        target.write_bytes(data)
        return target

    def cut(self, place: int) -> Cut:
        """The frame of a packet alone."""
        return Cut(self.times[place] - 0.001, self.times[place] + 0.001)


@pytest.fixture(scope="module")
def file(media: Any) -> File:
    return File(media.folder / "references.mp4", media)


def alone(path: Path, cut: Cut) -> DecodedClip | str:
    try:
        return decode_clip(path, 1, start=cut.start, end=cut.end)
    except VideoError as error:
        return str(error)


def predicted(file: File, place: int) -> set[int]:
    """Packets whose decoding begins before a destroyed one and ends after it."""
    return set(range(place + 1, GOP))


@pytest.mark.parametrize("kind", ["p", "b"])
@pytest.mark.parametrize("destroy", DESTROYED, ids=lambda d: d.__name__)
def test_every_frame_behind_a_destroyed_reference_is_degraded_and_no_other(
    file: File, tmp_path: Path, kind: str, destroy: Destroy
) -> None:
    place = file.reference(kind)
    path = file.without(destroy, place, tmp_path / "x.mp4")
    everything, times = decode_all(path)
    whole, _ = decode_all(file.path)
    cuts = [file.cut(i) for i in range(len(file.times))]
    together: dict[int, Any] = {
        one.cut: one.clip for one in decode_cuts(survey(path), cuts, [(1, "uniform")])
    }
    for i, cut in enumerate(cuts):
        clip = alone(path, cut)
        if isinstance(clip, str):
            assert i == place, clip  # a full decode shows no such frame
            assert str(together[i]) == clip
            continue
        if i != place:
            assert (clip.degraded is not None) == (i in predicted(file, place)), i
        if clip.degraded is None:
            np.testing.assert_array_equal(clip.frames[0], whole[file.frames[i]])
        else:
            at = int(np.abs(times - file.times[i]).argmin())
            np.testing.assert_array_equal(clip.frames[0], everything[at])
        assert together[i].degraded == clip.degraded
        np.testing.assert_array_equal(together[i].frames, clip.frames)


@pytest.mark.parametrize("kind", ["p", "b"])
@pytest.mark.parametrize("destroy", DESTROYED, ids=lambda d: d.__name__)
def test_windows_that_overlap_and_every_say_it_too(
    file: File, tmp_path: Path, kind: str, destroy: Destroy
) -> None:
    place = file.reference(kind)
    path = file.without(destroy, place, tmp_path / "x.mp4")
    requests = [(3, "uniform"), (2, "official")]
    cuts = [Cut(k * 0.16, k * 0.16 + 0.4) for k in range(12)]
    taken = list(decode_cuts(survey(path), cuts, requests))
    said = set()
    for cut, request, clip in taken:
        at = cuts[cut]
        (single,) = decode_samples(path, [requests[request]], start=at.start, end=at.end)
        assert isinstance(clip, DecodedClip)
        np.testing.assert_array_equal(clip.frames, single.frames)
        assert clip.degraded == single.degraded
        said |= {cut} if clip.degraded else set()
    ends = max(file.times[i] for i in range(GOP))
    assert {k for k, cut in enumerate(cuts) if file.times[place] < cut.start <= ends - 0.2} <= said
    assert not {k for k, cut in enumerate(cuts) if cut.start > ends} & said
    video = survey(path)
    parts = list(scored_windows(video, Windows(0.16, 0.4), [fakes.FakeEncoder()], _no_scores))
    assert [part["start"] for part in parts if "degraded" in part]
    for part in parts:
        (single,) = decode_samples(
            path, [(4, "uniform")], start=part["start"], end=part["start"] + 0.4
        )
        assert part.get("degraded") == single.degraded


def _no_scores(features: Any) -> list[list[dict[str, Any]]]:
    return [[] for _ in features]


@pytest.mark.parametrize("destroy", DESTROYED, ids=lambda d: d.__name__)
def test_views_of_a_clip_say_it_too(file: File, tmp_path: Path, destroy: Destroy) -> None:
    place = file.reference("p")
    path = file.without(destroy, place, tmp_path / "x.mp4")
    late = file.times[place] + 0.12
    views = [View(), View("augmented", 1), View("official", 1)]
    pictures = tuple(Picture(2, "uniform", 32, "torch", view=view) for view in views)
    behind = decode(DecodeTask(0, path, late, late + 0.1, pictures, id="c"))
    assert behind.reason is None
    assert all(behind.degraded)
    later = decode(DecodeTask(0, path, file.times[GOP] + 0.001, None, pictures, id="c"))
    assert later.degraded == [None, None, None]


def test_a_destroyed_frame_that_nothing_refers_to_is_its_own_affair(
    file: File, tmp_path: Path
) -> None:
    place = next(i for i in sorted(file.idle) if i > 6)
    path = file.without(no_content, place, tmp_path / "x.mp4")
    for i in range(GOP):
        clip = decode_clip(path, 1, start=file.cut(i).start, end=file.cut(i).end)
        assert (clip.degraded is not None) == (i == place)


def test_what_nothing_refers_to_is_still_not_decoded(file: File) -> None:
    with open_stream(file.path) as (container, stream):
        packets = [p for p in container.demux(stream) if p.size]
        run, places = Run(0, GOP - 1), places_by_time(packets)
        part = packets[:GOP]
        came = {at for at, _ in planned_frames(stream.codec_context, part, run, [], places)}
    assert file.idle
    assert came == set(range(GOP)) - file.idle


# --- frames that are decoded and not shown --------------------------------------------------------


@pytest.mark.parametrize("destroy", [no_kind, no_content], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", ["edit list.mp4", "edit list tail.mp4"])
def test_a_destroyed_frame_that_an_edit_list_hides(
    media: Any, tmp_path: Path, name: str, destroy: Destroy
) -> None:
    path = media(name)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    shown = [i for i, p in enumerate(packets) if not p.is_discard]
    hidden = [i for i, p in enumerate(packets)
              if p.is_discard and not p.is_keyframe and data[p.pos + 4] & 0x60]  # fmt: skip
    inside = [i for i in hidden if i < shown[-1]]
    assert inside
    assert decode_clip(path, 4).degraded is None
    destroy(data, packets[inside[0]].pos, packets[inside[0]].size)
    broken = tmp_path / "x.mp4"
    broken.write_bytes(data)
    clip = decode_clip(broken, 60)
    assert clip.degraded is not None
    everything, _ = decode_all(broken)
    np.testing.assert_array_equal(clip.frames, everything[sample_indices(len(everything), 60)])
    for frames in (2, 60):
        ((_, _, again),) = decode_cuts(survey(broken), [Cut(None, None)], [(frames, "uniform")])
        single = decode_clip(broken, frames)
        assert again.degraded == single.degraded
        np.testing.assert_array_equal(again.frames, single.frames)


def test_packets_that_give_nothing_and_say_nothing_are_counted(media: Any, tmp_path: Path) -> None:
    source = media("hevc.mp4")
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    data[packets[7].pos + 4] = 62 << 1  # a unit of no known kind: the decoder passes it over
    path = tmp_path / "x.mp4"
    path.write_bytes(data)
    everything, _ = decode_all(path)
    assert len(everything) < len(packets)
    missing = len(packets) - len(everything)
    clip = decode_clip(path, len(packets))
    assert clip.degraded == f"packets that gave neither a frame nor an error: {missing}"
    np.testing.assert_array_equal(
        clip.frames, everything[sample_indices(len(everything), len(packets))]
    )
    ((_, _, again),) = decode_cuts(survey(path), [Cut(None, None)], [(len(packets), "uniform")])
    assert again.degraded == clip.degraded


def test_a_stream_that_begins_amid_a_refresh_is_clean(media: Any, tmp_path: Path) -> None:
    """Its first packets show nothing, in a full decode, too; nothing is destroyed."""
    source, path = tmp_path / "whole.mp4", tmp_path / "cut.mkv"
    media.encode(source, 60, gop=10, bframes=0, extra=":intra-refresh=1")
    with av.open(str(source)) as whole, av.open(str(path), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for i, packet in enumerate(whole.demux(video=0)):
            if packet.size and i >= 20:
                packet.stream = stream
                cut.mux(packet)
    everything, _ = decode_all(path)
    assert len(everything) < len(frame_times(path)) == 40
    clip = decode_clip(path, 50)
    assert clip.degraded is None
    np.testing.assert_array_equal(clip.frames, everything[sample_indices(len(everything), 50)])


# --- the outer form of a packet -------------------------------------------------------------------


def units(*contents: bytes, size: int = 4) -> bytes:
    return b"".join(len(c).to_bytes(size, "big") + c for c in contents)


RECORD = b"\x01\x64\x00\x0a\xff\xe0\x00"  # lengths of four bytes, no parameter sets


@pytest.mark.parametrize(
    ("contents", "idle"),
    [
        ([b"\x01abc"], True),
        ([b"\x06sei", b"\x67sps", b"\x01abc", b"\x01def"], True),
        ([b"\x41abc"], False),  # others refer to it
        ([b"\x01abc", b"\x41def"], False),
        ([b"\x81abc"], False),  # a bit that is never set
        ([b"\x05abc"], False),  # an IDR that nothing refers to: there is none
        ([b"\x00abc"], False),
        ([b"\x1fabc"], False),
        ([b"\x06sei"], False),  # no picture at all
        ([b""], False),
        ([], False),
    ],
)
def test_only_packets_of_a_known_form_are_skipped(contents: list[bytes], idle: bool) -> None:
    packet = units(*contents)
    assert References(RECORD).skips(packet) == idle
    assert References(RECORD[:4] + b"\xfd" + RECORD[5:]).skips(units(*contents, size=2)) == idle
    started = b"".join(b"\0\0\1" + c for c in contents)
    for extradata in (b"\0\0\0\1\x67\x64\x00\x0a", b"", None):
        assert References(extradata).skips(started) == idle
    assert not References(RECORD).skips(packet + b"\0")
    assert not References(RECORD).skips(packet[:-1])


@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".mp4", {}), (".ts", {}), (".mp4", {"extra": ":open-gop=1"}), (".mkv", {"bframes": 0}),
     (".mp4", {"pix_fmt": "yuv444p"}), (".mp4", {"extra": ":cqm=jvt"}),
     (".mp4", {"extra": ":interlaced=1"}), (".mp4", {"gop": 250, "count": 90})],
)  # fmt: skip
def test_references_count_on_in_whole_files_and_a_missing_one_is_found(
    media: Any, tmp_path: Path, suffix: str, options: dict[str, Any]
) -> None:
    path = tmp_path / f"x{suffix}"
    media.encode(path, **{"count": 48, "bframes": 3, **options})
    with av.open(str(path)) as container:
        extradata = container.streams.video[0].codec_context.extradata
        packets = [p for p in container.demux(video=0) if p.size]
        keys = {i for i, p in enumerate(packets) if p.is_keyframe}
        data = [bytes(p) for p in packets]
    whole = References(extradata)
    idle = [whole.skips(packet) for packet in data]
    assert any(idle) == (options.get("bframes") != 0)
    for skipping in (True, False):  # or decoding all of them
        references = References(extradata)
        for packet in data:
            if not (skipping and references.skips(packet)):
                references._skipped = True  # look closely, whatever was skipped
                assert not references.lost(packet)
    for gone in range(1, len(data) - 1):
        references, found = References(extradata), False
        for i, packet in enumerate(data):
            if i == gone:
                references._skipped = True  # as if it had been one that nothing refers to
            elif not references.skips(packet) and references.lost(packet):
                found = True
                assert i == next(k for k in range(gone + 1, len(data)) if not idle[k])
        following = [k for k in range(gone + 1, len(data)) if not idle[k]]
        if idle[gone] or gone in keys or not following or _is_idr(data[following[0]]):
            continue
        assert found, gone


def _is_idr(packet: bytes) -> bool:
    return any(unit and unit[0] & 0x1F == 5 for size in (4, 0) for unit in _units(packet, size))


def test_a_hidden_packet_is_revealed_with_all_that_it_has(media: Any) -> None:
    with av.open(str(media("edit list.mp4"))) as container, av.open(str(media("cfr.mp4"))) as other:
        stream = container.streams.video[0]
        hidden = next(p for p in container.demux(stream) if p.is_discard)
        plain = next(p for p in other.demux(video=0) if p.size)
        assert revealed(stream.codec_context, plain) is plain
        assert revealed(stream.codec_context, None) is None
        sets = cast("Any", PacketSideData)(1, 8)  # new parameter sets
        sets.update(b"avcC 1 2")
        hidden.set_sidedata(sets)
        shown = revealed(stream.codec_context, hidden)
        assert shown is not None
        assert not shown.is_discard
        assert bytes(shown) == bytes(hidden)
        names = ("pts", "dts", "time_base", "is_keyframe", "size")
        assert [getattr(shown, n) for n in names] == [getattr(hidden, n) for n in names]
        (side,) = shown.iter_sidedata()
        assert (side.data_type, bytes(side)) == ("new_extradata", b"avcC 1 2")
