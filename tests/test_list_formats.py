"""Kinetics, mmaction2 and ActivityNet lists: true formats, real JSON and CSV."""

import json
from pathlib import Path

import pytest
from PIL import Image

from msq.errors import DatasetError, UsageError
from msq.extract.datasets import activitynet, kinetics, mmaction2
from msq.extract.datasets.activitynet import read_activitynet
from msq.extract.datasets.kinetics import read_kinetics
from msq.extract.datasets.mmaction2 import read_mmaction2
from msq.extract.decode_pool import DecodeTask, Picture, decode


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def rows(data):
    return [(c.id, c.labels, c.split) for c in data.clips]


# --- Kinetics and SlowFast lists ----------------------------------------------------------------


def test_slowfast_lists_are_split_from_the_right_and_paths_keep_their_blanks(tmp_path):
    write(tmp_path / "train.csv", "ab seiling/x y.mp4 0\r\nb.mp4 2 \r\n\r\n")
    write(tmp_path / "val.csv", "c.mp4 1\n")
    data = read_kinetics(tmp_path)
    assert data.classes == ("class 0", "class 1", "class 2")
    assert rows(data) == [
        ("ab seiling/x y", (0,), "train"),
        ("b", (2,), "train"),
        ("c", (1,), "val"),
    ]
    assert "--option classes=FILE" in kinetics.ADAPTER.survey(tmp_path, {}).notes[0]


def test_commas_are_told_from_the_file_and_names_may_stand_for_numbers(tmp_path):
    write(tmp_path / "test.csv", "brush_hair/a, b (1).avi,1\nc.avi,cartwheel\n")
    write(tmp_path / "label_map.txt", "wave\ncartwheel\n")
    data = read_kinetics(tmp_path)
    assert rows(data) == [("brush_hair/a, b (1)", (1,), "test"), ("c", (1,), "test")]
    assert data.clips[0].path == tmp_path / "brush_hair" / "a, b (1).avi"


def test_absolute_paths_leave_no_machine_in_the_ids(tmp_path):
    write(tmp_path / "train.csv", "/data/k400/x/a.mp4 0\n/data/k400/y/a.mp4 1\n")
    data = read_kinetics(tmp_path)
    assert [c.id for c in data.clips] == ["x/a", "y/a"]
    assert data.clips[0].path == Path("/data/k400/x/a.mp4")


def test_the_official_csv_names_videos_by_id_and_seconds(tmp_path):
    header = "label,youtube_id,time_start,time_end,split\n"
    write(
        tmp_path / "kinetics_train.csv",
        header + '"testifying","---QUuC4vJs",84,94,train\nair drumming,-0abc,5.0,15,train\n',
    )
    write(tmp_path / "kinetics_val.csv", header + "air drumming,_1,0,10,validate\n")
    write(tmp_path / "kinetics_test.csv", "youtube_id,time_start,time_end,split\nq,1,11,test\n")
    write(tmp_path / "train/testifying/---QUuC4vJs_000084_000094.mp4", "x")
    write(tmp_path / "videos/air_drumming/-0abc_000005_000015.mp4", "x")
    data = read_kinetics(tmp_path)
    assert data.classes == ("air drumming", "testifying")
    assert rows(data) == [
        ("---QUuC4vJs_000084_000094", (1,), "train"),
        ("-0abc_000005_000015", (0,), "train"),
        ("_1_000000_000010", (0,), "val"),
        ("q_000001_000011", (), "test"),
    ]
    assert [c.path.exists() for c in data.clips] == [True, True, False, False]
    survey = kinetics.ADAPTER.survey(tmp_path, {})
    assert survey.missing == 2
    assert survey.oddities == {"unlabelled": 1}
    assert survey.splits["test"].unlabelled == 1


