"""The demo at its smallest: the keys that others rely on, the tables, the page."""

import json
from pathlib import Path

import pytest

from msq import config as configuration
from msq.cli import main
from msq.demo import demo_config

MODES = {"vanilla", "text", "multimodal"}


@pytest.mark.slow
def test_the_demo_runs_and_prints_what_is_promised(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["demo", "--small", "--out", str(tmp_path / "demo"), "--json", "--quiet"])
    assert left.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(out)
    assert result["videos"] == 144
    assert result["train"].keys() == MODES
    assert result["protocol"] == "paper"
    for mode, scores in result["zero_shot"].items():
        made = demo_config(mode, result["seed"], zero_shot=True)
        made = configuration.override(made, ["train.epochs=3"])  # as --small has it
        assert scores["classifier"] == ("shared" if mode == "vanilla" else "text")
        assert scores["fingerprint"] == configuration.fingerprint(made)
        assert scores["protocol"] == made.train.protocol
    assert result["heads"].keys() == MODES
    for mode, made in result["heads"].items():
        run = json.loads((tmp_path / "demo" / f"run_{mode}" / "result.json").read_text())
        assert made == {key: run[key] for key in ("protocol", "classifier", "fingerprint")}
    for metrics in result["train"].values():
        assert {"map", "map_micro", "map_official"} <= metrics.keys()
    assert {"frequency", "linear_probe"} <= result["baselines"].keys()
    assert result["zero_shot"].keys() == MODES
    for scores in result["zero_shot"].values():
        promised = {"unseen_map", "unseen_map_looks", "unseen_map_motion", "seen_map"}
        assert promised <= scores.keys()
        assert all(0 < scores[key] < 1 for key in promised)
    # Words find classes that were never trained; random queries do not.
    unseen = {mode: scores["unseen_map"] for mode, scores in result["zero_shot"].items()}
    assert min(unseen["text"], unseen["multimodal"]) > unseen["vanilla"] + 0.1
    assert {"store", "report", *(f"run_{mode}" for mode in MODES)} <= result["artifacts"].keys()
    for path in result["artifacts"].values():
        assert Path(path).exists()
    assert len(result["predictions"]) == 2
    page = Path(result["artifacts"]["report"]).read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") >= 7
    assert "<script" not in page
    assert "http" not in page
    assert json.loads((tmp_path / "demo" / "demo.json").read_text(encoding="utf-8")) == result
