"""Half-extracted archives, wrong roots, other delimiters and the class files of other datasets.

One table: every dataset of the paper and every way in which people get it wrong. Each must be told
through the command line what was expected, what was found, and how to mend it.
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from msq.cli import main
from msq.extract.datasets import Clip, Dataset, hmdb51, thumos14
from msq.extract.datasets.archives import archives_in
from msq.extract.pipeline import extract

CHARADES = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length"


def run(*arguments: object) -> int:
    """Exit code of one command."""
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    return int(left.value.code or 0)


def write(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def charades(root: Path) -> None:
    for split, name in (("train", "AAAAA"), ("test", "CCCCC")):
        row = f"{name},S1,Room,6,7,Yes,s,o,d,c001 1.00 9.00;c000 0.50 2.00,8.50"
        write(root / f"Charades_v1_{split}.csv", CHARADES, row)
    write(root / "Charades_v1_classes.txt", "c000 Holding some clothes", "c001 Opening a door")


def animal_kingdom(root: Path) -> None:
    header = "original_vido_id video_id frame_id path labels type"
    for file, name, kind in (("train", "AAACXZTV", "train"), ("val", "AAQNNZGK", "test")):
        rows = [f"{name} 1 {k} {name}/{name}_t{k:06d}.jpg 2,0 {kind}" for k in (1, 2)]
        write(root / "annotation" / f"{file}.csv", header, *rows)
    write(root / "names.txt", "Abseiling", "Attacking", "Attending")


def thumos(root: Path) -> None:
    for k, name in enumerate(thumos14.CLASSES):
        lines = (f"video_test_{k:07d}  1.5 {k + 3}.0", f"video_test_{k + 20:07d}  2.0 9.5")
        write(root / "annotation" / f"{name}_test.txt", *lines)
    names = (f"{k} {name}" for k, name in enumerate(thumos14.CLASSES, 7))
    write(root / "annotation" / "detclasslist.txt", *names)


def hmdb(root: Path) -> None:
    for name in hmdb51.CLASSES:
        lines = (f"A_{name}_0.avi 1 ", f"A_{name}_1.avi 2 ")
        write(root / "testTrainMulti_7030_splits" / f"{name}_test_split1.txt", *lines)


def ucf(root: Path) -> None:
    folder = root / "ucfTrainTestlist"
    write(folder / "classInd.txt", "1 Archery", "2 YoYo")
    write(
        folder / "trainlist01.txt", "Archery/v_Archery_g08_c01.avi 1", "YoYo/v_YoYo_g08_c01.avi 2"
    )
    write(folder / "testlist01.txt", "YoYo/v_YoYo_g01_c01.avi")


def hockey(root: Path) -> None:
    for part in (5, 6):
        write(root / f"period1-1-{part}-gray-label.txt", *["0,0,0,1,0,0,0,0,0,0,0,0"] * 40)


def volleyball(root: Path) -> None:
    for video in (1, 4):
        lines = (f"{k}.jpg r-pass 5 5 40 90 digging 60 60 40 90 standing" for k in (9, 20))
        write(root / "volleyball" / str(video) / "annotations.txt", *lines)


class Kind(NamedTuple):
    """A dataset: how to write it, its annotation and its videos' archive, a file, one clip's path.

    `line` is a line of `file` as published.
    """

    write: Callable[[Path], None]
    annotation: str
    videos: str
    file: str
    line: str
    clip: str
    options: tuple[str, ...] = ()


KINDS = {
    "charades": Kind(
        charades, "Charades.zip", "Charades_v1_480.zip", "Charades_v1_train.csv",
        "AAAAA,S1,", "Charades_v1_480/AAAAA.mp4",
    ),
    "animal-kingdom": Kind(
        animal_kingdom, "annotation.zip", "dataset/video.tar.gz", "annotation/train.csv",
        "AAACXZTV 1 ", "dataset/video/AAACXZTV.mp4",
        ("--option", "classes={root}/names.txt"),
    ),
    "thumos14": Kind(
        thumos, "TH14_Temporal_annotations_test.zip", "TH14_Test_set_mp4.zip",
        "annotation/Diving_test.txt", "video_test_", "TH14_Test_set_mp4/video_test_0000000.mp4",
    ),
    "hmdb51": Kind(
        hmdb, "test_train_splits.rar", "hmdb51_org.rar",
        "testTrainMulti_7030_splits/talk_test_split1.txt", "A_talk_1.avi",
        "hmdb51_org/brush_hair/A_brush_hair_0.avi",
    ),
    "ucf101": Kind(
        ucf, "UCF101TrainTestSplits-RecognitionTask.zip", "UCF101.rar",
        "ucfTrainTestlist/trainlist01.txt", "YoYo/v_Y",
        "UCF-101/Archery/v_Archery_g08_c01.avi",
    ),
    "hockey": Kind(
        hockey, "ets_dataset_concordia1_v1.zip", "videos.zip", "period1-1-5-gray-label.txt",
        "0,0,0,1", "period1-1-5-gray/00001.jpg",
    ),
    "volleyball": Kind(
        volleyball, "volleyball.zip", "volleyball/1.tar", "volleyball/1/annotations.txt",
        "20.jpg r-pass", "volleyball/1/9/1.jpg",
    ),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def dataset(request, tmp_path):
    """A dataset's name, its kind, its root with the annotation alone, and the arguments for it."""
    name, root = request.param, tmp_path / "data"
    root.mkdir()
    KINDS[name].write(root)
    return name, KINDS[name], root, arguments(name, root)