def test_unusable_lines_of_a_list_are_left_out_alone(tmp_path):
    write(tmp_path / "train.csv", "a.mp4 0\nnothing\nb.mp4 x\na.mp4 1\n")
    data = read_kinetics(tmp_path)
    assert [where for where, _ in data.skipped] == [
        *("train.csv line 2", "train.csv line 3", "train.csv line 4"),
    ]
    assert "a is in train already" in data.skipped[2][1]


@pytest.mark.parametrize(
    ("files", "options", "error", "words"),
    [
        ({}, {}, DatasetError, r"expected train.csv or val.csv, found none; name the lists"),
        ({"train.csv": "a.mp4;0\n"}, {}, DatasetError, r"line 1: expected `path label`.*delimiter"),
        ({"train.csv": "a.mp4 0\n"}, {"delimiter": "comma"}, DatasetError, r"found 'a.mp4 0'"),
        ({"train.csv": ""}, {}, DatasetError, "empty file"),
        ({"train.csv": "a 0\n", "train_b.csv": "a 0\n"}, {}, UsageError, r"--option train=FILE"),
        ({"val.csv": "a 0\n"}, {"val": "v.csv"}, DatasetError, r"v.csv: expected the list"),
        (
            {"train.csv": "a.mp4 399\n", "labels.csv": "id,name\n0,wave\n1,walk\n"},
            {},
            DatasetError,
            r"label 399 is none of the 2 classes of .*labels.csv: is it the class file of another",
        ),
        (
            {"train.csv": "original_vido_id video_id frame_id path labels\na 1 1 a/1.jpg 2\n"},
            {},
            DatasetError,
            "a line for every frame",
        ),
        (
            {"train.csv": "label;youtube_id;time_start;time_end;split\nx;y;1;2;train\n"},
            {},
            DatasetError,
            "comma-separated columns",
        ),
    ],
)
def test_lists_of_another_form_are_refused_with_the_way_to_mend_them(
    tmp_path, files, options, error, words
):
    for name, text in files.items():
        write(tmp_path / name, text)
    with pytest.raises(error, match=words):
        read_kinetics(tmp_path, **options)


# --- mmaction2 lists ----------------------------------------------------------------------------


def test_video_lists_with_several_labels_are_multi_label(tmp_path):
    write(tmp_path / "k_train_list_videos.txt", "some/path a 2.mp4 1 3 5\r\nb.mp4 3 \r\n")
    write(tmp_path / "label_map.txt", "\n".join("abcdef"))
    data = read_mmaction2(tmp_path)
    assert (data.task, data.metric, data.classes) == ("multilabel", "map", tuple("abcdef"))
    assert rows(data) == [("some/path a 2", (1, 3, 5), "train"), ("b", (3,), "train")]


def test_single_label_lists_and_other_delimiters(tmp_path):
    write(tmp_path / "annotations" / "hmdb51_val_split_1_videos.txt", "x, y.mp4,3\nz.mp4,0\n")
    data = read_mmaction2(tmp_path, delimiter=",")
    assert data.task == "singlelabel"
    assert rows(data) == [("x, y", (3,), "val"), ("z", (0,), "val")]


def test_rawframes_lists_give_a_folder_a_length_and_labels(tmp_path):
    write(tmp_path / "train_list_rawframes.txt", "a/v 1 30 2\nb/v 0 1\nc 40 2 4\n0007 9 5\n")
    write(tmp_path / "val_list_rawframes.txt", "d 12 1\n")
    (tmp_path / "rawframes/c").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "rawframes/c/img_00001.jpg")
    data = read_mmaction2(tmp_path)
    assert rows(data) == [
        ("a/v", (2, 30), "train"),
        ("c", (2, 4), "train"),
        ("0007", (5,), "train"),
        ("d", (1,), "val"),
    ]
    assert data.skipped == (("train_list_rawframes.txt line 2", "b/v has 0 frames"),)
    assert data.clips[1].path == tmp_path / "rawframes/c"
    assert (data.clips[1].start, data.clips[1].fps) == (None, None)
    single = read_mmaction2(tmp_path, task="singlelabel", train="train_list_rawframes.txt")
    assert rows(single)[0] == ("a/v 1", (2,), "train")
    counted = mmaction2.ADAPTER.survey(tmp_path, {}).oddities
    assert counted == {"frame_count_mismatch": 1, "zero_frames": 1, "skipped": 1}


