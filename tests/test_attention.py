"""`msq attention` and `Head.attention`: what is looked at, from a video file to pictures."""

from __future__ import annotations

import base64
import io
import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from msq.cli import main
from msq.errors import UsageError, VideoError
from msq.extract.encode import encode_clip
from msq.head.predict import Head, load_head
from msq.head.rollout import query_rollout
from msq.report.attention import title
from msq.report.heat_map import STOPS, colours, levels, overlay, strip

_predict = runpy.run_path(str(Path(__file__).with_name("test_predict.py")))
world, CLASSES = _predict["world"], _predict["CLASSES"]


@pytest.fixture(scope="module")
def head(world: Any) -> Head:
    return load_head(world.run("text"), weights=world.weights)


def run(*arguments: Any) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def where(world: Any) -> list[str]:
    """Options that say where the weights of the tests' runs are."""
    return [f"--{kind}-encoder={place}" for kind, place in world.weights.items()]


# --- in Python ------------------------------------------------------------------------------------


def test_scores_and_labels_are_those_of_predict(world: Any, head: Head) -> None:
    video = world.videos[0]
    for labels in (None, ["bird walk", "dog run"]):
        (expected,) = head.predict(video, labels)
        maps = head.attention(video, labels)
        assert maps.clip == expected["clip"]
        assert list(maps.labels) == [p["label"] for p in expected["predictions"]]
        scores = [p["score"] for p in expected["predictions"]]
        assert np.abs(maps.scores - scores).max() <= 1e-5


def test_arrays_have_the_shapes_and_sums_that_they_promise(world: Any, head: Head) -> None:
    maps = head.attention(world.videos[1])
    assert maps.tokens.shape == (3, 5)
    assert maps.heat.shape == (3, 4, 4, 4)
    assert maps.video.heat is not None
    assert maps.video.heat.shape == (4, 4, 4)
    assert maps.video.frames.shape == (4, 64, 96, 3)
    assert maps.video.box == (0.0, 16.0, 64.0, 64.0)
    assert maps.image is not None
    assert maps.image.heat is not None
    assert maps.image.heat.shape == (3, 4, 4)
    assert np.abs(maps.tokens.sum(1) - 1).max() <= 1e-5
    assert np.abs(maps.heat.sum((1, 2, 3)) + maps.elsewhere - 1).max() <= 1e-5
    assert maps.video.heat.sum() + maps.video.elsewhere == pytest.approx(1, abs=1e-5)
    assert maps.image.heat.sum() + maps.image.elsewhere == pytest.approx(1, abs=1e-5)
    assert min(maps.heat.min(), maps.video.heat.min(), maps.image.heat.min()) >= 0
    assert maps.remarks == ()
    with pytest.raises(AttributeError):
        maps.clip = "another"  # type: ignore[misc]


def test_a_classs_heat_is_its_query_followed_back_to_the_patches(world: Any, head: Head) -> None:
    """The head's maps by hand from `forward`, then through the encoder token by token."""
    video = world.videos[2]
    maps = head.attention(video)
    encoders = [head.encoders["video"], head.encoders["image"]]
    tokens, image = encode_clip(video, encoders).features
    with torch.no_grad():
        found = head.model(tokens[None], image[None], intermediates=True)
    looks = query_rollout(found)[0]
    order = found["logits"][0].argsort(descending=True)
    assert np.abs(maps.tokens - looks[order].numpy()).max() <= 1e-6
    only = head.attention(video, through_encoder=False)
    # Frame pooling: a frame's token is the mean of its 16 patches.
    assert np.abs(only.heat - maps.tokens[:, 1:, None, None] / 16).max() <= 1e-6
    assert np.abs(only.elsewhere - maps.tokens[:, 0]).max() <= 1e-6
    assert only.video.heat is None
    assert only.image is None
    # The encoder moves it within each frame; between frames it moves the global token's part alone.
    assert maps.video.heat is not None
    shared = maps.tokens[:, :1] * maps.video.heat.sum((1, 2))
    assert np.abs(maps.heat.sum((2, 3)) - maps.tokens[:, 1:] - shared).max() <= 1e-6
    assert (
        np.abs(maps.heat - only.heat - maps.tokens[:, :1, None, None] * maps.video.heat).max()
        > 1e-5
    )