def arguments(name: str, root: Path) -> tuple[str, ...]:
    options = (option.format(root=root) for option in KINDS[name].options)
    return ("--root", str(root), *options)


def told(capsys, name: str, given: tuple[str, ...]) -> str:
    """What `datasets check` and `extract` both say as they refuse with exit code 2."""
    said = []
    for command in (("datasets", "check", name), ("extract", "--dataset", name, "-q")):
        assert run(*command, *given) == 2, command
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("msq: "), err
        assert err.count("\n") == 1, err
        said.append(err)
    assert said[0] == said[1]
    return said[0]


def assert_parts(message: str, *parts: str) -> None:
    for part in ("expected", "found", *parts):
        assert re.search(part, message), (part, message)


def test_a_root_that_is_not_there_or_a_file(dataset, tmp_path, capsys):
    name, kind, _, given = dataset
    given = ("--root", str(tmp_path / "dta"), *given[2:])
    assert_parts(
        told(capsys, name, given), r"dta: expected a folder with", "nothing there", "check"
    )
    archive = tmp_path / Path(kind.annotation).name
    archive.touch()
    given = ("--root", str(archive), *given[2:])
    assert_parts(told(capsys, name, given), re.escape(archive.name), "a file; unpack it", "--root")


def test_a_root_with_another_dataset_in_it(dataset, capsys):
    name, _, root, given = dataset
    shutil.rmtree(root)
    other = "volleyball" if name != "volleyball" else "charades"
    KINDS[other].write(root)
    write(root / "names.txt", "one", "two", "three")
    said = told(capsys, name, given)
    lies = "volleyball" if other == "volleyball" else "Charades_v1_classes.txt"
    assert_parts(said, re.escape(f"{root}: expected"), lies, "unpack|put the annotation")


def test_an_annotation_archive_that_lies_there_packed(dataset, capsys):
    name, kind, root, given = dataset
    shutil.rmtree(root)
    (root / kind.annotation).parent.mkdir(parents=True)
    (root / kind.annotation).touch()
    packed = rf"\({re.escape(kind.annotation)} lies there still packed: unpack it\)"
    assert_parts(told(capsys, name, given), re.escape(str(root)), packed)


def test_an_annotation_that_was_cut_off(dataset, capsys):
    name, kind, root, given = dataset
    file = root / kind.file
    text = file.read_text()
    start = text.rindex(kind.line)
    file.write_text(text[: start + len(kind.line)])
    where = rf"{re.escape(str(file))}, (.* )?line \d+: "
    assert_parts(told(capsys, name, given), where, "extract|unpack|take the file|download")


def test_an_empty_annotation(dataset, capsys):
    name, kind, root, given = dataset
    (root / kind.file).write_text("")
    said = told(capsys, name, given)
    assert_parts(said, re.escape(str(root / kind.file)), "empty file|''", "extract|unpack|take")


