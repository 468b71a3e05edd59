"""Only labelled frames are shown: the decoder, and Charades as the authors' loader has it."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import re
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import msq.extract.video as video_module
from msq.errors import DatasetError, UsageError, VideoError
from msq.extract.datasets.charades import ADAPTER, read_charades
from msq.extract.datasets.charades_frames import FrameRule, labels_at, open_intervals, restrict
from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.decode_pool import DecodeTask, Picture, decode
from msq.extract.sampling import sample_indices
from msq.extract.video import decode_all, decode_clip, decode_samples, frame_times

CLEAN = runpy.run_path(str(Path(__file__).with_name("test_video.py")))["CLEAN"]
_charades = runpy.run_path(str(Path(__file__).with_name("test_charades.py")))
KEEP = ((0.1, 0.4), (0.9, 0.3), (0.56, 0.9), (1.2, 1.28))  # one of them reversed
REQUESTS = [(4, "uniform"), (10, "official"), (1, "uniform")]


def labelled_frames(
    actions: Sequence[tuple[int, float, float]], times: Sequence[float], frames: int
) -> tuple[list[int], set[int]]:
    """The authors' loader, frame by frame: (indices that it shows, target classes)."""
    per_frame = [[c for c, start, end in actions if start < t < end] for t in times]
    left = [i for i, labels in enumerate(per_frame) if labels]
    n = len(left)
    if n <= frames:
        places = np.linspace(0, n - 1, frames, dtype=int)
    else:
        ticks = np.linspace(0, n, frames + 1, dtype=int)
        places = ticks[:-1] + (ticks[1:] - ticks[:-1]) // 2
    shown = [left[p] for p in places]
    return shown, {c for i in shown for c in per_frame[i]}


# --- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLEAN)
def test_kept_frames_are_those_of_a_full_decode(name: str, media: Any) -> None:
    everything, times = decode_all(media(name))
    if np.isnan(times).any():
        with pytest.raises(VideoError, match="without time stamps"):
            decode_samples(media(name), REQUESTS, keep=KEEP)
        return
    np.testing.assert_array_equal(frame_times(media(name)), times)
    for cut in ((None, None), (0.2, 0.8)):
        low, high = (-1e9 if cut[0] is None else cut[0]), (1e9 if cut[1] is None else cut[1])
        kept = [i for i, t in enumerate(times)
                if low <= t < high and any(a < t < b for a, b in KEEP)]  # fmt: skip
        assert len(kept) < len(everything)
        if not kept:  # of files with a frame or five
            with pytest.raises(VideoError, match="found none"):
                decode_samples(media(name), REQUESTS, start=cut[0], end=cut[1], keep=KEEP)
            continue
        clips = decode_samples(media(name), REQUESTS, start=cut[0], end=cut[1], keep=KEEP)
        for clip, (frames, sampling) in zip(clips, REQUESTS, strict=True):
            chosen = np.array(kept)[sample_indices(len(kept), frames, sampling)]
            np.testing.assert_array_equal(clip.frames, everything[chosen])
            np.testing.assert_array_equal(clip.times, times[chosen].astype(np.float32))


