from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch

from msq import config as configuration
from msq.config import RunConfig
from msq.errors import UsageError
from msq.head.features import Features
from msq.head.metrics import average_precision
from msq.head.train import train_head
from msq.head.zeroshot import (
    ClassSplit,
    class_split,
    class_split_from_files,
    evaluate_split,
    seen_features,
    spread,
    zero_shot,
)

SMALL = ("head.layers=1", "head.heads=2", "head.ffn=64", "train.epochs=30", "train.batch=32",
         "optim.lr=2e-3", "head.dropout=0")  # fmt: skip


def world(clips: int = 400, task: str = "multilabel", seed: int = 0) -> Features:
    """Classes are pairs of parts; a pair's text and its mark in the tokens are sums of parts.

    So a pair never trained can be told from its text, if its parts were trained in other pairs.
    """
    g = torch.Generator().manual_seed(seed)
    width, tokens = 16, 3
    first, second = torch.randn(4, width, generator=g), torch.randn(3, width, generator=g)
    text = (first[:, None] + second[None]).reshape(12, width)
    turn = torch.randn(width, width, generator=g) / 4
    if task == "multilabel":
        labels = (torch.rand(clips, 12, generator=g) < 0.12).to(torch.uint8)
    else:
        index = torch.randint(0, 12, (clips,), generator=g)
        labels = torch.nn.functional.one_hot(index, 12).to(torch.uint8)
    x = 0.3 * torch.randn(clips, tokens, width, generator=g)
    for row, k in labels.nonzero().tolist():
        x[row, int(torch.randint(0, tokens, (1,), generator=g))] += text[k] @ turn
    image = labels.float() @ text + 0.5 * torch.randn(clips, width, generator=g)
    return Features(
        name="pairs", task=task, classes=tuple(f"{a} {b}" for a in "abcd" for b in "xyz"),
        ids=tuple(f"{i}" for i in range(clips)),
        splits=tuple("test" if i % 4 == 3 else "train" for i in range(clips)),
        tokens=x, labels=labels, image=image, text=text,
    )  # fmt: skip


def config(*overrides: str) -> RunConfig:
    return configuration.override(RunConfig(), [*SMALL, *overrides])


def test_class_splits_are_seeded_disjoint_and_of_the_stated_size() -> None:
    names = [f"c{i}" for i in range(157)]
    split = class_split(names, 0.75, 0)
    assert (len(split.seen), len(split.unseen)) == (117, 40)
    assert len(class_split(names, 0.5, 0).seen) == 78
    assert not set(split.seen) & set(split.unseen)
    assert sorted(split.seen + split.unseen) == sorted(names)
    assert list(split.seen) == [n for n in names if n in split.seen]
    assert split == class_split(names, 0.75, 0)
    assert split.hash == class_split(names, 0.75, 0).hash != class_split(names, 0.75, 1).hash
    assert split.seen != tuple(names[:117])  # not simply the first ones
    for share in (0.0, 1.0, 0.001):
        with pytest.raises(UsageError, match="on either side"):
            class_split(names, share, 0)


