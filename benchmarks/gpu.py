"""The head and its kernels on a GPU; needs torch, triton, numpy and safetensors alone.

    PYTHONPATH=. python benchmarks/gpu.py --smoke             # is everything right: under 90 s
    PYTHONPATH=. python benchmarks/gpu.py --part 1 --out results.jsonl
    PYTHONPATH=. python benchmarks/gpu.py --part 2 --out results.jsonl
    PYTHONPATH=. python benchmarks/gpu.py --part 3 --out results.jsonl
    PYTHONPATH=. python benchmarks/gpu.py --part 4 --out results.jsonl   # encoders of stage one
    PYTHONPATH=. python benchmarks/gpu.py --part 5 --out results.jsonl   # end to end, T = 8; 6: 16

Parts 5 and 6 need Pillow too, and transformers for what they compare with.

Each part takes under eight minutes, K = 157 first, and appends its results to --out as they come,
one JSON document a line. At the end the goals are printed with what has been reached by all lines
of that file. `--dry-run` does all of it on the CPU at tiny sizes, to see that every path runs. The
exit code is 4 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from msq.bench.gpu_answers import answers
from msq.bench.gpu_goals import table
from msq.bench.gpu_parts import MINUTES, PARTS, run_part
from msq.bench.gpu_smoke import checks
from msq.bench.gpu_timing import Session
from msq.bench.machine import line, machine


def smoke(device: str, tiny: bool, seconds: float) -> bool:
    """Every check with its distance, until the time is over; whether all that ran are green."""
    good, began, left_out = True, time.monotonic(), 0
    for name, check in checks(device, tiny=tiny):
        if time.monotonic() - began > seconds:
            left_out += 1
            print(f"left out  {name}: no time")
            continue
        try:
            gate = check()
        except Exception as error:  # the next check may work
            text = (str(error).strip() or repr(error)).splitlines()[0][:300]
            print(f"FAILED  {name}: {type(error).__name__}: {text}", flush=True)
            good = False
            continue
        good &= gate.ok
        state = "ok    " if gate.ok else "FAILED"
        print(f"{state}  {name}: {gate.worst:.2g}, at most {gate.tolerance:.2g} ({gate.what})",
              flush=True)  # fmt: skip
    verdict = "all green" if good else "NOT all green"
    rest = f"; {left_out} checks left out, see --seconds" if left_out else ""
    print(f"{verdict} in {time.monotonic() - began:.0f} s{rest}")
    return good


def read(file: Path, tiny: bool) -> dict[str, dict[str, Any]]:
    """Results by name, those of dry runs apart; of several with one name the last."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found = [json.loads(text) for text in lines]
    return {one["name"]: one for one in found if one["tiny"] == tiny}


def measure(numbers: list[int], file: Path, device: str, tiny: bool) -> bool:
    """Some parts, their results written as they come; whether all gates were green."""
    good = True
    for number in numbers:

        def record(found: dict[str, Any]) -> None:
            nonlocal good
            good &= bool(found.get("gate", {"ok": True})["ok"])
            with file.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({"part": number, **found}) + "\n")  # noqa: B023
            print(json.dumps(found)[:400], flush=True)

        record({"name": "machine", "tiny": tiny, **machine(device)})
        run_part(number, Session(device, tiny, 60.0 * MINUTES, record))
    return good


def conclude(found: dict[str, dict[str, Any]]) -> None:
    """The goals and the open questions."""
    print("\n| goal | target | reached | met |\n|---|---|---|---|")
    for row in table(found):
        print("| " + " | ".join(row) + " |")
    print()
    for text in answers(found):
        print(f"- {text}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="check that everything is right")
    parser.add_argument("--part", type=int, choices=sorted(PARTS), action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="results are appended")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--seconds", type=float, default=80, help="no check begins after these")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("GPU tier not run: no CUDA device here; --dry-run runs every path on the CPU")
        return
    device = "cpu" if options.dry_run else "cuda"
    print(line(machine(device)))
    if options.dry_run:
        print("dry run: tiny sizes on the CPU, references in place of kernels; no number counts")
    good = True
    if options.smoke or not options.part:
        good = smoke(device, options.dry_run, options.seconds)
    if options.part and good:
        good = measure(options.part, options.out, device, options.dry_run)
        conclude(read(options.out, options.dry_run))
    sys.exit(0 if good else 4)


if __name__ == "__main__":
    main()
