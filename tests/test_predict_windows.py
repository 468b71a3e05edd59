"""`msq predict --every`: long videos window by window, with random encoders."""

from __future__ import annotations

import itertools
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msq.cli import main
from msq.errors import UsageError
from msq.extract.encode import encode_clip
from msq.head.predict import Head, load_head
from msq.head.predict_windows import Window, Windows
from msq.report.stage_two import prediction_exit_code

_predict = runpy.run_path(str(Path(__file__).with_name("test_predict.py")))
_media = runpy.run_path(str(Path(__file__).with_name("media.py")))
World, world, scores, CLASSES = (_predict[k] for k in ("World", "world", "scores", "CLASSES"))


@pytest.fixture(scope="module")
def head(world: Any) -> Head:
    return load_head(world.run("text"), weights=world.weights)


def run(*arguments: Any) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def spans(item: dict[str, Any]) -> list[tuple[float, float]]:
    return [(part["start"], part["end"]) for part in item["segments"]]


# --- which windows --------------------------------------------------------------------------------


def test_windows_meet_without_a_gap_and_end_with_the_video() -> None:
    even = np.arange(100) / 25  # the last frame is shown from 3.96 to 4 s
    assert Windows(1.5, 1.5).of(even) == [(0, 1.5, None), (1.5, 3.0, None), (3.0, 4.0, None)]
    assert Windows(2, 3).of(even) == [(0, 3, None), (2, 4, None)]  # they overlap
    assert Windows(2, 0.5).of(even) == [(0, 0.5, None), (2, 2.5, None)]  # with gaps
    tenth = Windows(0.1, 0.1).of(np.arange(600) / 30)
    assert len(tenth) == 200
    assert all(a.end == b.start for a, b in itertools.pairwise(tenth))
    assert Windows(10, 10).of(np.array([0.0])) == [(0, 10, None)]  # nobody knows how long it is
    assert Windows(1, 1).of(np.array([3600.0 + i / 25 for i in range(25)]))[-1][:2] == (3600, 3601)


def test_a_window_in_which_nothing_new_is_shown_has_the_frame_before_it() -> None:
    still = np.array([0.0, 0.04, 0.08, 5.5, 5.54])  # a screen recording: nothing moves for 5 s
    assert Windows(2, 2).of(still) == [
        Window(0, 2), Window(2, 4, since=0.08), Window(4, 5.58)
    ]  # fmt: skip
    late = np.array([2.5, 2.54])  # nothing is shown before
    assert Windows(1, 1).of(late) == [Window(0, 1), Window(1, 2), Window(2, 2.58)]


@pytest.mark.parametrize("seconds", [0, -1, 0.0001, float("nan"), float("inf")])
def test_windows_that_cannot_be_are_refused(seconds: float) -> None:
    with pytest.raises(UsageError, match=r"--every: expected at least 0\.001 seconds, found"):
        Windows.asked(seconds, None)
    with pytest.raises(UsageError, match=r"--window: expected at least 0\.001 seconds, found"):
        Windows.asked(1, seconds)
    with pytest.raises(UsageError, match="expected --every SECONDS with it"):
        Windows.asked(None, seconds)
    with pytest.raises(UsageError, match="at most 100000 windows, found 3600001 in 3600 s"):
        Windows(0.001, 1).of(np.array([0.0, 3600.0]))
    assert Windows.asked(None, None) is None
    assert Windows.asked(5, None) == Windows(5, 5)


# --- what is done in them -------------------------------------------------------------------------


def scenes(path: Path, *seeds: int, seconds: int = 1, fps: int = 25) -> None:
    """A video of several scenes, joined without a new encoder: H.264, a keyframe each second."""
    pictures = [p for s in seeds for p in _media["pictures"](seconds * fps, 96, 64, s)]
    encode = _media["encode"]
    original = encode.__globals__["pictures"]
    encode.__globals__["pictures"] = lambda *_: pictures
    try:
        encode(path, len(pictures), gop=fps, fps=fps)
    finally:
        encode.__globals__["pictures"] = original


