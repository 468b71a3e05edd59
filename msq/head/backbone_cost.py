"""What a training step through a TimeSformer costs: parameters, bytes kept, operations.

A layer keeps for its backward pass, in bytes, with R = B (1 + N T) rows, P = B N T of them patches,
Q = B T (1 + N) rows of the attention in each frame, e bytes an element (4, or 2 in bf16, where the
residual stream and what a LayerNorm reads stay 4):

* over time: 4 R D for the norm; 3 P D e for q, k, v and P D e for what they mix; where its matrices
  learn 2 P D e more, for what the packed projection and the last one read;
* in each frame: 4 Q D for the norm; 4 Q D e likewise; Q D e more where its matrices learn;
* MLP: 4 R D for the norm; R F e for the GELU; R D e + R F e more where its matrices learn.

A matrix that is frozen needs nothing of what it reads. Below the lowest layer with anything that
learns nothing is kept at all. With checkpointing a layer keeps what it reads, 4 R D, and one layer
at a time the rest; the lowest one keeps all where nothing under it learns. In bf16 the matrices'
low copies, 2 bytes a number, stay too.

Against what was allocated on a CPU the bytes of a step are 0.8 to 1.3 times as much
(`tests/test_backbone_memory.py`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from msq.extract.encoders.timesformer_config import TimeSformerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneShape:
    """What the memory and the operations of the encoder's part of a step depend on.

    Attributes:
        encoder: the architecture, with T and the size of the frames.
        clips: B, that go through it at a time.
        precision: `fp32` or `bf16`.
        unfreeze: what learns, as in `BackboneConfig`.
        checkpointing: activations are computed again in the backward pass.
        fused: a kernel does the attention over time.
        band: tokens are pooled to bands, which keeps what the pooling reads.
    """

    encoder: TimeSformerConfig
    clips: int
    precision: str = "fp32"
    unfreeze: str = "all"
    checkpointing: bool = False
    fused: bool = False
    band: bool = False

    @property
    def layers(self) -> int:
        """Layers from the lowest that learns upwards."""
        if self.unfreeze == "none":
            return 0
        if self.unfreeze.startswith("last:"):
            return min(int(self.unfreeze.partition(":")[2]), self.encoder.depth)
        return self.encoder.depth

    @property
    def stem_learns(self) -> bool:
        """Whether the gradient goes down to the pixels' projection."""
        conv = self.encoder.stem == "conv" and self.unfreeze == "norms"
        return self.unfreeze == "all" or conv

    @property
    def rows(self) -> tuple[int, int, int]:
        """R, P and Q."""
        c, b = self.encoder, self.clips
        return (
            b * (1 + c.patches * c.frames),
            b * c.patches * c.frames,
            b * c.frames * (1 + c.patches),
        )

    @property
    def element(self) -> int:
        """Bytes of a number of the activations, e."""
        return 2 if self.precision == "bf16" else 4

    @property
    def learns(self) -> tuple[bool, bool]:
        """Whether the matrices over time, and the others, learn in the layers that do."""
        whole = self.unfreeze == "all" or self.unfreeze.startswith("last:")
        return whole or self.unfreeze == "temporal", whole


def parameters(encoder: TimeSformerConfig) -> int:
    """All numbers of the encoder."""
    stem = sum(9 * a * b for a, b in _stem(encoder)) + 2 * sum(b for _, b in _stem(encoder)[:-1])
    if encoder.stem == "patch":
        stem = 3 * encoder.patch_size**2 * encoder.width
    embeddings = encoder.width * (2 + encoder.patches + encoder.frames)
    return stem + encoder.width + embeddings + encoder.depth * _layer(encoder) + 2 * encoder.width


def learning(encoder: TimeSformerConfig, unfreeze: str) -> int:
    """Those that learn."""
    d, depth = encoder.width, encoder.depth
    if unfreeze == "all":
        return parameters(encoder)
    if unfreeze == "none":
        return 0
    if unfreeze == "norms":
        return depth * 6 * d + 2 * d + 2 * sum(b for _, b in _stem(encoder)[:-1])
    if unfreeze == "temporal":
        return encoder.frames * d + depth * (5 * d * d + 7 * d)
    return (
        BackboneShape(encoder=encoder, clips=1, unfreeze=unfreeze).layers * _layer(encoder) + 2 * d
    )


def kept_bytes(shape: BackboneShape) -> int:
    """Bytes that the forward pass leaves for the backward pass."""
    if not shape.layers:
        return 0
    c = shape.encoder
    stream = 4 * shape.rows[0] * c.width
    whole = _whole_layers(shape)
    kept = (shape.layers - whole) * stream
    kept += whole * (_layer_bytes(shape) + _copies(shape))
    kept += stream * (2 if shape.band else 1)  # what the last norm reads; what is pooled
    if shape.stem_learns:
        pixels = 3 * c.frames * c.image_size[0] * c.image_size[1] * shape.clips
        kept += (4 if shape.element == 4 else 6) * pixels + 3 * _conv_bytes(shape)
    return kept


