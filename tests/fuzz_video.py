"""Damaged video files by number, and a process that decodes them one after another.

`python tests/fuzz_video.py FOLDER FIRST LAST` decodes the cases FIRST to LAST-1 (one JSON line
each); `python tests/fuzz_video.py FOLDER 1234 1235` makes one failing case again and leaves its
file in FOLDER. A case is made of its number alone, and of the real clips, where there are any.
`test_fuzz_video.py` starts this file as a process of its own, so that a crash of a codec is seen
and not suffered.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

SEED = 20_261_121
MEMORY = 8 * 2**30  # address space: a header that asks for more gets a MemoryError
REAL_SHARE = 12  # one case in so many is made of a real clip, where there are any
WORDS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
SMALL = {"size": (64, 48)}
BFRAMES = {"codec": "mpeg4", **SMALL}

# Name -> what `media.encode` is told; 20 frames of 64x48 each.
GENERATED: dict[str, dict[str, Any]] = {
    "h264.mp4": {"gop": 8, **SMALL},
    "faststart.mp4": {"gop": 6, "movflags": "faststart", **SMALL},
    "fragmented.mp4": {"gop": 5, "movflags": "frag_keyframe+empty_moov", **SMALL},
    "open gop.mp4": {"gop": 8, "bframes": 3, "extra": ":open-gop=1", **SMALL},
    "vfr.mp4": {"gop": 8, "ticks": [31 * i + i % 3 for i in range(20)], **SMALL},
    "mpeg4.avi": {"gop": 8, **BFRAMES},
    "divx.avi": {"gop": 8, "bframes": 0, **BFRAMES},
    "h264.avi": {"gop": 8, "bframes": 0, **SMALL},
    "motion.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "gop": 1, "bframes": 0, **SMALL},
    "vp9.webm": {"codec": "libvpx-vp9", "gop": 8, **SMALL},
    "vp8.webm": {"codec": "libvpx", "gop": 8, **SMALL},
    "h264.mkv": {"gop": 8, **SMALL},
    "hevc.mkv": {"codec": "libx265", "gop": 8, "bframes": 3, **SMALL},
    "hevc.mp4": {"codec": "libx265", "gop": 8, "bframes": 3, **SMALL},
    "av1.mp4": {"codec": "libsvtav1", "gop": 8, **SMALL},
    "stream.ts": {"gop": 8, **SMALL},
    "mpeg2.mpg": {"codec": "mpeg2video", "gop": 8, **SMALL},
    "raw.h264": {"gop": 8, "format": "h264", **SMALL},
}
REAL = ("vid1.mp4", "part_0.mp4", "test.avi", "flipping_a_pancake.mkv")


@dataclass(frozen=True)
class Source:
    """A whole file: its bytes, and (position, size) of its packets."""

    name: str
    data: bytes
    packets: tuple[tuple[int, int], ...]

    @classmethod
    def read(cls, path: Path) -> Source:
        with av.open(str(path)) as container:
            found = [(p.pos, p.size) for p in container.demux() if p.size and p.pos is not None]
        return cls(path.name, path.read_bytes(), tuple(sorted(found)))

    def header(self, rng: np.random.Generator) -> int:
        """A place outside all packets, where there is one: what the container says itself."""
        for _ in range(50):
            at = int(rng.integers(len(self.data)))
            if not any(start <= at < start + size for start, size in self.packets):
                return at
        return 0


Mutation = Callable[[bytearray, Source, np.random.Generator], None]


def _range(data: bytearray, rng: np.random.Generator) -> slice:
    length = int(min(len(data) // 2, 2 ** rng.integers(0, 12)))
    at = int(rng.integers(max(1, len(data) - length)))
    return slice(at, at + length)


def flip(data: bytearray, source: Source, rng: np.random.Generator) -> None:
    for at in rng.integers(len(data), size=int(2 ** rng.integers(0, 7))):
        data[at] ^= 1 << int(rng.integers(8))


def flip_header(data: bytearray, source: Source, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 9))):
        at = min(source.header(rng), len(data) - 1)
        data[at] ^= 1 << int(rng.integers(8))


def word(data: bytearray, source: Source, rng: np.random.Generator) -> None:
    """A field of the container, or of a packet's first bytes, becomes an extreme number."""
    for _ in range(int(rng.integers(1, 4))):
        at = source.header(rng)
        if rng.random() < 0.3 and source.packets:
            start, _ = source.packets[int(rng.integers(len(source.packets)))]
            at = start + int(rng.integers(24))
        value = WORDS[int(rng.integers(len(WORDS)))] if rng.random() < 0.8 else rng.integers(2**32)
        order = "big" if rng.random() < 0.7 else "little"
        width = int(rng.choice([1, 2, 4, 4, 8]))
        at = max(0, min(at, len(data) - width))
        data[at : at + width] = (int(value) % 256**width).to_bytes(width, order)


