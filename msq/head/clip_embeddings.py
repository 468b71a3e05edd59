"""A clip as one vector, before and after the decoder: what the paper's Figure 4 shows."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from msq.head.evaluate import probabilities, score
from msq.head.features import Features
from msq.head.model import MSQNet
from msq.head.token_batches import with_next

Weights = Literal["mean", "scores"]
_AT_ONCE = 256  # clips whose tokens are averaged together


def before_decoder(features: Features, rows: Tensor) -> Tensor:
    """The video embedding as it enters: the mean over all S tokens of the video encoder.

    Nothing in it was trained by msq; it is defined alike for every pooling and every encoder, with
    a global token or without. (A linear probe on averaged features sees the same.)

    Args:
        features: of the clips.
        rows: [n] row numbers.

    Returns:
        [n, D'] float32, on the CPU.
    """
    parts = torch.split(rows, _AT_ONCE)
    return torch.cat([x.float().mean(1).cpu() for _, x in with_next(features.tokens, parts)])


@torch.no_grad()
def after_decoder(
    model: MSQNet, features: Features, rows: Tensor, weights: Weights = "mean"
) -> Tensor:
    """The decoder's output for a clip: its K queries after the final LayerNorm, as one vector.

    The classifier reads these queries and nothing else. How they become one vector decides much of
    what is seen, so no label may have a say in it: a mean over the queries of the classes that a
    clip is labelled with would put clips together by their labels alone, whatever the decoder did.

    Args:
        model: the head.
        features: on its device.
        rows: [n] row numbers.
        weights: `mean`, all K queries alike; `scores`, weighted by the head's own probabilities,
            which draws together what the head takes for alike, rightly or wrongly.

    Returns:
        [n, D] float32, on the CPU.
    """
    weight, bias = model.class_parts(None, None)[2:]
    found = []

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        queries = output.view(-1, model.classes, model.width)
        if weights == "mean":
            found.append(queries.mean(1).float().cpu())
            return
        share = probabilities((queries * weight).sum(-1) + bias, features.task)
        share = share / share.sum(1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
        found.append((share[:, :, None] * queries).sum(1).float().cpu())

    hook = model.norm.register_forward_hook(keep)
    try:
        score(model, features, rows)
    finally:
        hook.remove()
    return torch.cat(found)
