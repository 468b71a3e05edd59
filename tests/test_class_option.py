"""`--option classes=FILE` is looked for as `--classes FILE` is, here and by workers elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from msq.cli import main
from msq.errors import DatasetError, UsageError
from msq.extract.datasets.registry import read_dataset
from msq.extract.request import ExtractRequest
from msq.extract.request_text import anchored, read_request, write_request

HERE, THERE = ("run", "eat"), ("eat", "run")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a dataset below it, which has a class file of its own."""
    root = tmp_path / "lists"
    root.mkdir()
    (root / "train.csv").write_text("a.mp4 1\n")
    (root / "order.txt").write_text("\n".join(THERE) + "\n")
    (root / "m.csv").write_text("path,labels,split\na.mp4,run,train\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/order.txt").write_text("\n".join(HERE) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(name: str, root: str, classes: str = "order.txt") -> ExtractRequest:
    return ExtractRequest(dataset=name, root=Path(root), options={"classes": classes})


@pytest.mark.parametrize(("name", "root"), [("kinetics", "lists"), ("manifest", "lists/m.csv")])
def test_it_is_the_same_file_as_of_the_other_way_to_say_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, root: str
) -> None:
    request = asked(name, root)
    typed = ExtractRequest(dataset=name, root=Path(root), classes=Path("order.txt"))
    assert request.read_dataset().classes == typed.read_dataset().classes == THERE
    assert read_dataset(name, Path(root), request.options).classes == THERE
    text = write_request(anchored(request))
    monkeypatch.chdir(folder / "elsewhere")  # a file of that name there is not the one meant
    there = read_request(text)
    assert there.options == {"classes": str(folder / "lists/order.txt")}
    assert there.read_dataset().classes == THERE
    monkeypatch.chdir(folder)
    (folder / "order.txt").write_text("\n".join(HERE) + "\n")  # the working folder goes first
    assert request.read_dataset().classes == typed.read_dataset().classes == HERE
    both = replace(typed, options={"classes": "./order.txt"})
    assert both.read_dataset().classes == HERE


def test_both_ways_at_once_must_name_one_file(folder: Path) -> None:
    (folder / "other.txt").write_text("run\neat\n")
    both = ExtractRequest(
        dataset="kinetics", root=Path("lists"), classes=Path("other.txt"),
        options={"classes": "order.txt"},
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"--classes .*other\.txt and --option classes="):
        both.read_dataset()


def test_a_file_that_is_nowhere_is_said_to_be_missing_below_the_root(folder: Path) -> None:
    lost = asked("kinetics", "lists", "none.txt")
    for request in (lost, read_request(write_request(anchored(lost)))):
        with pytest.raises(DatasetError, match=r"lists/none\.txt: expected a text file"):
            request.read_dataset()


def test_a_home_folder_is_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder / "elsewhere"))
    assert asked("kinetics", "lists", "~/order.txt").read_dataset().classes == HERE


def test_datasets_check_looks_where_extraction_looks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "names.txt").write_text("\n".join(HERE) + "\n")
    with pytest.raises(SystemExit) as ended:
        main(["datasets", "check", "kinetics", "--root", "lists",
              "--option", "classes=names.txt", "--json"])  # fmt: skip
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["classes"] == 2
