"""Plan decode against sequential decode: `python benchmarks/bench_decode.py [--rounds 15]`.

Both sides use PyAV with one codec thread and return the same 16 full-size RGB frames; the runs are
interleaved in random order in one process. Where the frames differ, no speed is printed. The
videos (640x480 at 30 frames/s, moving textures with sensor noise, x264 medium crf 23) are made in
a temporary folder. CPU time is the figure to trust on a shared machine.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from msq.extract.sampling import sample_indices
from msq.extract.video import decode_clip

FRAMES = 16


def make_video(path: Path, seconds: int, gop: int) -> None:
    rng = np.random.default_rng(gop)
    far = np.kron(rng.integers(40, 216, (40, 50, 3)), np.ones((32, 32, 1)))
    near = np.kron(rng.integers(0, 256, (20, 20, 3)), np.ones((16, 16, 1)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "23", "g": str(gop)})
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
        for i in range(30 * seconds):
            image = np.roll(far, (i // 2, i), (0, 1))[:480, :640].copy()
            at = 60 + int(50 * np.sin(i / 9))
            image[at : at + 200, at : at + 200] = np.roll(near, 3 * i, 1)[:200, :200]
            image += rng.normal(0, 3, (480, 640, 1))
            frame = av.VideoFrame.from_ndarray(np.clip(image, 0, 255).astype(np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def sequential(path: Path) -> np.ndarray:
    """Every frame decoded, the wanted ones converted: the frame count is known to it for free."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = set(sample_indices(stream.frames, FRAMES).tolist())
        return np.stack(
            [
                frame.to_ndarray(format="rgb24", threads=1)
                for i, frame in enumerate(container.decode(stream))
                if i in wanted
            ]
        )


def plan(path: Path) -> np.ndarray:
    return decode_clip(path, FRAMES).frames


def measure(function: Callable[[Path], np.ndarray], path: Path) -> tuple[float, float]:
    """(wall, CPU) milliseconds of one run."""
    wall, cpu = time.perf_counter(), time.process_time()
    function(path)
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return (
        f"{middle:.2f} ({low:.2f} to {high:.2f})"
        if high < 100
        else (f"{middle:.0f} ({low:.0f} to {high:.0f})")
    )


def compare(path: Path, name: str, rounds: int) -> None:
    if not np.array_equal(sequential(path), plan(path)):
        sys.exit(f"{name}: the frames differ, so there is no speed to report")
    times: dict[str, list[tuple[float, float]]] = {"sequential": [], "plan": []}
    for _ in range(rounds):
        for side in random.sample(["sequential", "plan"], 2):
            times[side].append(measure(plan if side == "plan" else sequential, path))
    cells = [name, f"{path.stat().st_size / 1e6:.1f}"]
    for which in (0, 1):  # wall, CPU
        both = [[t[which] for t in times[side]] for side in ("sequential", "plan")]
        cells += [spread(side) for side in both]
        cells.append(spread([a / b for a, b in zip(*both, strict=True)]))
    print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=int, default=30)
    options = parser.parse_args()
    random.seed(0)
    versions = f"Python {platform.python_version()}, PyAV {av.__version__}, numpy {np.__version__}"
    libraries = ", ".join(
        f"{n} {'.'.join(map(str, av.library_versions[n]))}" for n in ("libavcodec", "libswscale")
    )
    print(f"{versions}, {libraries}; {options.rounds} rounds; median (quartiles)\n")
    print("| video | MB | sequential wall ms | plan wall ms | ratio | sequential CPU ms | "
          "plan CPU ms | ratio |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for gop in (30, 250):
            path = Path(folder) / f"gop{gop}.mp4"
            make_video(path, options.seconds, gop)
            compare(path, f"640x480, {options.seconds} s, GOP {gop}", options.rounds)


if __name__ == "__main__":
    main()
