"""Charades in its official form, as SlowFast's frame lists and as pytorch-i3d's JSON."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from msq.errors import DatasetError, UsageError
from msq.extract.datasets.charades import (
    ADAPTER,
    read_charades,
    read_charades_classes,
    read_charades_lengths,
)
from msq.extract.datasets.charades_json import ADAPTER as JSON_ADAPTER
from msq.extract.datasets.charades_json import read_charades_json

HEADER = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length"
TRAIN = (
    "46GP8,HR43,Kitchen,6,7,Yes,A person cooking.,food;stove,A person cooks.,"
    "c092 11.90 21.20;c147 0.00 12.60,24.83",
    '0IH69,6RE8,Bedroom,6,5,Yes,"A person is leaving, slowly.",book;box,"He said ""go"".",,30.25',
    # reversed, and past the end in both ways
    "00SL4,X1Y2,Kitchen,,,No,s,o,d,c015 18.00 10.00;c018 0.00 9.50;c018 1.00 2.00,8.96",
)
TEST = (
    '"YSKX3","CP6Y","Bedroom","5","6","Yes","two\r\nlines","bed","d","c077 12.10 18.00","31.00"',
    "T5ECU,M7K8,Living room,6,7,Yes,s,o,d,,12.00",
)
NAMES = tuple(f"Doing thing {k}" for k in range(157))


def write(root: Path, *, end: str = "\r\n", train=TRAIN, test=TEST, header=HEADER) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        text = end.join((header, *rows)) + end
        (root / f"Charades_v1_{split}.csv").write_bytes(text.encode())
    write_classes(root)
    return root


def write_classes(root: Path) -> None:
    lines = [f"c{k:03d} {name} \n" for k, name in enumerate(NAMES)]
    (root / "Charades_v1_classes.txt").write_text("".join(lines), encoding="utf-8")


@pytest.mark.parametrize("end", ["\r\n", "\n"], ids=["crlf", "lf"])
def test_the_official_files_are_read_as_written(tmp_path, end):
    data = read_charades(write(tmp_path, end=end))
    assert (data.name, data.task, data.metric) == ("charades", "multilabel", "map")
    assert data.classes == NAMES
    assert data.skipped == ()
    assert [(c.id, c.split, c.labels) for c in data.clips] == [
        ("46GP8", "train", (92, 147)),
        ("0IH69", "train", ()),
        ("00SL4", "train", (15, 18)),
        ("YSKX3", "test", (77,)),
        ("T5ECU", "test", ()),
    ]
    assert data.clips[0].intervals == ((92, 11.9, 21.2), (147, 0.0, 12.6))
    assert data.clips[2].intervals[0] == (15, 18.0, 10.0)
    assert {(c.start, c.end) for c in data.clips} == {(None, None)}


def test_the_survey_counts_every_oddity(tmp_path):
    survey = ADAPTER.survey(write(tmp_path), {})
    assert survey.to_dict()["splits"] == {
        "train": {"clips": 3, "unlabelled": 1},
        "test": {"clips": 2, "unlabelled": 1},
    }
    assert survey.missing == 5
    assert survey.missing_examples[0] == "Charades_v1/46GP8.mp4"
    assert survey.oddities == {
        "end_past_length": 2,
        "end_past_length_train": 2,
        "end_past_length_test": 0,
        "reversed": 1,
        "start_past_length": 1,
        "repeated_class": 1,
        "subjects_in_both": 0,
        "empty_frame_folders": 0,
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("Charades_v1/46GP8.mp4", "Charades_v1_rgb/46GP8/46GP8-000001.jpg"), 0),
        (("Charades_v1_480/46GP8.mp4",), 0),
        (("46GP8.avi",), 0),
        (("Charades_v1_rgb/46GP8/46GP8-000001.jpg",), 0),
        (("46GP8/46GP8-000001.jpg",), "46GP8"),
        (("Charades/Charades_v1_rgb/46GP8/46GP8-000001.jpg",), "Charades/Charades_v1_rgb/46GP8"),
    ],
)
def test_videos_and_frame_folders_are_found_wherever_they_were_unpacked(tmp_path, files, expected):
    root = write(tmp_path)
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    path = read_charades(root).clips[0].path
    found = files[0] if expected == 0 else expected
    assert path == root / (found.rsplit("/", 1)[0] if found.endswith(".jpg") else found)
    survey = ADAPTER.survey(root, {})
    assert survey.missing == 4
    assert survey.notes[0].startswith("1 clips from ")


def test_an_option_prefers_frames_and_gives_them_times(tmp_path):
    root = write(tmp_path)
    for name in ("Charades_v1/46GP8.mp4", "Charades_v1_rgb/46GP8/46GP8-000001.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "Charades_v1_rgb/0IH69").mkdir()
    clips = read_charades(root, media="frames", fps=24).clips
    assert clips[0].path == root / "Charades_v1_rgb/46GP8"
    assert {c.fps for c in clips} == {24.0}
    assert clips[2].path == root / "Charades_v1_rgb/00SL4"
    assert ADAPTER.survey(root, {"media": "frames"}).oddities["empty_frame_folders"] == 1
    assert read_charades_lengths(root)["46GP8"] == 24.83


def test_the_layout_of_the_authors_code_is_found(tmp_path):
    write(tmp_path / "Charades" / "Charades")
    assert len(read_charades(tmp_path).clips) == 5


def test_unlabelled_videos_are_left_out_only_when_asked_and_then_listed(tmp_path):
    data = read_charades(write(tmp_path), unlabelled="skip")
    assert len(data.clips) == 3
    assert [item for item, _ in data.skipped] == ["0IH69", "T5ECU"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"header": HEADER.replace(",", ";")}, ("train.csv", "between commas", "id;subject")),
        ({"header": "id,script", "train": ("a,b",)}, ("expected a header", "found 'id,script'")),
        ({"train": ()}, ("train.csv", "found none", "unpack Charades.zip")),
        ({"train": (*TRAIN, "00YZL,X,Y,6")}, ("line 5", "expected 11 columns, found 4", "extract")),
        ({"train": (*TRAIN, '00YZL,X,Y,6,7,"cut off')}, ("line 5", "cut off")),
        ({"test": (TRAIN[0],)}, ("test.csv, line 2", "duplicate id '46GP8'")),
        ({"test": (TEST[1].replace(",,12", ",c200 1 2,12"),)}, ("c200", "157 classes")),
        ({"test": (TEST[1].replace(",,12", ",riding 1 2,12"),)}, ("'riding 1 2'", "c092 11.90")),
        ({"test": (TEST[1].replace("12.00", "long"),)}, ("length in seconds", "'long'")),
    ],
)  # fmt: skip
def test_a_file_that_is_not_as_it_should_be_is_refused_with_the_line_and_the_fix(
    tmp_path, change, words
):
    root = write(tmp_path, **change)
    with pytest.raises(DatasetError) as error:
        read_charades(root)
    assert str(root) in str(error.value)
    for word in words:
        assert word in str(error.value), error.value


def test_policy_skip_goes_on_and_lists_the_row(tmp_path):
    root = write(tmp_path, train=(*TRAIN, "00YZL,X,Y,6"))
    data = read_charades(root, policy="skip")
    assert len(data.clips) == 5
    assert data.skipped == (("Charades_v1_train.csv, line 5", "expected 11 columns, found 4"),)
    assert ADAPTER.survey(root, {"policy": "skip"}).oddities["skipped"] == 1


def test_a_root_that_lacks_files_says_which_and_where_it_looked(tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere: expected a folder with Charades_v1_train"):
        read_charades(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"found an empty folder; unpack Charades\.zip"):
        read_charades(tmp_path)
    root = write(tmp_path / "half")
    (root / "Charades_v1_test.csv").unlink()
    with pytest.raises(DatasetError, match=r"expected Charades_v1_test\.csv .*Charades_v1_train"):
        read_charades(root)
    write(root)
    (root / "Charades_v1_classes.txt").unlink()
    with pytest.raises(DatasetError, match=r"expected Charades_v1_classes\.txt"):
        read_charades(root)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("7 BaseballPitch\n9 BasketballDunk\n", "expected 'c000 <name>', found '7 BaseballPitch'"),
        ("c000 Holding\nc002 Taking\n", "line 2: expected 'c001 <name>'"),
        ("\n", "expected 157 class names, found none"),
    ],
)
def test_the_class_file_of_another_dataset_is_refused(tmp_path, text, words):
    root = write(tmp_path)
    (root / "Charades_v1_classes.txt").write_text(text)
    with pytest.raises(DatasetError) as error:
        read_charades(root)
    assert words in str(error.value)


def test_half_a_class_file_is_noticed_by_the_actions(tmp_path):
    root = write(tmp_path)
    file = root / "Charades_v1_classes.txt"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:90]))
    with pytest.raises(DatasetError, match="c092 is not among the 90 classes"):
        read_charades(root)


def test_options_that_do_not_exist_are_refused(tmp_path):
    root = write(tmp_path)
    with pytest.raises(UsageError, match=r"no option 'medai' \(did you mean media\?\)"):
        ADAPTER.read(root, {"medai": "video"})
    with pytest.raises(UsageError, match="media=film: expected auto, video, frames"):
        ADAPTER.read(root, {"media": "film"})
    with pytest.raises(UsageError, match="fps"):
        ADAPTER.read(root, {"fps": "fast"})


FRAMES = "original_vido_id video_id frame_id path labels"


def write_frames(root: Path, header: str = FRAMES) -> Path:
    root.mkdir(exist_ok=True)
    train = (
        '46GP8 0 0 46GP8/46GP8-000001.jpg "147"',
        '46GP8 0 1 46GP8/46GP8-000002.jpg  "92,147" ',
        '0IH69 1 0 0IH69/0IH69-000001.jpg ""',
    )
    (root / "train.csv").write_bytes("\r\n".join((header, *train, "")).encode())
    (root / "val.csv").write_text(f"{header}\nYSKX3 0 0 YSKX3/YSKX3-000001.jpg 77\n")
    write_classes(root)
    return root


def test_slowfast_frame_lists_give_each_video_the_union_of_its_frames(tmp_path):
    root = write_frames(tmp_path)
    (root / "YSKX3").mkdir()
    data = read_charades(root)
    assert [(c.id, c.split, c.labels) for c in data.clips] == [
        ("46GP8", "train", (92, 147)),
        ("0IH69", "train", ()),
        ("YSKX3", "test", (77,)),
    ]
    assert data.clips[2].path == root / "YSKX3"
    survey = ADAPTER.survey(root, {})
    assert survey.oddities["labels_vary"] == 1
    assert survey.splits["train"].unlabelled == 1
    # The official files win where both are there, unless the option says otherwise.
    write(root)
    assert len(read_charades(root).clips) == 5
    assert len(read_charades(root, annotation="frames").clips) == 3


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_frame_list_with_another_delimiter_is_refused(tmp_path, delimiter):
    root = write_frames(tmp_path, FRAMES.replace(" ", delimiter))
    with pytest.raises(DatasetError, match=r"train\.csv: expected .*blanks"):
        read_charades(root)


def test_a_frame_list_that_was_cut_off_is_refused(tmp_path):
    root = write_frames(tmp_path)
    with (root / "val.csv").open("a") as file:
        file.write("YSKX3 0 1 YS")
    with pytest.raises(DatasetError, match=r"val\.csv, line 3: expected 5 columns, found 4"):
        read_charades(root)
    assert len(read_charades(root, policy="skip").skipped) == 1


I3D = {
    "46GP8": {"subset": "training", "duration": 24.83, "actions": [[92, 11.9, 21.2], [147, 0, 25]]},
    "0IH69": {"subset": "training", "duration": 30.25, "actions": []},
    "YSKX3": {"subset": "testing", "duration": "31.0", "actions": [[77, "12.1", "18.0"]]},
}


def write_json(root: Path, document) -> Path:
    write_classes(root)
    (root / "charades.json").write_text(
        document if isinstance(document, str) else json.dumps(document)
    )
    return root


def test_the_json_form_says_the_same(tmp_path):
    data = read_charades_json(write_json(tmp_path, I3D))
    assert data.name == "charades"
    assert [(c.id, c.split, c.labels) for c in data.clips] == [
        ("46GP8", "train", (92, 147)),
        ("0IH69", "train", ()),
        ("YSKX3", "test", (77,)),
    ]
    assert data.clips[2].intervals == ((77, 12.1, 18.0),)
    survey = JSON_ADAPTER.survey(tmp_path, {})
    assert survey.oddities["end_past_length"] == 1
    assert survey.splits["train"].unlabelled == 1


def test_short_frame_folders_are_left_out_when_asked(tmp_path):
    folder = write_json(tmp_path, I3D) / "Charades_v1_rgb" / "46GP8"
    folder.mkdir(parents=True)
    for k in range(3):
        (folder / f"46GP8-{k + 1:06d}.jpg").touch()
    data = JSON_ADAPTER.read(tmp_path, {"min_frames": "66"})
    assert data.skipped == (("46GP8", "3 frames, fewer than min_frames=66"),)
    assert len(data.clips) == 2
    with pytest.raises(UsageError, match="min_frames=many"):
        JSON_ADAPTER.read(tmp_path, {"min_frames": "many"})


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ('{"46GP8": {"subset"', "not JSON"),
        ([1], "expected an object of videos by id"),
        ({"database": {}}, "--dataset activitynet"),
        ({}, "found none"),
        ({"46GP8": {"subset": "training"}}, "46GP8: expected subset, duration and actions"),
        ({"46GP8": {**I3D["46GP8"], "subset": "holdout"}}, "found 'holdout'"),
        ({"46GP8": {**I3D["46GP8"], "actions": [[157, 0, 1]]}}, "expected classes 0 to 156"),
        ({"46GP8": {**I3D["46GP8"], "actions": [7]}}, "expected actions like"),
        ({"46GP8": {**I3D["46GP8"], "duration": "long"}}, "could not convert"),
        ({"46GP8": {**I3D["46GP8"], "actions": None}}, "46GP8: "),
    ],
)
def test_json_of_another_form_is_refused(tmp_path, document, words):
    with pytest.raises(DatasetError) as error:
        read_charades_json(write_json(tmp_path, document))
    assert words in str(error.value), error.value
    assert "charades.json" in str(error.value)


@pytest.fixture
def real(shared: Path) -> Path:
    folder = shared / "annotations" / "charades"
    if not folder.is_dir():
        pytest.skip(f"no annotation files in {folder}")
    return folder


def test_the_real_annotation_gives_the_published_counts(real):
    data = read_charades(real)
    assert len(data.classes) == 157
    assert data.skipped == ()
    train = [c for c in data.clips if c.split == "train"]
    test = [c for c in data.clips if c.split == "test"]
    assert (len(train), sum(not c.labels for c in train)) == (7985, 174)
    assert (len(test), sum(not c.labels for c in test)) == (1863, 49)
    assert sum(len(c.intervals) for c in train) == 49809
    assert sum(len(c.intervals) for c in test) == 16691
    assert round(sum(len(c.labels) for c in train) / 7985, 2) == 6.10
    assert round(sum(len(c.labels) for c in test) / 1863, 2) == 8.74
    assert round(sum(len(c.labels) for c in test) / 1814, 2) == 8.98
    assert (max(len(c.labels) for c in train), max(len(c.labels) for c in test)) == (28, 26)
    positives = Counter(k for c in test for k in c.labels)
    assert len(positives) == 157
    assert min(positives.values()) == 6
    lengths = read_charades_lengths(real).values()
    assert (min(lengths), max(lengths), len(lengths)) == (2.33, 194.33, 9848)


def test_the_real_annotation_is_read_as_a_plain_csv_reader_reads_it(real):
    data = read_charades(real)
    clips = {c.id: c for c in data.clips}
    order = []
    for split in ("train", "test"):
        with (real / f"Charades_v1_{split}.csv").open(newline="", encoding="utf-8") as handle:
            for record in csv.DictReader(handle):
                order.append(record["id"])
                actions = [a.split() for a in record["actions"].split(";") if a]
                clip = clips[record["id"]]
                assert clip.split == split
                assert clip.labels == tuple(sorted({int(c[1:]) for c, _, _ in actions}))
                assert [f"c{k:03d}" for k, _, _ in clip.intervals] == [c for c, _, _ in actions]
                assert [e for _, _, e in clip.intervals] == [float(e) for _, _, e in actions]
    assert order == [c.id for c in data.clips]


def test_the_real_annotation_has_the_oddities_that_are_known(real):
    survey = ADAPTER.survey(real, {})
    assert survey.oddities["end_past_length_train"] == 14596
    assert survey.oddities["end_past_length_test"] == 5027
    assert survey.oddities["end_past_length"] == 14596 + 5027
    assert survey.oddities["reversed"] == 7
    assert survey.oddities["start_past_length"] == 5
    assert survey.oddities["subjects_in_both"] == 0
    assert survey.missing == 9848
    for key, value in survey.published.items():
        if key in survey.oddities:
            assert survey.oddities[key] == value, key
    reversed_in = Counter(
        c.id for c in read_charades(real).clips for _, start, end in c.intervals if end < start
    )
    assert reversed_in == {"00SL4": 2, "AKKWU": 1, "IOL8Q": 2, "LEOL6": 2}


def test_the_real_class_names_are_distinct_and_in_order(real):
    names = read_charades_classes(real)
    assert names[0] == "Holding some clothes"
    assert names[8] == "Opening a door"
    assert len(set(names)) == 157


def test_the_class_file_of_another_real_dataset_is_refused(real, tmp_path):
    root = write(tmp_path)
    text = (real.parent / "thumos14" / "annotation" / "detclasslist.txt").read_text()
    (root / "Charades_v1_classes.txt").write_text(text)
    with pytest.raises(DatasetError, match="this is not the class file of Charades"):
        read_charades(root)
