"""Writes the tables of docs/scale.md anew: `python benchmarks/scale_tables.py`.

The costs of a clip that they start from are `MEASURED` in `msq/bench/scale.py`.
"""

from __future__ import annotations

import re
from pathlib import Path

from msq.bench.scale import tables

DOCUMENT = Path(__file__).parents[1] / "docs" / "scale.md"
PLACE = re.compile(r"(<!-- tables: msq\.bench\.scale -->\n).*?(<!-- end of tables -->)", re.DOTALL)

if __name__ == "__main__":
    text = DOCUMENT.read_text(encoding="utf-8")
    written = PLACE.sub(lambda found: f"{found[1]}\n{tables()}\n\n{found[2]}", text)
    DOCUMENT.write_text(written, encoding="utf-8")