def test_the_frames_are_those_that_predict_sees(world: Any, head: Head) -> None:
    video = world.videos[3]
    maps = head.attention(video, start=0.1, end=0.4)
    expected = encode_clip(video, [head.encoders["video"]], 0.1, 0.4)
    assert np.array_equal(maps.video.times, expected.times[0])
    assert maps.video.times.min() >= 0.1
    assert maps.video.times.max() < 0.4
    assert not np.array_equal(maps.video.times, head.attention(video).video.times)


def test_top_takes_the_highest_scores(world: Any, head: Head) -> None:
    every, best = head.attention(world.videos[0]), head.attention(world.videos[0], top=1)
    assert best.labels == every.labels[:1]
    assert np.abs(best.heat - every.heat[:1]).max() <= 1e-6


@pytest.mark.parametrize(("start", "end"), [(2.0, 1.0), (1.0, 1.0), (float("nan"), None)])
def test_a_part_without_length_is_refused(
    world: Any, head: Head, start: float, end: float | None
) -> None:
    with pytest.raises(UsageError, match="start before its end"):
        head.attention(world.videos[0], start=start, end=end)


@pytest.mark.parametrize("top", [0, -1])
def test_no_labels_at_all_are_refused(world: Any, head: Head, top: int) -> None:
    with pytest.raises(UsageError, match=f"top: expected 1 or more labels, found {top}"):
        head.attention(world.videos[0], top=top)


def test_a_part_beyond_the_end_and_a_file_that_is_no_video(
    world: Any, head: Head, tmp_path: Path
) -> None:
    with pytest.raises(VideoError, match="frames are shown from"):
        head.attention(world.videos[0], start=50)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoError, match=r"text\.mp4"):
        head.attention(tmp_path / "text.mp4")


def test_a_folder_of_frames(world: Any, head: Head, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 40, 30, 3), np.uint8)
    for k, frame in enumerate(noise):
        Image.fromarray(frame).save(tmp_path / f"{k:03d}.png")
    maps = head.attention(tmp_path)
    assert maps.video.frames.shape == (4, 40, 30, 3)
    assert maps.video.box == pytest.approx((5.0, 0.0, 30.0, 30.0), abs=1)
    assert np.isnan(maps.video.times).all()
    with pytest.raises(UsageError, match="fps"):
        head.attention(tmp_path, fps=-1)
    assert head.attention(tmp_path, fps=2, start=1).video.times.min() == 1


def test_frames_far_apart_are_said(world: Any, head: Head, tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    for k in range(8):
        Image.new("RGB", (32, 32), (k, 0, 0)).save(tmp_path / "f" / f"{k:03d}.png")
    maps = head.attention(tmp_path / "f", fps=0.02)
    assert "100 s lie between" in maps.remarks[0]


def test_queries_without_an_image_need_no_image_tower(world: Any) -> None:
    run_ = world.run("shared", "text")
    maps = load_head(run_, weights={"video": world.weights["video"]}).attention(world.videos[0])
    assert maps.image is None
    assert maps.remarks == ()


def test_patch_tokens_have_places_of_their_own(world: Any) -> None:
    """With patch pooling a query's weight on one token lies on that patch alone."""
    from msq.extract.encode_watched import WatchedTokens
    from msq.extract.encoders import load_video_encoder

    encoder = load_video_encoder("timesformer", world.weights["video"], pooling="patch")
    clip = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
    watched = WatchedTokens(encoder, clip, through_encoder=False)
    rows = torch.zeros(1, 65)
    rows[0, 1 + 9 * 4 + 2] = 1  # patch 9, row 2 and column 1, of frame 2
    assert watched.heat(rows)[0][0].nonzero().tolist() == [[2, 2, 1]]


@pytest.mark.parametrize("name", ["flipping_a_pancake.mkv", "test.avi", "v_ZNVhz7ctTq0.mp4"])
def test_real_clips(shared: Path, world: Any, head: Head, name: str) -> None:
    file = shared / "clips" / name
    if not file.exists():
        pytest.skip(f"no {name}")
    maps = head.attention(file, start=1, end=4)
    assert np.abs(maps.heat.sum((1, 2, 3)) + maps.elsewhere - 1).max() <= 1e-5
    top, left, height, width = maps.video.box
    frame = maps.video.frames.shape[1:3]
    assert height == pytest.approx(min(frame), abs=0.5)
    assert width == pytest.approx(min(frame), rel=0.02)
    assert top + height / 2 == pytest.approx(frame[0] / 2, rel=0.02)
    assert left + width / 2 == pytest.approx(frame[1] / 2, rel=0.02)


# --- pictures -------------------------------------------------------------------------------------


def test_the_colour_map_rises_in_lightness() -> None:
    srgb = colours(np.linspace(0, 1, 101, dtype=np.float32)) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]  # CIE 1976 L*
    light = np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)
    steps = np.diff(light)
    assert steps.min() > 0.3  # of 0.9 on average: no level looks like the next
    assert light[0] < 10
    assert light[-1] > 90
    assert tuple(colours(np.float32(0))) == STOPS[0]
    assert tuple(colours(np.float32(1))) == STOPS[-1]


