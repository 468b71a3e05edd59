from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
import torch

from msq import config as configuration
from msq.config import RunConfig
from msq.errors import UsageError
from msq.extract.datasets.thumos14 import read_thumos14
from msq.head.class_leaks import clip_labels, coinciding_classes, leaks
from msq.head.class_split_files import class_split_from_files, class_splits_from_folder
from msq.head.class_splits import ClassSplit, class_order_split, class_split, drawn_splits
from msq.head.features import Features
from msq.head.metrics import average_precision
from msq.head.sweep_plan import Source
from msq.head.train import train_head
from msq.head.zeroshot import (
    Variant,
    evaluate_split,
    plan_zero_shot,
    seen_features,
    spread,
    zero_shot,
)

THUMOS = [
    "BaseballPitch", "BasketballDunk", "Billiards", "CleanAndJerk", "CliffDiving",
    "CricketBowling", "CricketShot", "Diving", "FrisbeeCatch", "GolfSwing", "HammerThrow",
    "HighJump", "JavelinThrow", "LongJump", "PoleVault", "Shotput", "SoccerPenalty", "TennisSwing",
    "ThrowDiscus", "VolleyballSpiking",
]  # fmt: skip
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


def test_the_splits_of_one_share_are_different_ones() -> None:
    names = [f"c{i}" for i in range(12)]
    found = drawn_splits(names, 0.9, 40)
    assert len({split.seen for split in found}) == 40
    assert len({class_split(names, 0.9, i).seen for i in range(40)}) < 40
    assert found[:10] == drawn_splits(names, 0.9, 10)
    assert [split.seed for split in found[:3]] == [0, 1, 2]
    with pytest.raises(UsageError, match=r"at most 66 splits.*found 67"):
        drawn_splits(names, 0.9, 67)
    plan = plan_zero_shot([Variant(world(60), Source.of(world(60)))], config(), seen=(10, 90),
                          splits=10, queries=("text",))  # fmt: skip
    assert len(plan.trials) == 20


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
    splits = class_splits_from_folder(THUMOS, folder)
    assert splits[0].unseen == (
        "BaseballPitch", "HammerThrow", "PoleVault", "SoccerPenalty", "ThrowDiscus",
    )  # fmt: skip
    splits = class_splits_from_folder(THUMOS, folder.parent)
    assert [(len(s.seen), len(s.unseen)) for s in splits] == [(10, 10)] * 10 + [(15, 5)] * 10
    assert len({s.hash for s in splits}) == 20
    assert all(sorted(s.seen + s.unseen) == sorted(THUMOS) for s in splits)
    assert splits[3].source == "train_50_test_50/THUMOS14/split_3"
    assert splits[0].unseen == (
        "BaseballPitch", "Billiards", "CleanAndJerk", "GolfSwing", "HammerThrow", "HighJump",
        "PoleVault", "SoccerPenalty", "TennisSwing", "ThrowDiscus",
    )  # fmt: skip


@pytest.mark.parametrize("view", ["official", "dedup"])
def test_thumos_splits_that_part_diving_from_cliff_diving_leak(shared: Path, view: str) -> None:
    data = read_thumos14(shared / "annotations" / "thumos14", view=view, train="none")
    labels = torch.zeros(len(data.clips), 20, dtype=torch.uint8)
    for row, clip in enumerate(data.clips):
        labels[row, list(clip.labels)] = 1
    features = Features(
        name="thumos14", task=data.task, classes=data.classes,
        ids=tuple(clip.id for clip in data.clips), splits=("test",) * len(data.clips),
        tokens=torch.arange(float(len(data.clips)))[:, None, None], labels=labels,
    )  # fmt: skip
    merged = clip_labels(features)
    assert (len(features.ids), len(merged)) == (3358 if view == "official" else 3140, 3140)
    pairs = coinciding_classes(merged, data.classes)
    assert pairs == [("CliffDiving", "Diving", 1.0, 217)]  # not the one Shotput with ThrowDiscus
    folder = shared / "annotations" / "thumos14_splits"
    for name, expected in (("train_50_test_50", [2, 4, 5, 6, 7, 9]),
                           ("train_75_test_25", [2, 5, 6, 7])):  # fmt: skip
        splits = class_splits_from_folder(data.classes, folder / name)
        found = [i for i, split in enumerate(splits) if leaks(split, pairs)]
        assert found == expected
    (leak,) = leaks(class_splits_from_folder(data.classes, folder)[2], pairs)
    assert (leak.seen, leak.unseen) == ("CliffDiving", "Diving")


