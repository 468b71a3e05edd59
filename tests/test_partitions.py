"""Official splits in one store: from the annotation to the mean over three runs."""

from __future__ import annotations

import json
import runpy
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
import zarr

from msq import config as configuration
from msq.cli import main
from msq.config import RunConfig
from msq.errors import SpecMismatch, UsageError
from msq.extract import store_schema as schema
from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.datasets.hmdb51 import CLASSES, hmdb51_tags, read_hmdb51
from msq.extract.datasets.ucf101 import read_ucf101
from msq.extract.store import open_store
from msq.extract.store_writer import ShardRows, StoreWriter
from msq.head.features import load_features
from msq.head.partitions import merged

fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))
SPLITS = {
    "split1": ("train", "train", "test", "val", "test", "train"),
    "split2": ("test", "train", "train", "val", "", "train"),
}
SMALL = ("head.layers=1", "head.heads=2", "head.ffn=32", "train.epochs=2", "train.batch=8")


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


def dataset(**changes: object) -> Dataset:
    """Six clips of three classes; of the first split's parts."""
    clips = tuple(
        Clip(f"clip {row}", Path(f"{row}.mp4"), None, None, (row % 3,), split)
        for row, split in enumerate(SPLITS["split1"])
    )
    data = Dataset("toy", ("a", "b", "c"), "singlelabel", clips, "top1")
    return replace(data, **changes)


def fill(path: Path, data: Dataset, status: dict[int, int] | None = None) -> None:
    """A store of made-up features."""
    writer = StoreWriter(path, data, shard=4)
    writer.add_encoder(fakes.SPEC)
    rng = np.random.default_rng(0)
    for k in range(writer.shards):
        rows = writer.rows(k)
        codes = np.array([(status or {}).get(row, 1) for row in rows], dtype=np.uint8)
        shape = (len(rows), fakes.SPEC.tokens, fakes.SPEC.channels)
        times = np.zeros((len(rows), fakes.SPEC.frames), dtype=np.float32)
        values = rng.normal(size=shape).astype(np.float16)
        writer.commit(k, {fakes.SPEC.slug: ShardRows(values, times, codes)}, [])


def hmdb51(folder: Path, listed: dict[str, list[str]]) -> Path:
    """Split files in the true format; the tag of clip i in split s is (i + s) modulo 3, or 0."""
    files = folder / "testTrainMulti_7030_splits"
    files.mkdir(parents=True)
    for split in (1, 2, 3):
        for name in CLASSES:
            tags = [(k + split) % 3 if k % 4 else 0 for k in range(len(listed[name]))]
            pairs = zip(listed[name], tags, strict=True)
            text = "".join(f"{clip} {tag} \n" for clip, tag in pairs)
            (files / f"{name}_test_split{split}.txt").write_text(text)
    return folder


def test_hmdb51_of_all_splits_has_every_clip_that_one_of_them_uses(tmp_path):
    listed = {name: [f"{name}_{k}.avi" for k in range(7)] for name in CLASSES}
    root = hmdb51(tmp_path, listed)
    data = read_hmdb51(root, split="all")
    assert len(data.clips) == 51 * 5
    assert {c.id for c in data.clips} == {f"{n}/{n}_{k}" for n in CLASSES for k in (1, 2, 3, 5, 6)}
    assert len(data.left_out) == 51 * 2
    assert (data.unusable, data.variant) == ((), "all splits")
    assert ("wave/wave_4", "unused in every split (tag 0)") in data.left_out
    for split in (1, 2, 3):
        tags = hmdb51_tags(root, split)
        found = dict(zip((c.id for c in data.clips), data.partitions[f"split{split}"], strict=True))
        assert found == {c.id: tags[c.id] or "" for c in data.clips}
    own = {c.id: c.split for c in data.clips}
    assert own == {c.id: hmdb51_tags(root, 1)[c.id] or "val" for c in data.clips}
    alone = read_hmdb51(root, split=2)
    assert (alone.partitions, alone.variant) == ({}, "split 2")
    assert set(alone.regular) == set(alone.skipped)
    with pytest.raises(UsageError, match="unused=val: goes with one split"):
        read_hmdb51(root, split="all", unused="val")


