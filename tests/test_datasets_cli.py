"""`msq datasets list` and `check`, and `msq extract --dataset NAME --root DIR`."""

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import msq.extract.datasets
from msq.cli import main
from msq.errors import DatasetError, UsageError
from msq.extract.datasets.adapter import Adapter, SplitCount, Survey
from msq.extract.datasets.options import parse_options
from msq.extract.datasets.registry import MODULES, find_adapter, list_adapters
from msq.extract.request import ExtractRequest
from msq.report.datasets import survey_rows

CHARADES = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length"


def run(*arguments):
    """Exit code of one command."""
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    return left.value.code


@pytest.fixture
def charades(tmp_path):
    """Two training videos and a test video, annotated; no video files yet."""
    root = tmp_path / "charades"
    root.mkdir()
    rows = {
        "train": ("AAAAA,S1,Room,6,7,Yes,s,o,d,c001 1.00 9.00;c000 0.50 2.00,8.50",
                  "BBBBB,S1,Room,6,7,Yes,s,o,d,,8.50"),
        "test": ("CCCCC,S2,Room,6,7,Yes,s,o,d,c002 0.00 1.00,8.50",),
    }  # fmt: skip
    for split, lines in rows.items():
        text = "\r\n".join((CHARADES, *lines, ""))
        (root / f"Charades_v1_{split}.csv").write_bytes(text.encode())
    names = "".join(f"c{k:03d} {name}\n" for k, name in enumerate(("running", "eating", "flying")))
    (root / "Charades_v1_classes.txt").write_text(names)
    return root


def test_every_module_with_an_adapter_is_in_the_registry():
    package = msq.extract.datasets
    listed = {target.partition(":")[0] for target in MODULES.values()}
    for module in pkgutil.iter_modules(package.__path__):
        found = importlib.import_module(f"{package.__name__}.{module.name}")
        if isinstance(getattr(found, "ADAPTER", None), Adapter):
            assert module.name in listed, module.name
            assert MODULES[found.ADAPTER.name] == module.name


def test_adapters_are_found_by_name_and_say_what_they_need():
    for adapter in list_adapters():
        assert find_adapter(adapter.name) is adapter
        for text in (adapter.title, adapter.needs, adapter.access, *adapter.options.values()):
            assert text.strip(), adapter.name
    assert find_adapter("Animal_Kingdom").name == "animal-kingdom"
    assert {"charades", "animal-kingdom", "folder", "manifest"} <= set(MODULES)


def test_an_unknown_name_gets_the_nearest_names_and_the_list():
    with pytest.raises(UsageError) as error:
        find_adapter("charade")
    assert "unknown dataset 'charade' (did you mean charades, charades-json?)" in str(error.value)
    assert "animal-kingdom, " in str(error.value)


