"""The layers of the head: attention, and the post-norm Transformer layers made of it."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from msq.head.masks import LayerMasks, Site

LAYER_NORM_EPS = 1e-5


class Attention(nn.Module):
    """Multi-head attention with separate projections.

    Args:
        width: D.
        heads: H, a divisor of D.
        dropout: of the attention probabilities, in training.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        want_map: bool = False,
        masks: LayerMasks | None = None,
        site: Site = Site.self_probability,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` [B, K, D] to `key` and `value` [B, S, D].

        Args:
            query: what asks.
            key: what is compared.
            value: what is mixed.
            want_map: also return the probabilities.
            masks: of dropout; without them torch draws its own in training.
            site: whose mask is for the probabilities.

        Returns:
            [B, K, D], and the probabilities before dropout [B, H, K, S] (None unless `want_map`).
        """
        q, k, v = self._split(self.q(query)), self._split(self.k(key)), self._split(self.v(value))
        p = self.dropout if self.training else 0.0
        weights = None
        if want_map or masks is not None:
            weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
            mixed = (F.dropout(weights, p) if masks is None else masks.drop(site, weights)) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return self.out(mixed.transpose(1, 2).flatten(2)), weights if want_map else None

    def _split(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, H, S, D / H]."""
        b, s, d = x.shape
        return x.view(b, s, self.heads, d // self.heads).transpose(1, 2)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward over the tokens, each with residual and norm.

    Args:
        width: D.
        heads: H.
        ffn: hidden width of the feed-forward part.
        dropout: of attention probabilities, of the hidden layer and of each residual branch.
    """

    def __init__(self, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(width, heads, dropout)
        self.expand = nn.Linear(width, ffn)
        self.contract = nn.Linear(ffn, width)
        self.norm_self = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.norm_ffn = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, want_map: bool = False, masks: LayerMasks | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One layer over `x` [B, S, D], with the given dropout `masks` or torch's own.

        Returns:
            [B, S, D], and the attention probabilities [B, H, S, S] (None unless `want_map`).
        """

        def drop(y: Tensor, site: Site) -> Tensor:
            return self.dropout(y) if masks is None else masks.drop(site, y)

        y, weights = self.self_attention(x, x, x, want_map, masks)
        x = self.norm_self(x + drop(y, Site.self_residual))
        y = self.contract(drop(F.relu(self.expand(x)), Site.hidden))
        return self.norm_ffn(x + drop(y, Site.ffn_residual)), weights


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward (Eq. 4 to 6), each with residual and norm.

    Args:
        width: D.
        heads: H.
        ffn: hidden width of the feed-forward part.
        dropout: of attention probabilities, of the hidden layer and of each residual branch.
    """

    def __init__(self, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(width, heads, dropout)
        self.cross_attention = Attention(width, heads, dropout)
        self.expand = nn.Linear(width, ffn)
        self.contract = nn.Linear(ffn, width)
        self.norm_self = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.norm_cross = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.norm_ffn = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        memory_key: Tensor,
        query_position: Tensor | None,
        want_maps: bool = False,
        masks: LayerMasks | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One layer: queries `x` [B, K, D] read the tokens `memory` [B, S, D].

        Args:
            x: queries.
            memory: tokens, used as values.
            memory_key: tokens with their position code, used as keys.
            query_position: [K, D] added to query and key, or None.
            want_maps: also return the attention probabilities.
            masks: of dropout; without them torch draws its own in training.

        Returns:
            [B, K, D], self-attention [B, H, K, K] or None, cross-attention [B, H, K, S] or None.
        """

        def drop(y: Tensor, site: Site) -> Tensor:
            return self.dropout(y) if masks is None else masks.drop(site, y)

        placed = x if query_position is None else x + query_position
        y, self_map = self.self_attention(placed, placed, x, want_maps, masks)
        x = self.norm_self(x + drop(y, Site.self_residual))
        placed = x if query_position is None else x + query_position
        y, cross_map = self.cross_attention(
            placed, memory_key, memory, want_maps, masks, Site.cross_probability
        )
        x = self.norm_cross(x + drop(y, Site.cross_residual))
        y = self.contract(drop(F.relu(self.expand(x)), Site.hidden))
        return self.norm_ffn(x + drop(y, Site.ffn_residual)), self_map, cross_map
