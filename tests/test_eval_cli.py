"""`msq eval` end to end: exported scores, submissions of anyone's, groups of classes, variants."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from msq.cli import main
from msq.errors import UsageError
from msq.extract.datasets.charades import read_charades
from msq.extract.datasets.thumos14 import CLASSES, read_thumos14
from msq.extract.store import open_store
from msq.extract.store_writer import ShardRows, StoreWriter
from msq.head.evaluate import evaluate_run
from msq.head.export import read_charades_submission, write_charades_submission
from msq.head.features import load_features
from msq.report.scores import scope
from msq.report.submission import evaluate_submission

fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))
kingdom = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_animal_kingdom.py"))))
SMALL = ("head.layers=1", "head.heads=4", "head.ffn=32", "train.epochs=2", "train.batch=8")
NAMES = ("running", "eating", "flying", "sitting", "reading")
ACTIONS = {
    "train": ("0", "1 2", "3", "4 0", "2", "1"),
    "test": ("0 1", "2", "", "3 4", "1 4", "0 2 3"),
}


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


def official_map(scores: np.ndarray, labels: np.ndarray) -> float:
    """The official script, step by step: a video without labels or without a line is at -inf."""
    found = []
    for k in range(labels.shape[1]):
        column = np.where(labels.any(1), scores[:, k], -np.inf)
        order = sorted(range(len(column)), key=lambda row: -column[row])
        hits, total = 0, 0.0
        for place, row in enumerate(order, start=1):
            if labels[row, k]:
                hits += 1
                total += hits / place
        if hits:
            found.append(total / hits)
    return float(np.mean(found))


@pytest.fixture(scope="module")
def charades(tmp_path_factory):
    """Official files of twelve videos of five classes, a store of them and a head."""
    root = tmp_path_factory.mktemp("charades")
    names = "".join(f"c{k:03d} {name}\n" for k, name in enumerate(NAMES))
    (root / "Charades_v1_classes.txt").write_text(names)
    for split, listed in ACTIONS.items():
        rows = ["id,subject,scene,quality,relevance,verified,script,objects,descriptions,"
                "actions,length"]  # fmt: skip
        for k, labels in enumerate(listed):
            name = f"{split[:2].upper()}{k:03d}"
            actions = ";".join(f"c{int(c):03d} 0.00 0.50" for c in labels.split())
            rows.append(f"{name},S{k},Home,6,7,Yes,script,objects,words,{actions},0.90")
            fakes.write_video(root / "Charades_v1_480" / f"{name}.mp4", 20 * len(split) + k)
        (root / f"Charades_v1_{split}.csv").write_text("\n".join(rows) + "\n")
    store, trained = root / "a.zarr", root / "run"
    assert run(*extraction(root, store)) == 0
    assert run("train-head", store, "--out", trained, "-q", *SMALL) == 0
    return SimpleNamespace(root=root, store=store, run=trained)


def extraction(root: Path, store: Path, *more: object) -> tuple[object, ...]:
    return ("extract", "--dataset", "charades", "--root", root, "--out", store, "--frames", 2,
            "--workers", 0, "-q", *more)  # fmt: skip


def test_an_exported_file_read_back_scores_the_same(charades, tmp_path, capsys):
    file = tmp_path / "scores.txt"
    assert run("eval", charades.run, charades.store, "--export", file, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    lines = [line.split(" ") for line in file.read_text().splitlines()]
    assert [line[0] for line in lines] == [f"TE{k:03d}" for k in range(6)]
    assert {len(line) for line in lines} == {1 + len(NAMES)}
    assert result["export"] == {"file": str(file), "clips": 6, "without_line": []}
    store = open_store(charades.store)
    labels = store.labels(slice(6, 12)).numpy()
    scores = np.array([[float(x) for x in line[1:]] for line in lines])
    expected = official_map(scores, labels)
    assert result["metrics"]["map_charades"] == pytest.approx(expected, abs=1e-12)
    assert 0 < expected < 1
    for source in ((charades.store,), ("--dataset", "charades", "--root", charades.root)):
        assert run("eval", "--submission", file, *source, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        for key in ("map_charades", "map", "map_micro", "map_official", "top1", "classes_scored"):
            assert found["metrics"][key] == pytest.approx(result["metrics"][key], abs=1e-12)
        assert (found["dataset"], found["split"], found["clips"]) == ("charades", "test", 6)
        assert "accuracy" not in found["metrics"]
        assert any("the official test set has 1863" in w for w in found["warnings"])
    assert run("eval", "--submission", file, charades.store) == 0
    assert "Charades scorer" in capsys.readouterr().out


def test_a_clip_that_failed_gets_no_line_and_the_output_says_so(charades, tmp_path, capsys):
    for file in (charades.root).glob("Charades_v1_*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for file in (charades.root / "Charades_v1_480").glob("*.mp4"):
        (tmp_path / file.name).write_bytes(b"no video" if file.stem == "TE003" else
                                           file.read_bytes())  # fmt: skip
    store, file = tmp_path / "b.zarr", tmp_path / "scores.txt"
    assert run(*extraction(tmp_path, store)) == 3
    capsys.readouterr()
    assert run("eval", charades.run, store, "--export", file) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "5 lines" in said
    assert "the official test list has 1863 videos, the store 6" in said
    assert "1 clips of the test split have no features and get no line" in said
    assert "TE003" in said
    assert run("eval", charades.run, store, "--export", file, "--json") == 0
    assert json.loads(capsys.readouterr().out)["export"]["without_line"] == ["TE003"]
    # Scored against the annotation, the missing video is last of all.
    assert run("eval", "--submission", file, store, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["without_line"] == ["TE003"]
    assert any("1 videos without a line" in w for w in found["warnings"])
    lines = {line.split()[0]: line.split()[1:] for line in file.read_text().splitlines()}
    rows = [lines.get(f"TE{k:03d}", ["-inf"] * len(NAMES)) for k in range(6)]
    expected = official_map(np.array(rows, dtype=float), open_store(store).labels()[6:].numpy())
    assert found["metrics"]["map_charades"] == pytest.approx(expected, abs=1e-12)


def test_unlabelled_videos_in_the_store_or_not_give_the_same(charades, tmp_path):
    store = tmp_path / "c.zarr"
    run(*extraction(charades.root, store, "--option", "unlabelled=skip"))
    kept = evaluate_run(charades.run, open_store(charades.store))["metrics"]
    skipped = evaluate_run(charades.run, open_store(store))["metrics"]
    assert (kept["rows"], kept["rows_unlabelled"]) == (6, 1)
    assert (skipped["rows"], skipped["rows_unlabelled"]) == (5, 0)
    for key in ("map_charades", "map", "map_micro", "map_official", "top1"):
        assert kept[key] == pytest.approx(skipped[key], abs=1e-12)


def test_the_real_annotation_scores_a_submission_as_the_official_script(shared, tmp_path):
    root = shared / "annotations" / "charades"
    if not root.is_dir():
        pytest.skip("no real Charades annotation")
    test = [c for c in read_charades(root).clips if c.split == "test"]
    ids = [c.id for c in test]
    labels = np.zeros((1863, 157), dtype=int)
    for row, clip in enumerate(test):
        labels[row, list(clip.labels)] = 1
    g = torch.Generator().manual_seed(0)
    # Two digits, so that there are ties; and three videos without a line.
    scores = (torch.rand(1863, 157, generator=g) + 0.3 * torch.from_numpy(labels)).mul(100).round()
    file = tmp_path / "submission.txt"
    write_charades_submission(file, ids[3:], scores[3:] / 100)
    found = evaluate_submission(file, None, "charades", root, {}, "test")
    assert found["warnings"] == [f"{file}: 3 videos without a line, ranked last: {ids[:3]!r}"]
    assert found["without_line"] == ids[:3]
    exact = (scores / 100).float().double().numpy()
    exact[:3] = -np.inf
    assert found["metrics"]["map_charades"] == pytest.approx(official_map(exact, labels), abs=1e-12)
    keep = labels.any(1)
    finite = np.where(np.isfinite(exact), exact, -1.0)[keep]
    ap = [average_precision_score(labels[keep, k], finite[:, k]) for k in range(157)]
    assert found["metrics"]["map"] == pytest.approx(np.mean(ap), abs=1e-12)
    assert found["metrics"]["rows_unlabelled"] == 49


def test_what_eval_is_asked_for_has_to_fit(charades, tmp_path, capsys):
    file = tmp_path / "none.txt"
    cases = [
        (("eval",), "expected RUN and STORE"),
        (("eval", charades.run), "expected RUN and STORE"),
        (("eval", charades.run, charades.store, "--submission", file), "needs no RUN"),
        (("eval", "--submission", file), "expected a STORE, or --dataset NAME"),
        (("eval", charades.store, "--submission", file, "--dataset", "charades"), "expected a ST"),
        (("eval", charades.run, charades.store, "--dataset", "charades"), "go with --submission"),
        (("eval", "--submission", file, charades.store), "expected a submission, found nothing"),
        (("eval", "--submission", file, charades.store, "--split", "val"), "no clip in it"),
    ]
    for arguments, words in cases:
        assert run(*arguments) == 2, arguments
        assert words in " ".join(capsys.readouterr().err.split()), arguments
    file.write_text("TE000 1 2 3\n")
    assert run("eval", "--submission", file, charades.store) == 2
    assert "expected an id and 5 scores, found 3" in capsys.readouterr().err


def test_probabilities_keep_their_last_bits(tmp_path):
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(4, 3, generator=g, dtype=torch.float64)
    scores[1] = scores[0] * (1 + 2**-50)
    file = tmp_path / "s.txt"
    write_charades_submission(file, list("abcd"), scores)
    assert torch.equal(read_charades_submission(file, list("abcd"), 3, expected=None), scores)


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """A store of Animal Kingdom's true file formats with head, middle and tail."""
    root = tmp_path_factory.mktemp("animals")
    kingdom.write_metadata(root)
    kingdom.write_actions(root)
    for k, row in enumerate(kingdom.AR):
        fakes.write_video(root / "dataset" / "video" / f"{row[1]}.mp4", k)
    arguments = ("--dataset", "animal-kingdom", "--root", root, "--out", root / "a.zarr")
    assert run("extract", *arguments, "--frames", 2, "--workers", 0, "-q") == 0
    return root / "a.zarr"