def moment_bytes(shape: BackboneShape) -> int:
    """Bytes beyond what is kept that the pass through a layer takes for a moment, at its worst."""
    c, e, (r, p, q) = shape.encoder, shape.element, shape.rows
    d, f = c.width, c.mlp_width
    pixels = 5 * 3 * c.frames * c.image_size[0] * c.image_size[1] * shape.clips
    forward = 4 * d * (2 * r + 2 * p + q) + e * (q * d + 2 * r * f) + pixels
    if not shape.layers:
        return forward
    backward = 4 * 3 * r * d + e * max(2 * r * f, 6 * q * d)
    if _whole_layers(shape) < shape.layers:
        backward += _layer_bytes(shape) + _copies(shape)
    below = shape.layers < c.depth
    return max(backward, forward - kept_bytes(shape)) if below else backward


def forward_flops(encoder: TimeSformerConfig, clips: int) -> int:
    """Operations of a forward pass, two per product and sum."""
    stem, (products, attention) = _stem_flops(encoder, clips), _layer_flops(encoder, clips)
    return stem + encoder.depth * (sum(products) + attention)


def step_flops(shape: BackboneShape) -> int:
    """Operations of forward and backward pass, and of what checkpointing computes again.

    A product costs as much again for the gradient of what it reads, and as much for that of its
    matrix where that learns; the two products of attention cost twice as much again.
    """
    c, stem = shape.encoder, _stem_flops(shape.encoder, shape.clips)
    (over_time, rest), attention = _layer_flops(c, shape.clips)
    of_time, of_rest = shape.learns
    again = over_time + rest + attention if shape.checkpointing else 0
    layer = over_time * (1 + of_time) + rest * (1 + of_rest) + 2 * attention + again
    return forward_flops(c, shape.clips) + shape.layers * layer + stem * shape.stem_learns


def _whole_layers(shape: BackboneShape) -> int:
    """Layers that keep everything: all of them, or what checkpointing leaves of it.

    It passes over a layer whose input needs no gradient.
    """
    if not shape.checkpointing:
        return shape.layers
    reached = shape.stem_learns or shape.unfreeze in ("temporal", "none")
    return 0 if reached else min(shape.layers, 1)


def _layer_bytes(shape: BackboneShape) -> int:
    """What one layer keeps, as the module says; and two numbers a row for each norm."""
    c, e, (r, p, q) = shape.encoder, shape.element, shape.rows
    d, f, (over_time, rest) = c.width, c.mlp_width, shape.learns
    mixed = 0 if shape.fused and not over_time else p * d * e
    time = 4 * r * d + 3 * p * d * e + mixed + (2 * p * d * e if over_time else 0)
    space = 4 * q * d + 4 * q * d * e + (q * d * e if rest else 0)
    mlp = 4 * r * d + r * f * e + ((r * d + r * f) * e if rest else 0)
    numbers = 8 * (p + q + r) + 4 * c.heads * (q if shape.fused else p + q)
    return time + space + mlp + numbers


def _copies(shape: BackboneShape) -> int:
    """Low copies of a layer's matrices."""
    return 2 * _matrices(shape.encoder) if shape.element == 2 else 0


def _matrices(c: TimeSformerConfig) -> int:
    return 9 * c.width * c.width + 2 * c.width * c.mlp_width


def _layer(c: TimeSformerConfig) -> int:
    return _matrices(c) + 16 * c.width + c.mlp_width


def _stem(c: TimeSformerConfig) -> list[tuple[int, int]]:
    """Channels in and out of each convolution of a convolutional stem."""
    if c.stem == "patch":
        return []
    steps = max(1, c.patch_size.bit_length() - 1)
    widths = [3, *(max(8, c.width >> (steps - 1 - i)) for i in range(steps - 1)), c.width]
    return list(itertools.pairwise(widths))


def _conv_bytes(shape: BackboneShape) -> int:
    """One result of each convolution but the last."""
    c = shape.encoder
    pixels = c.image_size[0] * c.image_size[1] * c.frames * shape.clips
    out = [b for _, b in _stem(c)[:-1]]
    return sum(shape.element * b * pixels // 4 ** (i + 1) for i, b in enumerate(out))


def _stem_flops(c: TimeSformerConfig, clips: int) -> int:
    pixels = c.image_size[0] * c.image_size[1] * c.frames * clips
    if c.stem == "patch":
        return 2 * 3 * c.width * pixels
    return sum(18 * a * b * pixels // 4 ** (i + 1) for i, (a, b) in enumerate(_stem(c)))


def _layer_flops(c: TimeSformerConfig, clips: int) -> tuple[tuple[int, int], int]:
    """Products with the matrices over time, with the others, and those of attention."""
    d, f, t, n = c.width, c.mlp_width, c.frames, c.patches
    rows, places = clips * t * n, clips * t * (n + 1)
    over_time = 2 * rows * 5 * d * d
    rest = 2 * places * 4 * d * d + 4 * (rows + clips) * d * f
    return (over_time, rest), 4 * rows * t * d + 4 * places * (n + 1) * d