def test_each_window_is_scored_as_a_video_of_it_alone(head: Head, tmp_path: Path) -> None:
    path = tmp_path / "three.mp4"
    scenes(path, 1, 2, 3)
    (item,) = head.predict(path, every=1)
    assert spans(item) == [(0, 1), (1, 2), (2, 3)]
    assert scores(item) == scores(head.predict(path)[0])  # the whole, first and as ever
    scored = [[scores(part)[c] for c in CLASSES] for part in item["segments"]]
    files = [tmp_path / f"{seed}.mp4" for seed in (1, 2, 3)]
    for seed, file in zip((1, 2, 3), files, strict=True):
        scenes(file, seed)
    alone = [[scores(one)[c] for c in CLASSES] for one in head.predict(files)]
    # Other files, not quite the same pictures: each window is nearest to its own scene.
    apart = np.abs(np.array(scored)[:, None] - np.array(alone)[None]).max(axis=2)
    assert apart.argmin(axis=1).tolist() == [0, 1, 2], apart
    assert all(set(scores(part)) == set(CLASSES) for part in item["segments"])
    labels = ["dog run", "bird run"]
    (other,) = head.predict(path, labels, every=1.5, window=0.5)
    assert spans(other) == [(0, 0.5), (1.5, 2.0)]
    assert all(set(scores(part)) == set(labels) for part in [other, *other["segments"]])


def test_a_window_equals_the_part_encoded_by_itself(head: Head, media: Any) -> None:
    """Whatever the container: even and uneven times, hidden frames, no declared duration."""
    encoders = [head.encoders["video"], head.encoders["image"]]
    for name in ("vfr.mp4", "pipe.mkv", "packed b.avi", "edit list.mp4", "one.mp4"):
        (item,) = head.predict(media(name), every=0.3, window=0.4)
        assert item["segments"]
        for part in item["segments"]:
            start = part.get("shown_since", part["start"])
            alone = encode_clip(media(name), encoders, start, part["end"]).features
            expected = head._scored(head._features_of([alone]), head._asked(None, None))[0]
            assert "error" not in part
            assert scores(part) == pytest.approx(scores({"predictions": expected}), abs=1e-5)


def test_windows_that_cannot_be_had_say_why(head: Head, media: Any, tmp_path: Path) -> None:
    (raw,) = head.predict(media("raw.h264"), every=1)  # a stream without times
    assert len(raw["predictions"]) == len(CLASSES)
    (part,) = raw["segments"]
    assert (part["start"], part["end"], part["predictions"]) == (0.0, None, [])
    assert "video without time stamps" in part["error"]
    assert "--fps" in part["error"]
    (absent,) = head.predict(tmp_path / "absent.mp4", every=1)
    assert (absent["predictions"], absent["segments"]) == ([], [])
    assert "absent.mp4" in absent["error"]
    late = tmp_path / "late.mp4"
    _media["encode"](late, 5, ticks=[0, 40, 2500, 2540, 2580])
    (item,) = head.predict(late, every=1)
    assert [part.get("shown_since") for part in item["segments"]] == [None, 0.04, None]
    with pytest.raises(UsageError, match=r"windows in time .* cut from videos"):
        head.predict([0, 1], every=1)


def test_only_the_windows_with_the_damage_are_degraded(head: Head, media: Any) -> None:
    (item,) = head.predict(media.damaged("flipped.mp4"), every=0.5)
    assert "corrupt data" in item["degraded"]
    marked = ["degraded" in part for part in item["segments"]]
    assert marked[0] is False
    assert marked[-1] is True
    assert all(part["predictions"] for part in item["segments"])


