"""The command line from videos to predictions, with the embedded encoders."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer

from msq import __version__
from msq.cli import app, main

ROOT = Path(__file__).parents[1]
SMALL_HEAD = ("head.layers=1", "head.heads=4", "head.ffn=64")


def run(*arguments):
    """Exit code of one command."""
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    return left.value.code


def extract(world, store, *more):
    """Exit code of an extraction with all of the world's classes."""
    classes = world / "classes.txt"
    return run(
        "extract", "--manifest", world / "manifest.csv", "--classes", classes, "--out", store, *more
    )


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A small world, its store and a head trained on it."""
    folder = tmp_path_factory.mktemp("cli")
    world, store, trained = folder / "world", folder / "small.zarr", folder / "run"
    assert run("world", world, "--train", 48, "--test", 24, "--seed", 3, "-q") == 0
    assert extract(world, store, "-q") == 0
    done = run("train-head", store, "--out", trained, "--epochs", 2, "-q", *SMALL_HEAD,
               "--classifier", "shared")  # fmt: skip
    assert done == 0
    return SimpleNamespace(folder=folder, world=world, store=store, run=trained)


def commands():
    root = typer.main.get_command(app)
    found = {}
    for name, command in root.commands.items():
        for child, inner in getattr(command, "commands", {"": command}).items():
            found[f"{name} {child}".strip()] = inner
    return found


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == f"msq {__version__}"


def test_every_command_has_help_an_example_and_a_page():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^##+ `msq ([\w -]+)`\n(.*?)(?=^##|\Z)", page, re.M | re.S))
    for name, command in commands().items():
        assert command.help, name
        assert command.epilog, name
        assert command.epilog.startswith(f"Example: msq {name}"), name
        assert name in sections, f"docs/cli.md has no section on {name}; run make docs"
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, (name, parameter.name)
                long = max(parameter.opts, key=len)
                assert f"`{long}" in sections[name] or f", {long}" in sections[name], (name, long)
    groups = ("store", "encoders", "datasets", "bench")
    documented = {name for name in sections if name not in groups}
    assert documented == set(commands())


def test_extract_again_does_nothing_and_says_the_same(small, capsys):
    before = {p: p.stat().st_mtime_ns for p in small.store.rglob("*") if p.is_file()}
    assert extract(small.world, small.store, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert {"store", "clips", "done", "failed", "skipped", "seconds", "clips_per_second",
            "stages"} <= result.keys()  # fmt: skip
    assert (result["clips"], result["done"], result["failed"], result["skipped"]) == (72, 72, 0, 0)
    assert {p: p.stat().st_mtime_ns for p in small.store.rglob("*") if p.is_file()} == before


def test_a_store_of_another_making_is_refused_with_the_difference(small, capsys):
    assert extract(small.world, small.store, "-q", "--frames", 4) == 1
    error = capsys.readouterr().err
    assert "frames: expected 4, found 8" in error
    assert extract(small.world, small.store, "-q", "--limit", 10) == 1
    assert "clips: expected 10, found 72" in capsys.readouterr().err


def test_train_head_and_eval_print_the_promised_keys_and_agree(small, capsys):
    assert run("train-head", small.store, "--out", small.run, "--epochs", 2, "--json", *SMALL_HEAD,
               "--classifier", "shared") == 0  # fmt: skip
    trained = json.loads(capsys.readouterr().out)
    assert {
        "run",
        "protocol",
        "metrics",
        "epochs",
        "seconds",
        "seconds_per_epoch",
    } <= trained.keys()
    assert {"map", "map_micro", "map_official", "top1", "classes_scored"} <= trained[
        "metrics"
    ].keys()
    assert trained["protocol"] == "paper"
    assert 0 < trained["metrics"]["map"] < 1
    assert run("eval", small.run, small.store, "--json") == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["metrics"] == pytest.approx(trained["metrics"])
    for name in ("config.toml", "env.json", "metrics.jsonl", "result.json", "head.safetensors",
                 "state.pt", "predictions.npz", "log.txt"):  # fmt: skip
        assert (small.run / name).is_file(), name


def test_zero_shot_prints_one_object_for_each_share_and_query_mode(small, capsys, tmp_path):
    code = run("zero-shot", small.store, "--seen", "50,75", "--splits", 2, "--epochs", 1, "--json",
               "--out", tmp_path / "sweep", *SMALL_HEAD)  # fmt: skip
    assert code == 0
    results = json.loads(capsys.readouterr().out)
    assert [(r["seen"], r["queries"]) for r in results] == [
        (share, mode) for share in (50, 75) for mode in ("vanilla", "text", "multimodal")
    ]
    for r in results:
        assert r["splits"] == 2
        assert r["classifier"] == ("shared" if r["queries"] == "vanilla" else "text")
        assert r["unseen"]["map"].keys() == {"mean", "std", "values"}
        assert len(r["unseen"]["map"]["values"]) == 2
        assert r["generalised"].keys() == {"seen", "unseen", "harmonic"}


def test_predict_knows_the_classes_and_any_other_words(small, capsys):
    video = sorted((small.world / "videos").iterdir())[0]
    assert run("predict", video, "--run", small.run, "--json") == 0
    (item,) = json.loads(capsys.readouterr().out)
    scores = [p["score"] for p in item["predictions"]]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == len((small.world / "classes.txt").read_text().splitlines())
    code = run(
        "predict", video, "--run", small.run, "--labels", "dog eating, zebra skating", "--json"
    )
    assert code == 0
    out, err = capsys.readouterr()
    (item,) = json.loads(out)
    assert {p["label"] for p in item["predictions"]} == {"dog eating", "zebra skating"}
    assert "zebra" in err
    assert "skating" in err
    assert set(item["unknown_words"]) == {"zebra", "skating"}


def test_predict_without_the_weights_leaves_with_2(small, capsys):
    video = sorted((small.world / "videos").iterdir())[0]
    assert run("predict", video, "--run", small.run, "--video-encoder", "local-dir:nowhere") == 2
    assert "If the weights moved, say where they are" in capsys.readouterr().err


def test_the_device_and_the_precision_are_named_first(small, tmp_path, capsys):
    words = f"cpu ({torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}), fp32"
    assert extract(small.world, small.store) == 0
    assert capsys.readouterr().err.splitlines()[0] == f"extracting on {words}"
    short = ("--epochs", 1, "--device", "cpu", *SMALL_HEAD)
    assert run("train-head", small.store, "--out", tmp_path / "run", *short) == 0
    assert capsys.readouterr().err.splitlines()[0] == f"training on {words}"
    opening = (tmp_path / "run" / "log.txt").read_text().splitlines()[0]
    assert f"packed head in fp32 on {words.removesuffix(', fp32')}, " in opening
    assert run("train-head", small.store, "--out", tmp_path / "run", *short, "-q") == 0
    assert "training on" not in capsys.readouterr().err
    bf16 = ("--out", tmp_path / "bf16", *short, "train.precision=bf16")
    assert run("train-head", small.store, *bf16) == 0
    assert capsys.readouterr().err.splitlines()[0] == f"training on {words[:-4]}bf16"


def test_predict_goes_on_past_a_broken_video(small, tmp_path, capsys):
    video = sorted((small.world / "videos").iterdir())[0]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    assert run("predict", broken, video, "--run", small.run, "--json") == 3
    first, second = json.loads(capsys.readouterr().out)
    assert first["predictions"] == []
    assert first["error"]
    assert second["predictions"]
    assert run("predict", broken, "--run", small.run, "--json") == 1


def test_store_commands(small, capsys):
    assert run("store", "inspect", small.store, "--json") == 0
    assert json.loads(capsys.readouterr().out)["clips"] == 72
    assert run("store", "verify", small.store, "--json") == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert run("encoders", "list", "--json") == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("extract",), "expected --manifest FILE"),
        (("extract", "--manifest", "none.csv"), "found nothing there"),
        (("extract", "--dataset", "nonsense", "--root", "."), "unknown dataset 'nonsense'"),
        (("train-head", "none.zarr"), "none.zarr"),
        (("eval", "no-run", "none.zarr"), "none.zarr"),
        (("predict", "x.mp4", "--run", "no-run"), "no-run"),
        (("train-head", "none.zarr", "optim.rl=1"), "optim.lr"),
        (("zero-shot", "none.zarr", "--queries", "tex"), "expected vanilla, text"),
        (("frobnicate",), "frobnicate"),
        (("extract", "--manifest", "m.csv", "--video-encoder", "local-dir:nowhere"), "nowhere"),
        (("extract", "--manifest", "m.csv", "--video-encoder", "nowhere.pyth"), "nowhere.pyth"),
        (("extract", "--manifest", "m.csv", "--image-encoder", "ViT-B-16/no.pt"), "no.pt"),
        (("extract", "--manifest", "m.csv", "--text-encoder", "ViT-B-16/no.pt"), "no.pt"),
        (("extract", "--manifest", "m.csv", "--text-encoder", "local-dir:nowhere"), "nowhere"),
    ],
)
def test_a_path_or_option_that_cannot_be_leaves_with_2(arguments, words, tmp_path, monkeypatch,
                                                        capsys):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.csv").write_text("path,labels,split\na.mp4,run,train\n")
    assert run(*arguments) == 2
    assert words in capsys.readouterr().err
