"""mAP after training in bf16 against float32, paired over seeds, on the demo world's features.

    python benchmarks/precision_map.py --store world.zarr [--seeds 8] [--write]

Without `--store` the store is made first, in a temporary folder: `msq world` (500 training and 300
test videos, seed 0) and `msq extract` with the embedded encoders, about two minutes. Both runs of
a pair share seed, start, order, dropout masks and validation tenth; only `train.precision` differs.
The claim that is checked: the mean of the differences lies within two standard errors of zero and
within half a point of mAP. The exit code is 1 where it does not.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from timing import machine

from msq import config as configuration
from msq.demo import demo_config
from msq.extract.store import open_store
from msq.head.features import Features, load_features
from msq.head.metrics import chance_map
from msq.head.train import train_head

WITHIN_ERRORS = 2.0
WITHIN_POINTS = 0.5


def make_store(folder: Path) -> Path:
    """A demo world and its store, by the commands that a user would type."""
    store = folder / "world.zarr"
    for words in (
        ["world", str(folder / "world"), "--train", "500", "--test", "300", "--quiet"],
        ["extract", "--manifest", str(folder / "world/manifest.csv"), "--out", str(store)],
    ):
        subprocess.run([sys.executable, "-m", "msq", *words], check=True, stdout=subprocess.DEVNULL)
    return store


def trained(features: Features, seed: int, precision: str, options: argparse.Namespace) -> float:
    """Test mAP in percent of one run."""
    config = demo_config(options.queries, seed, zero_shot=False)
    changes = [f"train.precision={precision}", *options.set]
    result = train_head(
        features, configuration.override(config, changes), device=options.device
    ).result
    assert result["step"]["precision"] == precision
    return 100 * float(result["metrics"]["map"])


def judged(differences: list[float]) -> tuple[float, float, bool]:
    """Mean difference, its standard error, and whether it is as small as claimed."""
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, error, abs(mean) <= WITHIN_ERRORS * error and abs(mean) <= WITHIN_POINTS


def report(features: Features, rows: list[tuple[int, float, float]], device: str) -> list[str]:
    """The lines of the result file."""
    differences = [low - full for _, full, low in rows]
    mean, error, small = judged(differences)
    test = features.rows("test")
    lines = [
        "# mAP in bf16 against float32",
        "",
        f"{len(rows)} paired seeds; test mAP in percent; {features.coverage()}, {len(test)} test "
        f"clips, {len(features.classes)} classes (chance "
        f"{100 * chance_map(features.labels[test]):.1f}). {machine(device)}.",
        "",
        "| seed | fp32 | bf16 | bf16 - fp32 |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {seed} | {full:.2f} | {low:.2f} | {low - full:+.2f} |" for seed, full, low in rows
    ]
    lines += [
        "",
        f"Mean difference {mean:+.3f} points, standard error {error:.3f} "
        f"({abs(mean) / error if error else 0:.2f} standard errors): "
        + ("within" if small else "NOT within")
        + f" {WITHIN_ERRORS:g} standard errors and {WITHIN_POINTS:g} points. fp32 over seeds: "
        f"{statistics.fmean(x[1] for x in rows):.2f} ± {statistics.stdev(x[1] for x in rows):.2f}, "
        f"bf16: {statistics.fmean(x[2] for x in rows):.2f} ± "
        f"{statistics.stdev(x[2] for x in rows):.2f}.",
    ]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, help="a feature store; made where none is given")
    parser.add_argument("--seeds", type=int, default=8, help="at least 2")
    parser.add_argument(
        "--queries", default="multimodal", choices=["vanilla", "text", "multimodal"]
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the runs")
    parser.add_argument("--write", action="store_true", help="write the result file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        features = load_features(open_store(options.store or make_store(Path(folder))))
    rows = []
    for seed in range(options.seeds):
        pair = [trained(features, seed, precision, options) for precision in ("fp32", "bf16")]
        rows.append((seed, pair[0], pair[1]))
        print(f"seed {seed}: fp32 {pair[0]:.2f}, bf16 {pair[1]:.2f}", file=sys.stderr, flush=True)
    lines = report(features, rows, options.device)
    given = [Path(x).name if "/" in x else x for x in sys.argv[1:]]  # no paths of this machine
    words = ["python benchmarks/precision_map.py", *given]
    threads = os.environ.get("OMP_NUM_THREADS")
    command = (f"OMP_NUM_THREADS={threads} " if threads else "") + " ".join(words)
    lines += ["", f"Command: `{command}`; torch {torch.__version__}."]
    print("\n".join(lines))
    if options.write:
        name = f"precision_map_{options.device.partition(':')[0]}_2026-11.md"
        target = Path(__file__).parent / "results" / name
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0 if judged([low - full for _, full, low in rows])[2] else 1


if __name__ == "__main__":
    sys.exit(main())
