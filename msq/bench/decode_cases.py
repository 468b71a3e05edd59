"""Plan decode against sequential decode of the same videos, and against other libraries.

In the first cases both sides use PyAV with one codec thread and return the same 16 full-size RGB
frames; for the others see `msq.bench.decode_libraries`. The videos (30 frames/s, moving textures
with sensor noise, x264 medium crf 23) are made in a temporary folder. Processor time
is the figure to trust on a shared machine.
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
from msq.bench.decode_libraries import library_case
from msq.extract.sampling import sample_indices
from msq.extract.video import decode_clip

FRAMES = 16
SECONDS = 30
GOPS = (30, 250)
# Name, width, height, seconds, frames from keyframe to keyframe: as phones and Charades, and as the
# copies of Kinetics, UCF101 and HMDB51 that are brought to a short side of 240 or 256.
LIBRARY_VIDEOS = (
    ("480p g30", 640, 480, 30, 30),
    ("480p g250", 640, 480, 30, 250),
    ("480p g60 no B", 640, 480, 30, 60),
    ("240p g12", 320, 240, 10, 12),
    ("240p g250", 320, 240, 10, 250),
    ("240p short", 320, 240, 3, 250),
)


def cases(settings: Settings) -> Iterable[Case]:
    """A keyframe every second, and every eight seconds; then all libraries."""
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
    for name, width, height, length, gop in LIBRARY_VIDEOS:
        made = functools.partial(
            _made,
            seconds=1 if settings.quick else length,
            gop=gop,
            size=(width // 4, height // 4) if settings.quick else (width, height),
            bframes=0 if "no B" in name else 3,
        )
        yield library_case(f"libraries {name}", f"{width}x{height}, {length} s", made)


def _made(folder: Path, seconds: int, gop: int, size: tuple[int, int], bframes: int) -> Path:
    path = folder / "video.mp4"
    make_video(path, seconds, gop, size, bframes)
    return path


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


def make_video(
    path: Path, seconds: int, gop: int, size: tuple[int, int] = (640, 480), bframes: int = 3
) -> None:
    """Two textures that move against each other, with noise."""
    width, height = size
    rng = np.random.default_rng(gop)
    far = np.kron(rng.integers(40, 216, (40, 50, 3)), np.ones((32, 32, 1)))
    near = np.kron(rng.integers(0, 256, (20, 20, 3)), np.ones((16, 16, 1)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=30, options={"crf": "23", "g": str(gop), "bf": str(bframes)}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(30 * seconds):
            image = np.roll(far, (i // 2, i), (0, 1))[:height, :width].copy()
            at, side = height // 8 + int(height // 10 * np.sin(i / 9)), height * 5 // 12
            image[at : at + side, at : at + side] = np.roll(near, 3 * i, 1)[:side, :side]
            image += rng.normal(0, 3, (height, width, 1))
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
