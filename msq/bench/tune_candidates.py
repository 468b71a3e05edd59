"""What the tuner tries: shapes that stand for a range of sizes, and tiles for each kernel."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from msq.bench.kernel_builds import (
    WIDTH,
    Build,
    absorbed_cross,
    hidden,
    norm,
    self_attention,
    short_cross,
)
from msq.kernels.cross_attention import columns
from msq.kernels.tiles import Tile


@dataclass(frozen=True, slots=True)
class Bucket:
    """A range of sizes and the shape that is timed for it.

    Attributes:
        op: of the forward pass, as the dispatch asks for it.
        keys: largest size that the tile is for, as the table of tiles counts.
        clips: B.
        queries: K.
        tokens: T.
        width: D; heads are 64 wide.
    """

    op: str
    keys: int
    clips: int = 256
    queries: int = 157
    tokens: int = 17
    width: int = WIDTH

    @property
    def heads(self) -> int:
        """H."""
        return self.width // 64

    def builds(self) -> tuple[Build, ...]:
        """Its kernels at this shape, forward first, without other forms of the same kernel."""
        made = {
            "drop_add_norm": lambda: norm(self.width),
            "relu_drop": lambda: hidden(4 * self.width),
            "self_attention": lambda: self_attention(self.queries),
            "absorbed_cross": lambda: absorbed_cross(self.tokens),
            "cross_attention": lambda: short_cross(self.queries),
        }[self.op]()
        return tuple({build.op: build for build in reversed(list(made))}.values())[::-1]

    def __str__(self) -> str:
        return (f"{self.op} up to {self.keys}: B={self.clips} K={self.queries} T={self.tokens} "
                f"D={self.width}")  # fmt: skip


BUCKETS: tuple[Bucket, ...] = (
    *(Bucket("drop_add_norm", width, width=width) for width in (512, 768, 1024, 2048)),
    *(Bucket("relu_drop", 4 * width, width=width) for width in (512, 768)),
    Bucket("relu_drop", 65536, width=1024),
    *(Bucket("self_attention", most, queries=queries) for most, queries in
      ((16, 12), (32, 20), (64, 51), (128, 101), (160, 157), (256, 200))),
    *(Bucket("absorbed_cross", columns(tokens, 8), tokens=tokens)
      for tokens in (8, 16, 17, 20, 32)),
    *(Bucket("cross_attention", most, queries=queries) for most, queries in
      ((16, 12), (32, 20), (64, 51), (4096, 157))),
)  # fmt: skip

_ROWS = (16, 32, 64, 128)
_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "drop_add_norm": {"ROWS": (1, 2, 4, 8)},
    "drop_add_norm_backward": {"ROWS": (1, 2, 4, 8)},
    "relu_drop": {"ROWS": (4, 16, 32), "COLS": (128, 256, 512)},
    "relu_drop_backward": {"ROWS": (4, 16, 32), "COLS": (128, 256, 512)},
    "self_attention": {"ROWS": _ROWS},
    "self_attention_backward_rows": {"ROWS": _ROWS},
    "self_attention_backward_keys": {"ROWS": (32, 64), "COLS": (32, 64)},
    "absorbed_cross": {"ROWS": (32, 64, 128)},
    "absorbed_cross_backward": {"ROWS": (32, 64)},
    "cross_attention": {"ROWS": _ROWS},
    "cross_attention_backward": {"ROWS": (16, 32, 64)},
}
_ELEMENTWISE = ("drop_add_norm", "drop_add_norm_backward", "relu_drop", "relu_drop_backward")


def candidates(op: str, architecture: str, keys: int) -> Iterator[Tile]:
    """Tiles to try for one kernel, without knowing which of them compile to something good.

    Args:
        op: of the kernel.
        architecture: such as `sm_90`.
        keys: largest size that they are for.
    """
    sizes = _SHAPES[op]
    stages = (1, 2) if op in _ELEMENTWISE else (2, 3)
    for *values, warps, depth in itertools.product(*sizes.values(), (4, 8), stages):
        chosen = dict(zip(sizes, values, strict=True))
        yield Tile(op, architecture, keys, chosen, warps, depth)
