"""HMDB51 on a fixture in the true format and on the real files of split 1."""

from pathlib import Path

import pytest

from msq.errors import DatasetError, UsageError
from msq.extract.datasets.hmdb51 import ADAPTER, CLASSES, hmdb51_tags, read_hmdb51

ODD = "(HQ)_Rock_Climbing_-_Dan's_[best]_climb_f_cm_np1_ba_med_0.avi"


@pytest.fixture
def root(tmp_path):
    """Three splits of three clips a class, with a blank at the end of each line."""
    folder = tmp_path / "testTrainMulti_7030_splits"
    folder.mkdir()
    for split in (1, 2, 3):
        for name in CLASSES:
            odd = ODD if name == "climb" else f"A_{name}_0.avi"
            tags = [(split + k) % 3 for k in range(3)]
            names = [odd, f"A_{name}_1.avi", f"two words_{name}_2.avi"]
            end = "\r\n" if name == "wave" else "\n"
            text = "".join(f"{n} {t} {end}" for n, t in zip(names, tags, strict=True))
            (folder / f"{name}_test_split{split}.txt").write_bytes(text.encode())
    return tmp_path


def real(shared: Path) -> Path:
    folder = shared / "annotations" / "hmdb51"
    if not folder.is_dir():
        pytest.skip("no real HMDB51 split files")
    return folder


def test_tags_are_read_from_the_right_and_unused_clips_are_listed(root):
    data = read_hmdb51(root)
    assert (data.task, data.metric, data.classes) == ("singlelabel", "top1", CLASSES)
    assert len(data.clips) == 102
    assert len(data.skipped) == 51
    clip = data.clips[CLASSES.index("climb") * 2]
    assert clip.id == f"climb/{ODD.removesuffix('.avi')}"
    assert (clip.split, clip.labels) == ("train", (CLASSES.index("climb"),))
    assert data.clips[1].id == "brush_hair/A_brush_hair_1"
    assert data.clips[1].split == "test"
    assert data.skipped[0] == ("brush_hair/two words_brush_hair_2", "unused in split 1 (tag 0)")


def test_the_three_splits_share_ids_and_differ_in_tags(root):
    for split, tag in ((1, "train"), (2, "test"), (3, None)):
        tags = hmdb51_tags(root, split)
        assert len(tags) == 153
        assert tags["wave/A_wave_0"] == tag
    assert {c.id for c in read_hmdb51(root, split=2, unused="val").clips} == set(tags)
    kept = {c.id: c.split for c in read_hmdb51(root, split=3, unused="val").clips}
    assert kept["wave/A_wave_0"] == "val"
    survey = ADAPTER.survey(root, {"split": "3"})
    assert len(survey.splits) == 9
    assert survey.splits["split2/unused"].clips == 51
    assert survey.oddities == {"unused": 51, "skipped": 51}


def test_climb_is_not_taken_for_climb_stairs(root):
    paths = {c.path.parent.name for c in read_hmdb51(root).clips if c.labels == (5,)}
    assert CLASSES[5] == "climb"
    assert paths == {"climb"}


def test_videos_are_found_in_class_folders_or_flat_and_as_frames(root):
    places = [
        (f"videos/climb/{ODD}", False),
        ("A_wave_0.avi", False),
        ("hmdb51_org/wave/A_wave_1.mp4", False),
        ("rawframes/talk/A_talk_0", True),
    ]
    for place, folder in places:
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if folder else path.write_bytes(b"x")
    found = {c.id: c.path for c in read_hmdb51(root).clips}
    assert found[f"climb/{ODD.removesuffix('.avi')}"] == root / places[0][0]
    assert found["wave/A_wave_0"] == root / places[1][0]
    assert found["wave/A_wave_1"] == root / places[2][0]
    assert found["talk/A_talk_0"] == root / places[3][0]
    survey = ADAPTER.survey(root, {})
    assert survey.missing == 98
    assert not any(str(root) in name for name in survey.missing_examples)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "talk_test_split1.txt").unlink(), "found 50; talk_test_split1.txt is not"),
        (lambda f: (f / "Diving_test_split1.txt").write_text("a 1\n"), "'Diving'.*another dataset"),
        (lambda f: (f / "talk_test_split1.txt").write_text("a.avi,1\n"), "a blank and a tag 0, 1"),
        (lambda f: (f / "talk_test_split1.txt").write_text(""), "empty file: unpack"),
    ],
)
def test_broken_split_files_are_named_with_the_way_to_mend_them(root, change, words):
    change(root / "testTrainMulti_7030_splits")
    with pytest.raises(DatasetError, match=words):
        read_hmdb51(root)


def test_wrong_roots_and_values_are_refused(tmp_path, root):
    with pytest.raises(DatasetError, match=r"51 files <class>_test_split1.txt, found none; unpack"):
        read_hmdb51(_empty(tmp_path))
    with pytest.raises(UsageError, match="expected 1, 2, 3"):
        read_hmdb51(root, split=4)


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def test_malformed_and_repeated_lines_are_left_out_alone(root):
    file = root / "testTrainMulti_7030_splits" / "talk_test_split1.txt"
    file.write_text("a.avi 1 \nb.avi 7 \na.avi 2 \n")
    reasons = dict(read_hmdb51(root).skipped)
    assert "found 'b.avi 7'" in reasons["talk_test_split1.txt line 2"]
    assert "a.avi stands twice" in reasons["talk_test_split1.txt line 3"]


def test_the_real_split_has_the_published_counts(shared):
    data = read_hmdb51(real(shared))
    splits = [c.split for c in data.clips]
    assert (splits.count("train"), splits.count("test"), len(data.skipped)) == (3570, 1530, 1666)
    assert len({c.id for c in data.clips}) == 5100
    for label in range(51):
        of = [c.split for c in data.clips if c.labels == (label,)]
        assert (of.count("train"), of.count("test")) == (70, 30)
    survey = ADAPTER.survey(real(shared), {})
    assert {k: v.clips for k, v in survey.splits.items()} == {
        name: count for name, count in survey.published.items() if name.startswith("split1")
    }
    assert survey.oddities == {"unused": 1666, "unsafe_names": 469, "skipped": 1666}
    assert survey.missing == 5100
    with pytest.raises(DatasetError, match="split2"):
        read_hmdb51(real(shared), split=2)
