from __future__ import annotations

from pathlib import Path

import pytest

from msq import config
from msq.config import HeadConfig, RunConfig
from msq.errors import UsageError
from msq.report import end_to_end
from msq.run_settings import run_settings


def test_a_configuration_comes_back_from_toml_as_it_was(tmp_path: Path) -> None:
    made = config.override(
        RunConfig(),
        ["optim.lr=3e-4", "head.queries=text", "head.width=64", "train.seed=7",
         "features.prompt=a video of", "head.query_position=true", "optim.weight_decay=0"],
    )  # fmt: skip
    file = tmp_path / "run.toml"
    file.write_text(config.to_toml(made, {"clips": 3}), encoding="utf-8")
    assert config.load(file) == made
    assert made.optim.lr == 3e-4
    assert made.head.width == 64
    assert made.features.prompt == "a video of"
    assert config.override(made, ["head.width=none"]).head.width is None


def test_the_fingerprint_changes_with_every_field() -> None:
    base = RunConfig()
    prints = {config.fingerprint(base)}
    for change in ("optim.lr=1", "head.layers=2", "train.seed=1", "features.view=1"):
        prints.add(config.fingerprint(config.override(base, [change])))
    assert len(prints) == 5
    assert config.fingerprint(RunConfig()) == config.fingerprint(base)


def test_a_younger_field_at_its_default_changes_no_fingerprint() -> None:
    """A sweep that was begun before the losses had numbers finds its trials again."""
    first = "2d6ab8c94649133e3c9cd8fe303b6e985393609400a21eb56ad509c60df28419"  # before 2026-11-21
    assert config.fingerprint(RunConfig()) == first
    for section, names in config.LATER.items():
        for name in names:
            changed = config.override(RunConfig(), [f"{section}.{name}=0.375"])
            assert config.fingerprint(changed) != first


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.lrr=1", "optim.lr"),
        ("optm.lr=1", "optim"),
        ("lr=1", "expected section.key=value"),
        ("optim.lr", "expected section.key=value"),
        ("optim.lr=fast", "optim.lr: expected a number, found 'fast'"),
        ("head.layers=2.5", "head.layers: expected a whole number, found 2.5"),
        ("head.layers=true", "expected a whole number"),
        ("head.queries=words", "one of vanilla, text, multimodal, found 'words'"),
        ("head.dropout=1.5", "head.dropout: expected a share"),
        ("train.epochs=0", "train.epochs: expected at least 1"),
        ("optim.lr=nan", "optim.lr: expected at least 0"),
        ("head.layers=none", "expected a whole number"),
        ("train.seed=99999999999999999999", "train.seed: expected a whole number from -8796"),
        ("train.seed=9223372036854775807", "found 9223372036854775807"),
        ("train.seed=-8796093022209", "train.seed: expected a whole number from -8796"),
        ("optim.lr=inf", "optim.lr: expected a finite number, found inf"),
        ("optim.weight_decay=inf", "optim.weight_decay: expected a finite number"),
        ("optim.warmup=inf", "optim.warmup: expected a finite number"),
    ],
)
def test_a_wrong_override_is_refused_with_what_was_expected(assignment: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        config.override(RunConfig(), [assignment])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("head.queries=multimodal", "head.queries: expected one value, found 'multimodal' and"),
        ("head.queries=txt", "head.queries: expected one value, found 'txt' and 'vanilla'"),
        ("train.seed = 4", "train.seed: expected one value, found '4' and '3'"),
        ("optim.lr=fast optim.lr=1", "optim.lr: expected one value, found 'fast' and '1'"),
    ],
)
def test_a_key_with_two_values_is_refused(override: str, message: str) -> None:
    options = {"head.queries": "vanilla", "train.seed": 3, "train.epochs": None}
    words = [override] if " = " in override else override.split()
    for settings in (
        lambda: run_settings(None, words, options),
        lambda: end_to_end.settings(None, words, options),
    ):
        with pytest.raises(UsageError, match=message):
            settings()


def test_a_key_given_twice_with_one_value_is_taken_beside_the_others() -> None:
    options = {"head.queries": "vanilla", "train.epochs": 5, "train.tensorboard": None}
    made = run_settings(None, ["train.epochs=5", "optim.lr=1e-3", "optim.lr=0.001"], options)
    assert (made.head.queries, made.train.epochs, made.optim.lr) == ("vanilla", 5, 1e-3)
    with pytest.raises(UsageError, match=r"expected section\.key=value"):
        run_settings(None, ["head.queries"], {})


def test_a_broken_file_is_refused_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    with pytest.raises(UsageError, match=r"bad\.toml: no such"):
        config.load(file)
    file.write_text("[head\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"bad\.toml: expected TOML"):
        config.load(file)
    file.write_bytes(b"\xff\xfe[head]")
    with pytest.raises(UsageError, match=r"bad\.toml: expected TOML"):
        config.load(file)
    file.write_text("head = 3\n", encoding="utf-8")
    with pytest.raises(UsageError, match="head is a section"):
        config.load(file)


def test_the_difference_names_the_field_and_both_values() -> None:
    left = config.to_dict(RunConfig())
    right = config.to_dict(RunConfig(head=HeadConfig(layers=2)))
    assert config.difference(left, right) == ["head.layers: expected 6, found 2"]
    assert config.difference(left, left) == []
