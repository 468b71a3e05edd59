"""UCF101 on a fixture in the true format and on the real lists of split 1."""

from pathlib import Path

import pytest

from msq.errors import DatasetError, UsageError
from msq.extract.datasets.ucf101 import ADAPTER, read_ucf101

NAMES = ("YoYo", "HandstandPushups", "Archery")  # the ids need not be in alphabetical order
TRAIN = [
    "YoYo/v_YoYo_g08_c01.avi 1",
    "HandstandPushups/v_HandStandPushups_g08_c01.avi 2",
    "Archery/v_Archery_g08_c01.avi 3",
]
TEST = ["YoYo/v_YoYo_g01_c01.avi", "HandstandPushups/v_HandStandPushups_g01_c01.avi"]


def crlf(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    return path


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "ucfTrainTestlist"
    crlf(folder / "classInd.txt", [f"{k} {name}" for k, name in enumerate(NAMES, 1)])
    for split in (1, 2, 3):
        crlf(folder / f"trainlist0{split}.txt", TRAIN[: 4 - split])
        crlf(folder / f"testlist0{split}.txt", TEST)
    return tmp_path


def real(shared: Path) -> Path:
    folder = shared / "annotations" / "ucf101"
    if not folder.is_dir():
        pytest.skip("no real UCF101 lists")
    return folder


def test_labels_come_from_the_train_column_and_from_the_folder_in_test_lists(root):
    data = read_ucf101(root)
    assert data.classes == NAMES
    assert (data.task, data.metric, data.skipped) == ("singlelabel", "top1", ())
    assert [(c.id, c.labels, c.split) for c in data.clips] == [
        ("YoYo/v_YoYo_g08_c01", (0,), "train"),
        ("HandstandPushups/v_HandStandPushups_g08_c01", (1,), "train"),
        ("Archery/v_Archery_g08_c01", (2,), "train"),
        ("YoYo/v_YoYo_g01_c01", (0,), "test"),
        ("HandstandPushups/v_HandStandPushups_g01_c01", (1,), "test"),
    ]
    assert read_ucf101(root, names="readable").classes[1] == "Handstand Pushups"


def test_handstand_pushups_are_found_under_either_spelling(root):
    for place in (
        "UCF-101/HandstandPushups/v_HandStandPushups_g08_c01.avi",
        "UCF-101/HandstandPushups/v_HandstandPushups_g01_c01.avi",
        "UCF-101/YoYo/v_YoYo_g08_c01.mp4",
    ):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(b"x")
    (root / "v_YoYo_g01_c01").mkdir()  # a folder of frames, flat
    (root / "UCF-101/YoYo/v_YoYo_g08_c01").mkdir()  # beside the video, which is taken first
    paths = {c.id: c.path for c in read_ucf101(root).clips}
    assert all(p.exists() == ("Archery" not in name) for name, p in paths.items())
    assert paths["YoYo/v_YoYo_g08_c01"].suffix == ".mp4"
    survey = ADAPTER.survey(root, {"split": "1"})
    assert (survey.missing, survey.missing_examples) == (1, ("Archery/v_Archery_g08_c01.avi",))
    assert survey.oddities == {"name_case": 2}


def test_all_splits_are_counted(root):
    splits = ADAPTER.survey(root, {}).splits
    assert {name: count.clips for name, count in splits.items()} == {
        **{"split1/train": 3, "split1/test": 2, "split2/train": 2, "split2/test": 2},
        **{"split3/train": 1, "split3/test": 2},
    }
    assert len(read_ucf101(root, split=3).clips) == 3


def test_without_a_class_file_the_train_labels_give_the_order(root):
    (root / "ucfTrainTestlist" / "classInd.txt").unlink()
    assert read_ucf101(root).classes == NAMES
    assert "no classInd.txt" in ADAPTER.survey(root, {}).notes[1]
    crlf(root / "ucfTrainTestlist" / "trainlist01.txt", TRAIN[1:])
    with pytest.raises(DatasetError, match=r"expected labels 1 to 101.*put classInd.txt beside"):
        read_ucf101(root)


def test_unusable_lines_are_left_out_alone(root):
    crlf(
        root / "ucfTrainTestlist" / "testlist01.txt",
        [*TEST, TEST[0], TRAIN[0], "Knitting/v_Knitting_g01_c01.avi", "YoYo", "a;b/c.avi,1"],
    )
    data = read_ucf101(root)
    assert len(data.clips) == 5
    assert [reason.split(":")[0][:34] for _, reason in data.skipped] == [
        "expected Class/video.avi and maybe",
        "expected Class/video.avi and maybe",
        "YoYo/v_YoYo_g01_c01.avi is in test",
        "YoYo/v_YoYo_g08_c01.avi is in trai",
        "'Knitting' is no class of classInd",
    ]
    counted = ADAPTER.survey(root, {}).oddities
    assert (counted["repeated"], counted["in_train_and_test"], counted["malformed"]) == (1, 1, 2)


@pytest.mark.parametrize(
    ("name", "lines", "words"),
    [
        ("classInd.txt", ["1 brush_hair", "2 cartwheel", "3 catch"], "another dataset"),
        ("classInd.txt", ["YoYo", "Archery"], "expected `1 ApplyEyeMakeup`"),
        ("trainlist01.txt", [x.replace(" ", ",") for x in TRAIN], "found 'YoYo/v_YoYo_g08_c01.avi"),
        ("trainlist01.txt", [TRAIN[0], "Archery/v_Archery_g01_c01.avi 1"], "label 1 stands for"),
        ("testlist01.txt", [], "empty file: unpack"),
    ],
)
def test_broken_lists_are_named_with_the_way_to_mend_them(root, name, lines, words):
    crlf(root / "ucfTrainTestlist" / name, lines)
    with pytest.raises(DatasetError, match=words):
        read_ucf101(root)


def test_wrong_roots_and_values_are_refused(root):
    with pytest.raises(DatasetError, match=r"testlist01.txt, found none; unpack"):
        read_ucf101(_empty(root))
    with pytest.raises(UsageError, match="expected 1, 2, 3"):
        read_ucf101(root, split=0)
    (root / "ucfTrainTestlist" / "testlist02.txt").unlink()
    with pytest.raises(DatasetError, match=r"testlist02.txt: expected an annotation file.*unpack"):
        read_ucf101(root, split=2)


def _empty(root: Path) -> Path:
    (root / "empty").mkdir()
    return root / "empty"


def test_the_real_lists_have_the_published_counts(shared):
    root = real(shared)
    data = read_ucf101(root)
    splits = [c.split for c in data.clips]
    assert (splits.count("train"), splits.count("test"), data.skipped) == (9537, 3783, ())
    assert len(data.classes) == 101
    assert (data.classes[0], data.classes[36], data.classes[100]) == (
        *("ApplyEyeMakeup", "HandstandPushups", "YoYo"),
    )
    assert len({c.id for c in data.clips}) == 13320
    survey = ADAPTER.survey(root, {})
    assert {k: v.clips for k, v in survey.splits.items()} == {
        name: count for name, count in survey.published.items() if name.startswith("split1")
    }
    assert survey.missing == 13320
    assert survey.oddities == {"name_case": 128}