def test_groups_of_classes_are_in_every_result(animals, tmp_path, capsys):
    store = open_store(animals)
    assert store.groups == {"head": (1, 2), "middle": (3,), "tail": (0, 4, 5)}
    assert run("train-head", animals, "--out", tmp_path / "run", "-q", "--json", *SMALL) == 0
    trained = json.loads(capsys.readouterr().out)["metrics"]
    assert run("eval", tmp_path / "run", animals, "--json") == 0
    scored = json.loads(capsys.readouterr().out)["metrics"]
    with np.load(tmp_path / "run" / "predictions.npz") as held:
        logits, labels = held["logits"], held["labels"]
    ap = {k: average_precision_score(labels[:, k], logits[:, k]) for k in (1, 2, 3)}
    for metrics in (trained, scored):
        assert metrics["map_head"] == pytest.approx((ap[1] + ap[2]) / 2, abs=1e-12)
        assert metrics["map_middle"] == pytest.approx(ap[3], abs=1e-12)
        assert metrics["map_tail"] is None  # test has none of its classes
        scored_classes = [metrics[f"classes_scored_{g}"] for g in ("head", "middle", "tail")]
        assert scored_classes == [2, 1, 0]
    assert run("eval", tmp_path / "run", animals) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "of head classes (2 scored)" in table
    assert "of tail classes (0 scored)" in table
    # Selecting columns takes the groups along.
    features = load_features(store).select(columns=(2, 3, 5))
    assert features.groups == {"head": (0,), "middle": (1,), "tail": (2,)}