@pytest.mark.parametrize("delimiter", [";", "\t"], ids=["semicolon", "tab"])
def test_an_annotation_with_another_delimiter(dataset, delimiter, capsys):
    name, kind, root, given = dataset
    blanks = name in ("thumos14", "hmdb51", "ucf101", "volleyball")
    if blanks and delimiter == "\t":
        delimiter = ","  # tabs are blanks there, and are read
    file = root / kind.file
    mark = " " if "," not in kind.line else ","
    lines = (re.sub(f"{mark}+", delimiter, line) for line in file.read_text().splitlines())
    write(file, *lines)
    said = told(capsys, name, given)
    shown = "t" if delimiter == "\t" else delimiter
    assert_parts(said, re.escape(str(file)), f"found .*{shown}", "take")


def test_a_comma_between_name_and_tag_is_no_part_of_the_name(tmp_path, capsys):
    hmdb(tmp_path)
    file = tmp_path / KINDS["hmdb51"].file
    write(file, "A_talk_0.avi, 1", "A_talk_1.avi, 2")
    said = told(capsys, "hmdb51", ("--root", str(tmp_path)))
    assert_parts(said, re.escape(str(file)), "found 'A_talk_0.avi, 1'", "take the file")


@pytest.mark.parametrize("name", ["thumos14", "hmdb51", "ucf101", "volleyball"])
def test_tabs_are_blanks_where_blanks_part_the_columns(name, tmp_path, capsys):
    kind = KINDS[name]
    kind.write(tmp_path)
    file = tmp_path / kind.file
    assert run("datasets", "check", name, "--root", tmp_path, "--json") == 0
    expected = capsys.readouterr().out
    file.write_text(re.sub(" +(?=[^ \n])", "\t", file.read_text()))
    assert run("datasets", "check", name, "--root", tmp_path, "--json") == 0
    assert capsys.readouterr().out == expected


FOREIGN: list[tuple[str, str, tuple[str, ...], str]] = [
    (
        "charades",
        "Charades_v1_classes.txt",
        ("1 ApplyEyeMakeup", "2 Archery"),
        "not the class file",
    ),
    ("charades", "Charades_v1_classes.txt", ("c000 Holding some clothes",), "half of it"),
    (
        "animal-kingdom",
        "names.txt",
        ("c000 Holding", "c001 Opening", "c002 Eating"),
        "another data",
    ),
    ("animal-kingdom", "names.txt", ("1 Archery", "2 YoYo", "3 Fencing"), "another dataset"),
    ("animal-kingdom", "names.txt", ("brush_hair", "cartwheel"), "those of another dataset"),
    ("thumos14", "annotation/detclasslist.txt", ("1 brush_hair", "2 catch"), "another dataset"),
    ("thumos14", "annotation/YoYo_test.txt", ("video_test_0000001  1 2",), "move it away"),
    ("hmdb51", "testTrainMulti_7030_splits/Diving_test_split1.txt", ("a.avi 1",), "move it away"),
    ("ucf101", "ucfTrainTestlist/classInd.txt", ("1 brush_hair", "2 catch"), "another dataset"),
    ("ucf101", "ucfTrainTestlist/classInd.txt", ("c000 Holding", "c001 Opening"), "as published"),
]


@pytest.mark.parametrize(("name", "file", "lines", "words"), FOREIGN)
def test_the_class_file_of_another_dataset(name, file, lines, words, tmp_path, capsys):
    KINDS[name].write(tmp_path)
    write(tmp_path / file, *lines)
    assert_parts(told(capsys, name, arguments(name, tmp_path)), words, re.escape(str(tmp_path)))


def test_actions_of_another_dataset_leave_volleyball_without_a_row(tmp_path, capsys):
    for video in (1, 4):
        file = tmp_path / str(video) / "annotations.txt"
        write(file, "9.jpg r-pass 5 5 40 90 juggling 60 60 40 90 knitting")
    said = told(capsys, "volleyball", ("--root", str(tmp_path)))
    assert_parts(said, r"1/annotations.txt line 1: unknown action 'juggling'", "another dataset")


def test_names_for_animal_kingdom_must_be_as_many_as_the_workbook_beside_them(tmp_path, capsys):
    book = runpy.run_path(str(Path(__file__).with_name("test_animal_kingdom.py")))
    book["write_metadata"](tmp_path)
    names = write(tmp_path / "names.txt", *(f"class of {k}" for k in range(157)))
    given = ("--root", str(tmp_path), "--option", f"classes={names}")
    said = told(capsys, "animal-kingdom", given)
    assert_parts(said, r"expected 6 class names, as AR_metadata.xlsx has, found 157", "140 names")


