"""The demo world's Table 3: 3 query modes x 2 shares x 10 class splits, killed and resumed.

    python benchmarks/sweep_demo.py --work sweep-demo --write
    python benchmarks/sweep_demo.py --work small-sweep --small

In `--work`: the demo world and its store (kept for the next time), and four sweeps by `msq
zero-shot` and `msq grid` with two one-thread processes each:

1. `whole`: to the end, timed;
2. `killed`: signal 9 when half of the trials are done, then the same command again;
3. `dask`: through two dask workers;
4. `patience`: some trials with early stopping and without, for what it saves and costs.

Parts that are done are not run again: remove `--work` for new timings.

The first three must agree in every number to the last digit; the exit code is 1 where they do not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timing import machine

HEAD = ("head.width=128", "head.layers=2", "head.heads=4", "head.ffn=512", "optim.lr=2e-3",
        "train.batch=32")  # fmt: skip
RESULT = Path(__file__).parent / "results" / "sweep_demo_cpu_2026-11.md"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def msq(*words: object) -> list[str]:
    return [sys.executable, "-m", "msq", *map(str, words)]


def run(command: list[str]) -> float:
    """Seconds of a command that must succeed."""
    began = time.perf_counter()
    subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def make_store(work: Path, small: bool) -> Path:
    store, world = work / "world.zarr", work / "world"
    train, test = (96, 48) if small else (640, 240)
    if not (world / "manifest.csv").exists():
        run(msq("world", world, "--train", train, "--test", test, "--seed", 0, "-q"))
    run(msq("extract", "--manifest", world / "manifest.csv", "--classes", world / "classes.txt",
            "--out", store, "-q"))  # fmt: skip
    return store


def killed(command: list[str], folder: Path, trials: int) -> tuple[int, float]:
    """Kill it in the middle and run it again; trials done before, and seconds of both together."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while (done := len(list(folder.glob("trials/*/outcome.json")))) < trials // 2:
        if process.poll() is not None:
            raise SystemExit("it ended before it could be killed")
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    spent = time.perf_counter() - began
    time.sleep(1)  # its workers see that it is gone
    return done, spent + run(command)


def part(work: Path, name: str, do: Callable[[Path], tuple[int, float]]) -> tuple[int, float]:
    """What a part gives, taken once: a later call finds it; one that was broken off begins anew."""
    folder, noted = work / name, work / f"{name}.json"
    if not noted.exists():
        if folder.exists():
            shutil.rmtree(folder)
        noted.write_text(json.dumps(do(folder)))
    done, wall = json.loads(noted.read_text())
    return done, wall


def numbers(folder: Path) -> Any:
    """Everything a sweep found, without times and its own name."""
    found = json.loads((folder / "results.json").read_text())
    del found["sweep"]
    return timeless(found)


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "seconds" not in k}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def patience_grid(work: Path, store: Path, epochs: int, patience: int) -> Path:
    """A grid of the same heads, stopped early and not."""
    file = work / "patience.toml"
    base = "\n".join(f"{key} = {value}" for key, value in
                     (one.split("=") for one in HEAD if one.startswith("head.")))  # fmt: skip
    file.write_text(
        f'name = "patience"\nstore = "{store.resolve()}"\n[zero_shot]\nseen = [50]\nsplits = 2\n'
        f"[head]\n{base.replace('head.', '')}\n[optim]\nlr = 2e-3\n[train]\nepochs = {epochs}\n"
        f'[product]\n"head.queries" = ["vanilla", "text", "multimodal"]\n'
        f'"train.patience" = [0, {patience}]\n'
    )
    return file


def report(work: Path, seconds: dict[str, float], before: int, trials: int, command: str) -> str:
    found = json.loads((work / "whole" / "results.json").read_text())
    saved = json.loads((work / "patience" / "results.json").read_text())["early_stopping"]
    cost = ", ".join(
        f"{name} {100 * one['mean']:.2f} ± {100 * (one['std'] or 0):.2f} points"
        for name, one in saved["cost"].items()
    )
    epochs = [run["epochs"] for result in found["results"] for run in result["runs"]]
    return "\n".join([
        "# The demo world's Table 3 on two cores, November 2026",
        "",
        f"- Command: `{command}`",
        f"- Hardware: {machine('cpu')}",
        f"- {trials} heads, {sum(epochs)} epochs together ({min(epochs)} to {max(epochs)} each), "
        "two processes of one thread.",
        "",
        "| run | wall |",
        "|---|---|",
        f"| to the end | {seconds['whole'] / 60:.1f} min |",
        f"| killed with -9 after {before} trials and resumed, both parts | "
        f"{seconds['killed'] / 60:.1f} min |",
        f"| two dask workers | {seconds['dask'] / 60:.1f} min |",
        "",
        "All numbers of the three runs are equal to the last digit.",
        "",
        (work / "whole" / "table.md").read_text(),
        f"Early stopping against the full length, {saved['pairs']} pairs of heads: "
        f"{100 * saved['saved']:.0f} % of the epochs saved; full minus stopped: {cost}.",
        "",
    ])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("sweep-demo"))
    parser.add_argument("--small", action="store_true", help="6 heads of 5 epochs, a small world")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    given = parser.parse_args()
    work = given.work
    work.mkdir(parents=True, exist_ok=True)
    store = make_store(work, given.small)
    shares, splits, epochs, patience = ("50", 2, 5, 2) if given.small else ("50,75", 10, 50, 3)
    trials = 3 * len(shares.split(",")) * splits
    words = ("zero-shot", store, "--seen", shares, "--splits", splits, "--queries", "all",
             "--epochs", epochs, "--patience", patience, *HEAD, "--device", "cpu", "--workers", 2,
             "--threads", 1, "-q")  # fmt: skip
    file = patience_grid(work, store, epochs, patience)
    parts: dict[str, Callable[[Path], tuple[int, float]]] = {
        "whole": lambda out: (0, run(msq(*words, "--out", out))),
        "killed": lambda out: killed(msq(*words, "--out", out), out, trials),
        "dask": lambda out: (0, run(msq(*words, "--out", out, "--scheduler", "dask"))),
        "patience": lambda out: (0, run(msq("grid", file, "--out", out, "--device", "cpu",
                                            "--workers", 2, "--threads", 1, "-q"))),
    }  # fmt: skip
    taken = {name: part(work, name, do) for name, do in parts.items()}
    seconds, before = {name: wall for name, (_, wall) in taken.items()}, taken["killed"][0]
    whole = numbers(work / "whole")
    same = [name for name in ("killed", "dask") if numbers(work / name) == whole]
    text = report(work, seconds, before, trials, f"python {' '.join(sys.argv)}")
    if same != ["killed", "dask"]:
        print(f"the runs differ: only {same} agree with the whole one")
        return 1
    print(text)
    if given.write:
        RESULT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