def test_list_files_are_read_and_their_mistakes_named(tmp_path: Path) -> None:
    seen, unseen = tmp_path / "train.list", tmp_path / "test.list"
    seen.write_bytes(b"\xef\xbb\xbfRun\r\nHigh Jump \r\n")
    unseen.write_text("Swim\n\n", encoding="utf-8")
    classes = ["Swim", "Run", "High Jump", "Fly"]
    split = class_split_from_files(classes, seen, unseen)
    assert split == ClassSplit(("Run", "High Jump"), ("Swim",))
    unseen.write_text("Swin\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"test\.list: 'Swin' is no class.*Swim"):
        class_split_from_files(classes, seen, unseen)
    unseen.write_text("Run\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"no class in both, found \['Run'\]"):
        class_split_from_files(classes, seen, unseen)
    with pytest.raises(UsageError, match="no such class list"):
        class_split_from_files(classes, seen, tmp_path / "absent.list")


def test_the_published_thumos_splits_are_read(shared: Path) -> None:
    folder = shared / "annotations" / "thumos14_splits" / "train_75_test_25"
    train = sorted(folder.rglob("train/split_0.list"))[0]
    test = sorted(folder.rglob("test/split_0.list"))[0]
    names = sorted({*train.read_text().split(), *test.read_text().split()})
    split = class_split_from_files(names, train, test)
    assert (len(split.seen), len(split.unseen)) == (15, 5)
    assert split.unseen == (
        "BaseballPitch", "HammerThrow", "PoleVault", "SoccerPenalty", "ThrowDiscus",
    )  # fmt: skip


def test_training_sees_seen_columns_and_only_clips_that_show_one() -> None:
    features = world()
    split = class_split(features.classes, 0.5, 0)
    shown = seen_features(features, split)
    assert shown.classes == split.seen
    columns = [features.classes.index(name) for name in split.seen]
    assert shown.text is not None
    assert features.text is not None
    assert torch.equal(shown.text, features.text[columns])
    train = shown.rows("train")
    assert shown.labels[train].bool().any(1).all()
    assert len(train) < len(features.rows("train"))
    assert len(shown.rows("test")) == len(features.rows("test"))


def test_unseen_labels_play_no_part_in_training() -> None:
    features, split = world(), class_split(world().classes, 0.5, 0)
    unseen = [features.classes.index(name) for name in split.unseen]
    other = features.labels.clone()
    other[:, unseen] = 1 - other[:, unseen]
    changed = Features(**{**vars(features), "labels": other})
    short = config("train.epochs=2")
    first = train_head(seen_features(features, split), short).model.state_dict()
    second = train_head(seen_features(changed, split), short).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unseen_scores_are_those_of_a_head_asked_by_hand() -> None:
    features = world()
    split = class_split(features.classes, 0.75, 1)
    made = config("train.epochs=2", "head.queries=text", "head.classifier=text")
    model = train_head(seen_features(features, split), made).model
    found = evaluate_split(model, features, split)
    columns = [features.classes.index(name) for name in split.unseen]
    test = features.rows("test")
    rows = test[features.labels[test][:, columns].bool().any(1)]
    assert features.text is not None
    with torch.no_grad():
        logits = model(features.tokens[rows], text=features.text[columns])["logits"]
    expected = average_precision(logits, features.labels[rows][:, columns])
    assert found["unseen"] == pytest.approx(float(expected.nanmean()), abs=1e-9)
    assert found["per_class"].keys() == set(split.unseen)
    assert found["unseen_clips"] == len(rows) < len(test)


@pytest.mark.parametrize("task", ["multilabel", "singlelabel"])
def test_words_make_unseen_classes_recognisable_and_random_queries_do_not(task: str) -> None:
    features = world(800, task)
    metric = "map" if task == "multilabel" else "top1"
    results = zero_shot(features, config(), seen=(75,), splits=2, queries=("vanilla", "text"))
    vanilla, text = results
    assert (vanilla["classifier"], text["classifier"]) == ("shared", "text")
    chance = text["chance"]["mean"]
    assert text["unseen"][metric]["mean"] > chance + 0.2
    assert vanilla["unseen"][metric]["mean"] < text["unseen"][metric]["mean"] - 0.15
    assert text["seen_only"][metric]["mean"] > 0.6


def test_the_result_has_the_documented_keys_and_honest_spread(tmp_path: Path) -> None:
    features, short = world(120), config("train.epochs=1")
    results = zero_shot(features, short, tmp_path, seen=(50, 75), splits=2, classifier="shared")
    assert [(r["seen"], r["queries"]) for r in results] == [
        (s, q) for s in (50, 75) for q in ("vanilla", "text", "multimodal")
    ]
    for result in results:
        assert {"seen", "splits", "queries", "classifier", "unseen", "generalised"} <= set(result)
        assert result["splits"] == 2
        values = result["unseen"]["map"]
        assert values["mean"] == pytest.approx(sum(values["values"]) / 2)
        assert values["std"] == pytest.approx(statistics.stdev(values["values"]))
        assert set(result["generalised"]) == {"seen", "unseen", "harmonic"}
        assert len({run["hash"] for run in result["runs"]}) == 2
    assert results[0]["runs"][0]["hash"] == results[1]["runs"][0]["hash"]
    json.dumps(results)
    assert (tmp_path / "seen50" / "split1" / "text" / "result.json").exists()
    again = zero_shot(features, short, tmp_path, seen=(50, 75), splits=2, classifier="shared")
    assert again == results
    assert spread([0.5]) == {"mean": 0.5, "std": None, "values": [0.5]}


def test_a_classifier_without_weights_for_unseen_classes_is_refused() -> None:
    with pytest.raises(UsageError, match="--classifier shared or --classifier text"):
        zero_shot(world(40), config(), classifier="per-class")
