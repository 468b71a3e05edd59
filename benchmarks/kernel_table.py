"""Compiles every kernel for sm_80, sm_90 and sm_100: `python benchmarks/kernel_table.py [--write]`.

Needs no GPU. `--write` puts the result into `msq/bench/kernel_builds.json` under the version of
Triton that is installed, and the table of docs/kernels.md is made anew from all versions there.
For another version: `pip install --no-deps --target DIR triton==3.6.0`, then the same with
`PYTHONPATH=DIR:.`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import triton

from msq.bench.kernel_builds import (
    ARCHITECTURES,
    RECORD,
    builds,
    compile_for,
    key,
    line,
    record,
    table,
)
from msq.kernels.tiles import find_tile

DOCS = Path(__file__).parents[1] / "docs" / "kernels.md"
BEGIN, END = "<!-- table of builds -->", "<!-- end of the table of builds -->"


def compiled() -> dict[str, dict[str, object]]:
    found = {}
    for architecture in ARCHITECTURES:
        for build in builds():
            tile = find_tile(build.op, (architecture // 10, architecture % 10), build.keys)
            made = compile_for(build, architecture, tile)
            found[key(build, architecture)] = line(made, tile)
            fits = "" if made.fits(architecture) else "  DOES NOT FIT"
            shown = (f"{made.registers} registers, stack {made.stack}, shared {made.shared}, "
                     f"{made.instructions} instructions")  # fmt: skip
            fits = "" if made.fits(architecture) else "  DOES NOT FIT"
            print(f"{key(build, architecture)}: {shown}{fits}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    print(f"Triton {triton.__version__}")
    found = compiled()
    if not options.write:
        return
    whole = record() if RECORD.exists() else {}
    whole[triton.__version__] = found
    lines = [
        f' "{version}": {{\n'
        + ",\n".join(f"  {json.dumps(n)}: {json.dumps(v)}" for n, v in whole[version].items())
        + "\n }"
        for version in sorted(whole)
    ]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    DOCS.write_text(f"{before}{BEGIN}\n{table(whole)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
