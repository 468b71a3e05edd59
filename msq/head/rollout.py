"""What each class's query looks at: attention rollout through the decoder.

Source: Abnar and Zuidema (arXiv 2005.00928), section 3, for a decoder with two residual attention
steps per layer. With W [K, S] what the queries have taken from the tokens so far, from W = 0, each
layer with head-averaged self-attention A [K, K] and cross-attention C [K, S] does

    W <- ½ A W + ½ W        the queries read each other
    W <- ½ C M + ½ W        then the tokens

M is the identity, or (½ E_n + ½ I) … (½ E_1 + ½ I) where the head has encoder layers with maps E_l.
After L layers every row sums to 1 - 2^-L: the rest is the queries' own start (class words, image
feature). It is the same for all classes and is divided out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def query_rollout(found: Mapping[str, Tensor]) -> Tensor:
    """What share of its look at the tokens each query gives each of them.

    Args:
        found: of `MSQNet.forward(..., intermediates=True)`: `self_attention` [L, B, H, K, K],
            `cross_attention` [L, B, H, K, S] and, where there is an encoder, `encoder_attention`
            [layers, B, H, S, S].

    Returns:
        [B, K, S]; rows sum to one.
    """
    memory: Tensor | None = None
    if "encoder_attention" in found:
        maps = found["encoder_attention"].mean(dim=2)
        memory = torch.eye(maps.shape[-1], device=maps.device, dtype=maps.dtype)
        for e in maps:
            memory = 0.5 * (e @ memory + memory)
    weights = torch.zeros_like(found["cross_attention"][0, :, 0])
    for own, cross in zip(found["self_attention"], found["cross_attention"], strict=True):
        weights = 0.5 * (own.mean(dim=1) @ weights + weights)
        read = cross.mean(dim=1)
        weights = 0.5 * ((read if memory is None else read @ memory) + weights)
    return weights / weights.sum(dim=-1, keepdim=True)