def test_hmdb51_of_all_splits_on_the_real_names(shared, tmp_path):
    real = shared / "annotations" / "hmdb51"
    if not real.is_dir():
        pytest.skip("no real HMDB51 split files")
    folder = tmp_path / "splits"
    folder.mkdir()
    turned = {"1": "2", "2": "0", "0": "1"}
    for file in real.glob("*_test_split1.txt"):
        lines = [line.rstrip().rsplit(" ", 1) for line in file.read_text().splitlines()]
        for split in (1, 2, 3):
            text = "".join(f"{name} {tag} \n" for name, tag in lines)
            (folder / file.name.replace("split1", f"split{split}")).write_text(text)
            lines = [[name, turned[tag]] for name, tag in lines]
    data = read_hmdb51(tmp_path, split="all")
    assert len(data.clips) == 6766  # a clip that one split leaves unused is used by another
    counts = [[p.count(s) for s in ("train", "test", "")] for p in data.partitions.values()]
    assert counts == [[3570, 1530, 1666], [1666, 3570, 1530], [1530, 1666, 3570]]
    assert data.skipped == ()


def ucf101(root: Path, *, videos: bool = False) -> Path:
    """Three classes of six clips; split s tests on clips s and s + 3; split 3 omits one clip."""
    folder = root / "ucfTrainTestlist"
    folder.mkdir(parents=True)
    names = ("YoYo", "Archery", "Biking")
    lines = "".join(f"{k} {name}\r\n" for k, name in enumerate(names, 1))
    (folder / "classInd.txt").write_bytes(lines.encode())
    for split in (1, 2, 3):
        parts: dict[str, list[str]] = {"train": [], "test": []}
        for label, name in enumerate(names, 1):
            for clip in range(1, 7):
                file = f"{name}/v_{name}_g0{clip}_c01.avi"
                if videos:
                    fakes.write_video(root / "UCF-101" / file, 10 * label + clip)
                if (split, name, clip) == (3, "Biking", 1):
                    continue
                test = clip % 3 == split % 3
                parts["test" if test else "train"].append(file if test else f"{file} {label}")
        for part, rows in parts.items():
            (folder / f"{part}list0{split}.txt").write_bytes(
                "".join(f"{r}\r\n" for r in rows).encode()
            )
    return root


def test_ucf101_of_all_splits_and_a_clip_that_one_of_them_lacks(tmp_path):
    root = ucf101(tmp_path)
    data = read_ucf101(root, split="all")
    assert len(data.clips) == 18
    assert [c.id for c in data.clips] == [c.id for c in read_ucf101(root, split=1).clips]
    for split in (1, 2, 3):
        expected = {c.id: c.split for c in read_ucf101(root, split=split).clips}
        found = zip((c.id for c in data.clips), data.partitions[f"split{split}"], strict=True)
        assert {name: part for name, part in found if part} == expected
    assert data.partitions["split3"].count("") == 1
    # A clip that the first split lacks comes last and is no training or test clip by itself.
    file = root / "ucfTrainTestlist" / "testlist02.txt"
    file.write_bytes(file.read_bytes() + b"YoYo/v_YoYo_g07_c01.avi\r\n")
    last = read_ucf101(root, split="all")
    assert (last.clips[-1].id, last.clips[-1].split) == ("YoYo/v_YoYo_g07_c01", "val")
    assert [p[-1] for p in last.partitions.values()] == ["", "test", ""]


def test_ucf101_of_all_splits_on_the_real_lists(shared, tmp_path):
    real = shared / "annotations" / "ucf101"
    if not real.is_dir():
        pytest.skip("no real UCF101 lists")
    for split in (1, 2, 3):
        for part in ("train", "test"):
            shutil.copy(real / f"{part}list01.txt", tmp_path / f"{part}list0{split}.txt")
    data = read_ucf101(tmp_path, split="all")
    assert len(data.clips) == 13320
    for splits in data.partitions.values():
        assert (splits.count("train"), splits.count("test")) == (9537, 3783)


