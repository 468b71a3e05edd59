"""The shape of a TimeSformer (`msq.extract.encoders.timesformer`), checked; it needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast

from msq.errors import UsageError

Stem = Literal["patch", "conv"]


@dataclass(frozen=True)
class TimeSformerConfig:
    """Shape of a TimeSformer. The defaults are the public base model.

    Attributes:
        image_size: height and width in pixels; one number means a square. Both are multiples of
            `patch_size`.
        patch_size: side of a patch (and total stride of the convolutional stem) in pixels.
        frames: T.
        width: D', the number of channels of every token.
        depth: number of layers.
        heads: number of attention heads; divides `width`.
        mlp_ratio: hidden width of the MLP over `width`.
        stem: `patch` (one strided projection, the public model) or `conv` (3×3 convolutions of
            stride 2, as many as halve `patch_size` to 1: three for 8).
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    frames: int = 8
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    stem: Stem = "patch"

    def __post_init__(self) -> None:
        """Normalises `image_size` to a pair and checks that the numbers fit together."""
        size = cast("int | tuple[int, int]", self.image_size)
        height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        object.__setattr__(self, "image_size", (height, width))
        for name in ("patch_size", "frames", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise UsageError(f"TimeSformer: {name} is {getattr(self, name)}, at least 1 needed")
        if height < 1 or width < 1 or height % self.patch_size or width % self.patch_size:
            raise UsageError(
                f"TimeSformer: image size {height}x{width} is not a multiple of the patch size "
                f"{self.patch_size}; choose a multiple of it for height and width"
            )
        if self.width % self.heads:
            raise UsageError(
                f"TimeSformer: width {self.width} is not divisible by {self.heads} heads"
            )
        if self.stem not in ("patch", "conv"):
            raise UsageError(f"TimeSformer: stem is 'patch' or 'conv', not {self.stem!r}")
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise UsageError(
                f"TimeSformer: a convolutional stem needs a patch size that is a power of two, "
                f"not {self.patch_size}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per frame as (rows, columns)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def patches(self) -> int:
        """N, patches per frame."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Length of the output sequence, 1 + N·T."""
        return 1 + self.patches * self.frames

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP."""
        return round(self.width * self.mlp_ratio)

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments as JSON-able values."""
        return {**asdict(self), "image_size": list(self.image_size)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TimeSformerConfig:
        """The inverse of `to_dict`; `image_size` may be one number.

        Raises:
            UsageError: for unknown names or numbers that do not fit together.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise UsageError(f"TimeSformer: unknown settings {', '.join(unknown)}")
        return cls(**values)
