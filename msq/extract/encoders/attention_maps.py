"""What attention layers look at, computed beside a model's own forward pass.

Fused attention never holds its probabilities. A hook takes a layer's input instead, makes queries
and keys of it with the layer's own weights, and from these softmax(q kᵀ / √d) (Vaswani et al. 2017,
Eq. 1) in float32, averaged over heads. The hook gives nothing back, so that the model's output
keeps its bits.

Shapes: M sequences, S tokens, H heads, d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Projected(NamedTuple):
    """Queries, keys and values of one layer, [M, H, S, d] each, in the layer's own precision."""

    queries: Tensor
    keys: Tensor
    values: Tensor


def is_readable(layer: nn.Module) -> bool:
    """Whether `projections` knows this kind of layer."""
    return _kind(layer) in _PROJECTIONS


def projections(layer: nn.Module, x: Tensor) -> Projected:
    """What a layer compares and mixes, from its input.

    Args:
        layer: of a kind that `is_readable` knows.
        x: its (first) input: [M, S, D], or [M, D, h, w] of CLIP's attention pool.
    """
    return _PROJECTIONS[_kind(layer)](cast(Any, layer), x)


def probabilities(queries: Tensor, keys: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) [M, S, S] in float32, averaged over the H heads; rows sum to one.

    Head by head: all maps of a large encoder's layer at once take hundreds of megabytes.

    Args:
        queries: [M, H, S, d].
        keys: likewise.
    """
    scale = 1 / math.sqrt(queries.shape[-1])
    total: Tensor | None = None
    # Under autocast the product would be rounded to half precision again.
    with torch.autocast(queries.device.type, enabled=False):
        for q, k in zip(queries.unbind(1), keys.unbind(1), strict=True):
            one = (q.float() @ k.float().mT * scale).softmax(-1)
            total = one if total is None else total.add_(one)
    assert total is not None
    return total / queries.shape[1]


@contextmanager
def watching(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Maps of all layers from the forward passes inside the block, the last one's where several.

    Args:
        layers: `is_readable` ones.

    Yields:
        A list that holds, after a forward pass, [M, S, S] of each layer, averaged over heads.
    """
    maps = [torch.empty(0)] * len(layers)

    def keep(place: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(layer: nn.Module, given: tuple[Any, ...], _: Any) -> None:
            found = projections(layer, given[0])
            maps[place] = probabilities(found.queries, found.keys)

        return hook

    hooks = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(layers)]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def _kind(layer: nn.Module) -> str:
    """Its exact class: a subclass may compute something else. By name, as libraries load slowly."""
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _split(x: Tensor, heads: int) -> Tensor:
    """[M, S, D] -> [M, H, S, d]."""
    m, s, d = x.shape
    return x.reshape(m, s, heads, d // heads).transpose(1, 2)


def _timesformer(layer: Any, x: Tensor) -> Projected:
    return Projected(*(_split(part, layer.heads) for part in layer.qkv(x).chunk(3, dim=-1)))


def _videomae(layer: Any, x: Tensor) -> Projected:
    parts = (layer.query(x), layer.key(x), layer.value(x))
    return Projected(*(_split(part, layer.heads) for part in parts))


def _torch(layer: Any, x: Tensor) -> Projected:
    x = x if layer.batch_first else x.transpose(0, 1)
    packed = F.linear(x, layer.in_proj_weight, layer.in_proj_bias)
    return Projected(*(_split(part, layer.num_heads) for part in packed.chunk(3, dim=-1)))


def _timm(layer: Any, x: Tensor) -> Projected:
    q, k, v = (_split(part, layer.num_heads) for part in layer.qkv(x).chunk(3, dim=-1))
    return Projected(layer.q_norm(q), layer.k_norm(k), v)


def _clip_pool(layer: Any, x: Tensor) -> Projected:
    """CLIP's ResNets (Radford et al. 2021, 2.4): token 0 is the mean over all places."""
    x = x.flatten(2).mT
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
    x = x + layer.positional_embedding.to(x.dtype)
    parts = (layer.q_proj(x), layer.k_proj(x), layer.v_proj(x))
    return Projected(*(_split(part, layer.num_heads) for part in parts))


_PROJECTIONS: dict[str, Callable[[Any, Tensor], Projected]] = {
    "msq.extract.encoders.timesformer.Attention": _timesformer,
    "msq.extract.encoders.videomae.JointAttention": _videomae,
    "torch.nn.modules.activation.MultiheadAttention": _torch,
    "timm.layers.attention.Attention": _timm,
    "timm.models.vision_transformer.Attention": _timm,  # 1.0.15
    "open_clip.modified_resnet.AttentionPool2d": _clip_pool,
}