def test_rawframes_with_offsets_decode_exactly_their_frames(tmp_path):
    write(tmp_path / "train.txt", "v 0 5 1\nv 7 4 0\n")
    (tmp_path / "v").mkdir()
    for k in range(1, 13):
        Image.new("L", (8, 8), 20 * k).save(tmp_path / "v" / f"img_{k:05d}.png")
    data = read_mmaction2(tmp_path, kind="rawframes_offset", train="train.txt", fps="29.97")
    assert [c.id for c in data.clips] == ["v#f0-5", "v#f7-11"]
    for clip, first, length in zip(data.clips, (0, 7), (5, 4), strict=True):
        picture = (Picture(length, "uniform", 8, "torch"),)
        task = DecodeTask(0, clip.path, clip.start, clip.end, picture, clip.fps)
        grey = decode(task).frames[0][:, 0, 0, 0] // 20
        assert grey.tolist() == list(range(first + 1, first + length + 1))


def test_optical_flow_beside_the_frames_is_passed_over(tmp_path):
    write(tmp_path / "train_rawframes.txt", "v 1 0\nw 2 0\n")
    for name in ("v/img_00001.jpg", "v/flow_x_00001.jpg", "w/img_00001.jpg", "w/flow_y_00001.jpg"):
        write(tmp_path / name, "x")
    data = read_mmaction2(tmp_path)
    assert [c.id for c in data.clips] == ["v", "w"]
    assert mmaction2.ADAPTER.survey(tmp_path, {}).oddities["frame_count_mismatch"] == 1


@pytest.mark.parametrize(
    ("name", "text", "options", "error", "words"),
    [
        ("train_videos.txt", "a.mp4,3\n", {}, DatasetError, r"expected `path.mp4 label …`.*delim"),
        ("train_rawframes.txt", "a 3\n", {}, DatasetError, r"expected `folder total label …`"),
        ("train_videos.txt", "a.mp4 3\n", {"kind": "rawframes"}, DatasetError, "found none"),
        ("train.txt", "a.mp4 3\n", {"kind": "frames"}, UsageError, "kind=frames: expected auto"),
    ],
)
def test_mmaction2_lists_of_another_form_are_refused(tmp_path, name, text, options, error, words):
    write(tmp_path / name, text)
    with pytest.raises(error, match=words):
        read_mmaction2(tmp_path, **options)


def test_lists_of_videos_beside_lists_of_frames_need_to_be_named(tmp_path):
    write(tmp_path / "x_train_split_1_videos.txt", "a.mp4 0\n")
    write(tmp_path / "x_train_split_1_rawframes.txt", "a 30 0\n")
    with pytest.raises(UsageError, match=r"x_train_split_1_rawframes.txt, x_train_split_1_videos"):
        read_mmaction2(tmp_path)
    assert [c.id for c in read_mmaction2(tmp_path, kind="rawframes").clips] == ["a"]


# --- ActivityNet JSON ---------------------------------------------------------------------------


def entry(subset, *annotations, **more):
    pairs = [{"segment": segment, "label": label} for segment, label in annotations]
    return {"subset": subset, "annotations": pairs, **more}


@pytest.fixture
def anet(tmp_path):
    """The database form with strings as times, two-label segments, ends past the video."""
    database = {
        "a1": entry(
            "training", (["1.5", "4.0"], "Diving"), ([9, 30], "Waving"), duration=20.0, fps=25.0
        ),
        "b2": entry("Validation", ([1, 4], "Diving"), ([1, 4], "CliffDiving"), duration=10),
        "c3": entry("testing", duration=5),
        "d4": entry(
            "Test",
            ([4, 2], "Diving"),
            ([3, 3], "Diving"),
            ([50, 60], "Waving"),
            ([1, 2], "Ambiguous"),
        ),
    }
    database["d4"]["duration"] = 30.5
    write(tmp_path / "anet.json", json.dumps({"version": "1.3", "database": database}))
    return tmp_path