def test_the_plan_decodes_kept_frames_alone(media: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[frozenset[int]] = []
    planned = video_module.decode_planned

    def noted(context: Any, packets: Any, wanted: frozenset[int]) -> Any:
        asked.append(wanted)
        return planned(context, packets, wanted)

    monkeypatch.setattr(video_module, "decode_planned", noted)
    clip = decode_clip(media("gop12 b2.mp4"), 16, keep=[(1.0, 1.1)])
    assert [len(wanted) for wanted in asked] == [2]  # 25 frames/s: 1.04 and 1.08, 1.0 is outside
    np.testing.assert_allclose(np.unique(clip.times), [1.04, 1.08], atol=1e-6)


def test_folders_need_a_frame_rate_and_nothing_kept_is_said(tmp_path: Path, media: Any) -> None:
    write_frames(tmp_path, "f", 12)
    clip = decode_clip(tmp_path / "f", 3, fps=4.0, keep=[(0.5, 1.5)])  # frames 3, 4, 5
    np.testing.assert_array_equal(clip.times, np.array([0.75, 1.0, 1.25], dtype=np.float32))
    assert [round(f.mean()) for f in clip.frames] == [30, 40, 50]
    with pytest.raises(VideoError, match="give frame folders their frame rate"):
        decode_clip(tmp_path / "f", 3, keep=[(0.5, 1.5)])
    for path, fps in ((tmp_path / "f", 4.0), (media("gop12 b2.mp4"), None)):
        with pytest.raises(VideoError, match="found none") as error:
            decode_clip(path, 3, fps=fps, keep=[(50.0, 60.0), (2.0, 1.0)])
        assert "of which 2 intervals are kept" in str(error.value)


def test_a_task_keeps_what_its_clip_keeps(media: Any) -> None:
    path, picture = media("gop12 b2.mp4"), Picture(4, "official", 32, "torch")
    result = decode(DecodeTask(0, path, None, None, (picture,), keep=KEEP))
    (expected,) = decode_samples(path, [(4, "official")], keep=KEEP)
    np.testing.assert_array_equal(result.times[0], expected.times)
    gone = decode(DecodeTask(0, path, None, None, (picture,), keep=((8.0, 9.0),)))
    assert gone.reason is not None
    assert "of which 1 intervals are kept" in gone.reason


def test_what_is_kept_is_part_of_the_clip_lists_hash_only_where_it_is_set() -> None:
    clip = Clip("a", Path("a.mp4"), None, None, (0, 2), "train")
    hashes = {
        Dataset("d", ("x", "y", "z"), "multilabel", (c,), "map").clip_list_hash()
        for c in (clip, dataclasses.replace(clip, keep=((0.5, 1.0),)),
                  dataclasses.replace(clip, keep=((0.5, 1.5),)))
    }  # fmt: skip
    assert len(hashes) == 3
    # What it was before clips could keep anything: stores made then are still theirs.
    row = b'[["a", null, null, [0, 2], "train"]]'
    assert hashlib.sha256(row).hexdigest() in hashes


# --- the rule on its own --------------------------------------------------------------------------


def test_intervals_become_their_union() -> None:
    actions = [(3, 5.0, 7.0), (1, 0.0, 2.0), (2, 1.0, 3.0), (4, 3.0, 4.0), (5, 9.0, 8.0), (6, 1, 1)]
    assert open_intervals(actions) == ((0.0, 3.0), (3.0, 4.0), (5.0, 7.0))
    times = np.arange(0, 100) / 10
    union = {t for t in times if any(a < t < b for a, b in open_intervals(actions))}
    assert union == {t for t in times if any(a < t < b for _, a, b in actions)}
    assert 3.0 not in union
    assert labels_at(actions, np.array([1.5, 3.0, 8.5])) == (1, 2)


def real_rows(shared: Path, split: str) -> list[tuple[str, float, list[tuple[int, float, float]]]]:
    """(id, length, actions) of an official CSV, read without the adapter."""
    file = shared / "annotations" / "charades" / f"Charades_v1_{split}.csv"
    with file.open(newline="", encoding="utf-8") as handle:
        return [
            (
                row["id"],
                float(row["length"]),
                [(int(c[1:]), float(a), float(b))
                 for c, a, b in (x.split() for x in row["actions"].split(";") if x)],
            )
            for row in csv.DictReader(handle)
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("split", "frames", "lost", "instances", "percent"),
    [
        ("test", 8, 37, 16285, "0.23"),
        ("test", 10, 6, 16285, "0.04"),
        ("test", 16, 0, 16285, "0.00"),
        ("test", 32, 0, 16285, "0.00"),
        ("train", 16, 10, 48684, "0.02"),  # of which reversed intervals are most
    ],
)
def test_the_labels_lost_in_the_real_files_at_24_frames_a_second(
    shared: Path, split: str, frames: int, lost: int, instances: int, percent: str
) -> None:
    rule = FrameRule(labelled=True, targets=frames)
    before = after = 0
    for k, (name, length, actions) in enumerate(real_rows(shared, split)):
        if not actions:
            continue
        n = round(24 * length)
        times = np.arange(n) / (n / length)
        labels = tuple(sorted({c for c, _, _ in actions}))
        clip = Clip(name, Path(name), None, None, labels, "test", tuple(actions))
        ruled = restrict(clip, rule, times)
        before += len(labels)
        if ruled is None:
            assert not any(a < t < b for t in times for _, a, b in actions)
            continue
        after += len(ruled.labels)
        if k % 20 == 0:  # and the whole rule, written down once more
            shown, target = labelled_frames(actions, list(times), frames)
            assert set(ruled.labels) == target
            kept = [i for i, t in enumerate(times) if any(a < t < b for a, b in ruled.keep)]
            chosen = [kept[i] for i in sample_indices(len(kept), frames, "official")]
            assert chosen == shown
    assert (before - after, before) == (lost, instances)
    assert f"{100 * lost / instances:.2f}" == percent


# --- the adapter ----------------------------------------------------------------------------------


def write_frames(root: Path, name: str, count: int) -> None:
    """A frame folder in which picture i is 10 i + 1 grey, numbered from 1 as Charades_v1_rgb is."""
    folder = root / name
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (48, 36), (10 * i % 250,) * 3).save(folder / f"{name}-{i + 1:06d}.png")


