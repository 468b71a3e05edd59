"""Cross-attention to a short memory with the projections absorbed into keys and values.

For head h with its slices Wq_h [d, D] and Wo_h [D, d]:

    K'_h = k_h Wq_h / sqrt(d)      beta_h = k_h bq_h / sqrt(d)      V'_h = v_h Wo_h^T
    y = sum_h dropout(softmax(x K'_h^T + beta_h)) V'_h + bo

which equals projecting x to queries, attending, and projecting what was mixed: x meets
B x (H S) rows of width D instead of two D x D matrices. That is less work where there are many
queries and few tokens; whether it is faster is read from a recorded table (`absorbed.json`,
written by `benchmarks/bench_absorbed.py`).
"""

from __future__ import annotations

import functools
import json
import math
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from msq.head.masks import LayerMasks, Site


def absorbed_attention(
    x: Tensor,
    k: Tensor,
    v: Tensor,
    query: tuple[Tensor, Tensor],
    out: tuple[Tensor, Tensor],
    masks: LayerMasks | None = None,
) -> Tensor:
    """Multi-head attention from x to k and v, output projection included.

    Args:
        x: [B, K, D] rows with their positions, before the query projection.
        k: [B, S, H, d] keys, projected.
        v: [B, S, H, d] values, projected.
        query: weight [D, D] and bias [D] of the query projection.
        out: weight [D, D] and bias [D] of the output projection.
        masks: dropout of the probabilities.

    Returns:
        [B, K, D].
    """
    (clips, tokens, heads, _), rows = k.shape, x.shape[1]
    keys, beta, values = absorbed_memory(k, v, query, out[0])
    scores = torch.baddbmm(beta.view(clips, 1, -1), x, keys.flatten(1, 2).transpose(1, 2))
    p = scores.view(clips, rows, heads, tokens).softmax(-1)
    scale = 1.0
    if masks is not None:
        kept = masks.kept(Site.cross_probability, (clips, heads, rows, tokens), p.dtype)
        p, scale = p * kept.transpose(1, 2), masks.scale
    mixed = p.view(clips, rows, heads * tokens)
    return torch.baddbmm(out[1], mixed, values.flatten(1, 2), alpha=scale)


def absorbed_memory(
    k: Tensor, v: Tensor, query: tuple[Tensor, Tensor], out_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """K', beta and V' of the formula above.

    Args:
        k: [B, S, H, d] keys, projected.
        v: [B, S, H, d] values, projected.
        query: weight [D, D] and bias [D] of the query projection.
        out_weight: [D, D] of the output projection.

    Returns:
        K' [B, H, S, D], beta [B, H, S] and V' [B, H, S, D], without gaps in memory.
    """
    clips, tokens, heads, d = k.shape
    width = heads * d
    key = k.permute(2, 0, 1, 3).reshape(heads, clips * tokens, d) * (1 / math.sqrt(d))
    value = v.permute(2, 0, 1, 3).reshape(heads, clips * tokens, d)
    keys = _per_clip(torch.bmm(key, query[0].view(heads, d, width)), clips)
    values = _per_clip(torch.bmm(value, out_weight.view(width, heads, d).permute(1, 2, 0)), clips)
    beta = torch.bmm(key, query[1].view(heads, d, 1)).view(heads, clips, tokens)
    return keys, beta.transpose(0, 1).contiguous(), values


def absorbing_pays(queries: int, tokens: int, device: str, precision: str) -> bool:
    """Whether the absorbed form is the faster one, by the recorded table.

    The table holds the ratio of the times (forward and backward) for some numbers of tokens and
    queries. The next larger recorded number of tokens and the next smaller one of queries decide,
    both on the side of the usual form; beyond the table it is the usual form.

    Args:
        queries: K.
        tokens: S.
        device: `cpu` or `cuda`.
        precision: `fp32` or `bf16`.
    """
    measured = table().get(f"{device} {precision}", {})
    larger = [int(s) for s in measured if int(s) >= tokens]
    if not larger:
        return False
    ratios = measured[str(min(larger))]
    smaller = [int(k) for k in ratios if int(k) <= queries]
    return bool(smaller) and ratios[str(max(smaller))] > 1


@functools.lru_cache(maxsize=1)
def table() -> dict[str, dict[str, dict[str, float]]]:
    """`device precision` -> tokens -> queries -> time of the usual form / of the absorbed one."""
    text = (resources.files("msq.head") / "absorbed.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return {name: entry["ratios"] for name, entry in found.items()}


def _per_clip(stacked: Tensor, clips: int) -> Tensor:
    """[H, B S, D] -> [B, H, S, D]."""
    heads, rows, width = stacked.shape
    split = stacked.view(heads, clips, rows // clips, width)
    return split.transpose(0, 1).contiguous()
