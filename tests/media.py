"""Small media files, made on the spot and kept for the length of the test run.

`conftest.py` loads this module and hands out one `Media` as the fixture `media`.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

# Without mbtree=0 some x264 builds write other bytes each time on processors with AVX-512.
X264 = "threads=1:mbtree=0:scenecut=0:keyint={gop}:min-keyint={gop}:bframes={b}:b-pyramid=normal"


def pictures(count: int, width: int, height: int, seed: int = 0) -> list[np.ndarray]:
    """Two textures that move against each other: every frame differs, and motion can be coded."""
    rng = np.random.default_rng(seed)
    far, near = (np.kron(rng.integers(0, 256, (32, 48, 3)), np.ones((8, 8, 1))) for _ in "ab")
    out = []
    for i in range(count):
        image = np.roll(far, (2 * i, 3 * i), (0, 1))[:height, :width].copy()
        patch = np.roll(near, (0, -5 * i), (0, 1))[: height // 3, : width // 3]
        image[height // 4 : height // 4 + height // 3, i % 7 : i % 7 + width // 3] = patch
        out.append(np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8))
    return out


def encode(
    target: Path | io.RawIOBase,
    count: int = 48,
    *,
    size: tuple[int, int] = (96, 64),
    fps: Fraction | int = 25,
    codec: str = "libx264",
    gop: int = 12,
    bframes: int = 2,
    extra: str = "",
    pix_fmt: str = "yuv420p",
    format: str | None = None,
    movflags: str = "",
    ticks: Sequence[int] | None = None,
    full_range: bool = False,
    seed: int = 0,
) -> None:
    """Encode `count` frames; `ticks` gives their times in 1/1000 s where they are not even."""
    where = str(target) if isinstance(target, Path) else target
    options = {"movflags": movflags} if movflags else {}
    with av.open(where, "w", format=format, container_options=options) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        if codec == "libx264":
            stream.options = {"x264-params": X264.format(gop=gop, b=bframes) + extra, "crf": "26"}
        elif codec == "libx265":
            params = f"log-level=none:pools=none:frame-threads=1:scenecut=0:keyint={gop}"
            stream.options = {"x265-params": f"{params}:min-keyint={gop}:bframes={bframes}{extra}"}
        elif codec in ("libvpx", "libvpx-vp9"):
            stream.options = {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1"}
            stream.options |= {"lag-in-frames": "12", "g": str(gop)}
        elif codec == "libsvtav1":
            stream.options = {"preset": "12", "svtav1-params": f"keyint={gop}:lp=1"}
        else:
            stream.gop_size, stream.max_b_frames = gop, bframes
            stream.options = {"qscale": "6", "flags": "+bitexact"}
        if full_range:
            stream.codec_context.color_range = 2
            stream.codec_context.colorspace = 1
        if ticks is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i, picture in enumerate(pictures(count, *size, seed)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if full_range:
                frame = frame.reformat(format=pix_fmt, dst_color_range=2, dst_colorspace=1)
            frame.pts = i if ticks is None else ticks[i]
            frame.time_base = Fraction(1, 1000) if ticks is not None else 1 / Fraction(fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


class Pipe(io.RawIOBase):
    """A sink without seeking, as a pipe is."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, block: bytes) -> int:  # type: ignore[override]
        self.data += block
        return len(block)


def boxes(data: bytes, start: int, end: int) -> list[tuple[bytes, int, int]]:
    """MP4 boxes (kind, start, end) between two offsets."""
    out = []
    while start < end:
        length, kind = struct.unpack(">I4s", data[start : start + 8])
        out.append((kind, start, start + length))
        start += length
    return out


def _inside(data: bytes, *kinds: bytes) -> tuple[int, int]:
    start, end = -8, len(data)
    for kind in kinds:
        start, end = next((s, e) for k, s, e in boxes(data, start + 8, end) if k == kind)
    return start, end


def with_edit_list(source: Path, target: Path, skip: int, keep: int) -> None:
    """Rewrite the edit list so that `keep` frames from frame `skip` on are shown.

    A cut with stream copy does the same: the packets before the cut stay in the file because
    the shown ones refer to them. The movie box is last, so no offset moves.
    """
    data = source.read_bytes()
    timescale = struct.unpack_from(">I", data, _inside(data, b"moov", b"mvhd")[0] + 20)[0]
    header = _inside(data, b"moov", b"trak", b"mdia", b"mdhd")[0]
    media = struct.unpack_from(">I", data, header + 20)[0]
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        tick = int(1 / stream.average_rate / Fraction(1, media))
    old, old_end = _inside(data, b"moov", b"trak", b"edts")
    delay = struct.unpack_from(">i", data, old + 8 + 8 + 8 + 4)[0]
    length = int(keep * tick * Fraction(timescale, media))
    elst = struct.pack(">I4sIIIiI", 28, b"elst", 0, 1, length, delay + skip * tick, 0x10000)
    edts = struct.pack(">I4s", 8 + len(elst), b"edts") + elst
    out = bytearray(data[:old] + edts + data[old_end:])
    for kinds in ((b"moov",), (b"moov", b"trak")):
        start, end = _inside(data, *kinds)
        struct.pack_into(">I", out, start, end - start + len(edts) - (old_end - old))
    target.write_bytes(out)


