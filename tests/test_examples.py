"""Every example runs as its head says, in a folder of its own, and what it promises comes out."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import msq
from msq.cli import main

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# What is run here, and what needs data that are not here: its commands are parsed.
RUN = {
    "small_world.py", "own_videos.py", "own_training_loop.py", "compare_heads.toml", "zero_shot.sh",
    "import_features.py", "long_video.py", "read_with_xarray.py", "from_python.py",
}  # fmt: skip
PARSED = {"charades.sh", "animal_kingdom.sh", "slurm.sbatch"}
_tables = runpy.run_path(str(Path(__file__).with_name("test_paper_tables.py")))
Shown, wrong = _tables["Shown"], _tables["wrong"]


def environment(*bins: Path) -> dict[str, str]:
    """As a user has it: `msq` and `python` on the path, and no network."""
    path = os.pathsep.join([*map(str, bins), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        **os.environ,
        "PATH": path,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }


def run(place: Path, *command: object) -> str:
    """What a command prints on stdout, which must leave with 0."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def python(place: Path, name: str, *words: object) -> str:
    return run(place, "python", EXAMPLES / name, *words)


def metrics(run_directory: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run_directory / "result.json").read_text(encoding="utf-8"))
    return result["metrics"]


def table_rows(sweep: Path) -> list[dict[str, Any]]:
    found = json.loads((sweep / "results.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = found["table"]["rows"]
    return rows


def labels_of(manifest: Path) -> dict[str, set[str]]:
    """Clip -> what it shows."""
    with manifest.open(newline="", encoding="utf-8") as file:
        return {row["id"]: set(row["labels"].split(";")) for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder, in which the small world is made first; the others leave it as it is."""
    folder = tmp_path_factory.mktemp("examples")
    python(folder, "small_world.py")
    made = [folder / "small-world" / name for name in ("store.zarr/zarr.json", "head/result.json")]
    before = [path.stat().st_mtime_ns for path in made]
    yield folder
    assert [path.stat().st_mtime_ns for path in made] == before


# --- the folder -----------------------------------------------------------------------------------


def test_every_example_is_tried_and_has_one_line_in_the_list():
    there = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    assert there == RUN | PARSED
    listed = re.findall(
        r"^\| \[([^]]+)\]\(([^)]+)\) \|", (EXAMPLES / "README.md").read_text(), re.M
    )
    assert sorted(name for name, _ in listed) == sorted(there)
    assert all(name == link for name, link in listed)


@pytest.mark.parametrize("name", sorted(RUN | PARSED))
def test_its_head_says_what_comes_out_and_how_to_run_it(name):
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    head = text.split('"""')[1] if name.endswith(".py") else text.split("\n\n")[0]
    head = " ".join(head.replace("#", " ").split())
    assert "hat comes out" in head
    caller = {".py": "python", ".sh": "sh", ".toml": "msq grid", ".sbatch": "sbatch"}
    assert f"{caller[Path(name).suffix]} examples/{name}" in head
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) <= 120


# --- on the small world ---------------------------------------------------------------------------


def test_the_small_world(place):
    store = msq.open_store(place / "small-world" / "store.zarr")
    assert len(store.ok_rows()) == 160
    found = metrics(place / "small-world" / "head")
    assert found["map"] > 3 * found["map_chance"]


def test_own_videos(place):
    out = python(place, "own_videos.py")
    own = place / "own-videos"
    store = msq.open_store(own / "store.zarr")
    assert {item["clip"]: item["status"] for item in store.failures()} == {
        "broken.mp4": 2, "lost.mp4": 2
    }  # fmt: skip
    assert {"train", "test"} == set(store.splits)
    truth = labels_of(place / "small-world" / "videos" / "manifest.csv")
    predicted = json.loads((own / "predictions.json").read_text(encoding="utf-8"))
    assert len(predicted) == 10
    top = [{one["label"] for one in item["predictions"][:5]} for item in predicted]
    hits = sum(bool(best & truth[item["clip"]]) for best, item in zip(top, predicted, strict=True))
    assert hits >= 5  # one by chance: a clip shows about two of 83 classes
    assert "dog sleeping" in out  # words that no table had


def test_own_training_loop(place):
    out = python(place, "own_training_loop.py")
    found = re.search(r"test mAP ([\d.]+) \(chance ([\d.]+)\)", out)
    assert found
    assert float(found[1]) > 3 * float(found[2])
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", out)]
    assert losses[-1] < losses[0] / 2
    # The head that it saved is one for msq.
    store = place / "small-world" / "store.zarr"
    scored = json.loads(run(place, "msq", "eval", "own-loop", store, "--json"))
    assert scored["metrics"]["map"] == pytest.approx(float(found[1]), abs=1e-3)
    assert scored["epochs"] is None  # nobody told
    (item,) = msq.load_head(place / "own-loop").predict([0], store=msq.open_store(store))
    assert len(item["predictions"]) == 83


def test_from_python(place):
    out = python(place, "from_python.py")
    assert "160 of 160 clips; []" in out
    means = [float(x) for x in re.findall(r"mAP ([\d.]+) ± [\d.]+ over 3 seeds", out)]
    runs = sorted((place / "from-python").iterdir())
    assert [run.name for run in runs] == [
        f"{queries}-{seed}" for queries in ("multimodal", "text") for seed in range(3)
    ]
    values = [metrics(run)["map"] for run in runs]
    assert means == pytest.approx([sum(values[3:]) / 3, sum(values[:3]) / 3], abs=1e-3)
    assert min(means) > 2 * metrics(runs[0])["map_chance"]
    (said,) = re.findall(r"from-python/\S+ says of test-\d+: (.*)", out)
    assert len(said.split(", ")) == 3
    before = [(run / "result.json").stat().st_mtime_ns for run in runs]
    assert python(place, "from_python.py") == out  # nothing is done again
    assert [(run / "result.json").stat().st_mtime_ns for run in runs] == before


def test_compare_heads(place):
    text = (EXAMPLES / "compare_heads.toml").read_text(encoding="utf-8")
    commands = [
        shlex.split(line, comments=True)
        for line in re.findall(r"^#   (msq .*?)(?:   |$)", text, re.M)
    ]
    assert [words[1] for words in commands] == ["grid", "report"]
    for words in commands:
        run(place, *(ROOT / word if word.startswith("examples/") else word for word in words))
    table = (place / "compare-heads" / "table.tex").read_text(encoding="utf-8")
    assert table.count(r"$\pm$") == 8  # four heads, two columns
    assert r"\toprule" in table
    rows = table_rows(place / "compare-heads")
    assert [(row["labels"]["queries"], row["labels"]["layers"]) for row in rows] == [
        ("text", 1), ("text", 2), ("multimodal", 1), ("multimodal", 2)
    ]  # fmt: skip
    assert all(len(row["metrics"]["map"]["values"]) == 2 for row in rows)
    chance = metrics(place / "small-world" / "head")["map_chance"]
    assert all(row["metrics"]["map"]["mean"] > 3 * chance for row in rows)


def test_zero_shot(place):
    run(place, "sh", EXAMPLES / "zero_shot.sh")
    found = {row["labels"]["queries"]: row["metrics"] for row in table_rows(place / "zero-shot")}
    assert {"vanilla", "multimodal", "CLIP similarity"} == set(found)
    unseen = {name: cells["unseen"]["mean"] for name, cells in found.items()}
    chance = found["vanilla"]["chance"]["mean"]
    assert unseen["multimodal"] > 2 * chance
    assert unseen["vanilla"] < 2 * chance
    assert len(found["multimodal"]["generalised_unseen"]["values"]) == 2
    assert "multimodal" in (place / "zero-shot" / "table.md").read_text(encoding="utf-8")


def test_import_features(place):
    out = python(place, "import_features.py")
    store = msq.open_store(place / "imported" / "store.zarr")
    assert store.encoders("video") == ["looks", "motion"]
    assert store.tokens([0], "motion").shape == (1, 7, 192)
    assert len(store.ok_rows()) == 160
    for name in ("looks", "motion"):
        found = metrics(place / "imported" / f"head-{name}")
        assert found["map"] > 2 * found["map_chance"]
        assert f"head-{name}" in out


def test_long_video(place):
    out = python(place, "long_video.py")
    found = re.search(r"precision ([\d.]+), recall ([\d.]+)", out)
    assert found
    assert float(found[1]) > 0.2  # of 83 classes about two are shown: 0.02 by chance
    assert float(found[2]) > 0.2
    with (place / "small-world" / "long.intervals.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 20
    assert all(0 <= float(row["start"]) < float(row["end"]) <= 120 for row in rows)
    assert all(0.3 <= float(row["score"]) <= 1 for row in rows)


def test_read_with_xarray(place):
    out = python(place, "read_with_xarray.py")
    assert "160 of 160 clips" in out
    found = re.search(r"mAP ([\d.]+) over \d+ classes \(([\d.]+) by chance\)", out)
    assert found
    assert float(found[1]) > 3 * float(found[2])


# --- real data: the commands ----------------------------------------------------------------------


def commands(
    name: str, folder: Path, *words: object, leaves: int = 0
) -> tuple[int, list[list[str]]]:
    """Exit code of a script, and what it calls msq with, each call leaving with `leaves`."""
    bins, log = folder / "bin", folder / "log"
    bins.mkdir(exist_ok=True)
    log.write_text("")
    (bins / "msq").write_text(
        f"#!/bin/sh\nfor word in \"$@\"; do printf '%s\\n' \"$word\"; done >> '{log}'\n"
        f"echo >> '{log}'\nif [ \"$1\" = extract ]; then exit {leaves}; fi\n"
    )
    (bins / "srun").write_text('#!/bin/sh\nwhile [ "$1" != msq ]; do shift; done\nexec "$@"\n')
    for file in bins.iterdir():
        file.chmod(0o755)
    shell = "bash" if name.endswith(".sbatch") else "sh"
    done = subprocess.run(
        [shell, str(EXAMPLES / name), *map(str, words)],
        cwd=folder, env=environment(bins), capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, [call.split("\n") for call in log.read_text().strip().split("\n\n")]


@pytest.mark.parametrize("name", sorted(PARSED))
def test_commands_for_real_data(name, tmp_path):
    root, out = tmp_path / "the data", tmp_path / "out"  # a blank in a path is nobody's fault
    code, calls = commands(name, tmp_path, root, out, leaves=3)  # some videos could not be read
    assert code == 0
    for words in calls:
        assert wrong(Shown(name, shlex.join(["msq", *words]), whole=True)) is None, words
    made: set[str] = set()
    for words in calls:
        used = {word for word in words[1:] if word.startswith(f"{out}/")}
        new = words[words.index("--out") + 1] if "--out" in words else ""
        new = words[words.index("--export") + 1] if "--export" in words else new
        assert used - {new} <= made, words  # each store and run is there when it is needed
        if "--dry-run" not in words:
            made.add(new)
    assert {"extract", "train-head"} <= {words[0] for words in calls}
    assert all(str(root) in words for words in calls if words[0] in ("extract", "datasets"))
    code, calls = commands(name, tmp_path, root, out, leaves=1)  # nothing could be encoded
    assert code == 1
    assert calls[-1][0] == "extract"
    code, calls = commands(name, tmp_path)  # without a folder nothing is begun
    assert code != 0
    assert calls == [[""]]


@pytest.mark.parametrize("name", ["charades", "animal_kingdom"])
def test_the_official_annotation_is_what_the_example_expects(name, shared, tmp_path, capsys):
    root = shared / "annotations" / name
    _, calls = commands(f"{name}.sh", tmp_path, root)
    (check,) = [words for words in calls if words[0] == "datasets"]
    with pytest.raises(SystemExit) as left:
        main([*check, "--json"])
    assert left.value.code in (0, None)
    found = json.loads(capsys.readouterr().out)
    assert found["classes"] == {"charades": 157, "animal_kingdom": 140}[name]
    assert found["missing"] > 0  # the videos
