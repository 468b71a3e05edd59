"""Weights of the authors' classes: their names and shapes, and how they become an `MSQNet`.

    | authors' name | here |
    |---|---|
    | `query_embed` [K, D_l], or `query_embed.weight` | start of the label embedding + its offset |
    | `linear1.weight` [D, D'], or `linear.weight` where no image is fused | W_out |
    | `linear2.weight` [D, D_l + D''] | W_l and W_v side by side |
    | `transformer.encoder.*`, `transformer.decoder.*` | encoder, decoder (`nn.Transformer`) |
    | `group_linear.W` [1, K, D], `group_linear.b` [1, K] | classifier (Eq. 7) |

Without `linear2` the label embeddings are the queries as they are (`text` here, whatever they
started from). The position code is no weight; where a file has one (`pos_encod.pe`), it must be the
one used here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from msq.config import HeadConfig
from msq.errors import WeightsError
from msq.head.model import MSQNet
from msq.head.official_names import STACKS, transformer_names
from msq.head.position_code import sincos

_PREFIXES = ("module.", "model.", "_orig_mod.")
_ENCODERS = re.compile(
    r"(backbone|image_model|text_model|clip\w*|timesformer|videomae|vision_model|visual"
    r"|video_encoder|image_encoder|text_encoder)\."
)
_POSITION = "pos_encod.pe"
_LAYER = re.compile(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.")
_SHOWN = 8  # keys of a list that a message names


def from_official(state_dict: Mapping[str, Any], *, heads: int = 8, dropout: float = 0.1) -> MSQNet:
    """See `MSQNet.from_official`."""
    found, ignored = _sorted_keys(state_dict)
    position = found.pop(_POSITION, None)
    config, sizes = _configuration(found, heads, dropout)
    embedding = found["query_embed"]
    model = MSQNet(
        config,
        classes=sizes["K"],
        token_width=sizes["D'"],
        image_width=sizes["D''"] or None,
        text=embedding.detach(),
    )
    _require_shapes(found, _shapes(sizes, config))
    if position is not None:
        _require_code(position, sizes["D"])
    own = dict(_unpacked(found, config, sizes))
    own |= {"text": embedding, "offset": torch.zeros_like(embedding)}
    broken = [name for name, tensor in found.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise WeightsError(f"official weights: values that are not finite in {_listed(broken)}")
    model = model.to(embedding.dtype)
    model.load_state_dict(own)
    model.ignored_keys = ignored
    return model.eval()


def to_official(model: MSQNet, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The head's parameters, or other tensors by its parameters' names, under authors' names.

    Args:
        model: a head with an encoder stack and a `per-class` classifier.
        values: for instance gradients; None means the parameters.

    Raises:
        WeightsError: a head that the authors' classes cannot hold.
    """
    config = model.config
    if not config.encoder_layers or config.classifier != "per-class" or config.query_position:
        raise WeightsError(
            "to_official: expected a head of the official protocol (an encoder stack, a per-class "
            f"classifier, no query positions), found {config}"
        )
    of = dict(model.named_parameters()) if values is None else values
    label = of["offset"]
    if values is None:
        start = model.start if config.queries == "vanilla" else model.text
        assert start is not None  # the constructor of MSQNet saw to it
        label = label + start
    fused = [of[f"{n}.weight"] for n in ("fuse_label", "fuse_image") if f"{n}.weight" in of]
    made = {"query_embed": label, "linear1.weight": of["memory.weight"]}
    if fused:
        made["linear2.weight"] = torch.cat(fused, dim=1)
    for theirs, here in transformer_names(_layers(config)):
        made[theirs] = torch.cat([of[name] for name in here])
    made["group_linear.W"] = of["classifier.weight"][None]
    made["group_linear.b"] = of["classifier.bias"][None]
    return {name: tensor.detach().clone() for name, tensor in made.items()}


