"""What stage one costs for many clips: hours of cores and GPUs, bytes and files.

The tables of docs/scale.md are made here (`tables`), from the store's layout (exact), the
encoders' operation counts (exact), processor time per clip (measured, see `MEASURED`) and a share
of a GPU's peak (assumed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from msq.extract import store_schema as schema
from msq.extract.encoders.spec import EncoderSpec
from msq.extract.shard import CRC_BYTES

Mode = Literal["frame", "patch"]
MODES: tuple[Mode, ...] = ("frame", "patch")
FRAMES = 16
PATCHES = 14 * 14
WIDTH, DEPTH, MLP = 768, 12, 3072
SHARD = 64
INDEX_ENTRY = 16  # offset and length of a row in a shard's index
MFU = 0.5  # assumed, not measured
PEAKS = {"A100": 312e12, "H100": 989e12}  # bf16 with dense matrices, FLOP/s, by the data sheets


@dataclass(frozen=True, slots=True)
class Workload:
    """A set of clips.

    Attributes:
        name: of the data set.
        clips: how many.
        video: key of `MEASURED.decode`.
    """

    name: str
    clips: int
    video: str


WORKLOADS = (
    Workload("Charades", 9_848, "480p, 30 s"),
    Workload("Kinetics-700", 650_000, "240p, 10 s"),
    Workload("100 million", 100_000_000, "240p, 10 s"),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """Processor seconds of one core for one clip, on the machine that docs/scale.md names.

    Attributes:
        decode: file -> 16 x 3 x 224 x 224 uint8, by kind of video.
        encode: TimeSformer-B and CLIP ViT-B/16 of 16 frames, by precision.
        row_seconds: reading a line of a manifest.
        row_bytes: memory of a clip in the list that each worker holds.
    """

    decode: dict[str, float]
    encode: dict[str, float]
    row_seconds: float
    row_bytes: float


MEASURED = Measured(
    decode={"480p, 30 s": 0.356, "240p, 10 s": 0.0467},
    encode={"fp32": 22.7},
    row_seconds=57e-6,
    row_bytes=1230.0,
)


def timesformer_flops(frames: int = FRAMES) -> int:
    """Operations of a TimeSformer-B for one clip of 224 x 224, two per product and sum.

    Per layer: q, k, v and output over time and its linear layer, q, k, v and output over space,
    both products of each attention, the feed-forward part; and the patch embedding. Attention over
    space is of the 196 patches of a frame and the global token.
    """
    tokens, width = frames * PATCHES, WIDTH
    over_time = 2 * tokens * (5 * width**2 + 2 * frames * width)
    over_space = 2 * frames * (PATCHES + 1) * (4 * width**2 + 2 * (PATCHES + 1) * width)
    feed_forward = 2 * (tokens + 1) * 2 * width * MLP
    return DEPTH * (over_time + over_space + feed_forward) + 2 * tokens * width * 3 * 16**2


def clip_image_flops(frames: int = FRAMES) -> int:
    """Operations of CLIP's ViT-B/16 for the frames of one clip of 224 x 224."""
    tokens, width = PATCHES + 1, WIDTH
    layer = 2 * tokens * (4 * width**2 + 2 * tokens * width + 2 * width * MLP)
    return frames * (DEPTH * layer + 2 * PATCHES * width * 3 * 16**2 + 2 * width * 512)


def clip_flops() -> int:
    """Operations of both encoders for one clip."""
    return timesformer_flops() + clip_image_flops()


