"""`msq train` as it is typed, of a few tiny videos, by one process or by several.

Load it by its path, as `fakes.py`.
"""

from __future__ import annotations

import dataclasses
import os
import runpy
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__)
_encoders = runpy.run_path(str(HERE.with_name("encoder_fixtures.py")))
# Two processes on this machine; the local address, for a machine's own name may lead nowhere.
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost",
    "--nproc-per-node", "2", "-m", "msq",
]  # fmt: skip


def environment(**changes: str) -> dict[str, str]:
    """Of a process that shares the machine with others; one thread, so that all have its bits."""
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return {**os.environ, **quiet, "PYTHONPATH": str(HERE.parents[1]), **changes}


def train_command(media: Any, folder: Path, videos: int = 8) -> list[str]:
    """The words after `msq`; encoders in folders, and the last two videos are the test split."""
    rows = ["path,labels,split"]
    for k in range(videos):
        media.encode(folder / f"{k}.mp4", 10, size=(48, 32), gop=4, bframes=0, seed=k)
        split = "test" if k >= videos - 2 else "train"
        rows.append(f"{k}.mp4,{'run' if k % 3 else 'sit'},{split}")
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    config = dataclasses.replace(_encoders["TINY_TIMESFORMER"], image_size=(16, 16), width=32)
    model = _encoders["random_timesformer"](config)
    _encoders["write_timesformer_folder"](folder / "video", model)
    tower = {**_encoders["TINY_CLIP"]["vision_cfg"], "image_size": 16, "layers": 1}
    _encoders["write_clip_folder"](folder / "clip", {**_encoders["TINY_CLIP"], "vision_cfg": tower})
    return [
        "train", str(folder / "clips.csv"), "--video-encoder", f"local-dir:{folder}/video",
        "--image-encoder", f"local-dir:{folder}/clip", "--device", "cpu", "--workers", "0",
        "--val", "0", "head.layers=1", "head.heads=2", "head.ffn=32",
    ]  # fmt: skip