def test_a_store_from_before_there_were_groups_is_gone_on_with(animals, tmp_path, capsys):
    document = json.loads((animals / "zarr.json").read_text())
    before = (animals / "zarr.json").read_bytes()
    arguments = ("extract", "--dataset", "animal-kingdom", "--root", animals.parent, "--out",
                 animals, "--frames", 2, "--workers", 0, "-q")  # fmt: skip
    try:
        changed = document["attributes"]["msq"].pop("groups")
        del document["attributes"]["msq"]["metadata_sha256"]  # nor were there digests
        (animals / "zarr.json").write_text(json.dumps(document))
        assert run(*arguments) == 0
        assert open_store(animals).groups == {}
        document["attributes"]["msq"]["groups"] = {**changed, "head": [0]}
        (animals / "zarr.json").write_text(json.dumps(document))
        assert run(*arguments) == 1
        assert "groups: expected" in capsys.readouterr().err
    finally:
        (animals / "zarr.json").write_bytes(before)


@pytest.mark.parametrize("view", ["official", "dedup"])
def test_the_reading_of_a_dataset_goes_from_the_adapter_to_the_features(tmp_path, view):
    """THUMOS14's view decides what a row is: of one of them top-1 cannot pass 93.51 %."""
    for k, name in enumerate(CLASSES):
        file = tmp_path / "annotation" / f"{name}_test.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"video_test_{k:07d}  1.5 {k + 3}.0\n")
    (tmp_path / "annotation" / "Ambiguous_test.txt").write_text("video_test_0000001  0.0 1.4\n")
    data = read_thumos14(tmp_path, view=view)
    assert data.left_out == data.skipped
    assert (len(data.left_out), data.unusable) == (1, ())
    writer = StoreWriter(tmp_path / "t.zarr", data, shard=len(data.clips))
    writer.add_encoder(fakes.SPEC)
    count = len(data.clips)
    tokens = np.zeros((count, fakes.SPEC.tokens, fakes.SPEC.channels), dtype=np.float16)
    times = np.zeros((count, fakes.SPEC.frames), dtype=np.float32)
    rows = ShardRows(tokens, times, np.ones(count, dtype=np.uint8))
    writer.commit(0, {fakes.SPEC.slug: rows}, [])
    features = load_features(open_store(tmp_path / "t.zarr"))
    assert features.variant == f"{view} view"
    result = {"dataset": features.name, "variant": features.variant, "split": "test"}
    assert scope(result) == f"thumos14 ({view} view), test split"


def test_a_submission_needs_one_truth(charades, tmp_path):
    with pytest.raises(UsageError, match="expected a STORE, or --dataset"):
        evaluate_submission(tmp_path / "x", charades.store, "charades", None, {}, "test")
