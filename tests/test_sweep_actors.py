"""Cross-actor transfer, and class lists: who is trained on, who is scored, and what is refused."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msq import config as configuration
from msq.config import RunConfig
from msq.errors import UsageError
from msq.extract.store import open_store
from msq.head import trials
from msq.head.actor_scores import actor_features, evaluate_actors
from msq.head.actors import ActorSplit, actor_split, leave_one_out, read_actors
from msq.head.class_split_files import class_split_from_list
from msq.head.class_splits import ClassSplit
from msq.head.features import Features, load_features
from msq.head.metrics import average_precision
from msq.head.split_scores import clip_baseline, evaluate_split
from msq.head.train import train_head
from msq.head.trial import Trial

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sweep_stores.py"))))
KINDS = ("dog", "horse", "bird")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(stores.make_store(tmp_path_factory.mktemp("actors") / "toy.zarr"))


@pytest.fixture(scope="module")
def features(store: Path) -> Features:
    return load_features(open_store(store))


def table(path: Path, features: Features, both: int = 0) -> Path:
    """An actor a clip, in turn over triples, since every third clip is a test clip."""
    lines = [f"{clip},{KINDS[row // 3 % 3]}" for row, clip in enumerate(features.ids)]
    lines += [f"{clip},horse" for clip in features.ids[:both]]
    path.write_text("clip,actor\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_clips_are_divided_by_their_actors_and_mixed_ones_left_out(
    features: Features, tmp_path: Path
) -> None:
    actors = read_actors(table(tmp_path / "a.csv", features, both=3))
    assert actors[features.ids[0]] == {"dog", "horse"}
    split = actor_split(features, actors, ["dog"], ["horse"])
    assert features.ids[0] not in split.train_clips  # shows a horse, too
    row = {clip: k for k, clip in enumerate(features.ids)}
    assert {row[c] // 3 % 3 for c in split.train_clips} == {0}
    assert {row[c] // 3 % 3 for c in split.test_clips} == {1}
    assert {features.splits[row[c]] for c in split.train_clips} == {"train"}
    assert {features.splits[row[c]] for c in (*split.test_clips, *split.same_clips)} == {"test"}
    assert actor_split(features, actors, ["dog"]).test == ("bird", "horse")
    held = [one.test for one in leave_one_out(features, actors)]
    assert held == [("bird",), ("dog",), ("horse",)]
    shown = actor_features(features, split)
    assert set(shown.ids) == {*split.train_clips, *split.test_clips}
    assert ActorSplit.from_dict(json.loads(json.dumps(split.to_dict()))) == split


def test_actors_without_a_test_clip_are_not_held_out(
    store: Path, features: Features, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where training and test subjects differ: the others are held out all the same."""
    lines = [
        f"{clip},{f'test {row % 2}' if split == 'test' else f'train {row % 2}'}"
        for row, (clip, split) in enumerate(zip(features.ids, features.splits, strict=True))
    ]
    file = tmp_path / "a.csv"
    file.write_text("clip,actor\n" + "\n".join(lines) + "\n", encoding="utf-8")
    held = leave_one_out(features, read_actors(file))
    assert [one.test for one in held] == [("test 0",), ("test 1",)]
    assert set(held[0].train_clips) == {
        clip for clip, split in zip(features.ids, features.splits, strict=True) if split != "test"
    }
    given = ("zero-shot", store, "--actors", file, "--queries", "text", "--dry-run", "--json",
             "--device", "cpu", "--out", tmp_path / "o", *stores.HEAD)  # fmt: skip
    assert stores.msq(*given) == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)["trials"]) == 2
    assert "note: 2 of 4 actors are not held out" in said.err
    shown = {clip: frozenset({"a", "b"}) for clip in features.ids}
    with pytest.raises(UsageError, match="of 2 actors 0 have such test clips, none has both"):
        leave_one_out(features, shown)


def test_transfer_is_the_score_on_other_actors_by_hand(features: Features, tmp_path: Path) -> None:
    actors = read_actors(table(tmp_path / "a.csv", features))
    split = actor_split(features, actors, ["dog", "bird"], ["horse"])
    made = configuration.override(RunConfig(), [*stores.HEAD, "train.epochs=1"])
    model = train_head(actor_features(features, split), made).model
    found = evaluate_actors(model, features, split)
    rows = [k for k, clip in enumerate(features.ids)
            if clip in split.test_clips and features.labels[k].any()]  # fmt: skip
    assert features.image is not None
    with torch.no_grad():
        logits = model(features.tokens[rows], features.image[rows])["logits"]
    expected = average_precision(logits, features.labels[rows]).nanmean()
    assert found["transfer"] == pytest.approx(float(expected), abs=1e-6)
    assert found["transfer_clips"] == len(rows)


