"""Writes the tables of docs/scale.md anew, or measures the costs that they start from.

`OMP_NUM_THREADS=1 python benchmarks/scale_tables.py --measure` prints processor seconds of a clip,
for `MEASURED` in `msq/bench/scale.py` (some minutes, on an idle machine); without an option the
tables are written from what stands there.
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from msq.bench.decode_cases import make_video
from msq.bench.decode_libraries import FRAMES, by_torch
from msq.bench.machine import line, machine
from msq.bench.scale import tables
from msq.extract.encoders.timesformer import TimeSformer
from msq.extract.encoders.timesformer_config import TimeSformerConfig
from msq.extract.video import decode_clip

DOCUMENT = Path(__file__).parents[1] / "docs" / "scale.md"
PLACE = re.compile(r"(<!-- tables: msq\.bench\.scale -->\n).*?(<!-- end of tables -->)", re.DOTALL)
VIDEOS = {"480p, 30 s": ((640, 480), 30), "240p, 10 s": ((320, 240), 10)}


def seconds(run: Callable[[], object], rounds: int) -> str:
    """Processor seconds: median, and the range."""
    run()
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        run()
        taken.append(time.process_time() - started)
    return f"{statistics.median(taken):.3g} ({min(taken):.3g} to {max(taken):.3g})"


def measure() -> None:
    torch.set_num_threads(1)
    print(line(machine()))
    with tempfile.TemporaryDirectory(prefix="msq-scale-") as folder:
        for name, (size, length) in VIDEOS.items():
            path = Path(folder) / f"{length}.mp4"
            make_video(path, length, 250, size)
            print(
                "decode", name, seconds(lambda p=path: by_torch(decode_clip(p, FRAMES).frames), 15)
            )
    import open_clip

    video = TimeSformer(TimeSformerConfig(frames=FRAMES)).eval()
    image = open_clip.create_model("ViT-B-16", pretrained=None).visual.eval()
    frames = torch.randn(1, FRAMES, 3, 224, 224)
    for precision in ("fp32", "bf16"):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            print("TimeSformer-B", precision, seconds(lambda: video(frames), 3), flush=True)
            print("CLIP ViT-B/16", precision, seconds(lambda: image(frames[0]), 3), flush=True)


if __name__ == "__main__":
    if "--measure" in sys.argv[1:]:
        measure()
    else:
        text = DOCUMENT.read_text(encoding="utf-8")
        written = PLACE.sub(lambda found: f"{found[1]}\n{tables()}\n\n{found[2]}", text)
        DOCUMENT.write_text(written, encoding="utf-8")
