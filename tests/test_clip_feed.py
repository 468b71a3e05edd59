"""Frames for end-to-end training: in order, drawn by number, replaced, cached, put away."""

from __future__ import annotations

import itertools
import os
import runpy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from msq.errors import UsageError, VideoError
from msq.extract import clip_feed, clip_order, decode_pool, frame_cache
from msq.extract.clip_feed import ClipFeed, Shown
from msq.extract.datasets.dataset import Clip
from msq.extract.decode_pool import DecodeTask, Picture, decode
from msq.extract.frame_arena import FrameArena
from msq.extract.frame_cache import FrameCache
from msq.extract.views import CLEAN, View, seed_of_draw

fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))
PICTURES = (Picture(4, "uniform", 16, "torch"), Picture(2, "official", 8, "pil"))
BYTES = sum(picture.bytes for picture in PICTURES)
ORDER = [(0, [3, 1, 2]), (1, [0]), (2, [5, 4, 3, 3]), (3, [1, 2])]
GOOD, BAD = range(6), range(6, 9)
TRAIN = [(n, [(2 * n) % 9, 6 + n % 3, (n + 5) % 9]) for n in range(10)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, media: Any) -> tuple[Clip, ...]:
    """Six clips that can be decoded, then a missing, a corrupt and a truncated one."""
    folder = tmp_path_factory.mktemp("videos")
    good = fakes.make_dataset(folder, 6).clips
    (folder / "corrupt.mp4").write_bytes(np.random.default_rng(1).bytes(5000))
    (folder / "cut.mp4").write_bytes(media("truncated.mp4").read_bytes())
    bad = [
        Clip(name, folder / f"{name}.mp4", None, None, (), "train")
        for name in ("missing", "corrupt", "cut")
    ]
    return (*good, *bad)


def feed(clips: Any, **options: Any) -> ClipFeed:
    return ClipFeed(clips, PICTURES, **({"workers": 0, "prefetch_bytes": 5 * BYTES} | options))


def kept(shown: Shown) -> Shown:
    return Shown(shown.rows, [array.copy() for array in shown.frames], shown.failed)


def parts(source: ClipFeed, order: Any = ORDER) -> list[Shown]:
    """All parts of an order, copied, after which the feed is closed."""
    with source:
        return [kept(shown) for shown in source.parts(order)]


def plain(clip: Clip, view: View = CLEAN) -> list[np.ndarray]:
    """The frames of one clip decoded by itself."""
    pictures = tuple(replace(picture, view=view) for picture in PICTURES)
    task = DecodeTask(0, clip.path, clip.start, clip.end, pictures, clip.fps, clip.id, clip.keep)
    return decode(task).frames


def same(a: list[Shown], b: list[Shown]) -> bool:
    return [(s.rows, s.failed) for s in a] == [(s.rows, s.failed) for s in b] and all(
        np.array_equal(x, y)
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one.frames, other.frames, strict=True)
    )


def processes() -> set[int]:
    """Processes that this one has started, and theirs."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state[0] != "Z":
            parents[int(folder.name)] = int(state[1])
    found = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def arenas() -> list[str]:
    """Shared memory that this process holds: mapped, or open."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    files = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            files.append(os.readlink(f"/proc/self/fd/{entry}"))
        except OSError:
            continue
    return [line for line in [*lines, *files] if "msq-frames" in line]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [None, 0.25])
def test_parts_come_in_order_and_are_what_plain_decoding_gives(
    clips: Any, workers: int, start: float | None
) -> None:
    clips = [replace(clip, start=start) for clip in clips]
    source = feed(clips, workers=workers)
    before: tuple[Shown, Shown] | None = None
    seen = []
    for (_, rows), shown in zip(ORDER, source.parts(ORDER), strict=True):
        assert shown.rows == rows
        assert shown.failed == []
        for index, row in enumerate(rows):
            for array, expected in zip(shown.frames, plain(clips[row]), strict=True):
                assert array.flags.c_contiguous
                assert array.dtype == np.uint8
                assert np.array_equal(array[index], expected), (row, index)
        if before is not None:  # the part before is of use until the next one is asked for
            assert same([before[0]], [before[1]])
        before = shown, kept(shown)
        seen.append(shown.rows)
    assert seen == [rows for _, rows in ORDER]
    assert source.summary()["clips"] == source.summary()["decoded"] == 10
    assert source.replaced == 0
    assert source.busy > 0


