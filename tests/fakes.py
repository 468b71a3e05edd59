"""Encoders that take no time, small videos, and what two stores are compared by.

Load it by its path, e.g. `runpy.run_path(str(Path(__file__).with_name("fakes.py")))`: tests are
no package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.encoders.spec import EncoderSpec

SPEC = EncoderSpec(
    slug="fake-video",
    kind="video",
    architecture="projection of frame means",
    weights="random",
    sha256="0" * 64,
    frames=4,
    size=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    pooling="frame",
    precision="fp32",
    sampling="uniform",
    resize="torch",
    output="",
    tokens=5,
    channels=6,
)


class FakeEncoder:
    """Per frame a projection of its mean colours; video: tokens `[B, 1 + T, D]`."""

    device = torch.device("cpu")

    def __init__(self, spec: EncoderSpec = SPEC, scale: float = 1.0) -> None:
        self.spec = spec
        self.calls: list[int] = []
        generator = torch.Generator().manual_seed(7)
        self._weight = torch.randn(3, spec.channels, generator=generator) * scale

    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        assert video.shape[1:] == (self.spec.frames, 3, self.spec.size, self.spec.size)
        assert video.dtype == torch.float32
        self.calls.append(len(video))
        frames = video.mean(dim=(3, 4)) @ self._weight
        if self.spec.kind == "image":
            return frames
        return torch.cat([frames.mean(dim=1, keepdim=True), frames], dim=1)


class FakeText:
    """A vector per string, from its hash; knows every word but `zorilla`."""

    def __init__(self, spec: EncoderSpec | None = None) -> None:
        self.spec = spec or text_spec()
        self.calls = 0

    def __call__(self, texts: list[str], prompt: str = "{}") -> torch.Tensor:
        self.calls += 1
        rows = [hashlib.sha256(prompt.format(text).encode()).digest() for text in texts]
        values = np.array([list(row[: self.spec.channels]) for row in rows], dtype=np.float32)
        return torch.from_numpy(values / 255)

    def unknown_words(self, text: str) -> list[str]:
        return [word for word in text.split() if word == "zorilla"]

    def too_long(self, texts: list[str], prompt: str = "{}") -> list[str]:
        return []


def image_spec(**changes: object) -> EncoderSpec:
    fields = {"slug": "fake-image", "kind": "image", "pooling": "mean", "tokens": 0} | changes
    return replace(SPEC, **fields)


def text_spec(**changes: object) -> EncoderSpec:
    fields = {
        "slug": "fake-text",
        "kind": "text",
        "frames": 0,
        "size": 0,
        "mean": (),
        "std": (),
        "pooling": "",
        "sampling": "",
        "resize": "",
        "tokens": 0,
    } | changes
    return replace(SPEC, **fields)


def write_video(path: Path, seed: int, frames: int = 9, width: int = 48, height: int = 32) -> None:
    """A short H.264 clip of moving blocks, other for every seed."""
    rng = np.random.default_rng(seed)
    picture = np.kron(rng.integers(0, 256, (height // 8, width // 8, 3)), np.ones((8, 8, 1)))
    path.parent.mkdir(parents=True, exist_ok=True)
    # The index goes first, so that a file that is cut short still says what it should hold.
    with av.open(str(path), "w", container_options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "ultrafast"}
        for index in range(frames):
            moved = np.roll(picture, 3 * index, axis=1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        container.mux(stream.encode())


def make_dataset(
    folder: Path, count: int, broken: tuple[int, ...] = (), name: str = "toy"
) -> Dataset:
    """`count` clips of three classes; the `broken` rows have files that are no videos."""
    clips = []
    for row in range(count):
        path = folder / f"clip {row} 'é'.mp4"
        if row in broken:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"this is no video" * 20)
        elif not path.exists():
            write_video(path, row)
        labels = (row % 3,) if row % 4 else ()
        split = ("train", "val", "test")[row % 3]
        clips.append(Clip(f"clip-{row}-é", path, None, None, labels, split))
    return Dataset(name, ("run", "jump", "feed a zorilla"), "multilabel", tuple(clips), "map")


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Killed(BaseException):
    """The process ends here; nothing may handle it."""


def dying_at(call: int, write: Callable[..., int]) -> Callable[..., int]:
    """`write`, except that the process dies in its n-th call, with half a file on the disk."""
    count = 0

    def wrapped(path: Path, pieces: Any) -> int:
        nonlocal count
        count += 1
        if count == call:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.4711.tmp").write_bytes(b"half")
            raise Killed
        return write(path, pieces)

    return wrapped
