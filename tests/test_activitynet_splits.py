"""A video that annotation files of ActivityNet's form have in two splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from msq.cli import main
from msq.errors import DatasetError
from msq.extract.datasets import activitynet
from msq.extract.datasets.activitynet import read_activitynet

FILES = {"annotations": "anet_train.json,anet_val.json"}


def video(*segments: tuple[float, float, str]) -> dict[str, Any]:
    return {"annotations": [{"segment": [a, b], "label": label} for a, b, label in segments]}


def write(path: Path, videos: dict[str, Any]) -> None:
    path.write_text(json.dumps(videos))


@pytest.fixture
def leaking(tmp_path: Path) -> Path:
    write(tmp_path / "anet_train.json", {"v_a": video((1, 2, "run")), "v_b": video((1, 2, "sit"))})
    write(tmp_path / "anet_val.json", {"v_b": video((3, 4, "run")), "v_c": video((5, 6, "sit"))})
    return tmp_path


def test_the_later_file_is_left_out_and_listed(leaking: Path) -> None:
    data = read_activitynet(leaking, **FILES)
    assert [(clip.id, clip.split) for clip in data.clips] == [
        ("v_a#1-2", "train"), ("v_b#1-2", "train"), ("v_c#5-6", "val")
    ]  # fmt: skip
    reason = (
        "anet_val.json: video v_b is in split val here and in anet_train.json in train; it can be "
        "in one of them"
    )
    assert data.skipped == (("v_b", reason),)
    assert data.regular == frozenset()  # it makes the exit code 3
    oddities = activitynet.ADAPTER.survey(leaking, FILES).oddities
    assert (oddities["in_two_splits"], oddities["skipped"]) == (1, 1)
    (kept,) = read_activitynet(leaking, policy="keep", **FILES).skipped
    assert kept == ("v_b", reason)
    with pytest.raises(DatasetError, match=r"v_b is in split val here and in anet_train\.json"):
        read_activitynet(leaking, policy="error", **FILES)
    videos = read_activitynet(leaking, clips="videos", **FILES)
    assert [(clip.id, clip.labels) for clip in videos.clips] == [
        ("v_a", (0,)), ("v_b", (1,)), ("v_c", (1,))
    ]  # fmt: skip
    turned = read_activitynet(leaking, annotations="anet_val.json,anet_train.json")
    assert [(clip.id, clip.split) for clip in turned.clips] == [
        ("v_b#3-4", "val"), ("v_c#5-6", "val"), ("v_a#1-2", "train")
    ]  # fmt: skip


def test_a_check_says_so(leaking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["datasets", "check", "activitynet", "--root", str(leaking), "--json"]
    with pytest.raises(SystemExit):
        main([*given, "--option", f"annotations={FILES['annotations']}"])
    assert json.loads(capsys.readouterr().out)["oddities"]["in_two_splits"] == 1


def test_files_of_one_split_are_put_together(tmp_path: Path) -> None:
    write(tmp_path / "one_val.json", {"v_b": video((1, 2, "sit"))})
    write(tmp_path / "two_val.json", {"v_b": video((3, 4, "run"))})
    data = read_activitynet(tmp_path, annotations="one_val.json,two_val.json")
    assert [(clip.id, clip.split) for clip in data.clips] == [
        ("v_b#1-2", "val"),
        ("v_b#3-4", "val"),
    ]
    assert data.skipped == ()


def test_lines_of_a_table_are_listed_one_by_one(tmp_path: Path) -> None:
    header = "video,type,type_idx,start,end\n"
    (tmp_path / "val.csv").write_text(header + "x_1,run,0,1,2\n")
    (tmp_path / "test.csv").write_text(header + "x_1,run,0,3,4\nx_1,run,0,5,6\nx_2,run,0,1,2\n")
    data = read_activitynet(tmp_path, annotations="val.csv,test.csv")
    assert [(clip.id, clip.split) for clip in data.clips] == [
        ("x_1#1-2", "val"), ("x_2#1-2", "test")
    ]  # fmt: skip
    assert [item for item, _ in data.skipped] == ["test.csv line 2", "test.csv line 3"]