def _sorted_keys(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The head's tensors by their plain names, and the keys of encoders, which are left aside.

    Raises:
        WeightsError: no state dict, keys that are neither, or two keys of one meaning.
    """
    found: dict[str, Tensor] = {}
    ignored = []
    for key, value in state_dict.items():
        name = str(key)
        while name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        if _ENCODERS.match(name):
            ignored.append(str(key))
            continue
        if not isinstance(value, Tensor):
            raise WeightsError(
                f"official weights: expected a tensor at {key!r}, found {type(value).__name__}; "
                "pass the state dict itself, as in checkpoint['state_dict']"
            )
        name = "query_embed" if name == "query_embed.weight" else name
        name = "linear1.weight" if name == "linear.weight" else name
        if name in found:
            raise WeightsError(f"official weights: several keys for {name}, the last is {key!r}")
        found[name] = value
    layers = {
        stack: 1 + max((int(m[2]) for k in found if (m := _LAYER.match(k)) and m[1] == stack),
                       default=5)
        for stack in STACKS
    }  # fmt: skip
    expected = {"query_embed", "linear1.weight", "group_linear.W", "group_linear.b"}
    expected |= {theirs for theirs, _ in transformer_names(layers)}
    missing = sorted(expected - found.keys())
    unexpected = sorted(found.keys() - expected - {"linear2.weight", _POSITION})
    if missing or unexpected:
        near = difflib.get_close_matches(missing[0], unexpected, n=1) if missing else []
        raise WeightsError(
            f"official weights: missing {_listed(missing)}; unexpected {_listed(unexpected)}"
            + (f"; is {near[0]} what {missing[0]} is?" if near else "")
        )
    return found, tuple(ignored)


def _configuration(
    found: Mapping[str, Tensor], heads: int, dropout: float
) -> tuple[HeadConfig, dict[str, int]]:
    """The head's configuration and its sizes K, D, D', D'', D_l, ffn, from the shapes."""
    for name in ("query_embed", "linear1.weight", "transformer.encoder.layers.0.linear1.weight"):
        if found[name].ndim != 2:
            raise WeightsError(f"official weights: {name}: expected a matrix, found "
                               f"{list(found[name].shape)}")  # fmt: skip
    classes, label = found["query_embed"].shape
    width, tokens = found["linear1.weight"].shape
    joined = found.get("linear2.weight")
    fused = label if joined is None or joined.ndim != 2 else joined.shape[1]
    if joined is None and label != width:
        raise WeightsError(
            f"official weights: without linear2.weight the queries are query_embed itself: "
            f"expected width {width} as in linear1.weight, found {label}"
        )
    if fused < label:
        raise WeightsError(
            f"official weights: linear2.weight: expected at least the {label} columns of "
            f"query_embed, found {fused}"
        )
    if width % heads:
        raise WeightsError(f"official weights: expected heads that divide width {width}, found "
                           f"heads={heads}")  # fmt: skip
    ffn = found["transformer.encoder.layers.0.linear1.weight"].shape[0]
    sizes = {"K": classes, "D": width, "D'": tokens, "D''": fused - label, "D_l": label, "F": ffn}
    layers = {stack: len({m[2] for k in found if (m := _LAYER.match(k)) and m[1] == stack})
              for stack in STACKS}  # fmt: skip
    config = HeadConfig(
        queries="multimodal" if sizes["D''"] else "text",
        classifier="per-class",
        width=width,
        layers=layers["decoder"],
        encoder_layers=layers["encoder"],
        heads=heads,
        ffn=ffn,
        dropout=dropout,
        memory_position="sincos-input",
        label_projection="fused" if joined is None or sizes["D''"] else "always",
        start="torch",
    )
    return config, sizes


def _layers(config: HeadConfig) -> dict[str, int]:
    return {"encoder": config.encoder_layers, "decoder": config.layers}


def _shapes(sizes: Mapping[str, int], config: HeadConfig) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The shapes that each tensor may have."""
    k, d, f = sizes["K"], sizes["D"], sizes["F"]
    leaves = {
        "in_proj_weight": (3 * d, d), "in_proj_bias": (3 * d,), "out_proj.weight": (d, d),
        "out_proj.bias": (d,), "linear1.weight": (f, d), "linear1.bias": (f,),
        "linear2.weight": (d, f), "linear2.bias": (d,),
    }  # fmt: skip
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "query_embed": ((k, sizes["D_l"]),),
        "linear1.weight": ((d, sizes["D'"]),),
        "linear2.weight": ((d, sizes["D_l"] + sizes["D''"]),),
        "group_linear.W": ((1, k, d), (k, d)),
        "group_linear.b": ((1, k), (k,)),
    }
    for name, _ in transformer_names(_layers(config)):
        leaf = next((shape for end, shape in leaves.items() if name.endswith(f".{end}")), (d,))
        shapes[name] = (leaf,)
    return shapes


def _require_shapes(
    found: Mapping[str, Tensor], shapes: Mapping[str, tuple[tuple[int, ...], ...]]
) -> None:
    """Refuse tensors of other shapes than those that K and the widths ask for."""
    lines = [
        f"{name}: expected {list(shapes[name][0])}, found {list(tensor.shape)}"
        for name, tensor in found.items()
        if tuple(tensor.shape) not in shapes[name]
    ]
    if lines:
        raise WeightsError("official weights:\n  " + "\n  ".join(lines[:_SHOWN]))


def _require_code(position: Tensor, width: int) -> None:
    """Refuse another position code than the one added here; float32 sines are 1e-4 apart."""
    rows = position.double().reshape(-1, position.shape[-1])
    if rows.shape[1] != width or float((rows.cpu() - sincos(*rows.shape)).abs().max()) > 1e-3:
        raise WeightsError(
            f"official weights: {_POSITION}: expected the sin/cos code of width {width}, sines in "
            f"the even channels, found another of shape {list(position.shape)}"
        )


def _unpacked(
    found: Mapping[str, Tensor], config: HeadConfig, sizes: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """Names here and their tensors, apart from the label embedding."""
    yield "memory.weight", found["linear1.weight"]
    joined = found.get("linear2.weight")
    if joined is not None:
        yield "fuse_label.weight", joined[:, : sizes["D_l"]]
        if sizes["D''"]:
            yield "fuse_image.weight", joined[:, sizes["D_l"] :]
    for theirs, here in transformer_names(_layers(config)):
        yield from zip(here, found[theirs].chunk(len(here)), strict=True)
    yield "classifier.weight", found["group_linear.W"].reshape(sizes["K"], sizes["D"])
    yield "classifier.bias", found["group_linear.b"].reshape(sizes["K"])


def _listed(keys: list[str]) -> str:
    """`a, b, … (12 in all)`, or `nothing`."""
    shown = ", ".join(keys[:_SHOWN]) or "nothing"
    return shown if len(keys) <= _SHOWN else f"{shown}, … ({len(keys)} in all)"
