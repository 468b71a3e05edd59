"""Numbers that cannot be low, or are of the training clips, are said to be so."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from msq.cli import main


def run(arguments: list[str]) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return int(left.value.code or 0)


def trained(folder: Path, rows: list[tuple[str, str]]) -> list[str]:
    """The command that trains a head on imported features of clips with these labels and splits."""
    features, manifest, store = folder / "f", folder / "m.csv", folder / "s.zarr"
    features.mkdir()
    values = np.random.default_rng(0).normal(size=(len(rows), 3, 8)).astype("float32")
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "labels", "split"])
        for k, (labels, split) in enumerate(rows):
            np.save(features / f"v{k}.npy", values[k])
            writer.writerow([f"v{k}.mp4", labels, split])
    made = run(["store", "import", str(store), str(features), "--name", "f", "--manifest",
                 str(manifest), "-q", "--json"])  # fmt: skip
    assert made == 0
    return ["train-head", str(store), "--queries", "vanilla", "--epochs", "1", "--out",
            str(folder / "run"), "-q", "head.layers=1"]  # fmt: skip


def splits(labels: tuple[str, ...], *parts: str) -> list[tuple[str, str]]:
    return [(labels[k % len(labels)], part) for part in parts for k in range(10)]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (splits(("flying", ""), "train", "test"), "mAP is 100 % for any scores here"),
        (splits(("a;b", "b"), "train"), "no test clip is in the store: the clips that the head"),
        (splits(("a;b", "b"), "train", "val"), "no test clip is in the store: the clips that cho"),
        ([*splits(("a;b", "b"), "train"), *splits(("",), "test")], "no clip of the test split has"),
        (splits(("a;b", "b"), "train", "test"), None),
    ],
)
def test_a_run_says_what_its_numbers_do_not_show(
    rows: list[tuple[str, str]], said: str | None, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = trained(tmp_path, rows)
    capsys.readouterr()
    assert run(command) == 0
    out, err = capsys.readouterr()
    assert err.count("warning:") == (said is not None)
    assert said is None or f"warning: {said}" in err
    chance = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["map_chance"]
    line = next(line for line in out.splitlines() if "the same for a random order" in line)
    assert ("–" if chance is None else f"{100 * chance:.2f}") in line