def test_a_frame_rate_table_with_another_delimiter(tmp_path, capsys):
    thumos(tmp_path)
    write(tmp_path / "test_video_info.csv", "video;fps;count", "video_test_0000001;30;300")
    said = told(capsys, "thumos14", ("--root", str(tmp_path)))
    assert_parts(said, "test_video_info.csv: expected comma-separated", "'video;fps;count'", "take")


def test_videos_that_are_still_packed(dataset, tmp_path, monkeypatch, capsys):
    name, kind, root, given = dataset
    monkeypatch.chdir(tmp_path)
    archive = root / kind.videos
    archive.parent.mkdir(parents=True, exist_ok=True)
    archive.touch()
    packed = f"{kind.videos} lies there still packed: unpack it"
    assert run("datasets", "check", name, *given, "--json") == 0  # annotations are enough for that
    survey = json.loads(capsys.readouterr().out)
    assert survey["missing"] > 0
    assert any(packed in note for note in survey["notes"])
    assert run("extract", "--dataset", name, *given, "-q") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert_parts(err, re.escape(str(root)), r"found none of \d+ clips", re.escape(packed))
    assert not list(tmp_path.glob("*.zarr"))


def test_a_video_that_is_there_is_no_longer_missing(dataset, capsys):
    name, kind, root, given = dataset
    counts = []
    for clip in ("nothing.txt", kind.clip):
        (root / clip).parent.mkdir(parents=True, exist_ok=True)
        (root / clip).touch()
        assert run("datasets", "check", name, *given, "--json") == 0
        survey = json.loads(capsys.readouterr().out)
        assert not any("packed" in note for note in survey["notes"])
        counts.append(survey["missing"])
        assert len(survey["missing_examples"]) == min(survey["missing"], 5)
    assert counts[1] == counts[0] - 1


def test_some_videos_missing_end_with_3_and_say_how_many(tmp_path, media, capsys):
    root = tmp_path / "data"
    charades(root)
    (root / "AAAAA.mp4").write_bytes(media("cfr.mp4").read_bytes())
    (root / "Charades_v1_480.zip").touch()
    given = ("--root", root, "--out", tmp_path / "s.zarr", "--frames", 4, "--workers", 0)
    assert run("extract", "--dataset", "charades", *given, "--image-encoder", "none", "-q") == 3
    err = capsys.readouterr().err
    assert "1 of 2 clips have no file below data, the first: Charades_v1/CCCCC.mp4 (" in err
    assert "failed: CCCCC: " in err


def test_archives_are_found_in_the_folders_below_and_the_rest_is_passed_over(tmp_path):
    for name in ("a.mp4", "videos/wave.rar", "b/c/video.TAR.GZ", "b/c/d/e/f.zip", "notes.gz"):
        write(tmp_path / name)
    (tmp_path / "folder.zip").mkdir()
    assert archives_in(tmp_path) == ("videos/wave.rar", "b/c/video.TAR.GZ")
    assert archives_in(tmp_path / "nowhere") == ()


@pytest.mark.parametrize(
    ("side", "names", "words"),
    [
        ("test", ("Swim", "Diving"), r"'Diving' is no class of the store; nearest: \['Dive'\]"),
        ("train", ("c000 Holding",), "Is it the split of another dataset"),
        ("train", ("Run;Fly",), "no class of the store"),
        ("test", ("Run", "Swim"), r"expected no class in both, found \['Run'\]"),
    ],
)
def test_zero_shot_split_files_that_name_unknown_classes(
    side, names, words, tmp_path, media, capsys
):
    fakes = runpy.run_path(str(Path(__file__).with_name("fakes.py")))
    store = tmp_path / "s.zarr"
    video = media("cfr.mp4")
    classes = ("Run", "Fly", "Swim", "Dive")
    clips = tuple(Clip(f"{k}", video, None, None, (k,), "test") for k in range(4))
    data = Dataset("d", classes, "multilabel", clips, "map")
    extract(data, store, video=fakes["FakeEncoder"](), image=None, workers=0)
    folder = tmp_path / "splits"
    write(folder / "train" / "split_0.list", "Run", "Fly")
    write(folder / "test" / "split_0.list", "Swim", "Dive")
    file = write(folder / side / "split_0.list", *names)
    assert run("zero-shot", store, "--split-dir", folder, "-q") == 2
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("msq: ", re.escape(str(file)), words):
        assert re.search(part, err), err
