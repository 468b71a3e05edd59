"""File -> 16 x 3 x 224 x 224 uint8, by msq and by the libraries that others use for it.

Every side opens the file, takes the same frames with one codec thread, brings the short side to
224 in the way that is fastest for what the library returns, and cuts the centre out. Libraries
that are not installed, cannot be loaded or give other frames are left out, and it is said why.
Processor time is the figure to trust on a shared machine.
"""

from __future__ import annotations

import functools
import importlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray

from msq.bench.cases import Case, Gate, Prepared, Settings, Side
from msq.extract.sampling import sample_indices
from msq.extract.transforms import resize_crop, resized_shape
from msq.extract.video import decode_clip

FRAMES, SIZE = 16, 224
# Grey levels, on average: other versions of libswscale round otherwise (below 0.6); the frame
# before or after is tens away.
SAME = 1.5

Frames = NDArray[np.uint8]  # [T, H, W, 3]
Take = Callable[[Path], Frames]


class OtherFrames(Exception):
    """A library that cannot be compared, because it does not return what was asked for."""


def library_case(name: str, compares: str, make: Callable[[Path], Path], rounds: int = 15) -> Case:
    """One file, all libraries.

    Args:
        name: of the case.
        compares: the file in words.
        make: gives the file, written into the folder it gets where there is none yet.
        rounds: how often each side runs.
    """
    return Case(
        name=name,
        compares=f"{compares} -> {FRAMES} x 3 x {SIZE} x {SIZE} uint8, CPU time of one file",
        base="msq",
        unit="ms",
        rounds=rounds,
        prepare=functools.partial(_prepare, make),
    )


@contextmanager
def _prepare(make: Callable[[Path], Path], settings: Settings) -> Iterator[Prepared]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a decode worker
    try:
        with tempfile.TemporaryDirectory(prefix="msq-bench-") as folder:
            path = make(Path(folder))
            expected = every_frame(path)
            left_out: dict[str, str] = {}

            def gate() -> Gate:
                found = decode_clip(path, FRAMES).frames
                same = found.shape == expected.shape and np.array_equal(found, expected)
                what = f"{FRAMES} frames of msq and of a sequential decode, bit for bit"
                return Gate(0.0 if same else 1.0, 0.0, what)

            yield Prepared(gate, lambda: _sides(path, expected, left_out), left_out=left_out)
    finally:
        torch.set_num_threads(threads)


def _sides(path: Path, expected: Frames, left_out: dict[str, str]) -> Mapping[str, Side]:
    sides: dict[str, Side] = {}
    for name, load in LIBRARIES.items():
        try:
            take, finish = load()
            check_frames(take(path), expected)
        except Exception as error:  # a library may fail in any way: that is its result
            words = str(error).splitlines() or [""]
            left_out[name] = f"{type(error).__name__}: {words[0][:160]}"
            continue
        sides[name] = Side(functools.partial(_run, take, finish, path))
    return sides


def _run(take: Take, finish: Callable[[Frames], object], path: Path) -> object:
    return finish(take(path))


def check_frames(found: Frames, expected: Frames) -> None:
    """Refuse frames that are not the ones asked for.

    Args:
        found: uint8 [T, H, W, 3] at full size.
        expected: the same from a sequential decode.

    Raises:
        OtherFrames: another shape, or a frame more than `SAME` grey levels away on average.
    """
    if found.shape != expected.shape:
        raise OtherFrames(f"expected frames {expected.shape}, found {found.shape}")
    away = [float(np.abs(a.astype(int) - b).mean()) for a, b in zip(found, expected, strict=True)]
    if max(away) > SAME:
        wrong = sum(distance > SAME for distance in away)
        raise OtherFrames(
            f"{wrong} of {len(away)} frames are others than asked for (up to {max(away):.1f} grey "
            f"levels away on average, expected at most {SAME})"
        )


def every_frame(path: Path) -> Frames:
    """All frames decoded one after the other by PyAV, the wanted ones converted."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        # Where the container does not say how many frames there are, they have to be counted.
        length = stream.frames or sum(1 for p in container.demux(stream) if p.size)
        container.seek(0)
        wanted = set(sample_indices(length, FRAMES).tolist())
        chosen = {
            i: frame.to_ndarray(format="rgb24", threads=1)
            for i, frame in enumerate(container.decode(stream))
            if i in wanted
        }
    return np.stack([chosen[int(i)] for i in sample_indices(length, FRAMES)])


def by_torch(frames: Frames | torch.Tensor) -> torch.Tensor:
    """Antialiased bicubic of torch on uint8, the fastest way with PIL's result."""
    return resize_crop(frames, SIZE)


def _msq() -> tuple[Take, Callable[[Frames], object]]:
    return (lambda path: decode_clip(path, FRAMES).frames), by_torch


def _sequential() -> tuple[Take, Callable[[Frames], object]]:
    return every_frame, by_torch


def _torchcodec(mode: str) -> tuple[Take, Callable[[Frames], object]]:
    decoder = importlib.import_module("torchcodec.decoders").VideoDecoder

    def take(path: Path) -> Frames:
        opened = decoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=mode)
        wanted = sample_indices(len(opened), FRAMES).tolist()
        frames: Frames = opened.get_frames_at(wanted).data.numpy()
        return frames

    return take, by_torch


def _decord() -> tuple[Take, Callable[[Frames], object]]:
    decord: Any = importlib.import_module("decord")

    def take(path: Path) -> Frames:
        opened = decord.VideoReader(str(path), num_threads=1)
        frames: Frames = opened.get_batch(sample_indices(len(opened), FRAMES)).asnumpy()
        return frames

    return take, by_torch


def _opencv() -> tuple[Take, Callable[[Frames], object]]:
    cv2: Any = importlib.import_module("cv2")
    cv2.setNumThreads(1)

    def take(path: Path) -> Frames:
        threads = [cv2.CAP_PROP_N_THREADS, 1]
        opened = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, threads)
        wanted = sample_indices(int(opened.get(cv2.CAP_PROP_FRAME_COUNT)), FRAMES).tolist()
        chosen: dict[int, Any] = {}
        for i in range(wanted[-1] + 1):
            if not opened.grab():
                raise OtherFrames(f"expected frame {wanted[-1]}, found the end at {i}")
            if i in wanted:
                chosen[i] = cv2.cvtColor(opened.retrieve()[1], cv2.COLOR_BGR2RGB)
        opened.release()
        return np.stack([chosen[i] for i in wanted])

    def finish(frames: Frames) -> object:
        height, width = resized_shape(frames.shape[1], frames.shape[2], SIZE)
        way = cv2.INTER_AREA if height < frames.shape[1] else cv2.INTER_CUBIC
        small = np.stack(
            [cv2.resize(frame, (width, height), interpolation=way) for frame in frames]
        )
        top, left = (height - SIZE) // 2, (width - SIZE) // 2
        cut = small[:, top : top + SIZE, left : left + SIZE]
        return np.ascontiguousarray(cut.transpose(0, 3, 1, 2))

    return take, finish


LIBRARIES: dict[str, Callable[[], tuple[Take, Callable[[Frames], object]]]] = {
    "msq": _msq,
    "torchcodec exact": functools.partial(_torchcodec, "exact"),
    "torchcodec approximate": functools.partial(_torchcodec, "approximate"),
    "decord": _decord,
    "OpenCV": _opencv,
    "PyAV sequential": _sequential,
}