ROWS = {  # id -> (split, actions, length)
    "AAAAA": ("train", "c001 0.20 0.50;c002 0.40 0.90;c003 1.30 1.50", 2.0),
    "BBBBB": ("train", "", 2.0),
    "CCCCC": ("test", "c005 1.50 0.50;c006 0.00 1.00", 2.0),  # one reversed
    "DDDDD": ("test", "c007 1.50 0.50", 2.0),  # nothing else
    "EEEEE": ("test", "c008 0.10 0.15;c009 0.30 1.70", 2.0),  # between two frames: never shown
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Official files for `ROWS`, without media."""
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for name, (split, actions, length) in ROWS.items():
        lines[split].append(f"{name},P{split},Kitchen,6,7,Yes,s,o,d,{actions},{length}")
    write: Callable[..., Path] = _charades["write"]
    return write(tmp_path / "root", train=lines["train"], test=lines["test"])


@pytest.fixture
def folders(root: Path) -> Path:
    """And their frame folders of 20 pictures: 10 frames a second."""
    for name in ROWS:
        write_frames(root / "Charades_v1_rgb", name, 20)
    return root


@pytest.fixture
def videos(root: Path, media: Any) -> Path:
    """And videos of 48 frames, 25 a second, as H.264."""
    (root / "Charades_v1_480").mkdir()
    for name in ROWS:
        content = media("gop12 b2.mp4").read_bytes()
        (root / "Charades_v1_480" / f"{name}.mp4").write_bytes(content)
    return root


def actions_of(name: str) -> list[tuple[int, float, float]]:
    """The actions of `ROWS`."""
    found = re.findall(r"c(\d{3}) ([\d.]+) ([\d.]+)", ROWS[name][1])
    return [(int(c), float(a), float(b)) for c, a, b in found]


@pytest.mark.parametrize("kind", ["folders", "videos"])
@pytest.mark.parametrize("frames", [2, 5, 16])
def test_charades_is_shown_as_the_authors_loader_shows_it(
    kind: str, frames: int, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(kind)
    data = read_charades(root, frames="labelled", targets=str(frames), unlabelled="skip")
    assert (data.name, data.variant) == ("charades", f"labelled frames, labels of {frames} frames")
    assert [c.id for c in data.clips] == ["AAAAA", "CCCCC", "EEEEE"]
    assert dict(data.left_out) == {
        "BBBBB": "no actions, and --option unlabelled=skip",
        "DDDDD": "no frame lies inside any of its actions, and --option frames=labelled",
    }
    assert data.unusable == ()
    instances = lost = 1  # of DDDDD
    for clip in data.clips:
        everything, times = decode_all(clip.path, fps=clip.fps)
        assert clip.fps == (10.0 if kind == "folders" else None)
        actions = actions_of(clip.id)
        shown, target = labelled_frames(actions, [float(t) for t in times], frames)
        assert set(clip.labels) == target
        whole = {c for c, _, _ in actions}
        instances, lost = instances + len(whole), lost + len(whole - target)
        decoded = decode_clip(clip.path, frames, sampling="official", fps=clip.fps, keep=clip.keep)
        np.testing.assert_array_equal(decoded.frames, everything[shown])
    assert f"labels of {frames} sampled frames: {lost} of {instances} label" in data.notes[0]
    assert 8 not in data.clips[2].labels  # no frame between 0.10 and 0.15 s, strictly


def test_each_option_works_alone(folders: Path) -> None:
    plain = read_charades(folders)
    shown = read_charades(folders, frames="labelled")
    assert [c.labels for c in shown.clips] == [(1, 2, 3), (5, 6), (8, 9)]  # of the whole videos
    assert shown.clips[0].keep == ((0.2, 0.9), (1.3, 1.5))
    assert dict(shown.left_out).keys() == {"BBBBB", "DDDDD"}
    sampled = read_charades(folders, targets="4")  # of all frames: 2, 7, 12, 17
    assert [c.labels for c in sampled.clips] == [(2,), (), (6,), (), (9,)]
    assert {c.keep for c in sampled.clips} == {()}
    assert [d.variant for d in (plain, shown, sampled)] == [
        "", "labelled frames", "labels of 4 frames",
    ]  # fmt: skip
    assert len({d.clip_list_hash() for d in (plain, shown, sampled)}) == 3
    survey = ADAPTER.survey(folders, {"frames": "labelled", "targets": "4"})
    assert any("label instances lost" in note for note in survey.notes)


def test_what_cannot_be_looked_at_is_an_error_or_listed(root: Path, media: Any) -> None:
    with pytest.raises(DatasetError, match=r"AAAAA\.mp4.*found nothing there \(3 such videos of 4"):
        read_charades(root, frames="labelled", targets="4", unlabelled="skip")
    assert len(read_charades(root, frames="labelled").clips) == 3  # their own clock will decide
    folder = root / "Charades_v1_480"
    folder.mkdir()
    (folder / "AAAAA.mp4").write_bytes(media("gop12 b2.mp4").read_bytes())
    (folder / "CCCCC.mp4").write_bytes(b"no video at all")
    data = read_charades(root, frames="labelled", targets="4", policy="skip")
    assert [c.id for c in data.clips] == ["AAAAA"]
    reasons = dict(data.unusable)
    assert "found nothing there" in reasons["EEEEE"]
    assert str(root) not in reasons["CCCCC"]
    assert len(reasons) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": "some"}, "--option frames=some: expected all, labelled"),
        ({"targets": "0"}, "--option targets=0: expected video or a number of frames"),
        ({"targets": "all"}, "--option targets=all: expected video or a number of frames"),
        ({"frames": "labelled", "fps": "24"}, "leave fps out"),
    ],
)
def test_options_that_cannot_be_are_refused(
    folders: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        read_charades(folders, **options)


def test_frame_lists_have_no_times(tmp_path: Path) -> None:
    lists = ["original_vido_id video_id frame_id path labels"]
    for split in ("train", "val"):
        rows = [f"{split} 0 {i} {split}/{split}-{i + 1:06d}.jpg 1" for i in range(3)]
        (tmp_path / f"{split}.csv").write_text("\n".join([*lists, *rows]) + "\n")
    _charades["write_classes"](tmp_path)
    assert len(read_charades(tmp_path).clips) == 2
    with pytest.raises(UsageError, match="found frame lists"):
        read_charades(tmp_path, frames="labelled")
