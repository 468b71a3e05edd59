from __future__ import annotations

import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from msq import config as configuration
from msq.config import RunConfig
from msq.config_sections import SEEDS
from msq.errors import MsqError, SpecMismatch, StoreError, UsageError
from msq.head.baselines import class_frequency, clip_similarity, linear_probe
from msq.head.checkpoint import load_model, load_state
from msq.head.evaluate import evaluate_run, score
from msq.head.features import Features, load_features
from msq.head.metrics import all_metrics, mean_average_precision
from msq.head.optim import WeightAverage
from msq.head.predict import load_head
from msq.head.run_result import read_result
from msq.head.schedule import learning_rate
from msq.head.train import Training, split_rows, train_head

watched = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("watched_processes.py"))))
SMALL = ("head.layers=1", "head.heads=2", "head.ffn=32", "train.epochs=3", "train.batch=16")


def toy(clips: int = 120, classes: int = 6, task: str = "multilabel", seed: int = 0) -> Features:
    """Clips in which a class leaves its mark on some tokens and, more weakly, on the image."""
    g = torch.Generator().manual_seed(seed)
    width, tokens = 16, 4
    marks, text = torch.randn(classes, width, generator=g), torch.randn(classes, width, generator=g)
    labels = (torch.rand(clips, classes, generator=g) < 0.25).to(torch.uint8)
    if task == "singlelabel":
        index = torch.randint(0, classes, (clips,), generator=g)
        labels = torch.nn.functional.one_hot(index, classes).to(torch.uint8)
    x = 0.5 * torch.randn(clips, tokens, width, generator=g)
    for row, k in labels.nonzero().tolist():
        x[row, int(torch.randint(0, tokens, (1,), generator=g))] += marks[k]
    image = labels.float() @ text + torch.randn(clips, width, generator=g)
    return Features(
        name="toy", task=task, classes=tuple(f"class {k}" for k in range(classes)),
        ids=tuple(f"clip {i} é" for i in range(clips)),
        splits=tuple("test" if i % 4 == 3 else "train" for i in range(clips)),
        tokens=x, labels=labels, image=image, text=text, prompt="a {}",
        specs={kind: {"slug": kind, "mean": [0.5]} for kind in ("video", "image", "text")},
    )  # fmt: skip


def small(*overrides: str) -> RunConfig:
    return configuration.override(RunConfig(), [*SMALL, *overrides])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run / "head.safetensors")[0].state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_every_file_and_the_documented_keys(tmp_path: Path) -> None:
    features, out, events = toy(), tmp_path / "run", []
    result = train_head(features, small(), out, progress=events.append)
    files = {path.name for path in out.iterdir()}
    assert files == {"config.toml", "env.json", "metrics.jsonl", "result.json", "head.safetensors",
                     "state.pt", "predictions.npz", "log.txt"}  # fmt: skip
    stored = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert {"run", "protocol", "metrics", "epochs", "seconds", "seconds_per_epoch"} <= set(stored)
    assert {"map", "map_micro", "map_official", "top1", "classes_scored"} <= set(stored["metrics"])
    assert stored["metrics"] == result.metrics
    assert stored["protocol"] == "paper"
    assert stored["clips"] == len(features.rows("test"))
    parts = stored["clips_by_split"]
    assert (parts["train"] + parts["val"], parts["val"]) == (90, 9)
    assert parts["test"] == stored["clips"]
    assert stored["per_class"].keys() == set(features.classes)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    assert [event["epoch"] for event in events] == [1, 2, 3]
    assert {"event", "epoch", "epochs", "loss", "lr", "val_map", "seconds"} <= set(events[0])
    assert configuration.load(out / "config.toml") == small()


