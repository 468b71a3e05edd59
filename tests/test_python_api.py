"""Both stages from Python: the same bytes and results as the commands."""

from __future__ import annotations

import json
import multiprocessing
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import msq
from msq.api.results import Spread
from msq.errors import MsqError, MsqWarning, SpecMismatch, UsageError
from msq.extract.extract_options import LEAST
from msq.extract.request import ExtractRequest
from msq.report.terminal import json_text

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sweep_stores.py"))))
fakes = stores.views.fakes
TINY = {"head.layers": 1, "head.heads": 2, "head.ffn": 32, "train.batch": 16, "optim.lr": 2e-3}
WORDS = [f"{key}={value}" for key, value in TINY.items()]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(stores.make_store(tmp_path_factory.mktemp("api") / "toy.zarr"))


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three short videos and one that is none; encoders that take no time."""
    video = fakes.FakeEncoder(fakes.SPEC)
    image = fakes.FakeEncoder(fakes.image_spec(frames=2, size=8))
    encoders = (video, image, fakes.FakeText())
    monkeypatch.setattr(ExtractRequest, "load_encoders", lambda _: encoders)
    lines = ["path,labels,split"]
    for row in range(3):
        fakes.write_video(tmp_path / "v" / f"{row}.mp4", row)
        lines.append(f"{row}.mp4,{'run' if row % 2 else 'jump;walk'},train")
    (tmp_path / "v" / "broken.mp4").write_text("not a video")
    file = tmp_path / "v" / "clips.csv"
    file.write_text("\n".join([*lines, "broken.mp4,run,test"]) + "\n")
    return file


def said(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> Any:
    """The JSON document of a command."""
    quiet = () if words[0] == "eval" else ("--quiet",)
    assert stores.msq(*words, "--json", *quiet) == code
    return json.loads(capsys.readouterr().out)


def timeless(value: Any) -> Any:
    return stores._timeless(value)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file()}  # fmt: skip


# --- stage one ------------------------------------------------------------------------------------


def test_a_store_has_the_bytes_and_the_result_of_the_command(
    manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[dict[str, Any]] = []
    with pytest.warns(MsqWarning, match=r"python\.zarr\nfailed: broken: .*expected") as warned:
        made = msq.extract_features(manifest, "python.zarr", workers=0, progress=events.append)
    assert warned[0].filename == __file__
    assert capsys.readouterr() == ("", "")
    assert (made.clips, made.done, made.failed) == (4, 3, 1)
    assert (events[-1]["done"], events[-1]["total"]) == (4, 4)
    words = ("extract", "--manifest", manifest, "--workers", 0, "--out")
    document = said(capsys, 3, *words, "command.zarr")
    assert files(Path("python.zarr")) == files(Path("command.zarr"))
    measured = {"store", "clips_per_second", "stages"}
    found = timeless(json.loads(json.dumps(made.to_dict())))
    assert {k: v for k, v in found.items() if k not in measured} == {
        k: v for k, v in timeless(document).items() if k not in measured
    }
    # Either finds the other's, and makes nothing again.
    before = {p: p.stat().st_mtime_ns for p in Path("python.zarr").rglob("*")}
    with pytest.warns(MsqWarning):
        again = msq.extract_features(str(manifest), Path("python.zarr"), workers=0)
    assert (again.done, again.stages["decode"]) == (3, None)
    assert said(capsys, 3, *words, "python.zarr")["done"] == 3
    assert {p: p.stat().st_mtime_ns for p in Path("python.zarr").rglob("*")} == before


def test_options_reach_the_store_and_the_bar_is_shown_where_it_is_asked_for(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "classes.txt").write_text("walk\nrun\njump\n")
    made = msq.extract_features(
        manifest, workers=np.int64(0), limit=2, classes="classes.txt", prompts="a video of {}",
        store_dtype="float32", shard=1, text_encoder=None, progress=True,
    )  # fmt: skip
    assert made.failed == 0  # and nothing is told by a warning
    opened = msq.open_store(made.store)
    assert Path(made.store).resolve() == tmp_path / "clips.zarr"
    assert list(opened.classes) == ["walk", "run", "jump"]
    assert list(opened.prompts().values()) == ["a video of {}"]
    assert opened.tokens().dtype == torch.float32
    out, err = capsys.readouterr()
    assert out == ""
    assert "extracting: 2/2" in err


def test_a_store_of_another_making_and_what_no_extraction_can_be_are_refused(
    manifest: Path, store: Path
) -> None:
    call: Any = msq.extract_features
    with pytest.warns(MsqWarning):
        call(manifest, "s.zarr", workers=0)
    with pytest.raises(MsqError, match="float32"):
        call(manifest, "s.zarr", workers=0, store_dtype="float32")
    for given, match in (
        ({"frame": 8}, "unknown option 'frame'; did you mean frames"),
        ({"frames": "eight"}, "extract.frames: expected a whole number or none, found 'eight'"),
        ({"precision": "fp64"}, "extract.precision: expected one of fp32, bf16, fp16"),
        ({"policy": "drop"}, "extract.policy: expected one of skip, error, keep"),
        ({"batch": None, "prompts": 3}, "extract.prompts: expected a list of text, found 3"),
        ({"classes": 3}, "extract.classes: expected a path, found 3"),
        ({"protocol": "official", "pooling": "patch"}, "--protocol official means --pooling band"),
        ({"root": "."}, "--root and --option go with the name of a dataset"),
        *(({name: least - 1}, f"expected at least {least}") for name, least in LEAST.items()),
    ):
        given.setdefault("workers", 0)
        if given.get("batch", 1) is None:
            del given["batch"]
        with pytest.raises(UsageError, match=re.escape(match)):
            call(manifest, "t.zarr", **given)
    with pytest.raises(UsageError, match=r"found a feature store; msq\.train_head trains"):
        call(store)
    with pytest.raises(UsageError, match="did you mean the dataset charades"):
        call("charade", root=".")
    assert not Path("t.zarr").exists()


def test_a_script_without_a_main_guard_is_told_before_anything_is_done(
    manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So it is in a decode process while it imports the script that called.
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(UsageError, match=r"under `if __name__ == '__main__':`"):
        msq.extract_features(manifest, "s.zarr")
    with pytest.raises(UsageError, match=r"under `if __name__ == '__main__':`"):
        msq.zero_shot("s.zarr")
    assert not Path("s.zarr").exists()


# --- stage two ------------------------------------------------------------------------------------


def test_a_head_is_that_of_the_command(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events: list[dict[str, Any]] = []
    made = msq.train_head(
        store, "python", queries="text", seed=3, epochs=2, overrides=TINY, progress=events.append
    )
    assert capsys.readouterr() == ("", "")
    assert [(event["epoch"], event["epochs"]) for event in events] == [(1, 2), (2, 2)]
    words = ("train-head", store, "--out", "command", "--queries", "text", "--seed", 3)
    document = said(capsys, 0, *words, "--epochs", 2, *WORDS)
    both = [timeless(one) | {"run": ""} for one in (made.to_dict(), document)]
    assert both[0] == both[1]
    for name in ("head.safetensors", "config.toml"):
        assert Path("python", name).read_bytes() == Path("command", name).read_bytes()
    assert made.run == Path("python")
    assert json.loads(json_text(made.metrics)) == document["metrics"]
    assert json.loads(json_text(made.per_class)) == document["per_class"]
    assert (made.protocol, made.split, made.epochs) == ("paper", "test", 2)
    # A finished run is not trained again, by whomever; other settings are refused.
    before = files(Path("python"))
    assert msq.train_head(
        msq.open_store(store), Path("python"), queries="text", seed=3, epochs=2, overrides=TINY
    ).to_dict() == made.to_dict()  # fmt: skip
    assert said(capsys, 0, *words[:3], "python", *words[4:], "--epochs", 2, *WORDS)
    assert files(Path("python")) == before
    with pytest.raises(SpecMismatch, match=r"train\.seed: expected 3, found 4"):
        msq.train_head(store, "python", queries="text", seed=4, epochs=2, overrides=TINY)
    other = msq.train_head(
        store, "python", queries="text", seed=4, epochs=1, overrides=TINY, overwrite=True
    )
    assert other.epochs == 1


def test_seeds_and_query_modes_in_a_loop(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for queries in ("text", "multimodal"):
        for seed in np.arange(2):
            made = msq.train_head(
                store, f"runs/{queries}-{seed}", queries=queries, seed=seed, classifier="text",
                epochs=1, config={"head": {"layers": 1, "heads": 2}, "head.ffn": 32},
            )  # fmt: skip
            found[queries, int(seed)] = made.metrics["map"]
    assert len(set(found.values())) == 4
    opened = msq.open_store(store)
    (item,) = msq.load_head(made.run).predict([0], store=opened)
    assert [one["label"] for one in item["predictions"]] != []
    # Scored again it is what it was; `msq eval` says the same.
    again = msq.evaluate(made, opened)
    assert json_text(again.metrics) == json_text(made.metrics)
    document = said(capsys, 0, "eval", made.run, store)
    assert timeless(again.to_dict()) == timeless(document)
    train = msq.evaluate(str(made.run), str(store), "train")
    assert (train.split, train.metrics == made.metrics) == ("train", False)
    with pytest.raises(UsageError, match="--test-views goes with --ensemble"):
        msq.evaluate(made, opened, test_views="10x3")
    assert capsys.readouterr() == ("", "")


def test_the_run_is_named_after_the_store_and_wrong_options_are_refused(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call: Any = msq.train_head
    made = call(msq.open_store(store), epochs=1, overrides=TINY, progress=True)
    assert made.run == Path("runs/toy")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0].startswith("training on cpu")
    assert "training: 1/1 · loss" in err
    for given, match in (
        ({"query": "text"}, "unknown option 'query'; did you mean queries"),
        ({"head.queries": "text"}, "unknown option 'head.queries'; overrides={"),
        ({"queries": "txt"}, "head.queries: expected one of vanilla, text, multimodal"),
        ({"epochs": 0}, "train.epochs: expected at least 1, found 0"),
        ({"device": "tpu"}, "--device tpu: expected auto"),
        ({"config": "lost.toml"}, "lost.toml: no such"),
    ):
        with pytest.raises(UsageError, match=re.escape(match)):
            call(store, "other", **given)
    with pytest.raises(MsqError, match=r"lost\.zarr"):
        call("lost.zarr", "other")
    assert not Path("other").exists()


def test_partitions_are_trained_one_after_another(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = msq.open_store(store).splits
    swapped = tuple({"train": "test", "test": "train"}.get(one, one) for one in splits)
    partitions = {"split1": tuple(splits), "split2": swapped}
    monkeypatch.setattr("msq.extract.store.FeatureStore.partitions", partitions, raising=False)
    events: list[dict[str, Any]] = []
    made = msq.train_head(
        store, "all", partition="all", epochs=1, overrides=TINY, progress=events.append
    )
    assert [(event["partition"], event["partitions"]) for event in events] == [
        ("split1", ("split1", "split2")), ("split2", ("split1", "split2"))
    ]  # fmt: skip
    assert list(made.document["partitions"]) == ["split1", "split2"]
    assert made.per_class == {}
    assert json_text(msq.evaluate(made, store).metrics) == json_text(made.metrics)
    words = ("--partition", "all", "--epochs", 1, *WORDS)
    assert stores.msq("train-head", store, "--out", "all2", *words) == 0
    err = capsys.readouterr().err
    assert "training: 2/2 · split2: loss" in err


# --- zero-shot ------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def test_a_sweep_is_that_of_the_command(
    store: Path, threads: int, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[dict[str, Any]] = []
    found = msq.zero_shot(
        store, "python", seen=50, splits=2, queries=["text"], epochs=1, threads=1, overrides=TINY,
        progress=events.append,
    )  # fmt: skip
    assert capsys.readouterr() == ("", "")
    assert torch.get_num_threads() == threads
    assert [event["done"] for event in events] == [1, 2]
    words = ("zero-shot", store, "--seen", 50, "--splits", 2, "--queries", "text", "--epochs", 1)
    document = said(capsys, 0, *words, "--threads", 1, "--out", "command", *WORDS)
    assert timeless(found.to_list()) == timeless(document)
    assert stores.numbers(Path("python")) == stores.numbers(Path("command"))
    (line,) = found.lines
    assert np.isfinite(line.unseen.std)
    assert np.isnan(Spread.of({"mean": 1.0, "std": None, "values": [1.0]}).std)
    assert (line.seen, line.queries, line.classifier, line.splits) == (50, "text", "text", 2)
    assert line.metric == "map"
    assert list(line.unseen.values) == document[0]["unseen"]["map"]["values"]
    assert line.unseen.mean == pytest.approx(np.mean(line.unseen.values))
    assert (found.trials, found.done, found.failed, found.sweep) == (2, 2, 0, Path("python"))


def test_a_sweep_tells_by_a_warning_what_failed(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from msq.report import sweeps

    whole = sweeps.conclude

    def with_failure(*given: Any, **how: Any) -> dict[str, Any]:
        found = whole(*given, **how)
        found["results"][0]["runs"][0]["leaks"] = [
            {"seen": "a", "unseen": "b", "share": 1.0, "clips": 20}
        ]
        return {**found, "failed": 1, "failures": [{"name": "x", "id": "y", "error": "broke"}]}

    monkeypatch.setattr(sweeps, "conclude", with_failure)
    with pytest.warns(MsqWarning, match=r"(?s)split 50 % seen.* leaks.*failed: x \(y\): broke"):
        msq.zero_shot(
            store, seen=[50], splits=1, queries="text", epochs=1, threads=1, overrides=TINY
        )
    assert Path("runs/toy-zero-shot/table.md").exists()
    call: Any = msq.zero_shot
    for given, match in (
        ({"split": 2}, "unknown option 'split'; did you mean splits"),
        ({"workers": 0}, "--workers: expected at least 1, found 0"),
        ({"classifier": "per-class"}, "has no weights for classes never trained"),
        ({"prompts": ["fancy"], "queries": "text"}, "'fancy': the store has no such one"),
        ({"class_order": True, "seen_classes": "x"}, "--class-order and --seen-classes"),
        ({"train_actors": "bob"}, "go with --actors FILE"),
    ):
        with pytest.raises(UsageError, match=re.escape(match)):
            call(store, "other", **given)


# --- the house ------------------------------------------------------------------------------------


def test_nothing_of_it_needs_the_command_line() -> None:
    for file in sorted(Path(msq.__file__).parent.glob("api/*.py")):
        assert not re.search(r"^\s*(from|import) (typer|msq\.cli)", file.read_text(), re.M), file
