"""Hockey on a fixture in the true format; the real files are not to be had."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msq.errors import DatasetError, UsageError
from msq.extract.datasets.hockey import ADAPTER, CLASSES, VIDEOS, read_hockey
from msq.extract.decode_pool import DecodeTask, Picture, decode
from msq.extract.video import decode_all, decode_clip

FRAMES = 95


def label_text(frames: int = FRAMES, on: dict[int, set[int]] | None = None, end="\n") -> str:
    """12 columns of 0 and 1 for each frame; `on` has the classes of some frames."""
    rows = []
    for frame in range(frames):
        lit = (on or {}).get(frame, set())
        rows.append(",".join("1" if k in lit else "0" for k in range(12)) + end)
    return "".join(rows)


@pytest.fixture
def root(tmp_path):
    """Label files of four of the 36 videos: parts 5 and 6 of two groups."""
    for name in ("period1-1-5-gray", "period1-2-5-gray", "period3-1-6-gray", "period3-2-6-gray"):
        text = label_text(on={29: {5}, 30: {0, 11}, 94: {3}}, end="\r\n")
        (tmp_path / f"{name}-label.txt").write_bytes(text.encode())
    return tmp_path


def grey_frames(folder: Path, frames: int = FRAMES) -> None:
    folder.mkdir(parents=True)
    for k in range(frames):
        Image.new("L", (12, 8), 2 * k).save(folder / f"{k + 1:05d}.png")


def test_clips_of_30_frames_every_10_in_training_and_every_45_in_test(root):
    data = read_hockey(root)
    assert (data.task, data.classes) == ("multilabel", CLASSES)
    train = [c for c in data.clips if c.split == "train"]
    test = [c for c in data.clips if c.split == "test"]
    assert [c.id for c in train[:7]] == [
        f"period1-1-5-gray#f{k}-{k + 30}" for k in range(0, 70, 10)
    ]
    assert [c.id for c in test] == [
        f"period3-{g}-6-gray#f{k}-{k + 30}" for g in (1, 2) for k in (0, 45)
    ]
    assert len(train) == 14
    assert {c.path.stem for c in test} == {"period3-1-6-gray", "period3-2-6-gray"}


def test_labels_are_the_or_over_the_frames_of_the_clip(root):
    labels = {c.id: c.labels for c in read_hockey(root).clips}
    assert labels["period1-1-5-gray#f0-30"] == (5,)
    assert labels["period1-1-5-gray#f10-40"] == (0, 5, 11)
    assert labels["period1-1-5-gray#f30-60"] == (0, 11)
    assert labels["period1-1-5-gray#f60-90"] == ()
    # the authors' 16 frames of 30 are 0 2 4 … 14 15 17 … 29: frame 20 of the clip is not shown
    sampled = {c.id: c.labels for c in read_hockey(root, target="16").clips}
    assert sampled["period1-1-5-gray#f10-40"] == (5,)
    assert sampled["period1-1-5-gray#f0-30"] == (5,)


def test_another_test_part_moves_its_videos_out_of_training(root):
    data = read_hockey(root, test_part=5)
    assert {c.path.stem for c in data.clips if c.split == "test"} == {
        *("period1-1-5-gray", "period1-2-5-gray"),
    }
    assert not {c.path for c in data.clips if c.split == "test"} & {
        c.path for c in data.clips if c.split == "train"
    }


def test_a_cut_of_a_frame_folder_decodes_exactly_its_30_frames(root):
    grey_frames(root / "period1-1-5-gray")
    for fps in (30.0, 29.97, 7.0):
        data = read_hockey(root, fps=fps)
        for clip in data.clips[:7]:
            assert clip.fps == fps
            task = DecodeTask(
                *(0, clip.path, clip.start, clip.end),
                pictures=(Picture(30, "uniform", 8, "torch"),),
                fps=clip.fps,
            )
            shown = decode(task)
            assert shown.reason is None
            first = int(clip.id.split("#f")[1].split("-")[0])
            grey = shown.frames[0][:, 0, 0, 0].astype(int) // 2
            assert grey.tolist() == list(range(first, first + 30))


def test_a_cut_of_an_avi_decodes_exactly_its_30_frames(root, media):
    file = root / "period1-2-5-gray.avi"
    media.encode(file, FRAMES, size=(48, 32), fps=Fraction(30000, 1001), codec="mpeg4")
    everything, _ = decode_all(file)
    assert len(everything) == FRAMES
    clips = [c for c in read_hockey(root).clips if c.path == file]
    for clip, first in zip(clips, range(0, 70, 10), strict=True):
        # At 29.97 a second, 30 / fps is later than frame 30 by the last bit of a float.
        assert clip.fps is None
        shown = decode_clip(file, 30, start=clip.start, end=clip.end)
        np.testing.assert_array_equal(shown.frames, everything[first : first + 30])


def test_the_survey_counts_what_is_there_and_what_does_not_fit(root):
    grey_frames(root / "frames" / "period1-1-5-gray", 90)
    grey_frames(root / "frames" / "period1-2-5-gray")
    (root / "frames" / "period1-2-5-gray" / "00050.png").unlink()
    grey_frames(root / "frames" / "period2-2-2-gray")
    (root / "period3-1-6-gray-label.txt").write_text(label_text(29))
    (root / "period3-2-6-gray.avi").write_bytes(b"not a video")
    survey = ADAPTER.survey(root, {})
    assert survey.oddities == {
        **{"label_frame_mismatch": 1, "frame_number_gaps": 1, "videos_without_labels": 1},
        **{"too_short": 1, "unreadable_videos": 1, "absent_videos": 31, "skipped": 3},
    }
    assert survey.published["videos"] == len(VIDEOS) == 36
    assert {k: v.clips for k, v in survey.splits.items()} == {"train": 7, "test": 2}
    assert survey.splits["train"].unlabelled == 3
    reasons = dict(read_hockey(root).skipped)
    assert "period2-2-2-gray-label.txt" in reasons["period2-2-2-gray"]
    assert "gaps" in reasons["period1-2-5-gray"]


def test_annotations_alone_count_videos_as_missing(root):
    survey = ADAPTER.survey(root, {})
    assert survey.missing == 4
    assert survey.missing_examples[0] == "period1-1-5-gray.avi"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (label_text().replace(",", " "), "line 1: expected 12 comma-separated 0 or 1"),
        (label_text(3) + "\n" + label_text(40), "line 4: expected a line for every frame"),
        ("0,1,2\n", "found '0,1,2'"),
        ("", "empty file"),
    ],
)
def test_label_files_of_another_form_are_refused(root, text, words):
    (root / "period1-1-5-gray-label.txt").write_text(text)
    with pytest.raises(DatasetError, match=words):
        read_hockey(root)


def test_wrong_roots_and_values_are_refused(root, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"period1-1-1-gray-label.txt.*found none; unpack"):
        read_hockey(tmp_path / "empty")
    with pytest.raises(UsageError, match="test_part=7"):
        read_hockey(root, test_part=7)
    with pytest.raises(UsageError, match="target=some: expected clip or a number"):
        read_hockey(root, target="some")
    with pytest.raises(UsageError, match="fps: expected a number above 0"):
        read_hockey(root, fps=0)