def test_adapters_are_imported_when_asked_for_and_not_before():
    program = (
        "import sys; from msq.extract.datasets.registry import find_adapter; "
        "find_adapter('charades'); print(sorted(m for m in sys.modules if 'datasets' in m)); "
        "assert not {'openpyxl', 'torch', 'av'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "animal_kingdom" not in done.stdout


def test_list_names_every_dataset_and_its_options(capsys):
    assert run("datasets", "list", "--json") == 0
    found = {d["dataset"]: d for d in json.loads(capsys.readouterr().out)}
    assert set(found) == set(MODULES)
    assert found["charades"]["options"].keys() == {
        "annotation", "media", "unlabelled", "policy", "fps", "frames", "targets"
    }  # fmt: skip
    assert run("datasets", "list") == 0
    out = capsys.readouterr().out
    for name in MODULES:
        assert name in out


def test_check_prints_the_promised_keys_and_leaves_with_0_with_annotations_alone(charades, capsys):
    assert run("datasets", "check", "charades", "--root", charades, "--json") == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert found["dataset"] == "charades"
    assert found["classes"] == 3
    assert found["splits"] == {
        "train": {"clips": 2, "unlabelled": 1},
        "test": {"clips": 1, "unlabelled": 0},
    }
    assert found["missing"] == 3
    assert found["oddities"]["end_past_length"] == 1
    assert found["oddities"]["reversed"] == 0
    assert found["published"]["train"] == 7985
    assert str(charades) not in out


def test_check_shows_what_is_there_beside_what_is_published(charades, capsys):
    assert run("datasets", "check", "charades", "--root", charades) == 0
    out, err = capsys.readouterr()
    assert any("train" in line and "7985" in line and "differs" in line for line in out.split("\n"))
    assert "missing, e.g. Charades_v1/AAAAA.mp4" in out
    assert err == ""


def test_an_option_reaches_the_adapter(charades, capsys):
    arguments = ("datasets", "check", "charades", "--root", charades, "--json", "--option")
    assert run(*arguments, "unlabelled=skip") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["splits"]["train"] == {"clips": 1, "unlabelled": 0}
    assert found["oddities"]["skipped"] == 1


def test_the_rows_of_the_table_mark_what_differs():
    survey = Survey(
        "x", 3, {"split1/train": SplitCount(5, 1), "split1/test": SplitCount(2)}, 4,
        oddities={"end_past_length": 7, "reversed": 0},
        published={"split1/train": 6, "end_past_length": 7, "val": 9},
    )  # fmt: skip
    assert survey_rows(survey) == [
        ("classes", "3", "–", ""),
        ("split1/train", "5", "6", "differs"),
        ("split1/train/unlabelled", "1", "–", ""),
        ("split1/test", "2", "–", ""),
        ("end past length", "7", "7", ""),
        ("reversed", "0", "–", ""),
        ("missing", "4", "–", ""),
        ("val", "–", "9", ""),
    ]


def test_folders_and_manifests_are_checked_like_any_dataset(tmp_path, media, capsys):
    for name in ("train/run/a.mp4", "train/eat/b.mp4", "test/run/c.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(media("cfr.mp4").read_bytes())
    assert run("datasets", "check", "folder", "--root", tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["classes"], found["missing"]) == (2, 0)
    assert found["splits"]["train"] == {"clips": 2, "unlabelled": 0}
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("path,labels,split\ntrain/run/a.mp4,run,train\nnone.mp4,,test\nx,y,z\n")
    for root in (tmp_path, manifest):
        assert run("datasets", "check", "manifest", "--root", root, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["missing"] == 1
        assert found["missing_examples"] == ["none.mp4"]
        assert found["oddities"] == {"skipped": 1}
        assert found["splits"]["test"] == {"clips": 1, "unlabelled": 1}
    read = ExtractRequest(dataset="folder", root=tmp_path, options={"name": "mine"}).read_dataset()
    assert read.name == "mine"
    with pytest.raises(DatasetError, match="expected one of manifest"):
        find_adapter("manifest").read(tmp_path / "train", {})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("check", "nonsense", "--root", "."), "unknown dataset 'nonsense'"),
        (("check", "charades", "--root", "none"), "none: expected a folder with Charades_v1"),
        (("check", "charades", "--root", "."), "expected Charades_v1_train.csv"),
        (("check", "charades", "--root", ".", "--option", "split"), "expected KEY=VALUE"),
        (("check", "charades", "--root", ".", "--option", "split=1"), "has no option 'split'"),
        (("check", "charades"), "--root"),
        (("check", "folder", "--root", "."), "expected videos as <class>/<video>, found none"),
    ],
)
def test_a_root_or_option_that_cannot_be_leaves_with_2(
    arguments, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run("datasets", *arguments) == 2
    assert words in capsys.readouterr().err


def test_an_option_given_twice_is_refused():
    assert parse_options(["a=1", "b = x=y "]) == {"a": "1", "b": "x=y"}
    with pytest.raises(UsageError, match="given twice: '1' and '2'"):
        parse_options(["a=1", "a=2"])
    with pytest.raises(UsageError, match="expected KEY=VALUE"):
        parse_options(["=1"])


def test_flags_of_extract_reach_the_datasets_that_have_such_an_option(charades, tmp_path):
    named = ExtractRequest(dataset="charades", root=charades)
    assert len(named.read_dataset().clips) == 3
    with pytest.raises(UsageError, match="has its own class order"):
        ExtractRequest(dataset="charades", root=charades, classes=tmp_path).read_dataset()
    with pytest.raises(UsageError, match="charades is multilabel"):
        ExtractRequest(dataset="charades", root=charades, task="singlelabel").read_dataset()
    with pytest.raises(UsageError, match="go with --dataset"):
        ExtractRequest(manifest=tmp_path, root=tmp_path).read_dataset()
    with pytest.raises(UsageError, match=r"needs --root DIR with Charades_v1_train"):
        ExtractRequest(dataset="charades").read_dataset()
    skipping = ExtractRequest(
        dataset="charades", root=charades, options={"unlabelled": "skip"}, policy="error"
    ).read_dataset()  # what was asked for is no error
    assert skipping.left_out == (("BBBBB", "no actions, and --option unlabelled=skip"),)
    assert skipping.unusable == ()
    jumps = tmp_path / "classes" / "jumping"
    jumps.mkdir(parents=True)
    for name in ("a.mp4", "notes.txt"):
        (jumps / name).touch()
    with pytest.raises(DatasetError, match=r"notes.txt: .*\(--policy error; 1 such items\)"):
        ExtractRequest(dataset="folder", root=jumps.parent, policy="error").read_dataset()
    classes = tmp_path / "order.txt"
    classes.write_text("b\na\n")
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,labels,split\nx.mp4,a,train\n")
    read = ExtractRequest(
        dataset="manifest", root=manifest, classes=classes, task="singlelabel"
    ).read_dataset()
    assert (read.classes, read.task) == (("b", "a"), "singlelabel")


def jumping(root):
    """A folder per class with a video and a file that is none."""
    (root / "jumping").mkdir(parents=True)
    for name in ("a.mp4", "notes.txt"):
        (root / "jumping" / name).touch()
    return root


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (("--classes", "order.txt"), "--classes: dataset folder has its own class order"),
        (("--task", "multilabel"), "--task multilabel: dataset folder is singlelabel"),
        (("--policy", "error"), "notes.txt: not a video by its suffix '.txt'"),
    ],
)
@pytest.mark.parametrize("command", ["extract", "import", "train"])
def test_what_is_typed_for_a_folder_per_class_is_not_passed_over(
    command, typed, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "order.txt").write_text("running\njumping\n")
    folder = jumping(tmp_path / "videos")
    arguments = {
        "extract": ("extract", "--manifest", folder),
        "import": ("store", "import", "s.zarr", "order.txt", "--name", "x", "--manifest", folder),
        "train": ("train", folder),
    }[command]
    assert run(*arguments, *typed) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("*.zarr"))


