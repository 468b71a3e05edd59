"""How an encoder's outputs were made: the part of a feature store's identity that it contributes.

Two feature sets are interchangeable exactly when their specs' lines are equal. A line holds the
hash of the weights, never where they lay: the same file reached by another path is the same
encoder.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from msq.errors import SpecMismatch, UsageError

Kind = Literal["video", "image", "text"]
Precision = Literal["fp32", "bf16", "fp16"]
Pooling = Literal["frame", "band", "patch"]
Sampling = Literal["uniform", "official"]
Resize = Literal["torch", "pil"]
Output = Literal["projected", "pooler"]

IMPORTED = "imported:"  # begins the weights of features that were computed elsewhere

_SLUG = re.compile(r"[a-z0-9_-]+")
_LATER = ("short_side", "kernels")  # fields that specs of earlier versions do not have
_HASH_CHARACTERS = 16  # of the line; 64 bits tell any two files apart, and stay readable


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that fixes an encoder's outputs; JSON-able by `to_dict`.

    Attributes:
        slug: name of the encoder inside a store, `[a-z0-9_-]+`.
        kind: `video`, `image` or `text`.
        architecture: readable, e.g. `timesformer p16 d12 w768 h12` or `ViT-B-16`.
        weights: readable id such as `hf-hub:org/name`; never a path on this machine. After
            `imported:` the name of the folder or file with features computed elsewhere.
        sha256: of the file that holds the weights, or of the features that were imported.
        frames: T; 0 for text.
        size: height and width of the frames in pixels; 0 for text.
        mean: per channel, of pixel values in 0 to 1; empty for text.
        std: likewise.
        pooling: `frame`, `band` or `patch` for video, `mean` (over frames) for image, else empty.
        precision: of the forward pass; outputs are always float32.
        sampling: which frames of a video, `uniform` or `official`; empty for text.
        resize: `torch` or `pil`; empty for text.
        output: `projected` or `pooler` for CLIP, else empty.
        tokens: S for video, else 0.
        channels: D', D'' or D.
        resized: embeddings that were interpolated at loading and how, else empty.
        short_side: pixels of the short side before the centre crop of `size`; 0 where they are
            equal, which is how specs were before there was a choice.
        kernels: `triton` where attention over time is computed by msq's kernel, whose last bits
            differ from those of torch; empty where all is torch's.
    """

    slug: str
    kind: Kind
    architecture: str
    weights: str
    sha256: str
    frames: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pooling: str
    precision: Precision
    sampling: str
    resize: str
    output: str
    tokens: int
    channels: int
    resized: str = ""
    short_side: int = 0
    kernels: Literal["", "triton"] = ""

    def __post_init__(self) -> None:
        """Normalises mean, std and the short side; checks it and the slug."""
        object.__setattr__(self, "mean", tuple(float(m) for m in self.mean))
        object.__setattr__(self, "std", tuple(float(s) for s in self.std))
        if not _SLUG.fullmatch(self.slug):
            raise UsageError(f"encoder name {self.slug!r} may hold only a-z, 0-9, _ and -")
        if self.short_side == self.size:
            object.__setattr__(self, "short_side", 0)
        if self.short_side and self.short_side < self.size:
            raise UsageError(
                f"short side: expected at least the {self.size} pixels of the crop, found "
                f"{self.short_side}"
            )

    def line(self, dataset_name: str) -> str:
        """The readable spec string, parts joined by `|`.

        For example `charades|timesformer-base@1f…|timesformer p16 d12 w768 h12|T16 uniform|`
        `224 torch|mean 0.45,0.45,0.45 std 0.225,0.225,0.225|frame-pool|fp32|17x768`.
        """
        parts = [
            dataset_name.replace("|", "/"),
            f"{self.slug}@{self.sha256[:_HASH_CHARACTERS]}",
            f"{self.kind} {self.architecture}",
        ]
        if self.weights.startswith(IMPORTED):  # what frames it saw, nobody knows
            parts += [f"T{self.frames} {self.sampling}".rstrip(), f"{self.pooling}-pool"]
        elif self.kind != "text":
            parts += [
                f"T{self.frames} {self.sampling}",
                f"{self.size}{f' of {self.short_side}' if self.short_side else ''} {self.resize}",
                f"mean {_numbers(self.mean)} std {_numbers(self.std)}",
                f"{self.pooling}-pool",
            ]
        arithmetic = f"{self.precision} {self.kernels}".rstrip()
        parts += [self.output, self.resized, arithmetic]
        parts.append(f"{self.tokens}x{self.channels}" if self.tokens else str(self.channels))
        return "|".join(part for part in parts if part)

    def fingerprint(self, dataset_name: str) -> str:
        """SHA-256 of `line(dataset_name)` as 64 hexadecimal digits."""
        return hashlib.sha256(self.line(dataset_name).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values; `short_side` and `kernels` only where they are set."""
        values = {**asdict(self), "mean": list(self.mean), "std": list(self.std)}
        for name in _LATER:
            if not values[name]:
                del values[name]  # the same dict as stores of earlier versions hold
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderSpec:
        """The inverse of `to_dict`.

        Raises:
            SpecMismatch: if fields are missing or unknown (written by another version).
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        missing = sorted(known - set(values) - {"resized", *_LATER})
        if unknown or missing:
            raise SpecMismatch(
                f"an encoder spec of another version: missing {', '.join(missing) or 'nothing'}, "
                f"unknown {', '.join(unknown) or 'nothing'}"
            )
        return cls(**values)


def _numbers(values: tuple[float, ...]) -> str:
    """Comma-joined, without the noise of binary fractions, exact to 8 digits."""
    return ",".join(f"{v:.8g}" for v in values)


def difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What tells two specs apart, one line per field; empty if they mean the same encoder.

    Args:
        expected: `EncoderSpec.to_dict()` of what is wanted.
        found: the same of what is there.

    Returns:
        Lines such as `frames: expected 16, found 8`. The readable name of the weights is left out
        where their SHA-256 agrees: moved weights are the same weights.
    """
    same_weights = expected.get("sha256") == found.get("sha256")
    lines = []
    for name in [*expected, *(n for n in found if n not in expected)]:
        a, b = _plain(expected.get(name)), _plain(found.get(name))
        if a != b and not (name == "weights" and same_weights):
            lines.append(f"{name}: expected {_shown(a)}, found {_shown(b)}")
    return lines


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "nothing"
    return ", ".join(f"{v:g}" for v in value) if isinstance(value, list) else str(value)


def slugify(text: str) -> str:
    """Lower case, every run of other characters than a-z and 0-9 a single hyphen."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def video_slug(stem: str, pooling: str) -> str:
    """Name of a video encoder inside stores: how it pools is said where it is not by frame."""
    return stem if pooling == "frame" else f"{stem}-{pooling}"