def test_a_folder_of_frames_needs_its_frame_rate(head: Head, tmp_path: Path) -> None:
    for i, picture in enumerate(_media["pictures"](20, 48, 32)):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    (item,) = head.predict(tmp_path, every=2, fps=5)
    assert spans(item) == [(0, 2), (2, 4)]
    (tmp_path / "13.png").write_bytes(b"no picture")  # seen by the second window alone
    (item,) = head.predict(tmp_path, every=2, fps=5)
    assert len(item["predictions"]) == len(CLASSES)
    assert [bool(part["predictions"]) for part in item["segments"]] == [True, False]
    assert "expected a picture in 13.png" in item["segments"][1]["error"]
    (tmp_path / "12.png").write_bytes(b"no picture")  # the whole alone would have seen it
    (item,) = head.predict(tmp_path, every=2, fps=5)
    assert item["predictions"] == []
    assert "expected a picture in 12.png" in item["error"]
    assert [bool(part["predictions"]) for part in item["segments"]] == [True, False]
    assert prediction_exit_code([item]) == 3
    assert prediction_exit_code([{**item, "segments": []}]) == 1
    (tmp_path / "12.png").unlink()
    with pytest.raises(UsageError, match="fps: expected a positive number of frames per second"):
        head.predict(tmp_path, every=2, fps=0)
    (item,) = head.predict(tmp_path, every=2)
    assert "--fps" in item["segments"][0]["error"]


# --- the command ----------------------------------------------------------------------------------


def test_the_command_prints_windows_and_leaves_with_3_where_one_failed(
    world: Any, media: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = world.run("text")
    path = tmp_path / "two.mp4"
    scenes(path, 4, 5)
    given = ("predict", path, "--run", trained, "--device", "cpu", "--every", 1)
    assert run(*given, "--top", 2, "--json", "-q") == 0
    out, err = capsys.readouterr()
    (item,) = json.loads(out)
    assert err == ""
    assert set(item) == {"clip", "predictions", "segments"}
    assert item["clip"] == "two"
    assert spans(item) == [(0, 1), (1, 2)]
    assert all(len(part["predictions"]) == 2 for part in [item, *item["segments"]])
    assert run(*given) == 0
    out, err = capsys.readouterr()
    table = " ".join(out.split())
    assert "two: 2 windows" in table
    assert "0:00 – 0:01" in table
    assert "0:01 – 0:02" in table
    for label, score in list(scores(item).items())[:1]:
        assert f"{label} │ {100 * score:.2f}" in table  # the whole video's table, before
    assert "windows: 2/2 · two.mp4" in err
    assert run("predict", media("raw.h264"), *given[2:], "--json", "-q") == 3
    out, err = capsys.readouterr()
    assert "failed: raw, 0:00 – the end: expected frames with times" in " ".join(err.split())
    assert json.loads(out)[0]["segments"][0]["error"]
    assert run("predict", tmp_path / "absent.mp4", *given[2:], "-q") == 1
    assert run("predict", path, "--run", trained, "--window", 2) == 2
    assert "expected --every SECONDS" in " ".join(capsys.readouterr().err.split())


def test_frames_more_than_a_minute_apart_get_one_warning_that_names_every(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = world.run("text")
    path = tmp_path / "hour.mp4"  # one frame every 100 s; encoders see 4 and 3 of the 36
    _media["encode"](path, 36, ticks=[100_000 * i for i in range(36)])
    assert run("predict", path, "--run", trained, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["seconds_between_frames"] == 1200
    assert err.count("warning") == 1
    assert "up to 1200 s lie between the frames that were looked at" in " ".join(err.split())
    assert "--every SECONDS" in err
    assert run("predict", path, "--run", trained, "--every", 900, "--json", "-q") == 0
    out, err = capsys.readouterr()
    assert "warning" not in err
    assert spans(json.loads(out)[0]) == [(0, 900), (900, 1800), (1800, 2700), (2700, 3600)]
    short = world.videos[0]
    assert run("predict", short, "--run", trained, "--json") == 0
    out, err = capsys.readouterr()
    assert "seconds_between_frames" not in json.loads(out)[0]
    assert err == ""


def test_real_clips_are_scored_window_by_window(head: Head, shared: Path) -> None:
    folder = shared / "clips"
    names = [n for n in ("test.avi", "vid2.mp4", "part_0.mp4") if (folder / n).is_file()]
    if not names:
        pytest.skip("no clips in the folder of real clips")
    for item in head.predict([folder / name for name in names], every=1):
        assert len(item["segments"]) > 1
        assert all(len(part["predictions"]) == 3 for part in item["segments"])
        assert spans(item)[0] == (0, 1)