@pytest.mark.parametrize(
    ("augment", "kind"), [("consistent", "augmented"), ("official", "official")]
)
def test_what_is_drawn_depends_on_seed_number_and_clip_alone(
    clips: Any, augment: Any, kind: Any
) -> None:
    order = [(4, [0, 1]), (5, [1, 0, 2])]
    first = parts(feed(clips, augment=augment, seed=3), order)
    assert same(first, parts(feed(clips, augment=augment, seed=3, workers=2), order))
    again = parts(feed(clips, augment=augment, seed=3), [(5, [2, 2, 1])])[0]
    assert np.array_equal(again.frames[0][2], first[1].frames[0][0])  # another place and part
    for number, shown in zip((4, 5), first, strict=True):
        view = View(kind, seed_of_draw(3, number))
        for index, row in enumerate(shown.rows):
            for array, expected in zip(shown.frames, plain(clips[row], view), strict=True):
                assert np.array_equal(array[index], expected)
    assert not np.array_equal(first[0].frames[0][1], first[1].frames[0][0])  # clip 1, 4 and 5
    other = parts(feed(clips, augment=augment, seed=4), order)
    assert not np.array_equal(other[0].frames[0], first[0].frames[0])


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded in this process, from now on."""
    names: list[str] = []
    original = decode_pool.decode

    def noted(task: DecodeTask) -> Any:
        names.append(task.path.name)
        return original(task)

    monkeypatch.setattr(decode_pool, "decode", noted)
    return names


@pytest.mark.parametrize("augment", ["none", "consistent"])
def test_clips_that_cannot_be_decoded_are_replaced_the_same_way_always(
    clips: Any, augment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"augment": augment, "seed": 2, "spare": range(9)}
    names = counted(monkeypatch)
    source = feed(clips, **options)
    first = parts(source, TRAIN)
    asked = [row for _, rows in TRAIN for row in rows]
    shown = [row for part in first for row in part.rows]
    assert set(shown) <= set(GOOD)
    assert all(a == s for a, s in zip(asked, shown, strict=True) if a in GOOD)
    assert source.replaced == sum(row in BAD for row in asked) > 10
    assert len({s for a, s in zip(asked, shown, strict=True) if a in BAD}) > 3
    assert set(source.failures) == {"missing", "corrupt", "cut"}
    assert all(reason and os.sep not in reason for reason in source.failures.values())
    bad = [name for name in names if name in ("missing.mp4", "corrupt.mp4", "cut.mp4")]
    assert len(bad) == len(set(bad)) == 3  # known afterwards
    for part, (number, _) in zip(first, TRAIN, strict=True):
        view = CLEAN if augment == "none" else View("augmented", seed_of_draw(2, number))
        for index, row in enumerate(part.rows):
            assert np.array_equal(part.frames[0][index], plain(clips[row], view)[0])
    names.clear()
    assert same(parts(source, TRAIN), first)
    assert len(names) == len(asked)  # none of the bad ones again
    assert same(parts(feed(clips, workers=2, **options), TRAIN), first)
    # A run that was resumed at its seventh draw knows nothing of what came before.
    assert same(parts(feed(clips, **options), TRAIN[7:]), first[7:])
    assert same(parts(feed(clips, **options | {"workers": 1}), TRAIN[7:]), first[7:])
    other = [
        row for part in parts(feed(clips, **options | {"seed": 3}), TRAIN) for row in part.rows
    ]
    assert other != shown


class Deadly:
    """Kills whichever process unpickles it."""

    name = "deadly.mp4"

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return os._exit, (3,)


def test_a_clip_that_kills_its_decoder_is_replaced(clips: Any) -> None:
    deadly = [replace(clips[0], id="deadly", path=Deadly()), *clips[1:]]
    order = [(n, [1, 2, 0, 3]) for n in range(3)]
    source = feed(deadly, workers=2, spare=[0, 4, 5])
    found = parts(source, order)
    assert [shown.rows[:2] + shown.rows[3:] for shown in found] == [[1, 2, 3]] * 3
    assert all(shown.rows[2] in (4, 5) for shown in found)
    assert "died" in source.failures["deadly"]
    for shown in found:
        for index, row in enumerate(shown.rows):
            assert np.array_equal(shown.frames[1][index], plain(clips[row])[1])
    # As if the clip were only missing.
    missing = [replace(clips[0], id="deadly", path=Path("none.mp4")), *clips[1:]]
    assert same(parts(feed(missing, spare=[0, 4, 5]), order), found)


@pytest.mark.parametrize("workers", [0, 1])
def test_where_nothing_can_be_decoded_the_error_names_files(clips: Any, workers: int) -> None:
    source = feed(clips, workers=workers, spare=list(BAD))
    stream = source.parts([(0, [1]), (1, [2, 7])])
    assert next(stream).rows == [1]
    with pytest.raises(VideoError, match=r"none of 3 clips.*corrupt\.mp4.*check that"):
        next(stream)
    assert source._stream is None


@pytest.mark.parametrize("workers", [0, 2])
def test_without_spare_clips_the_places_that_failed_are_told(clips: Any, workers: int) -> None:
    source = feed(clips, workers=workers)
    order = [(0, [0, 7, 1]), (1, [8]), (2, [7, 2])]
    found = parts(source, order)
    assert [(s.rows, s.failed) for s in found] == [([0, 7, 1], [1]), ([8], [0]), ([7, 2], [0])]
    assert not any(array[1].any() for array in found[0].frames)
    assert np.array_equal(found[2].frames[0][1], plain(clips[2])[0])
    assert (set(source.failures), source.replaced) == ({"corrupt", "cut"}, 0)
    assert same(parts(source, order), found)


def test_damaged_videos_that_still_show_frames_are_counted(clips: Any, media: Any) -> None:
    damaged = replace(clips[0], id="damaged", path=media.damaged("truncated faststart.mp4"))
    source = feed([damaged, *clips[1:]])
    assert parts(source, [(0, [0, 1])])[0].failed == []
    assert set(source.degraded) == {"damaged"}
    assert source.summary()["degraded"] == 1


def test_what_is_decoded_ahead_is_bounded(clips: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    start = FrameArena.__init__

    def noted(self: FrameArena, size: int) -> None:
        sizes.append(size)
        start(self, size)

    monkeypatch.setattr(FrameArena, "__init__", noted)
    taken: list[int] = []

    def order() -> Iterator[tuple[int, list[int]]]:
        for number in itertools.count():
            taken.append(number)
            yield number, [number % 6, (number + 1) % 6]

    source = feed(clips, workers=1, prefetch_bytes=6 * BYTES)
    stream = source.parts(order())
    arrays = set()
    for delivered in range(1, 12):
        shown = next(stream)
        arrays |= {array.__array_interface__["data"][0] for array in shown.frames}
        assert len(taken) - delivered <= 4  # three parts of two clips, and the one begun
    source.close()
    assert len(arrays) == 2 * len(PICTURES)  # two parts, used again and again
    assert sizes == [2 * 6 * BYTES + 3 * BYTES]


def test_cached_clips_are_not_planned_ahead_without_end(clips: Any) -> None:
    cache = FrameCache(PICTURES, 6, "memory", memory=10**9)
    parts(feed(clips, cache=cache), [(0, range(5))])
    taken: list[int] = []

    def order(first: list[int]) -> Iterator[tuple[int, list[int]]]:
        for number in itertools.count():
            taken.append(number)
            yield number, [0, 1] if number else first

    source = feed(clips, cache=cache, workers=2)
    stream = source.parts(order([0, 5]))
    assert next(stream).rows == [0, 5]
    assert 30 < len(taken) <= 1 + 128 // 2
    assert [next(stream).rows for _ in range(300)] == [[0, 1]] * 300
    assert source.summary()["decoded"] == 1
    taken.clear()
    stream = source.parts(order([2, 5]))  # 5 is there by now
    assert next(stream).rows == [2, 5]
    assert (taken, source._stream) == ([0], None)  # no worker process is needed
    source.close()


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_cached_frames_are_the_decoded_ones(
    clips: Any, where: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = parts(feed(clips, spare=range(9)), TRAIN)
    cache = FrameCache(PICTURES, 9, where, memory=10**9, folder=tmp_path)
    assert (cache.where, cache.bytes) == (where, 9 * BYTES)
    source = feed(clips, cache=cache, spare=range(9))
    assert same(parts(source, TRAIN), expected)
    assert len(cache) == len(GOOD)
    hits = source.summary()["cache_hits"]
    assert list(tmp_path.iterdir()) == []  # nothing to leave behind, whatever happens
    names = counted(monkeypatch)
    assert same(parts(source, TRAIN), expected)
    assert names == []
    assert source.summary()["cache_hits"] - hits == 30
    fresh = feed(clips, cache=cache, spare=range(9))  # as after a resume: bad ones are not known
    assert same(parts(fresh, TRAIN), expected)
    assert sorted(names) == ["corrupt.mp4", "cut.mp4", "missing.mp4"]
    assert same(parts(feed(clips, cache=cache, workers=1, spare=range(9)), TRAIN), expected)
    cache.close()
    assert (cache.where, len(cache), cache.hits >= 60) == ("off", 0, True)
    assert same(parts(source, TRAIN), expected)


def test_a_cache_that_is_full_or_fails_costs_no_frames(
    clips: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = [(0, range(6)), (1, range(6))]
    expected = parts(feed(clips), order)
    small = FrameCache(PICTURES, 2, "memory", memory=10**9)
    assert same(parts(feed(clips, cache=small), order), expected)
    assert (len(small), small.hits) == (2, 2)
    full = FrameCache(PICTURES, 6, "disk", memory=0, folder=tmp_path)
    put = FrameCache._put

    def no_room(self: Any, place: int, data: Any) -> None:
        if place >= 3 * BYTES:
            raise OSError(28, "No space left on device")
        put(self, place, data)

    monkeypatch.setattr(FrameCache, "_put", no_room)
    assert same(parts(feed(clips, cache=full), order), expected)
    assert len(full) == 3
    assert "no more than 3 clips fit: No space left" in full.line
    os.ftruncate(full._file.fileno(), BYTES + 1)  # type: ignore[union-attr]
    source = feed(clips, cache=full)
    assert same(parts(source, order), expected)
    assert full.where == "off"
    assert "given up" in source.summary()["cache"]


def test_where_clips_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def where(choice: Any, memory: int, free: int, kind: str = "ext4") -> str:
        mounts = tmp_path / "mounts"
        mounts.write_text(f"a / ext4 rw 0 0\nb {tmp_path} {kind} rw 0 0\n")
        monkeypatch.setattr(frame_cache, "_MOUNTS", mounts)
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
        with FrameCache(PICTURES, 10, choice, memory=memory, folder=tmp_path) as cache:
            assert cache.line
            return cache.where

    size = 10 * BYTES
    assert where("auto", 2 * size, 0) == "memory"
    assert where("auto", 2 * size - 2, 2 * size) == "disk"
    assert where("auto", size, size) == "off"  # not the whole disk
    assert where("auto", size, 2 * size, "tmpfs") == "off"
    assert where("disk", 0, 2 * size, "tmpfs") == "disk"
    assert where("memory", size, 0) == "memory"
    assert where("off", 10 * size, 10 * size) == "off"
    with pytest.raises(UsageError, match="do not fit in memory"):
        where("memory", size - 1, 0)
    with pytest.raises(UsageError, match="do not fit on the disk"):
        where("disk", size, size)
    with pytest.raises(UsageError, match="augmented"):
        FrameCache([replace(PICTURES[0], view=View("official", 1))], 1, memory=10**9)


def test_augmented_clips_are_not_cached(clips: Any) -> None:
    cache = FrameCache(PICTURES, 6, "memory", memory=10**9)
    source = feed(clips, cache=cache, augment="consistent")
    parts(source)
    assert (len(cache), cache.hits) == (0, 0)
    assert "not kept: augmented" in source.summary()["cache"]
    with pytest.raises(UsageError, match="other pictures"):
        ClipFeed(clips, PICTURES[:1], workers=0, prefetch_bytes=1, cache=cache)
    with pytest.raises(UsageError, match="only clean views"):
        ClipFeed(
            clips,
            [replace(PICTURES[0], view=View("test"))],
            workers=0,
            prefetch_bytes=1,
            augment="official",
        )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
@pytest.mark.parametrize("how", ["close", "generator", "interrupt", "end", "other"])
def test_nothing_is_left_when_it_ends(clips: Any, how: str) -> None:
    parts(feed(clips, workers=1), [(0, [0])])  # the fork server stays
    before = processes()

    def order() -> Iterator[tuple[int, list[int]]]:
        for number in range(40):
            if how == "interrupt" and number == 20:
                raise KeyboardInterrupt
            yield number, [number % 6, 8]

    source = feed(clips, workers=2, spare=list(GOOD))
    stream = source.parts(order())
    next(stream)
    assert len(processes() - before) == 2
    assert arenas()
    if how == "close":
        source.close()
        with pytest.raises(ValueError, match="closed"):
            next(stream)
    elif how == "generator":
        stream.close()
    elif how == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    elif how == "end":
        assert len(list(stream)) == 39
    else:  # another order ends this one
        other = source.parts([(0, [1])])
        assert next(other).rows == [1]
        with pytest.raises(ValueError, match="another order"):
            next(stream)
        assert list(other) == []
    assert processes() <= before
    assert arenas() == []


@pytest.mark.parametrize(("own", "expected"), [(1.0, "input"), (60.0, "encoder")])
def test_it_says_whether_it_keeps_up(
    clips: Any, own: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(clip_feed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(clip_feed, "cores", lambda: 4)
    original = decode_pool.decode

    def slow(task: DecodeTask) -> Any:
        now[0] += 3.0
        result = original(task)
        result.seconds = 3.0
        return result

    monkeypatch.setattr(decode_pool, "decode", slow)
    source = feed(clips)
    assert source.summary()["waited_share"] == 0.0
    for _ in source.parts([(0, [0, 1]), (1, [2]), (2, [3])]):
        now[0] += own
    found = source.summary()
    assert found["bottleneck"] == expected
    assert (source.waited, source.busy) == (12.0, 12.0)
    assert found["waited_share"] == pytest.approx(3 / (3 + own))  # the first part apart
    assert found["clips_per_second"] == pytest.approx(1 / (3 + own))
    assert found["decode_clips_per_second"] == pytest.approx(1 / 3)
    assert f"bottleneck: {expected}" in found["line"]
    assert ("up to 4 here" in found["line"]) == (expected == "input")
    assert ("clips.cache=memory" in found["line"]) == (expected == "input")


def test_replacements_are_drawn_without_repetition_and_within_bounds(clips: Any) -> None:
    order = clip_order.ClipOrder(
        clips, PICTURES, [], augment="none", seed=0, spare=range(100), failures={}, cache=None,
        ahead=1,
    )  # fmt: skip
    drawn = list(order._candidates(3, 1, 7))
    assert drawn[0] == 7
    assert len(drawn[1:]) == len(set(drawn[1:])) == clip_order.TRIES
    assert drawn == list(order._candidates(3, 1, 7))
    assert drawn[1:] == list(order._candidates(3, 1, 8))[1:]
    assert len({tuple(order._candidates(n, p, 7)) for n in range(5) for p in range(5)}) == 25