def truncate(data: bytearray, source: Source, rng: np.random.Generator) -> None:
    del data[int(rng.integers(1, len(data))) :]


def insert(data: bytearray, source: Source, rng: np.random.Generator) -> None:
    at = _range(data, rng)
    data[at.start : at.start] = rng.bytes(at.stop - at.start)


def duplicate(data: bytearray, source: Source, rng: np.random.Generator) -> None:
    at = _range(data, rng)
    data[at.stop : at.stop] = data[at]


def delete(data: bytearray, source: Source, rng: np.random.Generator) -> None:
    del data[_range(data, rng)]


def zero(data: bytearray, source: Source, rng: np.random.Generator) -> None:
    at = _range(data, rng)
    data[at] = bytes(at.stop - at.start)


def noise(data: bytearray, source: Source, rng: np.random.Generator) -> None:
    at = _range(data, rng)
    data[at] = rng.bytes(at.stop - at.start)


def swap(data: bytearray, source: Source, rng: np.random.Generator) -> None:
    """Two packets change places, as far as the shorter one goes, so that no offset moves."""
    if len(source.packets) < 2:
        return
    one, two = (source.packets[i] for i in rng.choice(len(source.packets), 2, replace=False))
    size = min(one[1], two[1], len(data) - max(one[0], two[0]))
    if size > 0:
        first, second = (slice(p[0], p[0] + size) for p in (one, two))
        data[first], data[second] = data[second], data[first]


def drop(data: bytearray, source: Source, rng: np.random.Generator) -> None:
    """The bytes of a packet become zeros."""
    if source.packets:
        start, size = source.packets[int(rng.integers(len(source.packets)))]
        end = min(start + size, len(data))
        data[start:end] = bytes(max(0, end - start))


def shuffle(data: bytearray, source: Source, rng: np.random.Generator) -> None:
    """Blocks of 512 bytes in another order, from somewhere on."""
    first = int(rng.integers(len(data)))
    blocks = [data[i : i + 512] for i in range(first, len(data), 512)]
    data[first:] = b"".join(bytes(blocks[i]) for i in rng.permutation(len(blocks)))


MUTATIONS: tuple[Mutation, ...] = (
    flip, flip, flip_header, flip_header, word, word, word, truncate, insert, duplicate, delete,
    zero, noise, swap, drop, shuffle,
)  # fmt: skip