def test_predictions_hold_ids_scores_and_labels_without_pickle(tmp_path: Path) -> None:
    features = toy()
    result = train_head(features, small(), tmp_path / "run")
    with np.load(tmp_path / "run" / "predictions.npz", allow_pickle=False) as held:
        ids, logits, scores, labels = (held[k] for k in ("ids", "logits", "scores", "labels"))
    assert ids.tolist() == [features.ids[i] for i in features.rows("test").tolist()]
    again = all_metrics(torch.from_numpy(logits), torch.from_numpy(labels), "multilabel")
    assert again == result.metrics
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits)), atol=1e-6)


def test_predictions_give_the_result_back_where_labels_are_unknown(tmp_path: Path) -> None:
    features = toy()
    g = torch.Generator().manual_seed(3)
    known = (torch.rand(features.labels.shape, generator=g) < 0.7).to(torch.uint8)
    features = replace(features, known=known)
    result = train_head(features, small(), tmp_path / "run")
    with np.load(tmp_path / "run" / "predictions.npz", allow_pickle=False) as held:
        assert held["classes"].tolist() == list(features.classes)
        logits, labels, kept = (torch.from_numpy(held[k]) for k in ("logits", "labels", "known"))
    assert torch.equal(kept, known[features.rows("test")])
    assert all_metrics(logits, labels, "multilabel", known=kept) == result.metrics
    assert all_metrics(logits, labels, "multilabel")["map"] != result.metrics["map"]


@pytest.mark.parametrize("task", ["multilabel", "singlelabel"])
@pytest.mark.parametrize("queries", ["vanilla", "text", "multimodal"])
def test_every_kind_of_query_learns(queries: str, task: str) -> None:
    features = toy(300, task=task)
    result = train_head(
        features, small(f"head.queries={queries}", "train.epochs=20", "optim.lr=3e-3")
    )
    assert result.run is None
    assert result.metrics["map"] > 0.75
    assert result.metrics["map_chance"] < 0.4
    assert result.result["loss"] == ("bce" if task == "multilabel" else "ce")


def test_the_same_seed_gives_the_same_bits_and_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = train_head(toy(), small()).model.state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert same(first, train_head(toy(), small()).model.state_dict())
    assert not same(first, train_head(toy(), small("train.seed=1")).model.state_dict())