def test_segments_become_clips_and_ends_are_cut_at_the_video_length(anet):
    data = read_activitynet(anet)
    assert data.classes == ("CliffDiving", "Diving", "Waving")
    assert (data.task, data.metric) == ("singlelabel", "top1")
    assert rows(data) == [
        ("a1#1.5-4", (1,), "train"),
        ("a1#9-20", (2,), "train"),
        ("b2#1-4/Diving", (1,), "val"),
        ("b2#1-4/CliffDiving", (0,), "val"),
    ]
    assert dict(data.skipped) == {
        "d4#1-2": "ambiguous, in no class",
        "c3": "no segment: take --option clips=videos to keep it",
        "d4#50-60": "begins after 30.5 s, the video's end",
        "d4#4-2": "d4: the start is not before the end",
        "d4#3-3": "d4: the start is not before the end",
    }
    assert activitynet.ADAPTER.survey(anet, {}).oddities == {
        **{"string_times": 1, "end_past_length": 1, "start_past_length": 1, "reversed": 2},
        **{"ambiguous": 1, "double_labelled": 1, "without_segments": 1, "skipped": 5},
    }


def test_distinct_segments_and_whole_videos_are_multi_label(anet):
    dedup = read_activitynet(anet, view="dedup")
    assert rows(dedup)[2:] == [("b2#1-4", (0, 1), "val")]
    assert dedup.task == "multilabel"
    videos = read_activitynet(anet, clips="videos")
    assert rows(videos) == [
        ("a1", (1, 2), "train"),
        ("b2", (0, 1), "val"),
        ("c3", (), "test"),
        ("d4", (1, 2), "test"),
    ]
    assert videos.clips[0].intervals == ((1, 1.5, 4.0), (2, 9.0, 30.0))
    assert videos.clips[0].start is None


def test_videos_go_by_their_id_with_or_without_v(anet):
    write(anet / "videos" / "v_a1.mp4", "x")
    (anet / "b2").mkdir()
    with pytest.raises(UsageError, match="b2 is a folder of frames"):
        read_activitynet(anet)
    data = read_activitynet(anet, fps="24")
    assert data.clips[0].path == anet / "videos" / "v_a1.mp4"
    assert (data.clips[0].fps, data.clips[2].fps) == (None, 24.0)
    assert activitynet.ADAPTER.survey(anet, {"clips": "videos"}).missing == 2


def test_label_ids_fix_the_order_of_the_classes(tmp_path):
    database = {"v": entry("train", ([1, 2], "b"), ([3, 4], "a"))}
    for annotation, number in zip(database["v"]["annotations"], (0, 1), strict=True):
        annotation["label_id"] = number
    write(tmp_path / "thumos14.json", json.dumps({"version": "x", "database": database}))
    assert read_activitynet(tmp_path).classes == ("b", "a")
    classes = write(tmp_path / "classes.txt", "a\nb\nc\n")
    assert read_activitynet(tmp_path, classes="classes.txt").classes == ("a", "b", "c")
    classes.write_text("wave\n")
    with pytest.raises(DatasetError, match=r"found no 'a': is it the class file of another"):
        read_activitynet(tmp_path, classes="classes.txt")