def test_a_folder_per_class_is_read_as_before_where_nothing_is_typed(tmp_path):
    data = ExtractRequest(manifest=jumping(tmp_path / "videos")).read_dataset()
    assert (data.classes, data.task, len(data.clips)) == (("jumping",), "singlelabel", 1)
    assert [item for item, _ in data.unusable] == ["jumping/notes.txt"]
    same = ExtractRequest(manifest=tmp_path / "videos", task="singlelabel", policy="skip")
    assert same.read_dataset() == data


def test_a_typed_policy_skip_reaches_the_datasets_that_are_strict(charades):
    row = "DDDDD,S1,Room,6,7,Yes,s,o,d,c999 1.00 2.00,8.50\r\n"
    with (charades / "Charades_v1_train.csv").open("a", newline="") as file:
        file.write(row)
    with pytest.raises(DatasetError, match="policy=skip goes on without the row"):
        ExtractRequest(dataset="charades", root=charades).read_dataset()
    with pytest.raises(DatasetError, match="policy=skip goes on without the row"):
        ExtractRequest(dataset="charades", root=charades, policy="error").read_dataset()
    skipping = ExtractRequest(dataset="charades", root=charades, policy="skip").read_dataset()
    assert (len(skipping.clips), len(skipping.unusable)) == (3, 1)
    with pytest.raises(UsageError, match=r"--policy skip and --option policy=error: expected one"):
        ExtractRequest(
            dataset="charades", root=charades, policy="skip", options={"policy": "error"}
        ).read_dataset()


