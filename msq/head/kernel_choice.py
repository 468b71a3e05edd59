"""Which operations of the packed head run a Triton kernel: decided once, before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from msq.head.absorbed import absorbing_pays
from msq.kernels.cross_attention import columns
from msq.kernels.cross_attention import unsupported as absorbed_unsupported
from msq.kernels.cross_attention_short import unsupported as short_unsupported
from msq.kernels.dispatch import Choice, Kernels, resolve
from msq.kernels.norm import WIDEST
from msq.kernels.self_attention import unsupported as self_unsupported

if TYPE_CHECKING:
    from msq.config import HeadConfig
    from msq.head.features import Features

# The absorbed form reads 4 D numbers of K' and V' for each token and head where the other one has
# passes over K rows: below about 93 queries that is more to move (docs/kernels.md).
FEWEST_QUERIES = 96


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The sizes of a head that decide which kernels can run, and which of them is the faster.

    Attributes:
        queries: K.
        tokens: S.
        width: D.
        heads: H.
        ffn: F.
        encoder: whether tokens attend to each other.
        positions: whether queries have positions.
    """

    queries: int
    tokens: int
    width: int
    heads: int
    ffn: int
    encoder: bool = False
    positions: bool = False

    @classmethod
    def of(cls, features: Features, head: HeadConfig) -> HeadShape:
        """Of the head that is trained on these features."""
        text = None if features.text is None else features.text.shape[1]
        width = head.width or text or features.tokens.shape[-1]
        return cls(
            queries=len(features.classes),
            tokens=features.tokens.shape[1],
            width=width,
            heads=head.heads,
            ffn=head.ffn or 4 * width,
            encoder=head.encoder_layers > 0,
            positions=head.query_position,
        )


def choose_kernels(
    kernels: Kernels, device: torch.device, precision: str, shape: HeadShape
) -> tuple[Choice, ...]:
    """The version of each operation, by name; `str` of each is a line for the log.

    At most one of the two cross-attentions is taken. What is no matter of the device, such as a
    form that these sizes do not call for, is left to the reference by `triton` too.

    Args:
        kernels: `auto`, `triton` or `reference`.
        device: to train on.
        precision: `fp32` or `bf16`.
        shape: of the head.

    Raises:
        UsageError: `triton` where a kernel cannot run.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    width = shape.width
    too_wide = f"rows of {width} (at most {WIDEST})" if width > WIDEST else ""
    rows = max(shape.queries, shape.tokens if shape.encoder else 0)
    among = self_unsupported(rows, width // shape.heads)
    return (
        *_cross(kernels, device, dtype, shape),
        resolve("drop_add_norm", device, dtype, width, kernels, too_wide),
        resolve("relu_drop", device, dtype, shape.ffn, kernels),
        resolve("self_attention", device, dtype, shape.queries, kernels, among),
    )


def cross_form(choices: tuple[Choice, ...], device: str, precision: str, shape: HeadShape) -> str:
    """`absorbed` or `standard`: what the chosen kernel computes, else what the table says.

    Args:
        choices: of `choose_kernels`; none for no kernels.
        device: `cpu` or `cuda`.
        precision: `fp32` or `bf16`.
        shape: of the head.
    """
    taken = {choice.op for choice in choices if choice.path == "triton"}
    if taken & {"absorbed_cross", "cross_attention"}:
        return "absorbed" if "absorbed_cross" in taken else "standard"
    pays = absorbing_pays(shape.queries, shape.tokens, device, precision)
    return "absorbed" if pays else "standard"


def not_absorbed(shape: HeadShape) -> str:
    """Why the absorbed kernel is not for these sizes; empty where it is."""
    if shape.queries < FEWEST_QUERIES:
        return f"{shape.queries} queries, it is for {FEWEST_QUERIES} and more"
    if shape.positions:
        return "queries with positions"
    return absorbed_unsupported(shape.tokens, shape.heads, shape.width)


def _cross(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, shape: HeadShape
) -> tuple[Choice, Choice]:
    """The absorbed kernel where it is for these sizes, else the one for a short memory."""
    obstacle = not_absorbed(shape)
    if obstacle:
        absorbed = Choice("absorbed_cross", "reference", obstacle)
    else:
        size = columns(shape.tokens, shape.heads)  # as the table of tiles counts
        absorbed = resolve("absorbed_cross", device, dtype, size, kernels)
        if absorbed.path == "triton":
            return absorbed, Choice("cross_attention", "reference", "absorbed_cross is taken")
    short = short_unsupported(shape.tokens, shape.width // shape.heads)
    return absorbed, resolve("cross_attention", device, dtype, shape.queries, kernels, short)