def test_bmn_files_take_their_split_from_their_name_and_their_rate_from_rfps(tmp_path):
    video = {
        **{"duration_second": 82.73, "duration_frame": 2067, "feature_frame": 2064},
        **{"fps": 24.9, "rfps": 25.0},
        "annotations": [{"segment": [6.2, 90.0], "label": "Drinking"}],
    }
    write(tmp_path / "anet_anno_val.json", json.dumps({"v_x": video}))
    write(tmp_path / "anet_anno_train.json", json.dumps({"v_y": video}))
    with pytest.raises(UsageError, match=r"found anet_anno_train.json, anet_anno_val.json"):
        read_activitynet(tmp_path)
    (tmp_path / "v_x").mkdir()
    data = read_activitynet(tmp_path, annotations="anet_anno_train.json,anet_anno_val.json")
    assert rows(data) == [("v_y#6.2-82.73", (0,), "train"), ("v_x#6.2-82.73", (0,), "val")]
    assert [c.fps for c in data.clips] == [None, 25.0]


@pytest.mark.parametrize(
    ("name", "text", "options", "error", "words"),
    [
        ("x.txt", "", {}, DatasetError, "found none; name it with --option annotations=FILE"),
        ("x.json", '{"database": ', {}, DatasetError, "expected JSON, found something else"),
        ("x.json", "[1, 2]", {}, DatasetError, "found a list; a Charades JSON"),
        ("x.json", '{"46GP8": {"subset": "testing", "actions": []}}', {}, DatasetError, "46GP8"),
        ("x.json", '{"v": {"annotations": []}}', {}, UsageError, "--option subset=train"),
        ("x.json", '{"v": {"annotations": []}}', {"subset": "test"}, DatasetError, "no classes"),
        ("x.csv", "video;type\n", {"annotations": "x.csv"}, DatasetError, "comma-separated"),
        ("x.json", "{}", {"annotations": "y.json"}, DatasetError, "y.json: expected an annotation"),
    ],
)
def test_annotations_of_another_form_are_refused(tmp_path, name, text, options, error, words):
    write(tmp_path / name, text)
    with pytest.raises(error, match=words):
        read_activitynet(tmp_path, **options)


def real(shared: Path) -> Path:
    folder = shared / "annotations" / "thumos14"
    if not folder.is_dir():
        pytest.skip("no real THUMOS14 annotations")
    return folder


def test_the_real_thumos_json_has_3311_test_segments_written_as_strings(shared):
    root = real(shared)
    data = read_activitynet(root, annotations="thumos_gt.json")
    splits = [c.split for c in data.clips]
    assert (splits.count("train"), splits.count("test"), data.skipped) == (3007, 3311, ())
    assert len(data.classes) == 20
    assert len({c.path.name for c in data.clips if c.split == "test"}) == 210
    survey = activitynet.ADAPTER.survey(root, {})
    assert survey.oddities == {"string_times": 6318, "double_labelled": 143 + 218}


def test_the_real_validation_csv_has_3007_segments_and_89_ambiguous_ones(shared):
    data = read_activitynet(real(shared), annotations="val_Annotation.csv")
    assert len(data.clips) == 3007
    assert len(data.skipped) == 89
    assert {c.split for c in data.clips} == {"val"}
    dedup = read_activitynet(real(shared), annotations="val_Annotation.csv", view="dedup")
    assert sum(len(c.labels) > 1 for c in dedup.clips) == 143


def test_the_error_policy_stops_at_what_cannot_be_used_and_not_at_what_is_left_out_by_rule(anet):
    write(anet / "train.csv", "a.mp4 0\nnothing\n")
    with pytest.raises(DatasetError, match=r"train.csv line 2: expected a path.*1 such items"):
        read_kinetics(anet, policy="error")
    with pytest.raises(DatasetError, match=r"d4#50-60: begins after 30.5 s.*policy=skip"):
        read_activitynet(anet, policy="error")
    database = {"v": entry("test", ([1, 2], "Ambiguous"), ([1, 2], "Diving")), "w": entry("test")}
    write(anet / "anet.json", json.dumps({"database": database}))
    assert rows(read_activitynet(anet, policy="error")) == [("v#1-2", (0,), "test")]