def test_a_store_keeps_its_partitions_and_plain_readers_see_them(tmp_path):
    fill(tmp_path / "a.zarr", dataset(partitions=SPLITS))
    store = open_store(tmp_path / "a.zarr")
    assert store.partitions == SPLITS
    assert list(store.partitions) == ["split1", "split2"]
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    assert tuple(group["partition/split2"][:]) == SPLITS["split2"]
    assert group["partition/split2"].metadata.dimension_names == ("clip",)
    tree = xr.open_datatree(tmp_path / "a.zarr", engine="zarr", consolidated=False)
    assert tuple(tree["partition"]["split1"].values) == SPLITS["split1"]
    tree.close()


def test_a_store_without_partitions_is_as_it_was(tmp_path):
    fill(tmp_path / "a.zarr", dataset())
    assert open_store(tmp_path / "a.zarr").partitions == {}
    assert not (tmp_path / "a.zarr" / "partition").exists()
    assert schema.root_attributes(dataset()).keys() == {
        *("schema", "dataset", "task", "metric", "classes", "clips", "clip_list_hash")
    }


@pytest.mark.parametrize(
    ("there", "wanted", "words"),
    [
        ({}, SPLITS, "partitions: expected split1, split2, found none"),
        (SPLITS, {}, "partitions: expected none, found split1, split2"),
        (SPLITS, {**SPLITS, "split2": SPLITS["split1"]}, "partition split2: other splits"),
    ],
)
def test_a_store_of_other_partitions_is_refused(tmp_path, there, wanted, words):
    fill(tmp_path / "a.zarr", dataset(partitions=there))
    before = fakes.tree(tmp_path)
    with pytest.raises(SpecMismatch, match=words):
        StoreWriter(tmp_path / "a.zarr", dataset(partitions=wanted), shard=4)
    assert fakes.tree(tmp_path) == before


def test_features_are_those_of_one_partition_and_unused_clips_are_counted(tmp_path):
    fill(tmp_path / "a.zarr", dataset(partitions=SPLITS), status={1: 2, 4: 2})
    store = open_store(tmp_path / "a.zarr")
    first = load_features(store)
    assert (first.partition, first.splits) == ("split1", ("train", "test", "val", "train"))
    assert first.left_out == {"failed": 2, "missing": 0}
    second = load_features(store, partition="split2")
    assert second.ids == ("clip 0", "clip 2", "clip 3", "clip 5")
    assert second.splits == ("test", "train", "val", "train")
    assert second.left_out == {"failed": 1, "missing": 0, "unused": 1}
    assert second.coverage() == "4 of 6 clips (1 failed; 1 unused)"
    assert first.identity()["partition"] == "split1"
    assert first.identity()["clip_hash"] != second.identity()["clip_hash"]
    with pytest.raises(UsageError, match="no partition 'split3'; it has split1, split2"):
        load_features(store, partition="split3")
    fill(tmp_path / "b.zarr", dataset())
    with pytest.raises(UsageError, match="its clips have one split each"):
        load_features(open_store(tmp_path / "b.zarr"), partition="split1")
    assert "partition" not in load_features(open_store(tmp_path / "b.zarr")).identity()


def test_the_first_rows_of_a_dataset_keep_their_partitions():
    limited = dataset(partitions=SPLITS).limited(3)
    assert limited.partitions == {"split1": ("train", "train", "test"),
                                  "split2": ("test", "train", "train")}  # fmt: skip


@pytest.fixture(scope="module")
def ucf_store(tmp_path_factory):
    """A store of the three splits, extracted from videos by the embedded encoders."""
    folder = tmp_path_factory.mktemp("ucf")
    root = ucf101(folder / "ucf", videos=True)
    arguments = ("--dataset", "ucf101", "--root", root, "--option", "split=all")
    code = run("extract", *arguments, "--out", folder / "u.zarr", "--workers", 0, "-q")
    assert code == 0
    return folder / "u.zarr"


