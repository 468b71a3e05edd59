"""Plan decode against sequential decode of the same videos.

Both sides use PyAV with one codec thread and return the same 16 full-size RGB frames. The videos
(640x480 at 30 frames/s, moving textures with sensor noise, x264 medium crf 23) are made in a
temporary folder. Processor time is the figure to trust on a shared machine.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from msq.bench.cases import Case, Gate, Prepared, Settings, Side
from msq.extract.sampling import sample_indices
from msq.extract.video import decode_clip

FRAMES = 16
SECONDS = 30
GOPS = (30, 250)


def cases(settings: Settings) -> Iterable[Case]:
    """A keyframe every second, and every eight seconds."""
    seconds = 2 if settings.quick else SECONDS
    for gop in GOPS:
        yield Case(
            name=f"decode GOP {gop}",
            compares=f"{FRAMES} frames of a 640x480 video of {seconds} s by plan, against decoding "
            "every frame",
            base="plan",
            unit="ms",
            rounds=15,
            prepare=functools.partial(_prepare, gop),
        )


@contextmanager
def _prepare(gop: int, settings: Settings) -> Iterator[Prepared]:
    with tempfile.TemporaryDirectory(prefix="msq-bench-") as folder:
        path = Path(folder) / f"gop{gop}.mp4"
        make_video(path, 2 if settings.quick else SECONDS, gop)

        def gate() -> Gate:
            expected, found = sequential(path), plan(path)
            same = expected.shape == found.shape and np.array_equal(expected, found)
            return Gate(0.0 if same else 1.0, 0.0, f"all {FRAMES} frames, bit for bit")

        sides = {
            "plan": Side(functools.partial(plan, path)),
            "sequential": Side(functools.partial(sequential, path)),
        }
        yield Prepared(gate, lambda: sides)


def make_video(path: Path, seconds: int, gop: int) -> None:
    """Two textures that move against each other, with noise."""
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


def sequential(path: Path) -> NDArray[Any]:
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


def plan(path: Path) -> NDArray[Any]:
    """Only what is needed for the wanted frames."""
    return decode_clip(path, FRAMES).frames
