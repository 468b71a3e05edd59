"""Operations of a head as the plain form counts them: two per product and sum, exact."""

from __future__ import annotations


def stack_flops(
    clips: int, rows: int, tokens: int, width: int, ffn: int, *, cross: bool = True
) -> int:
    """Forward operations of one Transformer layer.

    Projections of q, k and v, both products of attention, the output projection, the feed-forward
    part; for a decoder layer the same again for the cross-attention, its q from the rows and its k
    and v from the tokens.

    Args:
        clips: B.
        rows: K queries of a clip (S in an encoder).
        tokens: S that the cross-attention reads.
        width: D.
        ffn: hidden width F.
        cross: a decoder layer.
    """
    m, n = clips * rows, clips * tokens
    flops = 6 * m * width * width + 4 * m * rows * width + 2 * m * width * width
    flops += 4 * m * width * ffn
    if cross:
        flops += 2 * m * width * width + 4 * n * width * width
        flops += 4 * m * tokens * width + 2 * m * width * width
    return flops


def step_flops(
    clips: int,
    classes: int,
    tokens: int,
    *,
    width: int = 512,
    ffn: int = 2048,
    layers: int = 6,
    encoder_layers: int = 0,
) -> int:
    """Forward and backward (three times the forward) of the layers, without absorption.

    The projections before and the classifier after them are left out: less than one percent.
    """
    decoder = layers * stack_flops(clips, classes, tokens, width, ffn)
    encoder = encoder_layers * stack_flops(clips, tokens, 0, width, ffn, cross=False)
    return 3 * (decoder + encoder)
