"""Tables of results: mean and std, the best marked, the paper's number, and what is no match."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msq import config as configuration
from msq.config import RunConfig
from msq.errors import UsageError
from msq.head.sweep_plan import Plan, outcomes_of, read_plan, write_outcome, write_plan
from msq.head.trial import Trial
from msq.report import terminal
from msq.report.sweeps import conclude
from msq.report.table_formats import cells, csv_text, document, escape, latex, markdown
from msq.report.tables import Row, Table, joined, load_table, load_tables, sweep_table

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sweep_stores.py"))))


def outcome(value: float, **changes: Any) -> dict[str, Any]:
    return {
        "task": "multilabel", "protocol": "paper", "dataset": "toy", "variant": "",
        "views": "clean", "metrics": {"map": value, "map_official": value + 0.1},
        "detail": {}, "training": {"best_val_score": 0.5}, **changes,
    }  # fmt: skip


def made(
    values: Mapping[str, tuple[float, ...]], paper: Any = None, **changes: Any
) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """A plan with a row for each name and a repeat for each value, all done."""
    trials, outcomes = [], {}
    for name, numbers in values.items():
        for seed, number in enumerate(numbers):
            config = configuration.override(
                RunConfig(), [f"head.queries={name}", f"train.seed={seed}"]
            )
            trial = Trial(source="s", config=config, row={"queries": name}, repeat={"seed": seed})
            trials.append(trial)
            outcomes[trial.id] = outcome(number, **changes.get(name, {}))
    table = {"metrics": ["map"], "paper": paper or {}}
    return Plan("toy_grid", trials, {}, table=table), outcomes


PAPER = {
    "source": "a paper, Table 9", "protocol": "end to end", "metric": "map_official",
    "rows": [{"queries": "text", "value": 41.5}],
}  # fmt: skip
TWO = {"text": (0.25, 0.5), "vanilla": (0.125, 0.25)}


def test_mean_std_best_and_the_papers_number_in_every_format() -> None:
    table = sweep_table(*made(TWO, PAPER))
    shown = markdown(table)
    assert "| text | **37.50 ± 17.68** | 41.50 |" in shown
    assert "| vanilla | 18.75 ± 8.84 | – |" in shown
    assert "a paper, Table 9; end to end" in shown
    tex = latex(table)
    assert r"text & \textbf{37.50 $\pm$ 17.68} & 41.50 \\" in tex
    assert r"vanilla & 18.75 $\pm$ 8.84 & -- \\" in tex
    assert r"\begin{tabular}{lrr}" in tex
    assert r"toy\_grid" in tex
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert tex.count(rule) == 1
    first, second = csv.DictReader(io.StringIO(csv_text(table)))
    assert (first["map_mean"], first["paper"], first["paper_metric"]) == (
        "0.375", "0.415", "map_official"
    )  # fmt: skip
    assert float(second["map_std"]) == pytest.approx(0.0883883)
    assert (second["paper"], second["repeats"]) == ("", "2")
    written = document(table)
    assert written["rows"][0]["metrics"]["map"]["values"] == [0.25, 0.5]
    assert json.dumps(written)


def test_several_metrics_of_one_task_or_a_metric_that_nobody_has() -> None:
    plan, outcomes = made(TWO)
    header, _ = cells(sweep_table(plan, outcomes, ("map_official", "map")), str, str)
    assert header == ["queries", "official micro AP", "mAP"]
    with pytest.raises(UsageError, match=r"metric 'mpa': no trial .* they have map, map_official"):
        sweep_table(plan, outcomes, ("mpa",))


def test_different_protocols_in_one_table_are_warned_of_and_not_compared() -> None:
    plan, outcomes = made(TWO, vanilla={"protocol": "official"})
    table = sweep_table(plan, outcomes)
    assert table.best("map") == []
    (warning,) = table.warnings()
    assert "different protocols stand in one table (official, paper)" in warning
    for text in (markdown(table), latex(table), csv_text(table)):
        assert "different protocols" in text
        assert "official" in text
    assert cells(table, str, str)[0] == ["queries", "protocol", "mAP"]


@pytest.mark.parametrize(
    ("key", "name"), [("dataset", "datasets"), ("views", "test views"), ("split", "splits")]
)
def test_other_things_that_keep_rows_apart_are_warned_of(key: str, name: str) -> None:
    plan, outcomes = made(TWO, vanilla={key: "another"})
    table = sweep_table(plan, outcomes)
    assert f"rows of different {name}" in table.warnings()[0]
    assert table.best("map") == []


def test_rows_over_different_class_splits_are_warned_of() -> None:
    plan, outcomes = made(TWO, vanilla={"detail": {"split_hash": "b" * 64}},
                          text={"detail": {"split_hash": "a" * 64}})  # fmt: skip
    table = sweep_table(plan, outcomes)
    assert "different class splits" in table.warnings()[0]


def test_a_run_and_a_grid_of_the_same_clips_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = stores.make_store(tmp_path / "toy.zarr", clips=30)
    out, run, grid = tmp_path / "grid", tmp_path / "run", tmp_path / "g.toml"
    grid.write_text('name = "g"\n[product]\n"head.queries" = ["text", "multimodal"]\n')
    small = ("--device", "cpu", "-q")
    tiny = ("train.epochs=1", *stores.HEAD)
    assert stores.msq("grid", grid, f"store={store}", "--out", out, *small, *tiny) == 0
    assert stores.msq("train-head", store, "--out", run, *small, *tiny) == 0
    capsys.readouterr()
    table = joined(load_tables([run, out]))
    assert table.warnings() == []
    values = [row.cells["map"]["mean"] for row in table.rows]
    assert table.best("map") == [k for k, x in enumerate(values) if x == max(values)]
    outcomes = outcomes_of(out, read_plan(out))
    assert [one["split"] for one in outcomes.values()] == ["test", "test"]
    for one in outcomes.values():  # as of before outcomes said it
        write_outcome(out, {key: value for key, value in one.items() if key != "split"})
    assert joined(load_tables([run, out])).warnings() == []


def test_counts_are_no_percent_and_none_of_them_is_the_best() -> None:
    plan, outcomes = made(TWO, {**PAPER})
    for k, one in enumerate(outcomes.values()):
        one["metrics"] |= {"rows": 40, "classes_scored": 6 + k % 2, "rows_unlabelled": k,
                           "unseen_clips": 30 + k, "map_chance": 0.1 + k / 100}  # fmt: skip
    metrics = ("map", "rows", "classes_scored", "rows_unlabelled", "unseen_clips", "map_chance")
    table = sweep_table(plan, outcomes, metrics)
    assert [m for m in metrics if table.best(m)] == ["map"]
    header, rows = cells(table, str, lambda cell: "fraction")
    assert header[2:5] == ["rows (number)", "classes scored (number)", "rows unlabelled (number)"]
    assert rows[0][2:6] == ["40", "6.5 ± 0.707107", "0.5 ± 0.707107", "30.5 ± 0.707107"]
    assert "| text | **37.50 ± 17.68** | 40 | 6.5 ± 0.707107 |" in markdown(table)
    assert r"& 40 & 6.5 $\pm$ 0.707107 &" in latex(table)
    assert csv_text(table).splitlines()[1].split(",")[5] == "40.0"


def test_names_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "w[" / "b] [dQw4w9WgXcQ] :dog:"
    run.mkdir(parents=True)
    (run / "result.json").write_text('{"metrics": {"top1": 0.5}, "task": "singlelabel"}')
    assert stores.msq("report", run) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("b] [dQw4w9WgXcQ] :dog: (%)")
    terminal.table("[/b]", ["a [b]", "[/c]"], [[":dog: [x]", "[/y]"]])
    table = capsys.readouterr().out
    for word in ("[/b]", "a [b]", "[/c]", ":dog: [x]", "[/y]"):
        assert word in table
    terminal.say("[/b] [x] :dog:")
    with terminal.progress("[/b] :dog:") as update:
        update(1, 1, "[x]")
    assert capsys.readouterr().err == "[/b] [x] :dog:\n[/b] :dog:: 1/1 · [x]\n"


def test_class_splits_that_leak_are_warned_of_in_every_format() -> None:
    leak = {"seen": "Diving", "unseen": "CliffDiving", "share": 1.0, "clips": 20}

    def detail(name: str, *leaks: Any) -> dict[str, Any]:
        return {"detail": {"split_hash": name * 64, "leaks": list(leaks)}}

    plan, outcomes = made(TWO)
    for trial in plan.trials:
        name, leaks = ("a", [leak]) if trial.repeat["seed"] else ("b", [])
        outcomes[trial.id] |= detail(name, *leaks)
    table = sweep_table(plan, outcomes)
    (warning,) = table.warnings()
    assert warning.startswith("1 of 2 class splits part classes that have the same clips (Cliff")
    for text in (markdown(table), latex(table), csv_text(table)):
        assert "CliffDiving and Diving" in text
    assert joined([table, table]).warnings()[0].startswith("toy_grid: 1 of 2 class splits")


def test_what_validation_decided_is_said_beside_the_table() -> None:
    plan, outcomes = made(TWO)
    stopping = [
        Trial(source=t.source, repeat=t.repeat, row={**t.row, "patience": 3}, choice={"x": 1},
              config=configuration.override(t.config, ["train.patience=3"]))
        for t in plan.trials
    ]  # fmt: skip
    training = {"epochs": 3, "planned_epochs": 10, "seconds_per_epoch": 1.0, "best_val_score": 0.5}
    for trial, full in zip(stopping[1:], plan.trials[1:], strict=True):
        outcomes[trial.id] = {**outcomes[full.id], "training": training}
        outcomes[trial.id]["metrics"] = {"map": outcomes[full.id]["metrics"]["map"] - 0.01}
    both = Plan("both", [*plan.trials, *stopping], {}, table={"metrics": ["map"]})
    choice, stopped = sweep_table(both, outcomes).notes
    assert choice.endswith("in each repeat among those done; 1 of 4 trials are missing")
    assert stopped == (
        "early stopping: 3 of 3 trials stopped, 70.00 % of their epochs saved; full length minus "
        "stopped, 3 pairs: map 1.00 ± 0.00 points"
    )


def test_a_metric_without_a_number_has_no_cost_and_the_sweep_concludes(tmp_path: Path) -> None:
    """As where no test clip has a label: the metric is null in every outcome."""
    plan, outcomes = made({"text": (0.25, 0.5)})
    training = {"epochs": 3, "planned_epochs": 10, "seconds_per_epoch": 1.0, "best_val_score": 0.5}
    stopping = []
    for trial in plan.trials:
        config = configuration.override(trial.config, ["train.patience=3"])
        short = dataclasses.replace(trial, config=config, row={**trial.row, "patience": 3})
        stopping.append(short)
        lost = {"map": None if trial is plan.trials[0] else 0.25}
        outcomes[short.id] = {**outcomes[trial.id], "training": training, "metrics": lost}
    both = Plan("both", [*plan.trials, *stopping], {}, table={"metrics": ["map"]})
    write_plan(tmp_path, both)
    for name, one in outcomes.items():
        write_outcome(tmp_path, {"id": name, "status": "done", **one})
    found = conclude(tmp_path, both, {"done": 4})
    assert found["early_stopping"]["cost"]["map"] == {
        "mean": 0.25, "std": None, "values": [None, 0.25]
    }  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text())["table"]["notes"][0].endswith(
        "full length minus stopped, 2 pairs: map 25.00 points"
    )
    assert "| text | 3 | 25.00 |" in (tmp_path / "table.md").read_text()


def test_what_is_not_done_yet_is_said() -> None:
    plan, outcomes = made(TWO)
    del outcomes[plan.trials[0].id]
    table = sweep_table(plan, outcomes)
    assert table.warnings() == ["queries text: 1 of 2 done"]
    assert "| text | **50.00** |" in markdown(table)


def test_the_best_is_marked_in_each_group_and_chance_is_no_contest() -> None:
    def row(seen: int, mode: str, value: float) -> Row:
        cell = {"mean": value, "std": None, "values": [value]}
        return Row(
            {"seen": seen, "queries": mode}, {"unseen": cell, "chance": cell}, None, {}, 1, 1
        )

    rows = [row(50, "text", 0.5), row(50, "vanilla", 0.4), row(75, "text", 0.1),
            row(75, "vanilla", 0.2)]  # fmt: skip
    table = Table("t", ("seen", "queries"), ("unseen", "chance"), rows, by=("seen",))
    assert table.best("unseen") == [0, 3]
    assert table.best("chance") == []
    assert latex(table).count(r"\midrule") == 2


def test_sweeps_and_runs_stand_in_one_table_with_their_names(tmp_path: Path) -> None:
    first, second = (sweep_table(*made(TWO)) for _ in range(2))
    both = joined([first, second])
    assert [row.labels["of"] for row in both.rows] == ["toy_grid"] * 4
    assert both.axes == ["of", "queries"]
    assert both.warnings() == []


def test_each_of_several_tables_says_where_its_own_numbers_of_the_paper_are_from() -> None:
    other = {**PAPER, "source": "another paper", "metric": "map"}
    shown = markdown(joined([sweep_table(*made(TWO, PAPER)), sweep_table(*made(TWO, other))]))
    assert "paper: a paper, Table 9; end to end; to be read beside official micro AP" in shown
    assert "paper: another paper; end to end; to be read beside mAP" in shown
    assert markdown(joined([sweep_table(*made(TWO, PAPER))] * 2)).count("a paper, Table 9") == 1


def test_latex_keeps_what_people_write_in_names() -> None:
    assert escape(r"a_b & 50 % {x} \y") == r"a\_b \& 50 \% \{x\} \textbackslash{}y"


def test_report_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = stores.make_store(tmp_path / "toy.zarr")
    out = tmp_path / "sweep"
    small = ("--splits", "1", "--seen", "50", "--epochs", "1", "--device", "cpu", "-q")
    assert stores.msq("zero-shot", store, "--out", out, *small, *stores.HEAD) == 0
    shown = capsys.readouterr()
    assert "similarity" in shown.out
    assert "hash" in shown.out
    run = tmp_path / "run"
    more = ("--epochs", "1", "--device", "cpu", "-q", *stores.HEAD)
    assert stores.msq("train-head", store, "--out", run, *more) == 0
    capsys.readouterr()
    for kind in ("terminal", "markdown", "latex", "csv"):
        assert stores.msq("report", out, "--format", kind) == 0
        text = capsys.readouterr().out
        assert "multimodal" in text
    assert stores.msq("report", out, run, "--metric", "unseen", "--metric", "map", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["labels"]["of"] for row in found["rows"]][-1] == "run"
    for paths in ((run,), (out, run)):
        assert stores.msq("report", *paths, "--metric", "mpa") == 2
        assert "metric 'mpa'" in capsys.readouterr().err
    file = tmp_path / "t.tex"
    assert stores.msq("report", out, "--format", "latex", "--out", file) == 0
    assert r"\toprule" in file.read_text()
    assert stores.msq("report", tmp_path) == 2
    assert "expected a sweep (plan.json) or a finished run" in capsys.readouterr().err
    lines = (out / "per_class.csv").read_text().splitlines()
    assert lines[0] == "seen,queries,split,trial,class,ap"
    assert len(lines) == 1 + 3 * 4


@pytest.mark.parametrize("said", [True, False])  # runs did not always say their task
@pytest.mark.parametrize(
    ("task", "more", "columns"),
    [("singlelabel", {}, ("top1",)),
     ("multilabel", {"accuracy": 0.9}, ("map", "map_micro", "map_official"))],
)  # fmt: skip
def test_the_columns_of_a_run_are_those_of_its_task(
    tmp_path: Path, task: str, more: dict[str, float], columns: tuple[str, ...], said: bool
) -> None:
    metrics = {"map": 0.5, "map_micro": 0.4, "map_official": 0.45, "top1": 0.75, **more}
    result = {"metrics": metrics, "protocol": "paper", **({"task": task} if said else {})}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert load_table(tmp_path).metrics == columns


def test_report_writes_the_file_that_it_is_asked_for_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    result = {"metrics": {"map": 0.5, "top1": 0.75}, "task": "singlelabel", "protocol": "paper"}
    (run / "result.json").write_text(json.dumps(result))
    beginnings = {"t.md": "**run** (%)", "t.tex": "% needs", "t.csv": "queries,", "t.json": "{\n",
                  "new/t.html": "<!doctype html>"}  # fmt: skip
    for name, beginning in beginnings.items():
        assert stores.msq("report", run, "--out", tmp_path / name) == 0
        assert (tmp_path / name).read_text().startswith(beginning)
        told = capsys.readouterr()
        assert (told.out, name in told.err) == ("", True)
    assert stores.msq("report", run, "--json", "--out", tmp_path / "j") == 0
    assert json.loads((tmp_path / "j").read_text())["metrics"] == ["top1"]
    assert stores.msq("report", run, "--format", "csv", "--out", tmp_path / "t.txt") == 0
    assert (tmp_path / "t.txt").read_text().startswith("queries,")
    capsys.readouterr()
    for name, more in (("x.txt", ()), ("x.md", ("--format", "terminal"))):
        assert stores.msq("report", run, "--out", tmp_path / name, *more) == 2
        assert "expected --format markdown, latex, csv or html" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))
    assert stores.msq("report", run, "--json", "--format", "csv") == 2
    assert "expected --json or --format csv, found both" in capsys.readouterr().err
    (run / "result.json").write_text("{")
    assert stores.msq("report", run) == 2
    assert "result.json: expected the result of a run" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [tmp_path / name / "run" for name in ("a", "b")]
    for path in paths:
        path.mkdir(parents=True)
        (path / "result.json").write_text('{"metrics": {"top1": 0.5}, "task": "singlelabel"}')
    assert [table.title for table in load_tables(paths)] == [str(path) for path in paths]
    assert [table.title for table in load_tables(paths[:1])] == ["run"]


def test_what_a_protocol_fixes_tells_no_runs_apart(tmp_path: Path) -> None:
    """Its many fields would take the columns of those that were chosen."""
    configs = {
        "a": RunConfig(),
        "b": configuration.override(RunConfig(), ["train.loss=focal"]),
        "c": configuration.official_config("text"),
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(configuration.to_toml(config))
        result = {"metrics": {"map": 0.5}, "task": "multilabel", "queries": "text",
                  "classifier": "per-class", "protocol": config.train.protocol}  # fmt: skip
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    table = joined(load_tables([tmp_path / name for name in configs]))
    assert [axis for axis in table.axes if "." in axis] == ["train.loss"]
    header, rows = cells(table, str, lambda cell: "")
    assert "protocol" in header
    assert [row[header.index("protocol")] for row in rows] == ["paper", "paper", "official"]
    assert not any("differ in" in note for note in table.notes)