def test_what_was_cut_off_has_no_colour_and_is_dark() -> None:
    frame = np.full((60, 100, 3), (200, 120, 40), np.uint8)
    level = np.zeros((2, 2), np.float32)
    level[0, 1] = 1  # the upper right quarter of the square
    lit = overlay(frame, level, (0.0, 20.0, 60.0, 60.0), height=120).astype(int)
    assert lit.shape == (120, 200, 3)
    outside = np.concatenate([lit[:, :38], lit[:, 162:]], axis=1)
    assert np.ptp(outside, axis=-1).max() == 0
    assert outside.max() < 60
    corners = {"right": lit[5, 155], "left": lit[5, 45], "low": lit[115, 155]}
    assert corners["right"].min() > 140  # near the last stop, which is almost white
    assert corners["right"].sum() > 1.5 * corners["left"].sum()
    assert corners["right"].sum() > 1.5 * corners["low"].sum()
    assert np.ptp(corners["left"]) > 5  # dark violet over grey
    whole = overlay(frame, None, (0.0, 20.0, 60.0, 60.0), height=120)
    assert np.array_equal(whole[60, 100], frame[0, 0])


def test_levels_share_one_scale_over_the_frames_and_do_not_blow_up_what_is_even() -> None:
    heat = np.full((2, 2, 2), 0.1, np.float32)
    heat[1, 0, 0] = 0.3
    found = levels(heat)
    assert found.min() == 0
    assert found[1, 0, 0] == 1
    assert found[0].max() == 0
    nearly = np.full((2, 2, 2), 0.125, np.float32)
    nearly[0, 0, 0] *= 1.01
    assert levels(nearly).max() < 0.05


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [20, 63, 200])
def test_words_under_upright_frames_do_not_run_into_each_other(width: int) -> None:
    whole = strip([np.zeros((112, width, 3), np.uint8)] * 3, ["123.56 s · 12.5%"] * 3)
    pixels = np.asarray(whole)
    column = (whole.width + 4) // 3
    first, second, third = (pixels[:, k * column : (k + 1) * column - 4] for k in range(3))
    assert np.array_equal(first, second)
    assert np.array_equal(second, third)
    assert (pixels[:, column - 4 : column] == 255).all()
    assert (first[:112] == 0).all(axis=(0, 2)).sum() == width