def test_a_typed_task_must_be_the_datasets_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = jumping(tmp_path / "videos")
    with pytest.raises(UsageError, match="--task multilabel: dataset folder is singlelabel"):
        ExtractRequest(dataset="folder", root=folder, task="multilabel").read_dataset()
    # A list of classes is one of the working folder, not of the dataset's.
    (tmp_path / "order.txt").write_text("b\na\n")
    (folder / "m.csv").write_text("path,labels,split\nx.mp4,a,train\n")
    named = ExtractRequest(dataset="manifest", root=folder / "m.csv", classes=Path("order.txt"))
    assert named.read_dataset().classes == ("b", "a")


def test_charades_becomes_a_store_and_a_missing_video_a_failed_row(
    charades, media, tmp_path, capsys
):
    folder = charades / "Charades_v1_480"
    folder.mkdir()
    for name in ("AAAAA", "CCCCC"):
        (folder / f"{name}.mp4").write_bytes(media("cfr.mp4").read_bytes())
    store = tmp_path / "s.zarr"
    arguments = ("extract", "--dataset", "charades", "--root", charades, "--out", store)
    assert run(*arguments, "--frames", 4, "--workers", 0, "--json") == 3
    result = json.loads(capsys.readouterr().out)
    assert (result["clips"], result["done"], result["failed"], result["skipped"]) == (3, 2, 1, 0)
    assert [item["clip"] for item in result["failures"]] == ["BBBBB"]
    found = msq.open_store(store)
    assert (found.name, found.task) == ("charades", "multilabel")
    assert found.classes == ("running", "eating", "flying")
    assert list(found.clips) == ["AAAAA", "BBBBB", "CCCCC"]
    assert list(found.splits) == ["train", "train", "test"]
    assert found.labels().tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_check_says_which_lines_cannot_be_used_and_why(tmp_path, capsys):
    lines = "path,labels,split\na.mp4,run,train\nb.mp4,run,holdout\n"
    lines += "".join(f"c.mp4,run,{k}\n" for k in range(20))
    (tmp_path / "manifest.csv").write_text(lines)
    assert run("datasets", "check", "manifest", "--root", tmp_path) == 0
    told = capsys.readouterr().err
    assert "skipped: line 3: bad split 'holdout': expected train, val or test\n" in told
    assert "skipped: … and 1 more (all of them with --json)" in told
    assert run("datasets", "check", "manifest", "--root", tmp_path, "--json") == 0
    items = json.loads(capsys.readouterr().out)["skipped_items"]
    assert items[0] == {
        "item": "line 3",
        "reason": "bad split 'holdout': expected train, val or test",
    }
    assert len(items) == 21


def test_check_does_not_list_what_a_dataset_leaves_out_by_its_own_rules(tmp_path, capsys):
    for name in ("train/run/a.mp4", "test/run/b.mp4", "README.txt", "test/run/c.doc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert run("datasets", "check", "folder", "--root", tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["item"] for item in found["skipped_items"]] == ["test/run/c.doc"]


def test_a_manifest_with_semicolons_between_the_fields_is_told_so(tmp_path, capsys):
    (tmp_path / "m.csv").write_text('path;labels;split\na.mp4;"run;eat";train\n')
    assert run("datasets", "check", "manifest", "--root", tmp_path / "m.csv") == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "found path;labels;split (the fields stand apart by semicolons; save them with" in told
