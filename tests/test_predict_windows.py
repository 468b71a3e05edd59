"""`msq predict --every`: long videos window by window, with random encoders."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from msq.cli import main
from msq.errors import UsageError, VideoError
from msq.extract.encode import encode_clip
from msq.head.intervals import merged
from msq.head.predict import Head, load_head
from msq.head.predict_features import encoded_clips
from msq.head.predict_windows import Window, Windows
from msq.report.prediction_rows import _Sheet
from msq.report.predictions import prediction_exit_code

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


@pytest.mark.parametrize("every", [0.1, 0.2, 0.3, 0.7, 1 / 3])
def test_the_last_frame_is_in_the_last_window(every: float) -> None:
    for count in range(2, 120):  # 0.3 / 0.1 is less than 3, and 0.3 s the start of a window
        times = np.arange(count) / 10
        found = Windows(every, every).of(times)
        assert found[-1].end > times[-1]
        assert found[-1].since is None or found[-1].since == times[-1]


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
            expected = head._scored(
                encoded_clips(head.meta, [alone], head.device), head._asked(None, None)
            )[0]
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


# --- rows, intervals, damage ----------------------------------------------------------------------


def blanked(path: Path, source: Path, start: float, end: float) -> Path:
    """The file with the packets of some seconds overwritten by zeros."""
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            if packet.size and start <= packet.pts * stream.time_base < end:
                data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight seconds with a keyframe each, of which those from 3 to 5 are nothing but zeros."""
    folder = tmp_path_factory.mktemp("torn")
    scenes(folder / "whole.mp4", *range(8))
    return blanked(folder / "torn.mp4", folder / "whole.mp4", 3, 5)


def test_segments_come_one_by_one_in_order_and_are_those_of_predict(
    head: Head, torn: Path, media: Any
) -> None:
    for path, every, window in ((torn, 0.5, 1.0), (media("packed b.avi"), 0.3, None)):
        (item,) = head.predict(path, every=every, window=window)
        told: list[tuple[int, int, str]] = []
        tell = functools.partial(lambda kept, *told: kept.append(told), told)
        found = list(head.segments(path, every=every, window=window, progress=tell))
        assert spans({"segments": found}) == sorted(spans(item))
        assert found == item["segments"]
        assert told[-1] == (len(found), len(found), path.name)
        early = head.segments(path, every=every, window=window)
        assert next(early) == found[0]
        early.close()  # and the thread that decodes ends
        assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]
    with pytest.raises(VideoError, match=r"absent\.mp4"):
        list(head.segments("absent.mp4", every=1))