def test_a_page_is_one_file_with_words_for_every_picture(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new folder" / "look.html"
    video = world.videos[0]
    assert run("attention", video, "--run", world.run("text"), "--out", out, *where(world)) == 0
    text = out.read_text(encoding="utf-8")
    pictures = re.findall(r'<img class="strip" alt="([^"]+)" src="data:image/jpeg;base64,([^"]+)"',
                          text)  # fmt: skip
    assert len(pictures) == text.count("<img") == 6  # frames, two encoders, three classes
    for alt, data in pictures:
        assert len(alt) > 15
        assert Image.open(io.BytesIO(base64.b64decode(data))).width > 400
    assert all(any(alt.find(c) >= 0 for alt, _ in pictures) for c in CLASSES)
    assert "<script" not in text
    assert "http" not in text
    assert "no proof that a score rests on it" in text
    said = capsys.readouterr()
    assert "frame with most" in said.out
    assert str(out) in said.err.replace("\n", "")


def test_a_picture_has_a_row_for_each(world: Any, tmp_path: Path) -> None:
    every, one = tmp_path / "a.png", tmp_path / "b.png"
    command = ("attention", world.videos[0], "--run", world.run("text"), *where(world))
    assert run(*command, "--out", every) == 0
    assert run(*command, "--out", one, "--top", 1) == 0
    with Image.open(every) as more, Image.open(one) as fewer:
        assert more.format == "PNG"
        assert more.size[0] == fewer.size[0]
        assert more.size[1] - fewer.size[1] == 2 * (112 + 18 + 8)


def test_a_folder_takes_page_picture_and_arrays(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "looks"
    video = world.videos[1]
    assert run("attention", video, "--run", world.run("text"), "--out", out, *where(world)) == 0
    assert sorted(p.name for p in out.iterdir()) == [f"video 1.{x}" for x in ("html", "npz", "png")]
    with np.load(out / "video 1.npz", allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays}
    maps = load_head(world.run("text"), weights=world.weights).attention(video)
    assert found["labels"].tolist() == list(maps.labels)
    assert np.abs(found["heat"] - maps.heat).max() <= 1e-6
    assert found["image_heat"].shape == (3, 4, 4)


def test_json_prints_the_numbers_alone(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    video = world.videos[0]
    assert run("attention", video, "--run", world.run("text"), "--labels", "dog run,bird walk",
               "--json", "--start", 0.1, *where(world)) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    head = load_head(world.run("text"), weights=world.weights)
    maps = head.attention(video, ["dog run", "bird walk"], start=0.1)
    assert [p["label"] for p in found["predictions"]] == list(maps.labels)
    first = found["predictions"][0]
    assert first["score"] == pytest.approx(float(maps.scores[0]), abs=1e-6)
    assert first["frames"] == pytest.approx(maps.heat[0].sum((1, 2)).tolist(), abs=1e-6)
    assert sum(first["frames"]) + first["elsewhere"] == pytest.approx(1, abs=1e-5)
    assert sum(first["tokens"]) == pytest.approx(1, abs=1e-5)
    assert found["patches"] == [4, 4]
    assert found["video"]["times"] == pytest.approx(maps.video.times.tolist())
    assert found["video"]["box"] == [0.0, 16.0, 64.0, 64.0]
    assert len(found["image"]["frames"]) == 3
    assert found["written"] == []


@pytest.mark.parametrize(
    ("start", "end", "said"),
    [
        (None, None, "a.mp4: runs/a"),
        (2.0, 6.5, "a.mp4, 2 s to 6.5 s: runs/a"),
        (None, 6.0, "a.mp4, 0 s to 6 s: runs/a"),
        (600.0, None, "a.mp4, 600 s to the end: runs/a"),
    ],
)
def test_a_title_names_the_part(start: float | None, end: float | None, said: str) -> None:
    assert title(Path("videos/a.mp4"), Path("runs/a"), start, end) == said


@pytest.mark.parametrize(
    ("name", "made", "said"),
    [
        ("look.jpg", None, "ends in .html or .png, or a folder, found .jpg"),
        ("look.png", "folder", "a place for a file, found a folder"),
        ("look", "file", "expected a folder, found a file"),
    ],
)
def test_places_that_cannot_be_written_to(
    world: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    made: str | None,
    said: str,
) -> None:
    out = tmp_path / name
    if made == "folder":
        out.mkdir()
    elif made == "file":
        out.write_text("")
    assert run("attention", tmp_path / "no.mp4", "--run", tmp_path / "none", "--out", out) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_head_only_for_any_encoder(world: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "h.html"
    assert run("attention", world.videos[0], "--run", world.run("text"), "--head-only",
               "--out", out, "--json", *where(world)) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert found["video"]["frames"] is None
    assert found["image"] is None
    assert "What the encoders look at" not in out.read_text(encoding="utf-8")


def test_a_video_that_cannot_be_read_fails(world: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    out = tmp_path / "o.png"
    assert run("attention", tmp_path / "text.mp4", "--run", world.run("text"), "--out", out,
               *where(world)) == 1  # fmt: skip
    assert "text.mp4" in capsys.readouterr().err
    assert not out.exists()
