"""Makes the table of tiles on a GPU: `PYTHONPATH=. python benchmarks/tune.py --write`.

    PYTHONPATH=. python benchmarks/tune.py --op self_attention --write
    PYTHONPATH=. python benchmarks/tune.py --dry-run --out tiles.json      # no GPU needed

Candidates that spill, do not fit or are wrong are left out; the rest are timed interleaved, and the
winner against what the packed head does without kernels. `auto` takes a kernel where that ratio is
over 1. Without --write (into msq/kernels/tiles.json) or --out nothing is stored. A dry run compiles
every candidate for --arch and fills the table by a clock that is none: no number of it counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from msq.bench.gpu_timing import Session
from msq.bench.machine import line, machine
from msq.bench.tune import Tuning, merged, tune, untimed, write_table
from msq.bench.tune_candidates import BUCKETS
from msq.bench.tune_judges import fake_judge, gpu_judge
from msq.kernels import tiles

TABLE = Path(tiles.__file__).with_name("tiles.json")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ops = sorted({bucket.op for bucket in BUCKETS})
    parser.add_argument("--op", choices=ops, action="append", help="only these; default all")
    parser.add_argument("--keys", type=int, action="append", help="only ranges up to these sizes")
    parser.add_argument("--most", type=int, default=0, help="candidates of each kernel at most")
    parser.add_argument("--minutes", type=float, default=60, help="no range begins after these")
    parser.add_argument("--dry-run", action="store_true", help="compile only; a clock that is none")
    parser.add_argument("--arch", type=int, default=90, help="of a dry run, such as 90")
    parser.add_argument("--write", action="store_true", help="into the package")
    parser.add_argument("--out", type=Path, help="into another file")
    options = parser.parse_args()
    if options.dry_run and options.write:
        parser.error("--dry-run and --write: a dry run times nothing, so it may not fill the table "
                     "of the package; use --out")  # fmt: skip
    return options


def main() -> None:
    options = parsed()
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("GPU tier not run: no CUDA device here; --dry-run compiles the candidates")
    if options.dry_run:
        device, architecture, judge = "cpu", options.arch, fake_judge()
        text = "dry run: no number of it counts"
    else:
        device, (major, minor) = "cuda", torch.cuda.get_device_capability()
        architecture = 10 * major + minor
        judge = gpu_judge(Session(device, False, 60 * options.minutes, print))
        text = line(machine(device))
    print(text, flush=True)
    wanted = [b for b in BUCKETS if (not options.op or b.op in options.op)
              and (not options.keys or b.keys in options.keys)]  # fmt: skip
    began, found, before = time.monotonic(), list[Tuning](), tiles.all_tiles()
    for bucket in wanted:
        if time.monotonic() - began > 60 * options.minutes:
            print(f"left out: {bucket}: no time")
            continue
        print(bucket, flush=True)
        try:
            found.append(tune(bucket, architecture, judge, text, _say, options.most))
        except Exception as error:  # the next range may work
            print(f"FAILED: {type(error).__name__}: {error}")
            continue
        # After each: a call that is cut off loses what it was at, and nothing else.
        rest = untimed(BUCKETS, [tuning.bucket for tuning in found], architecture)
        for file in filter(None, (options.out, TABLE if options.write else None)):
            write_table(file, merged(before, [*rest, *found]))
            print(f"{file}: {sum(len(t.tiles) for t in found)} tiles timed")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