def test_a_torn_stretch_is_reported_and_the_rest_is_done(
    world: Any, head: Head, torn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (item,) = head.predict(torn, every=1)
    (clean,) = head.predict(torn.with_name("whole.mp4"), every=1)
    assert [bool(part.get("error")) for part in item["segments"]] == [False] * 3 + [True] * 2 + [
        False
    ] * 3
    for part, other in zip(item["segments"], clean["segments"], strict=True):
        if "error" not in part and "degraded" not in part:
            assert scores(part) == pytest.approx(scores(other), abs=1e-5)
    given = ("--run", world.run("text"), "--device", "cpu", "--every", 1)
    for more in (("--json", "-q"), ("--out", tmp_path / "a.csv"), ("--format", "jsonl", "-q")):
        assert run("predict", torn, *given, *more) == 3
        out, err = capsys.readouterr()
        said = " ".join(err.split())
        for place in ("0:03 – 0:04", "0:04 – 0:05"):
            assert f"failed: torn, {place}: expected at least one frame in the cut" in said
        assert said.count("failed:") == 2
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["start"] for row in rows if "error" in row] == [3.0, 4.0]
    assert {row["start"] for row in rows if "label" in row} == {0.0, 1.0, 2.0, 5.0, 6.0, 7.0}
    with (tmp_path / "a.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["clip", "start", "end", "label", "score", "degraded", "error"]
    assert len(table) == len(rows)
    for one, other in zip(table, rows, strict=True):
        assert {k: v for k, v in one.items() if v} == {k: str(v) for k, v in other.items()}


def test_damage_that_goes_on_is_one_line(
    world: Any, media: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = media.damaged("flipped.mp4")
    given = ("--run", world.run("text"), "--device", "cpu", "--every", 0.5)
    lines = []
    for more in (("--json", "-q"), ("--format", "csv", "-q")):
        assert run("predict", path, *given, *more) == 0  # the frames are there
        out, err = capsys.readouterr()
        (line,) = [line for line in err.splitlines() if line.startswith("damaged: flipped, 0:0")]
        assert "corrupt data" in line
        lines.append(line)
    assert lines[0] == lines[1]
    rows = list(csv.DictReader(out.splitlines()))
    assert not rows[0]["degraded"]
    assert "corrupt data" in rows[-1]["degraded"]


def test_rows_of_a_threshold_and_merged_ones_are_those_of_the_windows(
    world: Any, head: Head, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "four.mp4"
    scenes(path, 1, 2, 3, 1)
    (item,) = head.predict(path, every=0.5, window=1)
    every_score = sorted(p["score"] for part in item["segments"] for p in part["predictions"])
    threshold = every_score[len(every_score) // 2]
    given = ("predict", path, "--run", world.run("text"), "--device", "cpu",
             "--every", 0.5, "--window", 1, "-q", "--threshold", threshold)  # fmt: skip
    assert run(*given, "--format", "jsonl") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [
        {"clip": "four", "start": part["start"], "end": part["end"], **p}
        for part in item["segments"] for p in part["predictions"] if p["score"] >= threshold
    ]  # fmt: skip
    assert 0 < len(rows) < len(every_score)
    assert [{**row, "score": 0} for row in rows] == [{**row, "score": 0} for row in expected]
    assert [r["score"] for r in rows] == pytest.approx([r["score"] for r in expected], abs=1e-6)
    assert run(*given, "--json") == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert sum(len(part["predictions"]) for part in shown["segments"]) == len(rows)
    assert len(shown["segments"]) == len(item["segments"])
    assert "intervals" not in shown
    # Merged, by hand: what each label covers.
    assert run(*given, "--merge", "--out", tmp_path / "rows.jsonl") == 0
    assert capsys.readouterr().out == ""
    merged = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(merged) < len(rows)
    for label in CLASSES:
        of_label = [row for row in rows if row["label"] == label]
        joined = [row for row in merged if row["label"] == label]
        assert all(a["end"] < b["start"] for a, b in itertools.pairwise(joined))
        for row in of_label:
            (one,) = [x for x in joined if x["start"] <= row["start"] and row["end"] <= x["end"]]
            assert one["score"] >= row["score"]
        assert {x["start"] for x in joined} <= {row["start"] for row in of_label}
        assert {x["end"] for x in joined} <= {row["end"] for row in of_label}
    assert run(*given, "--merge", "--json") == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert [(x["label"], x["start"], x["end"]) for x in shown["intervals"]] == [
        (x["label"], x["start"], x["end"]) for x in merged
    ]
    assert run(*given, "--merge") == 0
    table = " ".join(capsys.readouterr().out.split())
    assert f"four: {len(merged)} intervals in {len(item['segments'])} windows" in table


def test_windows_are_merged_while_they_meet() -> None:
    def part(start: float, end: float | None, **scored: float) -> dict[str, Any]:
        listed = [{"label": k, "score": v} for k, v in scored.items()]
        return {"start": start, "end": end, "predictions": listed}

    parts = [
        part(0, 2, run=0.9, sit=0.1),
        part(1, 3, run=0.5, sit=0.6),
        {**part(2, 4, run=0.2, sit=0.7), "degraded": "bad frames"},
        part(3, 5, run=0.8, sit=0.3),
        {**part(4, 6), "error": "gone"},
        part(5.5, 7, run=0.4, sit=0.5),
    ]
    assert list(merged(parts, 0.5)) == [
        {"label": "sit", "start": 1, "end": 4, "score": 0.7, "windows": 2,
         "degraded": "bad frames"},
        {"label": "run", "start": 0, "end": 5, "score": 0.9, "windows": 3},
        {"label": "sit", "start": 5.5, "end": 7, "score": 0.5, "windows": 1},
    ]  # fmt: skip
    assert list(merged([part(0.0, None)], 0.0)) == []
    going = merged(iter(parts), 0.5)
    assert next(going)["label"] == "sit"  # as soon as it is over


def test_options_of_rows_that_cannot_be_are_refused(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video, trained = world.videos[0], world.run("text")
    for options, words in (
        (("--threshold", 1.5), "--threshold: expected a probability, 0 to 1, found 1.5"),
        (("--merge",), "expected --every SECONDS and --threshold P with it"),
        (("--merge", "--threshold", 0.5), "expected --every SECONDS and --threshold P with it"),
        (("--out", tmp_path / "a.txt"), "expected a file that ends in .csv or .jsonl"),
        (("--out", tmp_path / "a.csv", "--format", "jsonl"), "ends in .jsonl"),
        (("--out", tmp_path / "no" / "a.csv"), "expected a file that can be written: No such"),
        (("--json", "--format", "csv"), "expected one of them"),
    ):
        assert run("predict", video, "--run", trained, "--device", "cpu", *options) == 2
        assert words in " ".join(capsys.readouterr().err.split()), options
    # The rows of an earlier command are there until there are others.
    kept = tmp_path / "kept.csv"
    kept.write_text("rows of a night\n")
    for options in (("--every", 0.0001), ("--window", 3), ("--labels", ","), ("--every", 1,
                    "--video-encoder", f"local-dir:{tmp_path}")):  # fmt: skip
        given = (video, "--run", trained, "--device", "cpu", "--out", kept)
        assert run("predict", *given, *options) == 2, options
        assert kept.read_text() == "rows of a night\n", options
    assert run("predict", *given, "--every", 1, "--threshold", 1, "-q") == 0
    assert kept.read_text().splitlines() == ["clip,start,end,label,score,degraded,error"]
    capsys.readouterr()
    # Without windows each video has rows of its own.
    given = (*world.videos[:2], "--run", trained, "--device", "cpu", "--format", "jsonl", "-q")
    assert run("predict", tmp_path / "absent.mp4", *given, "--top", 1) == 3
    out, err = capsys.readouterr()
    first, *rows = [json.loads(line) for line in out.splitlines()]
    assert first["clip"] == "absent"
    assert "found nothing at this path" in first["error"]
    assert "failed: absent: " in err
    assert [(row["clip"], row["start"], row["end"]) for row in rows] == [
        ("video 0", None, None), ("video 1", None, None)
    ]  # fmt: skip
    assert run("predict", tmp_path / "absent.mp4", "--run", trained, "--every", 1,
               "--format", "csv", "-q") == 1  # fmt: skip


def test_a_score_that_is_no_number_is_null_in_a_line_of_json() -> None:
    file = io.StringIO()
    _Sheet(file, "jsonl").write({"clip": "a", "label": "run", "score": float("nan")})
    assert json.loads(file.getvalue()) == {"clip": "a", "label": "run", "score": None}


def test_rows_are_there_before_the_video_is_done_and_ctrl_c_ends_it(
    world: Any, tmp_path: Path
) -> None:
    path, out = tmp_path / "long.mp4", tmp_path / "rows.csv"
    scenes(path, *range(4), seconds=25)
    command = [sys.executable, "-m", "msq", "predict", path, "--run", world.run("text"),
               "--device", "cpu", "--every", "0.02", "--window", "1", "--top", "1",
               "--out", out]  # fmt: skip
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < end:
            if out.exists() and out.read_text().count("\n") > 8:
                break
            time.sleep(0.01)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert "interrupted" in err
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert 8 <= len(rows) < 5000
    assert [float(row["start"]) for row in rows] == [round(0.02 * k, 6) for k in range(len(rows))]
    assert all(0 <= float(row["score"]) <= 1 for row in rows)


def test_real_clips_are_scored_window_by_window(head: Head, shared: Path) -> None:
    folder = shared / "clips"
    names = [n for n in ("test.avi", "vid2.mp4", "part_0.mp4") if (folder / n).is_file()]
    if not names:
        pytest.skip("no clips in the folder of real clips")
    for item in head.predict([folder / name for name in names], every=1):
        assert len(item["segments"]) > 1
        assert all(len(part["predictions"]) == 3 for part in item["segments"])
        assert spans(item)[0] == (0, 1)