def lists(folder: Path, **halves: str) -> Path:
    """A folder of lists: `train_0="a b"` becomes `train/split_0.list` with two lines."""
    for name, words in halves.items():
        side, _, number = name.partition("_")
        (folder / side).mkdir(parents=True, exist_ok=True)
        text = "".join(f"{word}\n" for word in words.split())
        (folder / side / f"split_{number}.list").write_text(text, encoding="utf-8")
    return folder


def test_a_folder_of_lists_is_read_in_order_of_numbers(tmp_path: Path) -> None:
    halves = {f"{side}_{i}": word for i in (10, 2) for side, word in
              (("train", "HighJump run"), ("test", "swim"))}  # fmt: skip
    found = class_splits_from_folder(["swim", "High Jump", "run"], lists(tmp_path, **halves))
    assert [split.source for split in found] == ["split_2", "split_10"]
    assert found[0] == ClassSplit(("High Jump", "run"), ("swim",))


@pytest.mark.parametrize(
    ("halves", "message"),
    [
        ({}, r"expected train/split_0\.list and test/split_0\.list in it"),
        (
            {"train_0": "a", "test_0": "b", "train_1": "b"},
            r"test: expected split_1\.list .*found none",
        ),
        ({"train_0": "a x", "test_0": "b"}, r"train/split_0\.list: 'x' is no class of the store"),
        ({"train_0": "a a", "test_0": "b"}, r"each once, found \['a'\] twice"),
        ({"train_0": "a", "test_0": ""}, "one class per line, each once, found none"),
        ({"train_0": "a b", "test_0": "b"}, r"no class in both, found \['b'\]"),
    ],
)
def test_a_folder_of_lists_with_a_mistake_is_refused(
    tmp_path: Path, halves: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        class_splits_from_folder(["a", "b", "c"], lists(tmp_path, **halves))
    with pytest.raises(UsageError, match="no such folder of class splits"):
        class_splits_from_folder(["a"], tmp_path / "absent")


def test_one_half_of_a_folder_of_lists_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    lists(tmp_path, train_0="a", test_0="b")
    with pytest.raises(UsageError, match=r"train: expected train/split_0\.list and test/split"):
        class_splits_from_folder(["a", "b"], tmp_path / "train")


def test_class_order_takes_the_first_classes_as_the_authors_do_for_charades() -> None:
    names = [f"c{k:03}" for k in range(157)]
    split = class_order_split(names, 0.75)
    assert (split.seen[0], split.seen[-1], len(split.seen)) == ("c000", "c116", 117)
    assert (split.unseen[0], split.unseen[-1], len(split.unseen)) == ("c117", "c156", 40)
    assert [len(x) for x in (class_order_split(names, 0.5).seen,
                             class_order_split(names, 0.5).unseen)] == [78, 79]  # fmt: skip
    assert split.source == "class order"
    with pytest.raises(UsageError, match="on either side"):
        class_order_split(names, 1.0)


def test_classes_coincide_when_nearly_all_clips_of_the_smaller_are_the_others_too() -> None:
    labels = torch.zeros(100, 4, dtype=torch.uint8)
    labels[:60, 0] = 1
    labels[:20, 1] = 1  # inside class 0
    labels[41:61, 2] = 1  # 19 of 20 inside class 0
    labels[95:, 3] = 1
    found = coinciding_classes(labels, "abcd")
    assert found == [("a", "b", 1.0, 20), ("a", "c", 0.95, 19)]
    labels[40, 2], labels[61:63, 2] = 1, 1  # 20 of 23
    assert [pair[:2] for pair in coinciding_classes(labels, "abcd")] == [("a", "b")]
    few = torch.ones(9, 2, dtype=torch.uint8)
    assert coinciding_classes(few, "ab") == []
    split = ClassSplit(("b", "c"), ("a", "d"))
    assert leaks(split, found) == [("b", "a", 1.0, 20), ("c", "a", 0.95, 19)]
    assert leaks(ClassSplit(("a", "b", "c"), ("d",)), found) == []


def test_rows_of_one_clip_are_found_by_their_tokens_too() -> None:
    features = world(40, "singlelabel")
    tokens = features.tokens.clone()
    tokens[1] = tokens[0]
    merged = clip_labels(Features(**{**vars(features), "tokens": tokens}))
    assert merged.shape == (39, 12)
    assert merged[0].sum() == 2
    assert torch.equal(clip_labels(world(40)), world(40).labels)


def test_given_splits_are_grouped_by_share_and_leaks_are_counted() -> None:
    features = world(200)
    labels = features.labels.clone()
    labels[:, 1] = labels[:, 0]
    features = Features(**{**vars(features), "labels": labels})
    names = features.classes
    given = [ClassSplit(names[:6], names[6:], source="A"), ClassSplit(names[1:9], names[9:] +
             names[:1], source="B"), ClassSplit(names[1:7], names[7:] + names[:1])]  # fmt: skip
    results = zero_shot(features, config("train.epochs=1"), queries=("text",), class_splits=given)
    assert [(r["seen"], r["splits"], r["leaking_splits"]) for r in results] == [
        (50, 2, 1), (66.7, 1, 1)
    ]  # fmt: skip
    (leak,) = results[1]["runs"][0]["leaks"]
    assert (leak["seen"], leak["unseen"], leak["share"]) == (names[1], names[0], 1.0)
    assert [run["source"] for run in results[0]["runs"]] == ["A", ""]
    json.dumps(results)


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
        assert result["protocol"] == "paper"
        values = result["unseen"]["map"]
        assert values["mean"] == pytest.approx(sum(values["values"]) / 2)
        assert values["std"] == pytest.approx(statistics.stdev(values["values"]))
        assert set(result["generalised"]) == {"seen", "unseen", "harmonic"}
        assert len({run["hash"] for run in result["runs"]}) == 2
    assert results[0]["runs"][0]["hash"] == results[1]["runs"][0]["hash"]
    json.dumps(results)
    for run in (run for result in results for run in result["runs"]):
        assert (tmp_path / "trials" / run["trial"] / "run" / "result.json").exists()
    again = zero_shot(features, short, tmp_path, seen=(50, 75), splits=2, classifier="shared")
    assert again == results
    assert spread([0.5]) == {"mean": 0.5, "std": None, "values": [0.5]}


@pytest.mark.parametrize(
    ("image", "text", "comparable"),
    [
        (("a", "projected"), ("a", "projected"), True),
        (("a", "pooler"), ("a", "pooler"), False),
        (("a", "projected"), ("a", "pooler"), False),
        (("a", "projected"), ("b", "projected"), False),
        (("a", ""), ("a", ""), False),
    ],
)
def test_clip_similarity_is_of_projected_outputs_of_one_model_only(
    image: tuple[str, str], text: tuple[str, str], comparable: bool
) -> None:
    specs = {kind: {"sha256": sha256, "output": output}
             for kind, (sha256, output) in (("image", image), ("text", text))}  # fmt: skip
    features = dataclasses.replace(world(60), specs=specs)  # image and text are of one width
    results = zero_shot(features, config("train.epochs=1"), seen=(50,), splits=1, queries=("text",))
    assert (results[0]["clip_similarity"] is not None) == comparable


def test_a_classifier_without_weights_for_unseen_classes_is_refused() -> None:
    with pytest.raises(UsageError, match="--classifier shared or --classifier text"):
        zero_shot(world(40), config(), classifier="per-class")
