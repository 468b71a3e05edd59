"""Options of the two stages: one name, one default and one type in a shell and in Python."""

from __future__ import annotations

import inspect
import re
import tomllib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import msq
from msq import cli, cli_extract, cli_sweeps
from msq.api.extraction import ExtractKeywords
from msq.api.sweeps import ZeroShotKeywords
from msq.config import RunConfig
from msq.config_values import toml_value
from msq.errors import UsageError
from msq.extract.extract_options import PATHS, ExtractOptions
from msq.run_settings import KEYS, HeadOptions, override_text, run_settings
from msq.zeroshot_options import ZeroShotOptions, zero_shot_options


def command(function: Callable[..., Any]) -> dict[str, Any]:
    """Option of a command -> its default."""
    return {name: one.default for name, one in inspect.signature(function).parameters.items()}


def choices(hint: Any) -> set[Any]:
    """The words that a type allows."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return set(parts)
    return set().union(*map(choices, parts)) if parts else set()


SHOWN = {"json", "quiet", "dry_run"}  # how a command speaks
EXTRACT = {"manifest", "dataset", "root", "out", "option"}  # `what`, `root`, `out`, `options`


def test_options_of_stage_one_have_one_name_one_default_and_one_type() -> None:
    typed = command(cli_extract.extract)
    keywords = typing.get_type_hints(ExtractKeywords)
    fields = typing.get_type_hints(ExtractOptions)
    assert set(typed) - SHOWN - EXTRACT == set(keywords) - {"options"}
    assert set(keywords) | {"manifest", "dataset", "root", "out", "mean", "std"} == set(fields)
    for name in set(typed) - SHOWN - EXTRACT:
        assert typed[name] == getattr(ExtractOptions, name), name
        assert choices(keywords[name]) == choices(fields[name]), name
        if name not in PATHS and name != "prompts" and not choices(fields[name]):
            assert keywords[name] == fields[name], name
    doc = msq.extract_features.__doc__ or ""
    assert all(f"`{name}`" in doc for name in keywords)


def test_options_of_a_head_are_keys_of_its_configuration() -> None:
    typed = command(cli.train_head)
    keywords = typing.get_type_hints(HeadOptions)
    own = {"store", "out", "overrides", "config", "device", "overwrite"}
    assert set(typed) - SHOWN - own == set(keywords)
    python = inspect.signature(msq.train_head).parameters
    assert set(python) == own | {"progress", "options"}
    assert {k: python[k].default for k in own - {"store"}} == {k: typed[k] for k in own - {"store"}}
    for name, hint in keywords.items():
        section, _, key = KEYS[name].partition(".")
        made = typing.get_type_hints(typing.get_type_hints(RunConfig)[section])[key]
        assert made == hint, name
        assert f"`{name}`" in (msq.train_head.__doc__ or "")


def test_options_of_a_zero_shot_sweep_have_one_name_and_one_default() -> None:
    typed = command(cli_sweeps.zero_shot)
    own = {"store", "out", "overrides", "config", "device", "workers", "threads", "stack",
           "scheduler", "retry_failed"}  # fmt: skip
    runs = {"epochs", "patience", "seed"}
    assert set(typed) - SHOWN - own == set(ZeroShotKeywords.__annotations__)
    assert set(ZeroShotKeywords.__annotations__) - runs == set(vars(ZeroShotOptions()))
    given = {name: typed[name] for name in ZeroShotKeywords.__annotations__}
    assert zero_shot_options(given) == zero_shot_options({}) == ZeroShotOptions()
    python = inspect.signature(msq.zero_shot).parameters
    assert set(python) == own | {"progress", "options"}
    assert {k: python[k].default for k in own - {"store"}} == {k: typed[k] for k in own - {"store"}}
    assert all(f"`{k}`" in (msq.zero_shot.__doc__ or "") for k in ZeroShotKeywords.__annotations__)


def test_evaluate_has_the_defaults_of_eval() -> None:
    typed, python = command(cli.evaluate), inspect.signature(msq.evaluate).parameters
    for name in ("split", "device", "export", "ensemble", "test_views"):
        assert python[name].default == typed[name], name


def test_sweeps_take_what_is_typed_and_what_python_has() -> None:
    typed = {"seen": "10..30", "queries": "text,vanilla", "choose": ["optim.lr=1e-3,2e-3"]}
    python = {"seen": range(10, 31, 10), "queries": ["text", "vanilla"],
              "choose": {"optim.lr": [1e-3, 2e-3]}}  # fmt: skip
    assert zero_shot_options(typed) == zero_shot_options(python)
    assert zero_shot_options({"seen": 50, "queries": "text"}).seen == (50.0,)
    for wrong in ({"seen": "half"}, {"seen": [float("nan")]}, {"queries": "txt"}, {"splits": 0},
                  {"classifier": "svm"}, {"queries": []}):  # fmt: skip
        with pytest.raises(UsageError, match="expected"):
            zero_shot_options(wrong)


@pytest.mark.parametrize(
    "value",
    [None, True, False, 3, -2, 1e-5, 0.1, "text", "a b", "1e-3", "true", "none", " x", "é\n\"'"],
)
def test_a_value_is_the_same_behind_its_text(value: Any) -> None:
    back = toml_value(override_text(value))
    assert (back, type(back)) == (value, type(value))
    for own in (np.int64(3), np.float32(0.5)):
        assert toml_value(override_text(own)) == own


def test_settings_are_the_same_as_a_file_tables_dotted_keys_or_text(tmp_path: Path) -> None:
    text = 'train.epochs = 2\n[head]\nqueries = "text"\n[optim]\nlr = 0.002\n'
    (tmp_path / "head.toml").write_text(text)
    expected = run_settings(tmp_path / "head.toml", None, {})
    assert (expected.head.queries, expected.optim.lr) == ("text", 0.002)
    keys = {"train.epochs": 2, "head.queries": "text", "optim.lr": 0.002}
    for same in (
        run_settings(tomllib.loads(text), None, {}),
        run_settings(keys, None, {}),
        run_settings(expected, None, {}),
        run_settings(None, keys, {}),
        run_settings(None, tomllib.loads(text), {}),
        run_settings(None, ["train.epochs=2", "head.queries=text", "optim.lr=2e-3"], {}),
        run_settings(
            {"optim.lr": 0.002, "train.epochs": 9}, None, {"queries": "text", "epochs": 2}
        ),
    ):
        assert same == expected
    assert run_settings({"head.width": 8}, {"head.width": None}, {}).head.width is None
    official = run_settings(None, {"train.protocol": "official"}, {"epochs": 3})
    assert (official.head.layers, official.train.epochs, official.optim.lr) == (6, 3, 1e-5)
    for wrong, match in (
        ({"config": {"head.querys": "text"}}, "did you mean head.queries"),
        ({"config": {"head": 3}}, "head is a section"),
        ({"overrides": {"optim.lr": "fast"}}, "optim.lr: expected a number, found 'fast'"),
        ({"overrides": {"optim.lr": "1e-3"}}, "expected a number, found '1e-3'"),
        ({"overrides": {"train.seed": 1}, "options": {"seed": 2}}, "found '1' and '2'"),
    ):
        given: Any = {"config": None, "overrides": None, "options": {}, **wrong}
        with pytest.raises(UsageError, match=re.escape(match)):
            run_settings(**given)