def with_rotation(source: Path, target: Path, matrix: tuple[int, int, int, int]) -> None:
    """Write a display matrix (a, b, c, d) of whole numbers into the track header."""
    data = bytearray(source.read_bytes())
    at = _inside(bytes(data), b"moov", b"trak", b"tkhd")[0] + 8 + 40
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    target.write_bytes(data)


def pack_b_frames(source: Path, target: Path) -> None:
    """Turn an MPEG-4 AVI with single B frames into a packed one, as DivX 5 and XviD write it.

    Decode order I P B P B ... becomes the chunks I, P+B, N, P+B, N ... where N is a placeholder
    for a frame that is not coded. A user-data mark in the first header tells decoders so.
    """
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        rate, size = stream.average_rate, (stream.width, stream.height)
        chunks = [bytes(p) for p in container.demux(stream) if p.size]
    kinds = [_vop_kind(c) for c in chunks]
    bits = max(1, (rate.numerator - 1).bit_length())
    blank = "0101" + "0" * bits + "10"
    blank += "0" + "1" * (-(len(blank) + 1) % 8)
    nothing = b"\0\0\1\xb6" + int(blank, 2).to_bytes(len(blank) // 8, "big")
    packed = []
    for i, (chunk, kind) in enumerate(zip(chunks, kinds, strict=True)):
        if kind == "B":
            packed.append(nothing)
        elif i + 1 < len(kinds) and kinds[i + 1] == "B":
            packed.append(chunk + chunks[i + 1])
        else:
            packed.append(chunk)
    mark = b"\0\0\1\xb2DivX503b1393p"
    first = packed[0]
    at = first.index(b"\0\0\1\xb6")
    group = first.find(b"\0\0\1\xb3")
    at = group if 0 <= group < at else at
    packed[0] = first[:at] + mark + first[at:]
    with av.open(str(target), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i, chunk in enumerate(packed):
            packet = av.Packet(chunk)
            packet.stream = stream
            packet.time_base = 1 / rate
            packet.pts = packet.dts = i
            packet.is_keyframe = i == 0
            container.mux(packet)


def _vop_kind(chunk: bytes) -> str:
    return "IPBS"[chunk[chunk.index(b"\0\0\1\xb6") + 4] >> 6]


def silence(target: Path) -> None:
    """An MP4 with a second of silence and no picture."""
    with av.open(str(target), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for i in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def song_with_cover(target: Path) -> None:
    """An MP3 whose only picture is the cover."""
    with av.open(str(target), "w") as container:
        sound = container.add_stream("libmp3lame", rate=16000)
        cover = container.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(pictures(1, 32, 32)[0], format="rgb24")
        packets = [*cover.encode(picture.reformat(format="yuvj420p")), *cover.encode()]
        for i in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, 1152 * i
            packets += sound.encode(frame)
        container.mux([*packets, *sound.encode()])


class Media:
    """Media files by name, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.encode = encode
        self.pictures = pictures
        self.song_with_cover = song_with_cover
        self.with_rotation = with_rotation

    def __call__(self, name: str) -> Path:
        """Path of one of the files below: `clean()` and `broken()` list them."""
        path = self.folder / name
        if not path.exists():
            {**self.clean(), **self.broken()}[name](path)
        return path

    def clean(self) -> dict[str, Callable[[Path], None]]:
        """Whole files of every container and stream layout that data sets come in."""
        jumps = np.cumsum(np.random.default_rng(5).integers(10, 90, 48)).tolist()
        return {
            "cfr.mp4": lambda p: encode(p, gop=250, bframes=3),
            "gop12 b2.mp4": lambda p: encode(p),
            "gop7 no b.mp4": lambda p: encode(p, 45, gop=7, bframes=0, fps=Fraction(30000, 1001)),
            "all intra.mov": lambda p: encode(p, 20, gop=1, bframes=0),
            "vfr.mp4": lambda p: encode(p, ticks=jumps),
            "open gop.mp4": lambda p: encode(p, 60, bframes=3, extra=":open-gop=1"),
            "open gop.mkv": lambda p: encode(p, 60, bframes=3, extra=":open-gop=1"),
            "edit list.mp4": lambda p: with_edit_list(self("gop12 b2.mp4"), p, 17, 31),
            "edit list tail.mp4": lambda p: with_edit_list(self("gop12 b2.mp4"), p, 5, 20),
            "edit list open gop.mp4": lambda p: with_edit_list(self("open gop.mp4"), p, 15, 45),
            "xvid b.avi": lambda p: encode(p, codec="mpeg4"),
            "packed b.avi": lambda p: (
                encode(self.folder / "one b.avi", codec="mpeg4", bframes=1, gop=100),
                pack_b_frames(self.folder / "one b.avi", p),
            )[-1],
            "divx.avi": lambda p: encode(p, codec="mpeg4", bframes=0),
            "h264.avi": lambda p: encode(p, bframes=0),
            "mpeg4.mp4": lambda p: encode(p, codec="mpeg4"),
            "mpeg2.mpg": lambda p: encode(p, codec="mpeg2video"),
            "motion.avi": lambda p: encode(
                p, 20, codec="mjpeg", pix_fmt="yuvj420p", gop=1, bframes=0
            ),
            "fragmented.mp4": lambda p: encode(p, movflags="frag_keyframe+empty_moov"),
            "faststart.mp4": lambda p: encode(p, movflags="faststart"),
            "pipe.mkv": self._pipe,
            "stream.ts": lambda p: encode(p),
            "raw.h264": lambda p: encode(p, format="h264"),
            "five.mp4": lambda p: encode(p, 5),
            "one.mp4": lambda p: encode(p, 1),
            "rotated 90.mp4": lambda p: with_rotation(self("cfr.mp4"), p, (0, 1, -1, 0)),
            "rotated 180.mp4": lambda p: with_rotation(self("cfr.mp4"), p, (-1, 0, 0, -1)),
            "hevc.mp4": lambda p: encode(p, 40, codec="libx265", bframes=3),
            "hevc open gop.mkv": lambda p: encode(
                p, 40, codec="libx265", bframes=3, extra=":open-gop=1"
            ),
            "vp8.webm": lambda p: encode(p, 40, codec="libvpx"),
            "vp9.webm": lambda p: encode(p, 40, codec="libvpx-vp9"),
            "av1.mp4": lambda p: encode(p, 40, codec="libsvtav1"),
            "ten bit.mp4": lambda p: encode(p, 20, pix_fmt="yuv420p10le"),
            "yuv422.mp4": lambda p: encode(p, 20, pix_fmt="yuv422p"),
            "grey.mp4": lambda p: encode(p, 20, pix_fmt="gray"),
            "odd size.mp4": lambda p: encode(p, 20, size=(97, 63), pix_fmt="yuv444p"),
            "full range.mp4": lambda p: encode(p, 20, full_range=True),
        }

    def broken(self) -> dict[str, Callable[[Path], None]]:
        """Files without one frame to show."""
        noise = np.random.default_rng(1).bytes(20_000)
        return {
            "empty.mp4": lambda p: p.write_bytes(b"") and None,
            "text.mp4": lambda p: p.write_text("not a video\n" * 300) and None,
            "noise.mp4": lambda p: p.write_bytes(noise) and None,
            "audio only.mp4": silence,
            "truncated.mp4": lambda p: self._cut(self("gop12 b2.mp4"), p, 0.7),
        }

    def changing_size(self) -> Path:
        """A raw stream that goes from 96x64 to 64x48 on the way."""
        path = self.folder / "change.h264"
        if not path.exists():
            parts = []
            for size in ((96, 64), (64, 48)):
                part = self.folder / f"part {size[0]}.h264"
                encode(part, 10, size=size, format="h264")
                parts.append(part.read_bytes())
            path.write_bytes(b"".join(parts))
        return path

    def damaged(self, name: str) -> Path:
        """Files that still show frames: `truncated SOURCE`, `flipped.mp4` or `flipped.avi`."""
        path = self.folder / name
        if not path.exists() and name.startswith("truncated "):
            self._cut(self(name.removeprefix("truncated ")), path, 0.6)
        elif not path.exists():
            source = self.folder / f"long{path.suffix}"
            codec = "mpeg4" if path.suffix == ".avi" else "libx264"
            encode(source, 120, size=(160, 120), gop=60, codec=codec)
            data = bytearray(source.read_bytes())
            rng = np.random.default_rng(3)
            for at in rng.integers(len(data) * 2 // 5, len(data) * 3 // 5, 60):
                data[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
        return path

    def _pipe(self, path: Path) -> None:
        pipe = Pipe()
        encode(pipe, format="matroska")
        path.write_bytes(pipe.data)

    @staticmethod
    def _cut(source: Path, target: Path, part: float) -> None:
        data = source.read_bytes()
        target.write_bytes(data[: int(len(data) * part)])
