"""One set of TimeSformer weights under three sets of names.

Hugging Face's (`TimesformerModel`, and `TimesformerForVideoClassification`, whose model sits under
`timesformer.`), FAIR's (`.pyth`, model under `model.`) and ours (`timesformer.TimeSformer`). No
tensor is transposed or split between them; classifier heads are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from msq.errors import UsageError, WeightsError
from msq.extract.encoders.weights import shortened

Layout = Literal["huggingface", "fair", "msq"]

# ours, Hugging Face's, FAIR's
_TOP_NAMES = (
    ("cls_token", "embeddings.cls_token", "cls_token"),
    ("position_embed", "embeddings.position_embeddings", "pos_embed"),
    ("time_embed", "embeddings.time_embeddings", "time_embed"),
    (
        "stem.proj.weight",
        "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.weight",
    ),
    ("stem.proj.bias", "embeddings.patch_embeddings.projection.bias", "patch_embed.proj.bias"),
    ("norm.weight", "layernorm.weight", "norm.weight"),
    ("norm.bias", "layernorm.bias", "norm.bias"),
)
_BLOCK_NAMES = (
    ("temporal_norm", "temporal_layernorm", "temporal_norm1"),
    ("temporal_attention.qkv", "temporal_attention.attention.qkv", "temporal_attn.qkv"),
    ("temporal_attention.out", "temporal_attention.output.dense", "temporal_attn.proj"),
    ("temporal_out", "temporal_dense", "temporal_fc"),
    ("spatial_norm", "layernorm_before", "norm1"),
    ("spatial_attention.qkv", "attention.attention.qkv", "attn.qkv"),
    ("spatial_attention.out", "attention.output.dense", "attn.proj"),
    ("mlp_norm", "layernorm_after", "norm2"),
    ("mlp.up", "intermediate.dense", "mlp.fc1"),
    ("mlp.down", "output.dense", "mlp.fc2"),
)
_COLUMN: dict[Layout, int] = {"msq": 0, "huggingface": 1, "fair": 2}
_BLOCK_PREFIX: dict[Layout, str] = {
    "msq": "blocks.",
    "huggingface": "encoder.layer.",
    "fair": "blocks.",
}
_MODEL_PREFIX: dict[Layout, tuple[str, ...]] = {
    "msq": (),
    "huggingface": ("timesformer.",),
    "fair": ("model.", "module."),
}
_HEAD_PREFIX = ("classifier.", "head.")


def layout_of(names: Mapping[str, Any]) -> Layout:
    """Which of the three layouts tensor names belong to.

    Raises:
        WeightsError: if to none of them.
    """
    bare = [_without_prefix(n, "huggingface") for n in names]
    if any(n.startswith(("encoder.layer.", "embeddings.")) for n in bare):
        return "huggingface"
    if "position_embed" in names:
        return "msq"
    bare = [_without_prefix(n, "fair") for n in names]
    if "pos_embed" in bare or "patch_embed.proj.weight" in bare:
        return "fair"
    raise WeightsError(f"not a TimeSformer in any known layout; names found: {shortened([*names])}")


def _without_prefix(name: str, layout: Layout) -> str:
    for prefix in _MODEL_PREFIX[layout]:
        name = name.removeprefix(prefix)
    return name


def rename(name: str, source: Layout, target: Layout) -> str | None:
    """A tensor's name in another layout (without model prefix), or None for an unknown name."""
    a, b = _COLUMN[source], _COLUMN[target]
    for row in _TOP_NAMES:
        if row[a] == name:
            return row[b]
    match = re.fullmatch(re.escape(_BLOCK_PREFIX[source]) + r"(\d+)\.(.+)\.(weight|bias)", name)
    if match:
        block, middle, leaf = match.groups()
        for row in _BLOCK_NAMES:
            if row[a] == middle:
                return f"{_BLOCK_PREFIX[target]}{block}.{row[b]}.{leaf}"
    return None


def to_msq(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of any layout under our names.

    Returns:
        The tensors (unknown ones keep their own name, so that a strict load reports them), and
        the names of the classifier tensors that were left out.
    """
    layout = layout_of(state)
    if layout == "msq":
        return dict(state), []
    ours, ignored = {}, []
    for name, tensor in state.items():
        bare = _without_prefix(name, layout)
        if bare.startswith(_HEAD_PREFIX):
            ignored.append(name)
        else:
            ours[rename(bare, layout, "msq") or name] = tensor
    return ours, ignored


def from_msq(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Our tensors under another layout's names, with that layout's usual model prefix.

    Raises:
        UsageError: for a model with a convolutional stem, which no other layout can hold.
    """
    if layout == "msq":
        return dict(state)
    prefix = {"huggingface": "timesformer.", "fair": "model."}[layout]
    renamed = {}
    for name, tensor in state.items():
        other = rename(name, "msq", layout)
        if other is None:
            raise UsageError(f"the {layout} layout has no name for {name}")
        renamed[prefix + other] = tensor
    return renamed
