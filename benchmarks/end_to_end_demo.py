"""What unfreezing the encoder buys on the demo world, and what it costs.

    python benchmarks/end_to_end_demo.py --work end-to-end-demo --write
    python benchmarks/end_to_end_demo.py --work small --small

For each seed a head is trained on the cache, and then gone on with (`--init-head`) for a few epochs
with the encoder frozen, its last layer unfrozen, and all of it: so that what more training alone
brings is not taken for what unfreezing does. World and store are kept for the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from timing import machine

RESULT = Path(__file__).parent / "results" / "end_to_end_demo_cpu_2026-11.md"
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
HEAD = ("head.width=128", "head.layers=2", "head.heads=4", "head.ffn=512", "head.classifier=text")
KINDS = {"none": "frozen, more epochs", "last:1": "last layer", "all": "everything"}


def msq(*words: object) -> Any:
    """What a command says as JSON."""
    command = [sys.executable, "-m", "msq", *map(str, words), "--json", "-q"]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def cell(values: list[float], scale: float, digits: int) -> str:
    """Mean ± sample standard deviation."""
    text = f"{scale * statistics.fmean(values):.{digits}f}"
    return f"{text} ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def train_all(work: Path, seed: int, epochs: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """Kind of run -> its result, for one seed."""
    store, manifest = work / "world.zarr", work / "world" / "manifest.csv"
    cached = work / f"cached-{seed}"
    found = {"cached": msq("train-head", store, *HEAD, "optim.lr=2e-3", "--epochs", epochs[0],
                           "--seed", seed, "--out", cached, "--overwrite")}  # fmt: skip
    for kind in KINDS:
        out = work / f"{kind.replace(':', '')}-{seed}"
        found[kind] = msq(
            "train", manifest, "--store", store, "--init-head", cached, "--unfreeze", kind,
            "--epochs", epochs[1], "--seed", seed, "--out", out, "--overwrite", "optim.lr=5e-4",
            "backbone.lr=2e-4", "optim.warmup=0.5", "--classes", work / "world" / "classes.txt",
        )  # fmt: skip
    return found


def report(results: list[dict[str, dict[str, Any]]], epochs: tuple[int, int], text: str) -> str:
    lines = [
        "# Unfreezing the encoder on the demo world, November 2026",
        "",
        f"- Command: `{text}`",
        f"- Hardware: {machine('cpu')}",
        f"- {len(results)} seeds, {epochs[0]} epochs on the cache, then {epochs[1]} end to end from"
        " that head; mAP of the test clips in percent, mean ± sample standard deviation.",
        "",
        "| | mAP | against the frozen one, same epochs | s/epoch | times a cached epoch | learns |",
        "|---|---|---|---|---|---|",
    ]
    base = [one["cached"]["seconds_per_epoch"] for one in results]
    for kind, name in {"cached": "head on the cache", **KINDS}.items():
        runs = [one[kind] for one in results]
        scores = [run["metrics"]["map"] for run in runs]
        seconds = [run["seconds_per_epoch"] for run in runs]
        frozen = [one["none"]["metrics"]["map"] for one in results]
        gain = [a - b for a, b in zip(scores, frozen, strict=True)]
        times = [a / b for a, b in zip(seconds, base, strict=True)]
        lines.append(
            f"| {name} | {cell(scores, 100, 1)} | "
            f"{'–' if kind in ('none', 'cached') else cell(gain, 100, 1)} | "
            f"{cell(seconds, 1, 2)} | {cell(times, 1, 1)} | "
            f"{runs[0].get('learning', runs[0]['parameters'])} |"
        )
    shares = [one["all"]["input"]["waited_share"] for one in results]
    lines += ["", f"Everything unfrozen: {cell(shares, 100, 0)} % of the time went by waiting for "
              "clips.", ""]  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("end-to-end-demo"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="one seed, a few clips and epochs")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    given = parser.parse_args()
    work, small = given.work, given.small
    work.mkdir(parents=True, exist_ok=True)
    clips, epochs = ((48, 24), (2, 1)) if small else ((640, 240), (30, 4))
    if not (work / "world" / "manifest.csv").exists():
        msq("world", work / "world", "--train", clips[0], "--test", clips[1], "--seed", 0)
    msq("extract", "--manifest", work / "world" / "manifest.csv", "--classes",
        work / "world" / "classes.txt", "--out", work / "world.zarr")  # fmt: skip
    results = [train_all(work, seed, epochs) for seed in range(1 if small else given.seeds)]
    text = report(results, epochs, f"python {' '.join(sys.argv)}")
    print(text)
    if given.write:
        RESULT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
