"""Volleyball on a fixture in the true format and on the one real clip."""

from pathlib import Path

import pytest
from PIL import Image

from msq.errors import DatasetError, UsageError
from msq.extract.datasets.volleyball import (
    ACTIONS,
    ADAPTER,
    GROUPS,
    SPLIT_OF,
    WINDOWS,
    read_volleyball,
    video_size,
)
from msq.extract.frame_folder import frame_files

PLAYERS = " ".join(f"{50 * k} 400 40 90 standing" for k in range(11))


@pytest.fixture
def root(tmp_path):
    """Videos 0 (val), 1 (train) and 4 (test)."""
    lines = {
        0: f"1000.jpg l_set 5 5 40 90 waiting {PLAYERS}\n",
        1: f"9999.jpg r-pass 5 5 40 90 digging {PLAYERS} \r\n7.jpg l-spike 1 1 9 9 spiking\r\n",
        4: f"20.jpg r_winpoint 1270 5 40 90 falling {PLAYERS}\n",
    }
    for video, text in lines.items():
        folder = tmp_path / "volleyball" / str(video)
        folder.mkdir(parents=True)
        (folder / "annotations.txt").write_bytes(text.encode())
    return tmp_path


def real(shared: Path) -> Path:
    folder = shared / "annotations" / "volleyball"
    if not folder.is_dir():
        pytest.skip("no real Volleyball clip")
    return folder


def test_labels_are_the_set_of_actions_in_the_key_frame(root):
    data = read_volleyball(root)
    assert (data.task, data.classes) == ("multilabel", ACTIONS)
    assert [(c.id, [ACTIONS[k] for k in c.labels], c.split) for c in data.clips] == [
        ("0/1000", ["Standing", "Waiting"], "val"),
        ("1/9999", ["Digging", "Standing"], "train"),
        ("1/7", ["Spiking"], "train"),
        ("4/20", ["Falling", "Standing"], "test"),
    ]
    assert data.clips[1].path == root / "volleyball/1/9999"


def test_group_activities_are_one_of_eight_whatever_their_separator(root):
    data = read_volleyball(root, labels="group")
    assert (data.task, data.metric, data.classes) == ("singlelabel", "top1", GROUPS)
    names = [GROUPS[c.labels[0]] for c in data.clips]
    assert names == ["l_set", "r-pass", "l-spike", "r_winpoint"]
    file = root / "volleyball/0/annotations.txt"
    file.write_text(file.read_text().replace("l_set", "l-set"))
    assert read_volleyball(root, labels="group").clips[0].labels == (GROUPS.index("l_set"),)


def test_the_splits_are_those_of_the_authors():
    assert [len(WINDOWS[s]) for s in ("train", "val", "test")] == [24, 15, 16]
    assert sorted(SPLIT_OF) == list(range(55))
    assert (video_size(2), video_size(0)) == ((1920, 1080), (1280, 720))


def test_pictures_across_9999_stay_in_the_order_of_their_numbers(root):
    folder = root / "volleyball/1/9999"
    folder.mkdir()
    for k in range(9979, 10020):
        Image.new("RGB", (4, 4)).save(folder / f"{k}.jpg")
    clip = read_volleyball(root).clips[1]
    assert [int(f.stem) for f in frame_files(clip.path)] == list(range(9979, 10020))
    survey = ADAPTER.survey(root, {})
    assert (survey.missing, survey.missing_examples) == (3, ("0/1000", "1/7", "4/20"))
    assert "short_folders" not in survey.oddities
    (folder / "10019.jpg").unlink()
    assert ADAPTER.survey(root, {}).oddities["short_folders"] == 1


def test_the_survey_counts_every_oddity(root):
    file = root / "volleyball/1/annotations.txt"
    text = file.read_text()
    file.write_text(
        text + "8.jpg l_set 1 1 9 9\n"
        "9.jpg l_set 1 1 9 9 flying\n"
        "7.jpg l_set 1 1 9 9 standing\n"
        "ten.jpg l_set 1 1 9 9 standing\n"
    )
    survey = ADAPTER.survey(root, {})
    assert survey.oddities == {
        **{"malformed": 2, "unknown_action": 1, "repeated": 1, "skipped": 4},
        **{"under_12_players": 1, "under_7_players": 1, "box_past_picture": 1},
        "absent_videos": 52,
    }
    assert {k: v.clips for k, v in survey.splits.items()} == {"train": 2, "val": 1, "test": 1}
    reasons = dict(read_volleyball(root).skipped)
    assert "found 6 fields" in reasons["1/annotations.txt line 3"]
    assert "unknown action 'flying'" in reasons["1/annotations.txt line 4"]
    assert "unknown group 'x'" in _group_reason(file, text)


def _group_reason(file: Path, text: str) -> str:
    file.write_text(text + "8.jpg x 1 1 9 9 standing\n")
    data = read_volleyball(file.parents[2], labels="group")
    return dict(data.skipped)["1/annotations.txt line 3"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("29885.jpg r_spike waiting 430 575 82 170\n", "the action after its box"),
        ("29885.jpg,r_spike,430,575,82,170,waiting\n", "take the file as published"),
        ("", "empty file"),
    ],
)
def test_annotations_of_another_form_are_refused(root, text, words):
    (root / "volleyball/4/annotations.txt").write_text(text)
    with pytest.raises(DatasetError, match=words):
        read_volleyball(root)


def test_wrong_roots_and_half_extracted_archives_are_refused(root):
    with pytest.raises(DatasetError, match=r"folders 0 to 54 with annotations.txt.*unpack"):
        read_volleyball(root / "volleyball" / "0")
    with pytest.raises(UsageError, match="expected actions, group"):
        read_volleyball(root, labels="both")
    (root / "volleyball" / "3" / "100").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"3: expected annotations.txt.*unpack"):
        read_volleyball(root)


def test_the_real_clip_is_read_as_its_annotation_says(shared):
    data = read_volleyball(real(shared))
    first, second = data.clips
    assert (first.id, first.split, second.id) == ("39/29885", "train", "39/29905")
    names = ("Blocking", "Digging", "Moving", "Spiking", "Standing", "Waiting")
    assert tuple(ACTIONS[k] for k in first.labels) == names
    assert [f.name for f in frame_files(first.path)] == [f"{k}.jpg" for k in range(29880, 29890)]
    group = read_volleyball(real(shared), labels="group")
    assert [GROUPS[c.labels[0]] for c in group.clips] == ["r_spike", "l-pass"]
    survey = ADAPTER.survey(real(shared), {})
    assert survey.missing == 1
    assert survey.oddities == {"absent_videos": 54, "short_folders": 1}