class Cases:
    """Case number -> a damaged file and what is asked of it."""

    def __init__(self, folder: Path, real: Path | None) -> None:
        spec = importlib.util.spec_from_file_location("media", Path(__file__).with_name("media.py"))
        assert spec is not None
        assert spec.loader is not None
        media = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(media)
        whole = folder / "whole"
        whole.mkdir(exist_ok=True)
        for name, options in GENERATED.items():
            if not (whole / name).exists():
                media.encode(whole / name, 20, **options)
        self.folder = folder
        self.sources = [Source.read(whole / name) for name in GENERATED]
        places = [] if real is None else [real / name for name in REAL]
        self.real = [Source.read(place) for place in places if place.is_file()]

    def make(self, number: int) -> tuple[Path, str, dict[str, Any]]:
        """The file of a case, what was done to it, and the cut asked for."""
        rng = np.random.default_rng([SEED, number])
        sources = self.real if self.real and rng.integers(REAL_SHARE) == 0 else self.sources
        source = sources[int(rng.integers(len(sources)))]
        data = bytearray(source.data)
        done = []
        for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
            mutation = MUTATIONS[int(rng.integers(len(MUTATIONS)))]
            mutation(data, source, rng)
            done.append(mutation.__name__)
        if rng.integers(20) == 0:  # the beginning of one file and the end of another
            other = self.sources[int(rng.integers(len(self.sources)))]
            data[int(rng.integers(len(data))) :] = other.data[int(rng.integers(len(other.data))) :]
            done.append(f"spliced with {other.name}")
        cut: dict[str, Any] = {"start": None, "end": None, "keep": ()}
        if rng.integers(4) == 0:
            cut["start"], cut["end"] = 0.1, 0.6
        if rng.integers(10) == 0:
            cut["keep"] = ((0.05, 0.2), (0.3, 5.0))
        path = self.folder / f"case-{number}{Path(source.name).suffix}"
        path.write_bytes(data)
        return path, f"{source.name}: {', '.join(done)}", cut


def look(path: Path, cut: dict[str, Any]) -> dict[str, Any]:
    """Decode one file as stage one does, and hold what comes of it to what is promised."""
    from msq.errors import VideoError
    from msq.extract.decode_task import DecodeTask, Picture, decode
    from msq.extract.video import frame_times
    from msq.extract.views import View

    pictures = (
        Picture(4, "uniform", 32, "torch"),
        Picture(3, "official", 16, "torch"),
        Picture(4, "uniform", 32, "torch", view=View("augmented", 1)),
    )
    result = decode(DecodeTask(7, path, pictures=pictures, id=path.stem, **cut))
    wrong = []
    said = [result.reason, result.message, *result.degraded]
    if any(text and str(path.parent) in text for text in said):
        wrong.append(f"a path of this machine in {said}")
    if result.row != 7:
        wrong.append(f"row {result.row}")
    if result.reason is None:
        shapes = [array.shape for array in result.frames]
        if shapes != [(p.frames, 3, p.size, p.size) for p in pictures]:
            wrong.append(f"shapes {shapes}")
        if [len(times) for times in result.times] != [p.frames for p in pictures]:
            wrong.append(f"times {result.times}")
        if len(result.degraded) != len(pictures) or "" in result.degraded:
            wrong.append(f"degraded {result.degraded}")
    elif not result.reason.strip() or result.frames or result.times:
        wrong.append(f"failed, with reason {result.reason!r} and {len(result.frames)} pictures")
    try:
        times = frame_times(path)
        if not len(times):
            wrong.append("frame_times gave none")
    except VideoError as error:
        if str(path) not in str(error):
            wrong.append(f"frame_times does not name the file: {error}")
    damage = next(filter(None, result.degraded), None)  # of the picture that has some
    status = "failed" if result.reason else "degraded" if damage else "ok"
    return {"status": status, "wrong": wrong, "reason": result.reason or damage}


def run(folder: Path, numbers: Sequence[int], real: Path | None) -> None:
    """One line when a case begins, one with what came of it."""
    cases = Cases(folder, real)
    for number in numbers:
        path, what, cut = cases.make(number)
        print(json.dumps({"case": number, "what": what, "cut": cut}), flush=True)
        started = time.process_time()
        try:
            found = look(path, cut)
        except MemoryError:  # outside `decode`, which makes a failed clip of it
            found = {"status": "failed", "wrong": [], "reason": "out of memory"}
        except Exception:
            found = {"status": "bug", "wrong": [traceback.format_exc()], "reason": None}
        found["seconds"] = round(time.process_time() - started, 3)
        print(json.dumps({"done": number, **found}), flush=True)
        if not found["wrong"] and len(numbers) > 1:
            path.unlink()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    clips = os.environ.get("MSQ_FUZZ_CLIPS")
    run(
        Path(sys.argv[1]),
        range(int(sys.argv[2]), int(sys.argv[3])),
        Path(clips) if clips else None,
    )