def test_train_head_runs_every_partition_and_gives_the_mean(ucf_store, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train-head", ucf_store, "--out", out, "--partition", "all", "-q", "--json",
               *SMALL) == 0  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "result.json").read_text())
    assert list(result["partitions"]) == ["split1", "split2", "split3"]
    assert (result["partition"], result["protocol"]) == ("all", "paper")
    assert (result["dataset"], result["variant"], result["epochs"]) == ("ucf101", "all splits", 6)
    for key in ("map", "top1", "map_micro"):
        values = [part[key] for part in result["partitions"].values()]
        assert result["metrics"][key] == pytest.approx(sum(values) / 3, abs=1e-12)
        assert result["spread"][key] == pytest.approx(statistics.stdev(values), abs=1e-12)
    assert result["metrics"]["classes_scored"] == 3
    assert "classes_scored" not in result["spread"]
    parts = result["clips_by_split"]
    assert parts["split3"]["train"] + parts["split3"]["val"] == 11
    assert result["clips_by_partition"] == {name: part["test"] for name, part in parts.items()}
    assert result["clips"] == sum(result["clips_by_partition"].values())
    assert "split3: 17 of 18 clips (1 unused)" in result["coverage"]
    # Each is an ordinary run, that of the same command with its name.
    alone = tmp_path / "alone"
    assert run("train-head", ucf_store, "--out", alone, "--partition", "split2", "-q", "--json",
               *SMALL) == 0  # fmt: skip
    second = json.loads(capsys.readouterr().out)
    assert second["partition"] == "split2"
    assert second["metrics"] == result["partitions"]["split2"]
    # The first one counts where none is named.
    unnamed = tmp_path / "unnamed"
    assert run("train-head", ucf_store, "--out", unnamed, "-q", "--json", *SMALL) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["partition"], first["metrics"]) == ("split1", result["partitions"]["split1"])
    times = {p: p.stat().st_mtime_ns for p in out.glob("split*/*")}
    assert run("train-head", ucf_store, "--out", out, "--partition", "all", "-q", *SMALL) == 0
    table = " ".join(capsys.readouterr().out.split())
    for word in ("partitions split1, split2, split3", "±", "all splits", "split3"):
        assert word in table
    assert {p: p.stat().st_mtime_ns for p in out.glob("split*/*")} == times
    # A run of one kind does not go on as one of the other.
    assert run("train-head", ucf_store, "--out", out, "-q", *SMALL) == 1
    assert "features.partition: expected 'all', found None" in capsys.readouterr().err
    assert run("train-head", ucf_store, "--out", alone, "--partition", "all", "-q", *SMALL) == 1


def test_eval_scores_each_partition_with_its_own_head(ucf_store, tmp_path, capsys):
    out = tmp_path / "run"
    common = ("--out", out, "--partition", "all", "-q", "--json", *SMALL)
    assert run("train-head", ucf_store, *common) == 0
    trained = json.loads(capsys.readouterr().out)
    file = tmp_path / "scores.txt"
    assert run("eval", out, ucf_store, "--json", "--export", file) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["metrics"] == pytest.approx(trained["metrics"], abs=1e-12)
    assert (scored["clips"], "clips_by_split" in scored) == (trained["clips"], False)
    assert scored["partitions"].keys() == trained["partitions"].keys()
    assert scored["spread"] == pytest.approx(trained["spread"], abs=1e-12)
    lines = (tmp_path / "scores-split2.txt").read_text().splitlines()
    assert {line.split("_g0")[1][0] for line in lines} == {"2", "5"}
    assert len(scored["exports"]) == 3
    sources = ((ucf_store,), ("--dataset", "ucf101", "--root", ucf_store.parent / "ucf",
                              "--option", "split=all"))  # fmt: skip
    for source in sources:
        file = ("--submission", tmp_path / "scores-split2.txt", "--json")
        assert run("eval", *source, *file, "--partition", "split2") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["partition"] == "split2"
        for key in ("map", "top1", "map_micro"):
            expected = scored["partitions"]["split2"][key]
            assert found["metrics"][key] == pytest.approx(expected, abs=1e-12)
        assert found["warnings"] == []
        assert run("eval", *source, *file, "--partition", "split4") == 2
        assert "no partition 'split4'" in capsys.readouterr().err
    assert run("predict", "x.mp4", "--run", out) == 2
    assert "found one for each partition; name" in " ".join(capsys.readouterr().err.split())
    assert run("eval", out / "split1", ucf_store, "--json") == 0
    assert json.loads(capsys.readouterr().out)["partition"] == "split1"