@pytest.mark.parametrize("overrides", [(), ("train.ema=0", "optim.name=adam", "train.select=last")])
def test_stopping_anywhere_and_going_on_gives_the_same_bits(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    features, config = toy(), small(*overrides)
    whole = train_head(features, config, tmp_path / "whole")
    steps = Training(features, config).steps
    assert Training(features, config).epoch_steps == 5
    out, taken = tmp_path / "parts", 0
    for part in (1, 3, 2, 4):  # in the middle of epochs, and at the end of one
        taken += part
        stopped = train_head(features, config, out, stop_after=part)
        assert not stopped.finished
        assert load_state(out / "state.pt")["step"] == taken < steps
        assert not (out / "result.json").exists()
    done = train_head(features, config, out)
    assert same(weights(out), weights(tmp_path / "whole"))
    assert done.metrics == whole.metrics
    lines = [
        json.loads(x) for x in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    other = (tmp_path / "whole" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for line, expected in zip(lines, map(json.loads, other), strict=True):
        assert {**line, "seconds": 0} == {**expected, "seconds": 0}


VICTIM = """
import signal, sys
from pathlib import Path
import importlib.util
spec = importlib.util.spec_from_file_location("test_train_module", sys.argv[1])
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)

def told(event):
    if event["epoch"] == int(sys.argv[3]):  # so that it is there to be killed, however late
        signal.pause()

module.train_head(module.toy(), module.small("train.epochs=40"), Path(sys.argv[2]),
                  checkpoint_seconds=0.0, progress=told)
"""


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    config = small("train.epochs=40")
    train_head(toy(), config, tmp_path / "whole")
    out, moments = tmp_path / "killed", []
    state = out / "state.pt"
    command = [sys.executable, "-c", VICTIM, __file__, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for wait, last in ((0.02, "13"), (0.11, "26"), (0.23, "39")):
        victim = subprocess.Popen([*command, last], env=environment, stderr=subprocess.PIPE)
        seen = state.stat().st_mtime_ns if state.exists() else 0
        wrote = watched.until(
            lambda seen=seen: state.exists() and state.stat().st_mtime_ns != seen, victim
        )
        assert wrote, victim.stderr.read()
        time.sleep(wait)
        victim.send_signal(signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
        victim.stderr.close()
        moments.append(load_state(state)["step"])
    assert moments == sorted(moments)
    threads = torch.get_num_threads()
    train_head(toy(), config, out)
    assert threads == torch.get_num_threads()
    assert same(weights(out), weights(tmp_path / "whole"))
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, 41))


def test_the_state_loads_without_pickle_and_holds_the_generator(tmp_path: Path) -> None:
    train_head(toy(), small(), tmp_path / "run", stop_after=2)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["step"] == 2
    assert state["random_cpu"].dtype == torch.uint8
    assert [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".")] == []


def test_a_finished_run_is_returned_and_not_trained_again(tmp_path: Path) -> None:
    first = train_head(toy(), small(), tmp_path / "run")
    stamp = (tmp_path / "run" / "head.safetensors").stat().st_mtime_ns
    events: list[Any] = []
    again = train_head(toy(), small(), tmp_path / "run", progress=events.append)
    assert not events
    assert again.metrics == first.metrics
    assert same(again.model.state_dict(), first.model.state_dict())
    assert (tmp_path / "run" / "head.safetensors").stat().st_mtime_ns == stamp
    # Earlier versions wrote the parts under the name of the number.
    file = tmp_path / "run" / "result.json"
    old = {**first.result, "clips": first.result["clips_by_split"]}
    del old["clips_by_split"]
    file.write_text(json.dumps(old), encoding="utf-8")
    found = train_head(toy(), small(), tmp_path / "run").result
    assert (found["clips"], found["clips_by_split"]) == (30, old["clips"])


def test_damaged_files_of_a_run_are_named_with_what_to_do(tmp_path: Path) -> None:
    run, features = tmp_path / "run", toy()
    train_head(features, small(), run, stop_after=2)
    whole = (run / "state.pt").read_bytes()
    for bad in (whole[: len(whole) // 2], b"", b"not torch's", b"\x80\x02."):
        (run / "state.pt").write_bytes(bad)
        with pytest.raises(UsageError, match=r"state\.pt: expected the state of an unfin.*delete"):
            train_head(features, small(), run)
    (run / "state.pt").unlink()
    with pytest.raises(UsageError, match=r"no such file; is the run finished\?"):
        evaluate_run(run, features)
    first = train_head(features, small(), run).result
    text = (run / "result.json").read_text(encoding="utf-8")
    for bad_text in (text[: len(text) // 2], "", "[]", "{}"):
        (run / "result.json").write_text(bad_text, encoding="utf-8")
        for use in (
            lambda: train_head(features, small(), run),
            lambda: evaluate_run(run, features),
            lambda: read_result(run),
        ):
            with pytest.raises(UsageError, match=r"result\.json: expected .*--overwrite"):
                use()
    (run / "result.json").unlink()
    with pytest.raises(UsageError, match=r"run: expected a finished run, found no result\.json"):
        evaluate_run(run, features)
    (run / "result.json").write_text(text, encoding="utf-8")
    head = (run / "head.safetensors").read_bytes()
    (run / "head.safetensors").unlink()
    for use in (lambda: train_head(features, small(), run), lambda: evaluate_run(run, features)):
        with pytest.raises(UsageError, match=r"though the run is finished .*--overwrite"):
            use()
    (run / "head.safetensors").write_bytes(head)
    assert evaluate_run(run, features)["epochs"] == first["epochs"]


def test_a_run_of_another_making_is_refused_with_the_difference_unless_overwritten(
    tmp_path: Path,
) -> None:
    train_head(toy(), small(), tmp_path / "run")
    with pytest.raises(SpecMismatch, match=r"optim\.lr: expected 0\.0005, found 0\.001"):
        train_head(toy(), small("optim.lr=1e-3"), tmp_path / "run")
    with pytest.raises(SpecMismatch, match=r"data\.clip_hash"):
        train_head(toy(seed=1), small(), tmp_path / "run")
    done = train_head(toy(), small("optim.lr=1e-3"), tmp_path / "run", overwrite=True)
    assert done.finished
    assert configuration.load(tmp_path / "run" / "config.toml").optim.lr == 1e-3


def test_what_a_killed_process_left_half_written_is_in_nobodys_way(tmp_path: Path) -> None:
    for name in (".config.toml.17", ".state.pt.17"):
        (tmp_path / name).write_bytes(b"half")
    train_head(toy(), small(), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_of_other_things_is_not_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UsageError, match=r"found files but no config\.toml"):
        train_head(toy(), small(), tmp_path)
    train_head(toy(), small(), tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "years of work"


def test_the_validation_tenth_is_seeded_and_a_validation_split_takes_its_place() -> None:
    features = toy()
    train, val = split_rows(features, 0.1, seed=0)
    assert (len(train), len(val)) == (81, 9)
    assert not set(train.tolist()) & set(val.tolist())
    assert not set(val.tolist()) & set(features.rows("test").tolist())
    assert torch.equal(val, split_rows(features, 0.1, seed=0)[1])
    assert not torch.equal(val, split_rows(features, 0.1, seed=1)[1])
    assert len(split_rows(features, 0.0, seed=0)[1]) == 0
    splits = tuple("val" if i < 8 else split for i, split in enumerate(features.splits))
    own = Features(**{**vars(features), "splits": splits})
    assert split_rows(own, 0.1, seed=0)[1].tolist() == list(range(8))


def test_test_labels_play_no_part_in_training_and_selection() -> None:
    features = toy()
    other = features.labels.clone()
    other[features.rows("test")] = 1 - other[features.rows("test")]
    changed = Features(**{**vars(features), "labels": other})
    first, second = train_head(features, small()), train_head(changed, small())
    assert same(first.model.state_dict(), second.model.state_dict())
    assert first.metrics["map"] != second.metrics["map"]


def test_the_best_validation_epoch_is_kept_and_patience_ends_the_run() -> None:
    config = small(
        "train.epochs=60", "optim.lr=3e-2", "train.patience=3", "optim.schedule=constant"
    )
    result = train_head(toy(), config).result
    assert result["epochs"] == result["best_epoch"] + 3 < 60
    features = toy()
    _, val = split_rows(features, 0.1, 0)
    model = train_head(features, config).model
    value = mean_average_precision(score(model, features, val), features.labels[val])
    assert value == result["best_val_map"]


def test_each_clip_comes_equally_often_and_every_batch_has_one_size() -> None:
    training = Training(toy(), small("train.batch=16"))
    rows = [training.batches.of(step) for step in range(81)]  # 81 clips: 16 laps in 81 steps
    assert {len(r) for r in rows} == {16}
    counts = torch.cat(rows).bincount(minlength=120)[training.train_rows]
    assert counts.unique().tolist() == [16]
    assert torch.equal(training.batches.of(7), rows[7])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    features = toy()
    train_head(features, small(), tmp_path / "run", stop_after=3)
    kept = (tmp_path / "run" / "state.pt").read_bytes()
    features.tokens.fill_(float("inf"))  # the identity does not hold the values, only the making
    with pytest.raises(MsqError, match="the loss is not finite in epoch 1"):
        train_head(features, small(), tmp_path / "run")
    assert (tmp_path / "run" / "state.pt").read_bytes() == kept


def test_no_training_clip_is_said_plainly() -> None:
    features = toy()
    none = features.select(rows=features.rows("test"))
    with pytest.raises(UsageError, match="no training clip among 30 of 30 clips"):
        train_head(none, small())
    words = r"train\.val = 0\.999: holds out all 90 training clips; expected a share that leaves"
    with pytest.raises(UsageError, match=words):
        train_head(toy(), small("train.val=0.999"))


@pytest.mark.parametrize("seed", [SEEDS, -SEEDS])
def test_the_largest_seeds_train(seed: int) -> None:
    assert train_head(toy(24), small(f"train.seed={seed}", "train.epochs=2")).finished


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    optim = small("optim.lr=1", "optim.warmup=2").optim
    rates = [learning_rate(optim, step, 100, 5) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 1e-3
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    constant = configuration.override(RunConfig(), ["optim.schedule=constant"]).optim
    assert learning_rate(constant, 99, 100, 5) == constant.lr


def test_the_average_of_the_weights_is_the_textbooks_and_swaps_back() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = WeightAverage([parameter], 0.9)
    expected = torch.zeros(3)
    for step in range(120):
        with torch.no_grad():
            parameter += 1
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach()
    torch.testing.assert_close(average.average[0], expected, atol=1e-4, rtol=0)
    average.swap()
    torch.testing.assert_close(parameter.detach(), expected, atol=1e-4, rtol=0)
    average.swap()
    assert parameter.tolist() == [120.0] * 3


def test_evaluating_a_run_gives_its_own_result_and_refuses_other_features(tmp_path: Path) -> None:
    features, run = toy(), tmp_path / "run"
    done = train_head(features, small(), run)
    found = evaluate_run(run, features)
    assert found["metrics"] == done.metrics
    assert found["protocol"] == "paper"
    assert found["epochs"] == 3
    assert found["clips"] == 30
    other = Features(**{**vars(features), "specs": {**features.specs, "video": {"slug": "other"}}})
    with pytest.raises(
        SpecMismatch, match=r"encoders\.video\.slug: expected 'video', found 'other'"
    ):
        evaluate_run(run, other)
    with pytest.raises(UsageError, match="no usable clip in split 'val'"):
        evaluate_run(run, features, split="val")


def test_a_head_predicts_for_features_with_its_classes_or_fewer(tmp_path: Path) -> None:
    features = toy()
    result = train_head(features, small(), tmp_path / "run")
    head = load_head(tmp_path / "run")
    found = head.predict(features)
    assert [item["clip"] for item in found] == list(features.ids)
    values = [p["score"] for p in found[0]["predictions"]]
    assert values == sorted(values, reverse=True)
    assert {p["label"] for p in found[0]["predictions"]} == set(features.classes)
    logits = score(result.model, features)
    by_name = {p["label"]: p["score"] for p in found[7]["predictions"]}
    for k, name in enumerate(features.classes):
        assert by_name[name] == pytest.approx(float(logits[7, k].sigmoid()), abs=1e-6)
    assert len(head.predict(features, ["class 2", "class 0"])[0]["predictions"]) == 2
    with pytest.raises(UsageError, match="--classifier text or --classifier shared"):
        head.predict(features, ["class 1", "a thing never seen"])
    with pytest.raises(UsageError, match="with \\['class 1'\\] repeated"):
        head.predict(features, ["class 1", "class 1"])
    with pytest.raises(UsageError, match="row numbers need store="):
        head.predict([1, 2])


def test_a_file_that_is_no_head_is_named(tmp_path: Path) -> None:
    with pytest.raises(MsqError, match=r"head\.safetensors: no such file"):
        load_head(tmp_path)
    (tmp_path / "head.safetensors").write_bytes(b"not at all")
    with pytest.raises(MsqError, match=r"head\.safetensors: expected safetensors"):
        load_head(tmp_path)


class Store:
    """A store in memory: clip 1 failed, clip 2 missing for the image encoder, clip 4 degraded."""

    def __init__(self, features: Features) -> None:
        self.f = features
        self.name, self.task, self.classes = features.name, features.task, features.classes
        self.clips, self.splits = features.ids, features.splits
        self.names = {"video": ["v"], "image": ["clip"], "text": ["clip"]}

    def encoders(self, kind: str | None = None) -> list[str]:
        return self.names[str(kind)]

    def spec(self, encoder: str, kind: str | None = None) -> dict[str, Any]:
        return {"slug": encoder, "kind": kind}

    def status(self, encoder: str, view: int = 0) -> torch.Tensor:
        status = torch.ones(len(self.clips), dtype=torch.uint8)
        status[1], status[4] = 2, 3
        status[2] = 0 if encoder == "clip" else 1
        return status

    def tokens(self, rows: Any, encoder: str | None = None, view: int = 0) -> torch.Tensor:
        return self.f.tokens[rows].half()

    def image(self, rows: Any, encoder: str | None = None, view: int = 0) -> torch.Tensor:
        assert self.f.image is not None
        return self.f.image[rows].half()

    def labels(self, rows: Any = None) -> torch.Tensor:
        return self.f.labels[rows]

    def text(self, encoder: str | None = None, prompt: str | None = None) -> torch.Tensor:
        assert self.f.text is not None
        return self.f.text

    def prompts(self, encoder: str | None = None) -> dict[str, str]:
        return {"plain": "a {}"}


def test_only_clips_that_every_encoder_has_are_loaded_and_the_others_are_counted() -> None:
    held = toy(12)
    features = load_features(Store(held))
    assert features.ids == (held.ids[0], *held.ids[3:])
    assert features.left_out == {"failed": 1, "missing": 1}
    assert features.degraded == (held.ids[4],)
    assert features.coverage() == "10 of 12 clips (1 failed; 1 missing; 1 degraded kept)"
    assert features.tokens.dtype == torch.float32
    assert load_features(Store(held), dtype=None).tokens.dtype == torch.float16
    assert features.prompt == "a {}"
    assert features.specs["image"] == {"slug": "clip", "kind": "image"}
    assert torch.equal(features.labels[1], held.labels[3])


def test_several_encoders_need_a_name_and_an_empty_store_is_refused() -> None:
    store = Store(toy(12))
    store.names["video"] = ["v", "w"]
    with pytest.raises(UsageError, match=r"several video encoders \['v', 'w'\]"):
        load_features(store)
    with pytest.raises(UsageError, match="no video encoder 'x'"):
        load_features(store, video="x")
    with pytest.raises(UsageError, match=r"no prompt 'x' of clip; it has \['plain'"):
        load_features(store, video="w", prompt="x")
    store.prompts = lambda encoder=None: {"a": "a {}", "b": "{}"}  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=r"\['a', 'b'\] of clip; name one with features\.prompt"):
        load_features(store, video="w")
    store.status = lambda encoder, view=0: torch.tensor(  # type: ignore[method-assign]
        [1] * 12 if encoder == "w" else [2] + [0] * 11
    )
    with pytest.raises(StoreError, match=r"no usable clip among 12 .*w: 0 failed, 0 missing; clip: "
                       "1 failed, 11 missing"):  # fmt: skip
        load_features(store, video="w", prompt="a")


def test_the_linear_probe_beats_class_frequencies_and_reads_no_test_label() -> None:
    features = toy(300)
    rows = features.rows("test")
    labels = features.labels[rows]
    logits, chosen = linear_probe(features, rows)
    assert mean_average_precision(logits, labels) > 0.8
    assert set(chosen) == {"decay", "val_map"}
    frequency = class_frequency(features, rows)
    assert mean_average_precision(frequency, labels) < 0.45
    assert (frequency == frequency[0]).all()
    assert mean_average_precision(clip_similarity(features, rows), labels) > 0.5
    other = features.labels.clone()
    other[rows] = 0
    blind = Features(**{**vars(features), "labels": other})
    assert torch.equal(linear_probe(blind, rows)[0], logits)