def test_actors_from_the_command_line(
    store: Path, features: Features, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = table(tmp_path / "a.csv", features)
    out = ("--out", tmp_path / "out", "--device", "cpu", "-q", *stores.HEAD)
    given = ("zero-shot", store, "--actors", file, "--queries", "text", "--epochs", "1", *out)
    assert stores.msq(*given, "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert (result["splits"], result["queries"]) == (3, "text")
    assert result["transfer"]["map"]["std"] is not None
    assert result["same_actors"]["map"]["mean"] is not None
    for more, message in (
        (("--train-actors", "dgo"), "actor 'dgo': no clip of the store has it; did you mean dog?"),
        (("--train-actors", "dog", "--test-actors", "dog"), "trained on or scored, found both"),
        (("--test-actors", "dog"), "expected --train-actors beside it"),
        (("--class-order",), "expected one of them, found both"),
    ):
        assert stores.msq(*given, *more) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_table_of_actors_that_cannot_be_used_is_refused(
    features: Features, tmp_path: Path
) -> None:
    file = tmp_path / "a.csv"
    for content, message in (
        ("id,who\nx,dog\n", "expected columns clip and actor, found"),
        ("clip,actor\n", "expected a line for each clip"),
    ):
        file.write_text(content)
        with pytest.raises(UsageError, match=message):
            read_actors(file)
    with pytest.raises(UsageError, match="no table of actors can be read"):
        read_actors(tmp_path / "absent.csv")
    with pytest.raises(UsageError, match="none of its clips is in the store"):
        actor_split(features, {"other": frozenset({"dog"})}, ["dog"])


def test_a_list_that_leaves_nothing_unseen_is_refused(
    store: Path, features: Features, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "seen.list"
    file.write_text("\n".join(features.classes[:5]) + "\n")
    split = class_split_from_list(features.classes, file)
    assert (split.seen, split.unseen) == (features.classes[:5], features.classes[5:])
    file.write_text("\n".join(features.classes) + "\n")
    assert stores.msq("zero-shot", store, "--seen-classes", file, "--out", tmp_path / "o") == 2
    assert "found all 8 classes of the store in it" in capsys.readouterr().err
    for words, message in ((("--device", ","), "--device: expected auto, cpu, cuda"),
                           (("--seen", "nan"), "expected percentages such as 50,75")):  # fmt: skip
        assert stores.msq("zero-shot", store, *words, "--out", tmp_path / "o") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_unseen_classes_without_a_test_clip_are_an_error(features: Features) -> None:
    labels = features.labels.clone()
    labels[features.rows("test"), 0] = 0
    changed = Features(**{**vars(features), "labels": labels})
    split = ClassSplit(features.classes[1:], features.classes[:1], source="by hand")
    made = configuration.override(RunConfig(), [*stores.HEAD, "head.classifier=text"])
    made = configuration.override(made, ["train.epochs=1"])
    with pytest.raises(UsageError, match="by hand: expected test clips of toy that show one of"):
        clip_baseline(changed, split)
    model = train_head(changed, made).model
    with pytest.raises(UsageError, match="its unseen classes, found none among"):
        evaluate_split(model, changed, split)


def test_nothing_is_trained_for_a_split_that_cannot_be_scored(
    features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = features.labels.clone()
    labels[features.rows("test"), 0] = 0
    changed = Features(**{**vars(features), "labels": labels})
    config = configuration.override(
        RunConfig(), [*stores.HEAD, "head.classifier=text", "train.epochs=1"]
    )
    names = features.classes
    splits = [ClassSplit(names[1:], names[:1]), ClassSplit(names[:4], names[4:])]
    begun: list[int] = []
    engine = trials.ENGINES["sequential"]

    def counted(jobs: Any, *more: Any) -> Any:
        begun.append(len(jobs))
        return engine(jobs, *more)

    monkeypatch.setitem(trials.ENGINES, "sequential", counted)
    asked = [Trial(source="s", config=config, split=split) for split in splits]
    first, second = trials.run_group(asked, trials.Resident(changed), [None, None])
    assert begun == [1]
    assert "its unseen classes, found none among" in first["error"]
    assert (first["status"], second["status"]) == ("failed", "done")
    assert trials.run_group(asked[:1], trials.Resident(changed), [None])[0]["id"] == asked[0].id
    assert begun == [1]


def test_a_split_that_parts_classes_with_the_same_clips_is_warned_of(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], store: Path,
) -> None:  # fmt: skip
    labels = features.labels.clone()
    labels[:, 1] = labels[:, 0]
    leaking = Features(**{**vars(features), "labels": labels})
    monkeypatch.setattr("msq.head.zeroshot_on_store.configured_features", lambda *given: leaking)
    monkeypatch.setattr("msq.head.sweep.configured_features", lambda *given: leaking)
    file = tmp_path / "seen.list"
    file.write_text("\n".join(features.classes[1:5]) + "\n")
    out = ("--out", tmp_path / "o", "--device", "cpu", "-q", "--epochs", "1", *stores.HEAD)
    code = stores.msq("zero-shot", store, "--seen-classes", file, "--queries", "text", *out)
    assert code == 0
    error = " ".join(capsys.readouterr().err.split())
    assert "warning: split 50 % seen, seen.list leaks: 100.00 %" in error
