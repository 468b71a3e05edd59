"""Names in the authors' `nn.Transformer`, and what they join of an `MSQNet`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

# Of a layer here, and what torch calls them.
_ATTENTION = {
    "encoder": {"self_attention": "self_attn"},
    "decoder": {"self_attention": "self_attn", "cross_attention": "multihead_attn"},
}
_PARTS = {
    "encoder": {
        "expand": "linear1", "contract": "linear2", "norm_self": "norm1", "norm_ffn": "norm2",
    },
    "decoder": {
        "expand": "linear1", "contract": "linear2", "norm_self": "norm1", "norm_cross": "norm2",
        "norm_ffn": "norm3",
    },
}  # fmt: skip
# Of a stack here: the name of its layers, and that of the norm after them.
STACKS = {"encoder": ("encoder", "encoder_norm"), "decoder": ("layers", "norm")}


def transformer_names(layers: Mapping[str, int]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every name of theirs, with the names here that it joins along the first dimension.

    Args:
        layers: how many there are in `encoder` and `decoder`.
    """
    for stack, (mine, norm) in STACKS.items():
        for i in range(layers[stack]):
            theirs, here = f"transformer.{stack}.layers.{i}", f"{mine}.{i}"
            for name, other in _ATTENTION[stack].items():
                for kind in ("weight", "bias"):
                    packed = tuple(f"{here}.{name}.{x}.{kind}" for x in "qkv")
                    yield f"{theirs}.{other}.in_proj_{kind}", packed
                    yield f"{theirs}.{other}.out_proj.{kind}", (f"{here}.{name}.out.{kind}",)
            for name, other in _PARTS[stack].items():
                for kind in ("weight", "bias"):
                    yield f"{theirs}.{other}.{kind}", (f"{here}.{name}.{kind}",)
        for kind in ("weight", "bias"):
            yield f"transformer.{stack}.norm.{kind}", (f"{norm}.{kind}",)