def feature_bytes(mode: Mode, clips: int, shard: int = SHARD) -> int:
    """Bytes of features, times and status of both encoders, one view: exact, of full rows."""
    shards = -(-clips // shard)
    total = 0
    for spec in _specs(mode):
        for array in schema.feature_arrays(spec, "float16"):
            total += _array_bytes(array, clips, shard)
        total += shards * (shard + CRC_BYTES)
    return total


def frame_bytes(clips: int, shard: int = SHARD) -> int:
    """Bytes of the image features of each frame, which are stored on request; likewise."""
    return _array_bytes(schema.frame_array(_specs("frame")[1], "float16"), clips, shard)


def _array_bytes(array: schema.FeatureArray, clips: int, shard: int) -> int:
    index = -(-clips // shard) * (shard * INDEX_ENTRY + CRC_BYTES) if array.sharded else 0
    return clips * (array.row_bytes + CRC_BYTES) + index


def files(mode: Mode, clips: int, shard: int = SHARD) -> int:
    """Chunk files of both encoders, one view; as many folders again, and more, hold them."""
    shards = -(-clips // shard)
    tokens = clips if mode == "patch" else shards
    return tokens + 5 * shards  # image features, two of times, two of status


def _specs(mode: Mode) -> tuple[EncoderSpec, EncoderSpec]:
    tokens = 1 + FRAMES * (PATCHES if mode == "patch" else 1)
    return (
        _spec("timesformer", "video", mode, tokens, WIDTH),
        _spec("clip", "image", "mean", 0, 512),
    )


def _spec(
    slug: str, kind: Literal["video", "image"], pooling: str, tokens: int, channels: int
) -> EncoderSpec:
    return EncoderSpec(
        slug=slug, kind=kind, architecture=slug, weights="-", sha256="0" * 64, frames=FRAMES,
        size=224, mean=(0.5,) * 3, std=(0.5,) * 3, pooling=pooling, precision="fp32",
        sampling="uniform", resize="torch", output="", tokens=tokens, channels=channels,
    )  # fmt: skip


def tables(measured: Measured = MEASURED) -> str:
    """The tables of docs/scale.md, Markdown."""
    return "\n\n".join(part(measured) for part in (_clip_table, _time_table, _size_table))


def _clip_table(measured: Measured) -> str:
    per = clip_flops()
    rows = [
        (f"decode, {video}", _number(cost), "core seconds", "measured")
        for video, cost in measured.decode.items()
    ]
    rows += [
        (f"encode on a CPU, {precision}", _number(cost), "core seconds", "measured")
        for precision, cost in measured.encode.items()
    ]
    rows += [
        ("TimeSformer-B, 16 frames", _number(timesformer_flops() / 1e9), "GFLOP", "counted"),
        ("CLIP ViT-B/16, 16 frames", _number(clip_image_flops() / 1e9), "GFLOP", "counted"),
    ]
    rows += [
        (f"encode on one {gpu}", _number(1e3 * per / peak / MFU), "ms", "assumed, not measured")
        for gpu, peak in PEAKS.items()
    ]
    rows += [
        (f"features, `{mode}`", _number(feature_bytes(mode, 64_000) / 64e6), "kB", "exact")
        for mode in MODES
    ]
    frames = _number(frame_bytes(64_000) / 64e6)
    rows += [("more with `--image-frames`", frames, "kB", "exact")]
    return _table(("of one clip", "", "", "how known"), rows)


def _time_table(measured: Measured) -> str:
    rows = []
    for work in WORKLOADS:
        decode = measured.decode[work.video]
        cells = [work.name, f"{work.clips:,}", work.video, _number(work.clips * decode / 3600)]
        cells += [_number(work.clips * cost / 3600) for cost in measured.encode.values()]
        for peak in PEAKS.values():
            each = clip_flops() / peak / MFU
            cells += [_number(work.clips * each / 3600), _number(decode / each)]
        rows.append(tuple(cells))
    head = ["", "clips", "video", "decode core-h"]
    head += [f"encode core-h {precision}" for precision in measured.encode]
    for gpu in PEAKS:
        head += [f"{gpu}-h", f"cores per {gpu}"]
    return _table(tuple(head), rows)


def _size_table(measured: Measured) -> str:
    rows = []
    for work in WORKLOADS:
        cells = [work.name]
        for mode in MODES:
            cells.append(_number(feature_bytes(mode, work.clips) / 1e12))
            cells.append(f"{files(mode, work.clips):,}")
        cells.append(_number(work.clips * measured.row_seconds))
        cells.append(_number(work.clips * measured.row_bytes / 1e9))
        rows.append(tuple(cells))
    head = ["", "TB `frame`", "files `frame`", "TB `patch`", "files `patch`"]
    return _table((*head, "s to read the manifest", "GB of clip list, each worker"), rows)


def _number(value: float) -> str:
    """Three digits that count; separators in what is large."""
    if value >= 1000:
        digits = max(0, len(str(int(value))) - 3)
        return f"{int(round(value, -digits)):,}"
    return f"{value:.3g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