def test_all_partitions_of_a_store_without_any_are_refused(tmp_path, capsys):
    fill(tmp_path / "b.zarr", dataset())
    code = run("train-head", tmp_path / "b.zarr", "--partition", "all", "--out", tmp_path / "r")
    assert code == 2
    assert "option split=all" in capsys.readouterr().err


def test_a_count_that_differs_and_a_metric_that_is_none_are_merged():
    parts = {
        f"split{k}": {"metrics": {"map": value, "rows": 10 + k, "top1": 0.5}, "epochs": 1,
                      "seconds": 2.0, "clips": 3, "coverage": "3 of 3", "seed": 0}
        for k, value in ((1, 0.25), (2, None), (3, 0.75))
    }  # fmt: skip
    result = merged("r", parts)
    assert result["metrics"]["rows"] == 12
    assert result["metrics"]["map"] != result["metrics"]["map"]
    assert result["spread"] == {"map": None, "top1": 0.0}
    assert (result["seconds"], result["seed"]) == (6.0, 0)
    parts["split1"]["metrics"] = {**parts["split1"]["metrics"], "f1_macro": 0.5}
    assert "f1_macro" not in merged("r", parts)["metrics"]  # the others were scored before
    one = merged("r", {"split1": parts["split1"]})
    assert (one["metrics"]["map"], one["spread"]["map"]) == (0.25, None)


def test_results_of_earlier_versions_have_their_clips_under_the_name_of_the_parts():
    old = {"metrics": {"map": 0.5}, "epochs": 1, "seconds": 2.0, "coverage": "all", "split": "test",
           "clips": {"train": 9, "val": 1, "test": 4, "train_unlabelled": 0}}  # fmt: skip
    new = {**old, "clips": 5, "clips_by_split": {**old["clips"], "test": 5}}
    result = merged("r", {"split1": old, "split2": new})
    assert result["clips"] == 9
    assert result["clips_by_partition"] == {"split1": 4, "split2": 5}
    assert [part["test"] for part in result["clips_by_split"].values()] == [4, 5]


def test_inspect_lists_the_partitions(ucf_store, capsys):
    assert run("store", "inspect", ucf_store, "--json") == 0
    found = json.loads(capsys.readouterr().out)["partitions"]
    assert found["split3"] == {"train": 11, "test": 6, "unused": 1}


def test_hmdb51_alone_does_not_end_with_exit_code_3(tmp_path, capsys):
    """Clips that the split leaves unused are no failures; a malformed line is."""
    root = hmdb51(tmp_path / "h", {n: [f"{n}_{k}.avi" for k in range(2)] for n in CLASSES})
    video = tmp_path / "one.avi"
    fakes.write_video(video.with_suffix(".mp4"), 0)
    for name in CLASSES:
        place = root / "videos" / name / f"{name}_1.mp4"
        place.parent.mkdir(parents=True)
        place.hardlink_to(video.with_suffix(".mp4"))
    arguments = ("extract", "--dataset", "hmdb51", "--root", root, "--image-encoder", "none",
                 "--frames", 2, "--workers", 0, "-q", "--out")  # fmt: skip
    assert run(*arguments, tmp_path / "h.zarr", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["clips"], result["done"], result["skipped"], result["left_out"]) == (
        *(51, 51, 0, 51),
    )
    assert result["left_out_items"][0] == {
        "item": "brush_hair/brush_hair_0",
        "reason": "unused in split 1 (tag 0)",
    }
    file = root / "testTrainMulti_7030_splits" / "talk_test_split1.txt"
    file.write_text(file.read_text() + "no_tag.avi\n")
    assert run(*arguments, tmp_path / "h.zarr", "--json") == 3
    result = json.loads(capsys.readouterr().out)
    assert (result["skipped"], result["left_out"]) == (1, 51)
    assert run(*arguments, tmp_path / "h.zarr", "--json", "--dry-run") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["skipped"], plan["left_out"]) == (1, 51)
    # policy=error stops at what is unusable, never at what is left out by rule.
    assert run(*arguments, tmp_path / "h.zarr", "--policy", "error") == 2
    assert "no_tag.avi" in capsys.readouterr().err


def test_the_configuration_names_the_partition():
    config = configuration.override(RunConfig(), ["features.partition=split2"])
    assert config.features.partition == "split2"
