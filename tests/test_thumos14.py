"""THUMOS14 on a fixture in the true format and on the real annotation files."""

from pathlib import Path

import pytest

from msq.errors import DatasetError, UsageError
from msq.extract.datasets.thumos14 import ADAPTER, CLASSES, read_thumos14

CLIFF = "video_test_0000131  19.3 23.0\nvideo_test_0000131  40.0 44.5\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


@pytest.fixture
def root(tmp_path):
    """20 class files with two blanks after the name, Ambiguous, the class list."""
    folder = tmp_path / "annotation"
    for k, name in enumerate(CLASSES):
        text = f"video_test_{k:07d}  1.5 {k + 3}.0\n"
        if name in ("CliffDiving", "Diving"):
            text = CLIFF
        if name == "Billiards":
            text = "video_test_0000324  49.2 53.5\r\nvideo_test_0000324  60.0 58.0 \r\n\r\n"
        write(folder / f"{name}_test.txt", text)
    write(folder / "Ambiguous_test.txt", "video_test_0001292  0.0 1.4\n")
    write(folder / "detclasslist.txt", "".join(f"{k} {n}\n" for k, n in enumerate(CLASSES, 7)))
    return tmp_path


def real(shared: Path) -> Path:
    folder = shared / "annotations" / "thumos14"
    if not folder.is_dir():
        pytest.skip("no real THUMOS14 annotations")
    return folder


def test_the_official_view_has_a_row_for_each_segment_and_class_file(root):
    data = read_thumos14(root)
    assert (data.task, data.metric, data.classes) == ("singlelabel", "top1", CLASSES)
    assert len(data.clips) == 17 + 2 + 2 + 1
    clip = next(c for c in data.clips if c.path.stem == "video_test_0000324")
    assert (clip.id, clip.start, clip.end) == ("video_test_0000324#49.2-53.5", 49.2, 53.5)
    assert clip.labels == (CLASSES.index("Billiards"),)
    both = [c for c in data.clips if c.path.stem == "video_test_0000131"]
    assert [c.id.partition("#")[2] for c in both] == [
        "19.3-23/CliffDiving",
        "40-44.5/CliffDiving",
        "19.3-23/Diving",
        "40-44.5/Diving",
    ]
    assert {len(c.labels) for c in both} == {1}
    assert dict(data.skipped) == {
        "video_test_0001292#0-1.4": "Ambiguous_test.txt line 1: ambiguous, in no class",
        "video_test_0000324#60-58": "Billiards_test.txt line 2: the start is not before the end",
    }


def test_the_dedup_view_has_a_row_for_each_distinct_segment(root):
    data = read_thumos14(root, view="dedup", names="readable")
    assert data.task == "multilabel"
    both = [c for c in data.clips if c.path.stem == "video_test_0000131"]
    assert [c.id for c in both] == ["video_test_0000131#19.3-23", "video_test_0000131#40-44.5"]
    assert [data.classes[k] for k in both[0].labels] == ["Cliff Diving", "Diving"]


def test_the_survey_counts_every_oddity(root):
    write(root / "test_video_info.csv", "video,fps,count\nvideo_test_0000131,25.0,1100\n")
    survey = ADAPTER.survey(root, {})
    assert survey.splits["test"].clips == 22
    assert dict(survey.oddities) == {
        **{"double_labelled": 2, "reversed": 1, "ambiguous": 1, "videos_without_class": 1},
        **{"end_past_length": 2, "skipped": 2},
    }
    assert survey.missing == 19
    assert "93.51 %" in survey.notes[0]


def test_segments_after_the_end_of_their_video_go_when_asked_for(root):
    write(root / "test_video_info.csv", "video,fps,count\nvideo_test_0000131,10.0,300\n")
    assert len(read_thumos14(root).clips) == 22
    data = read_thumos14(root, past_end="skip")
    assert len(data.clips) == 20
    assert "begins after 30.00 s" in dict(data.skipped)["video_test_0000131#40-44.5"]


def test_ucf101_clips_train_and_part_of_them_is_an_error(root):
    for name in CLASSES:
        write(root / "UCF-101" / name / f"v_{name}_g01_c01.avi", "x")
    (root / "UCF-101" / "Diving" / "v_Diving_g01_c02").mkdir()
    data = read_thumos14(root)
    train = [c for c in data.clips if c.split == "train"]
    assert len(train) == 21
    assert train[0].id == "BaseballPitch/v_BaseballPitch_g01_c01"
    assert (train[0].start, train[0].end, train[0].labels) == (None, None, (0,))
    assert ADAPTER.survey(root, {}).splits["train"].clips == 21
    assert all(c.split == "test" for c in read_thumos14(root, train="none").clips)
    (root / "UCF-101" / "Shotput" / "v_Shotput_g01_c01.avi").unlink()
    (root / "UCF-101" / "Shotput").rmdir()
    with pytest.raises(DatasetError, match=r"found no folder Shotput: unpack UCF101 again"):
        read_thumos14(root)


