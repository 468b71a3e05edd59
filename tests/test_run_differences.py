"""Several runs in one table: what differs in their configurations stands beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from msq import config as configuration
from msq.cli import main
from msq.config import RunConfig
from msq.report.tables import load_tables


def run(place: Path, *changes: str) -> Path:
    """A finished run of this configuration."""
    place.mkdir()
    config = configuration.override(RunConfig(), changes)
    (place / "config.toml").write_text(configuration.to_toml(config))
    result = {
        "metrics": {"map": 0.5, "map_micro": 0.4, "map_official": 0.4}, "task": "multilabel",
        "protocol": "paper", "dataset": "toy", "queries": config.head.queries,
        "classifier": config.head.classifier,
    }  # fmt: skip
    (place / "result.json").write_text(json.dumps(result))
    return place


def shown(capsys: pytest.CaptureFixture[str], *paths: Path) -> list[list[str]]:
    """Header and rows of the command's CSV."""
    with pytest.raises(SystemExit) as left:
        main(["report", *map(str, paths), "--format", "csv"])
    assert left.value.code in (0, None)
    return [line.split(",") for line in capsys.readouterr().out.splitlines()]


def test_runs_that_look_alike_have_a_column_for_each_field_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = run(tmp_path / "a", "train.loss=focal", "features.video=looks")
    b = run(tmp_path / "b", "optim.lr=0.002", "train.loss=focal", "features.video=motion")
    c = run(tmp_path / "c", "train.loss=bce")  # the only video encoder of its store
    header, *rows = shown(capsys, a, b, c)
    assert header[:6] == ["of", "queries", "classifier", "optim.lr", "train.loss", "features.video"]
    own = str(RunConfig().optim.lr)
    assert [row[3:6] for row in rows] == [
        [own, "focal", "looks"], ["0.002", "focal", "motion"], [own, "bce", ""]
    ]  # fmt: skip
    turned, *_ = shown(capsys, c, b, a)
    assert turned == header


def test_what_is_shown_or_is_no_part_of_a_result_needs_no_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = run(tmp_path / "a", "head.queries=text", "optim.lr=0.002")
    b = run(tmp_path / "b", "head.queries=vanilla")
    c = run(tmp_path / "c", "head.queries=vanilla", "train.tensorboard=true")
    for paths in ((a, b), (b, c)):
        header, *_ = shown(capsys, *paths)
        assert header[:3] == ["of", "queries", "classifier"]
        assert "optim.lr" not in header
        assert not any(name.startswith(("head.", "train.")) for name in header)


def test_columns_are_few_and_a_note_names_the_rest(tmp_path: Path) -> None:
    changes = ("head.layers=2", "head.heads=4", "head.ffn=256", "optim.lr=0.002", "train.seed=3",
               "train.epochs=7")  # fmt: skip
    paths = [run(tmp_path / "a"), run(tmp_path / "b", *changes)]
    tables = load_tables(paths)
    assert tables[1].axes[2:] == ("head.layers", "head.heads", "head.ffn", "optim.lr")
    assert [table.notes for table in tables] == [
        (), ("the runs differ in train.epochs, train.seed, too",)
    ]  # fmt: skip


def test_a_run_without_its_configuration_is_shown_as_ever(tmp_path: Path) -> None:
    paths = [run(tmp_path / name, f"train.seed={k}") for k, name in enumerate("abc")]
    (paths[0] / "config.toml").unlink()
    (paths[1] / "config.toml").write_text("[head")
    assert [table.axes for table in load_tables(paths)] == [("queries", "classifier")] * 3