def test_validation_class_files_train_when_asked_for(root):
    for name in CLASSES:
        write(root / "annotation" / f"{name}_val.txt", "video_validation_0000690  1.0 2.0\n")
    data = read_thumos14(root, train="validation", view="dedup")
    assert [c.id for c in data.clips if c.split == "train"] == ["video_validation_0000690#1-2"]
    assert len(data.clips[0].labels) == 20


def test_videos_and_frame_folders_are_found_and_frames_need_a_rate(root):
    write(root / "TH14_test_set_mp4" / "video_test_0000131.mp4", "x")
    assert ADAPTER.survey(root, {}).missing == 18
    (root / "frames/test/video_test_0000324").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"video_test_0000324 is a folder of frames.*fps="):
        read_thumos14(root)
    clips = {c.path.stem: c for c in read_thumos14(root, fps=29.97).clips}
    assert clips["video_test_0000324"].fps == 29.97
    assert clips["video_test_0000131"].fps is None
    write(root / "test_video_info.csv", "video,fps,count\nvideo_test_0000324,25.0,9000\n")
    clips = {c.path.stem: c for c in read_thumos14(root).clips}
    assert clips["video_test_0000324"].fps == 25.0


def test_a_wrong_root_says_what_belongs_there(tmp_path):
    with pytest.raises(
        DatasetError, match=r"annotation/BaseballPitch_test.txt.*found none; unpack"
    ):
        read_thumos14(tmp_path)
    with pytest.raises(DatasetError, match="found nothing there"):
        read_thumos14(tmp_path / "none")
    with pytest.raises(UsageError, match=r"has no option 'veiw'.*did you mean view"):
        ADAPTER.read(tmp_path, {"veiw": "dedup"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "Shotput_test.txt").unlink(), "found 19; Shotput_test.txt is not there"),
        (lambda f: write(f / "climb_test.txt", "a  1 2\n"), "found 'climb'.*another dataset"),
        (lambda f: write(f / "detclasslist.txt", "1 climb\n"), "detclasslist.*found climb"),
        (lambda f: write(f / "Shotput_test.txt", ""), "empty file: unpack"),
        (lambda f: write(f / "Shotput_test.txt", "video_test_1,1.0,2.0\n"), "separated by blanks"),
        (lambda f: write(f / "Shotput_test.txt", "PK\0\1"), "binary data"),
    ],
)
def test_broken_annotations_are_named_with_the_way_to_mend_them(root, change, words):
    change(root / "annotation")
    with pytest.raises(DatasetError, match=words):
        read_thumos14(root)


def test_a_malformed_line_is_left_out_alone(root):
    file = root / "annotation" / "Shotput_test.txt"
    write(file, "video_test_1  1.0 2.0\nvideo_test_1  soon 2.0\nvideo_test_1  1.0 2.0\n")
    reasons = dict(read_thumos14(root).skipped)
    assert "found 'video_test_1  soon 2.0'" in reasons["Shotput_test.txt line 2"]
    assert "the same segment as Shotput_test.txt line 1" in reasons["video_test_1#1-2"]


def test_the_real_test_set_has_the_published_counts(shared):
    root = real(shared)
    data = read_thumos14(root, train="none")
    assert len(data.clips) == 3358
    assert len(data.skipped) == 99
    assert all("ambiguous" in reason for _, reason in data.skipped)
    counts = [0] * 20
    for clip in data.clips:
        counts[clip.labels[0]] += 1
    assert counts[CLASSES.index("BasketballDunk")] == 488
    assert counts[CLASSES.index("GolfSwing")] == min(counts) == 36
    assert len({c.path.name for c in data.clips}) == 212
    assert len({c.id for c in data.clips}) == 3358
    lengths = sorted(round(c.end - c.start, 6) for c in data.clips)
    assert (lengths[0], lengths[-1]) == (0.2, 86.6)
    distinct = read_thumos14(root, view="dedup", train="none")
    assert len(distinct.clips) == 3140
    pairs = [tuple(data.classes[k] for k in c.labels) for c in distinct.clips if len(c.labels) > 1]
    assert pairs.count(("CliffDiving", "Diving")) == 217
    assert pairs.count(("Shotput", "ThrowDiscus")) == len(pairs) - 217 == 1
    assert len(read_thumos14(root, train="none", past_end="skip").clips) == 3358 - 26


def test_the_real_survey_agrees_with_what_is_published(shared):
    survey = ADAPTER.survey(real(shared), {})
    assert survey.classes == 20
    assert {k: v.clips for k, v in survey.splits.items()} == {"validation": 3007, "test": 3358}
    assert survey.missing == 412
    for name, count in survey.oddities.items():
        assert survey.published.get(name, count) == count, name
    assert survey.oddities["double_labelled"] == 218
    assert survey.oddities["end_past_length"] == 26
    assert survey.oddities["videos_without_class"] == 1


def test_the_real_validation_set_trains_when_ucf101_is_absent(shared):
    data = read_thumos14(real(shared))
    train = [c for c in data.clips if c.split == "train"]
    assert len(train) == 3007
    assert len(data.skipped) == 99 + 89
    with pytest.raises(DatasetError, match="expected UCF101 clips"):
        read_thumos14(real(shared), train="ucf101")
