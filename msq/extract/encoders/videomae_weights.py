"""VideoMAE checkpoints in Hugging Face's layout: names, configurations, loading.

What "after the final LayerNorm" means here. A pre-trained encoder (`use_mean_pooling: false`, such
as `MCG-NJU/videomae-base`) ends in a LayerNorm on its tokens, which is applied. A fine-tuned one
(`use_mean_pooling: true`, such as `MCG-NJU/videomae-base-finetuned-kinetics`) has none: its
`fc_norm` was trained on the one mean over all tokens, right before the classifier, and means
nothing for a single token or the mean of a tubelet. It is left out together with the classifier,
and the tokens are those of the last layer. In both cases the tokens are exactly the
`last_hidden_state` of transformers' `VideoMAEModel`, which the authors of MSQNet use.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from msq.errors import WeightsError
from msq.extract.encoders.videomae import VideoMAE, VideoMAEConfig
from msq.extract.encoders.weights import WeightFiles, load_strictly, read_tensors, shortened

# ImageNet's, which VideoMAE was trained with and its preprocessor_config.json repeats.
DEFAULT_MEAN = (0.485, 0.456, 0.406)
DEFAULT_STD = (0.229, 0.224, 0.225)
_HEADS = ("classifier.", "fc_norm.", "decoder.", "encoder_to_decoder.", "mask_token")
_TOP_NAMES = {
    "embeddings.patch_embeddings.projection.weight": "stem.weight",
    "embeddings.patch_embeddings.projection.bias": "stem.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_BLOCK_NAMES = {
    "layernorm_before": "attention_norm",
    "attention.attention.query": "attention.query",
    "attention.attention.key": "attention.key",
    "attention.attention.value": "attention.value",
    "attention.output.dense": "attention.out",
    "layernorm_after": "mlp_norm",
    "intermediate.dense": "mlp.up",
    "output.dense": "mlp.down",
}
# Files on the hub name two biases apart; newer releases of transformers write `query.bias`.
_BLOCK_BIASES = {
    "attention.attention.q_bias": "attention.query.bias",
    "attention.attention.v_bias": "attention.value.bias",
}
_log = logging.getLogger(__name__)


def to_msq(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of Hugging Face's layout under our names.

    Returns:
        The tensors (unknown ones keep their own name, so that a strict load reports them), and
        the names of the heads' tensors that were left out.

    Raises:
        WeightsError: for another layout, or one tensor under two names.
    """
    bare = {name.removeprefix("videomae."): name for name in state}
    if not any(name.startswith(("encoder.layer.", "embeddings.")) for name in bare):
        hint = (
            ": the authors' own layout; take the same weights from hf-hub:MCG-NJU/…"
            if any(name.endswith("attn.q_bias") for name in bare)
            else ""
        )
        raise WeightsError(
            f"{source}: expected a VideoMAE in Hugging Face's layout (videomae.encoder.layer.…), "
            f"found names {shortened([*state])}{hint}"
        )
    ours: dict[str, Tensor] = {}
    ignored = []
    for short, name in bare.items():
        if short.startswith(_HEADS):
            ignored.append(name)
            continue
        own = _rename(short) or name
        if own in ours:
            raise WeightsError(f"{source}: {name} is there twice, under two spellings")
        ours[own] = state[name]
    return ours, ignored


def _rename(name: str) -> str | None:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
    if match is None:
        return None
    block, rest = match.groups()
    if rest in _BLOCK_BIASES:
        return f"blocks.{block}.{_BLOCK_BIASES[rest]}"
    middle, _, leaf = rest.rpartition(".")
    return f"blocks.{block}.{_BLOCK_NAMES[middle]}.{leaf}" if middle in _BLOCK_NAMES else None


def from_msq(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names that files on the hub have, with their prefix `videomae.`."""
    top = {ours: theirs for theirs, ours in _TOP_NAMES.items()}
    blocks = {ours: theirs for theirs, ours in _BLOCK_NAMES.items()}
    biases = {ours: theirs for theirs, ours in _BLOCK_BIASES.items()}
    renamed = {}
    for name, tensor in state.items():
        if name in top:
            renamed[f"videomae.{top[name]}"] = tensor
            continue
        _, block, rest = name.split(".", 2)
        middle, _, leaf = rest.rpartition(".")
        theirs = biases.get(rest) or f"{blocks[middle]}.{leaf}"
        renamed[f"videomae.encoder.layer.{block}.{theirs}"] = tensor
    return renamed


def config_from_huggingface(values: Mapping[str, Any], source: str) -> VideoMAEConfig:
    """Reads a Hugging Face `config.json`; absent keys mean Hugging Face's defaults.

    Raises:
        WeightsError: for a variant whose forward pass is not the one implemented here.
    """
    required = {"model_type": "videomae", "hidden_act": "gelu", "num_channels": 3}
    wrong = [
        f"{k} (expected {v!r}, found {values[k]!r})"
        for k, v in required.items()
        if k in values and values[k] != v
    ]
    if wrong:
        raise WeightsError(f"{source}: not this VideoMAE: {', '.join(wrong)}")
    patch = _pair(values.get("patch_size", 16))
    if patch[0] != patch[1]:
        raise WeightsError(f"{source}: patches must be square, found {patch[0]}x{patch[1]}")
    return VideoMAEConfig(
        image_size=_pair(values.get("image_size", 224)),
        patch_size=patch[0],
        tubelet=int(values.get("tubelet_size", 2)),
        frames=int(values.get("num_frames", 16)),
        width=int(values.get("hidden_size", 768)),
        depth=int(values.get("num_hidden_layers", 12)),
        heads=int(values.get("num_attention_heads", 12)),
        mlp_width=int(values.get("intermediate_size", 3072)),
        norm_eps=float(values.get("layer_norm_eps", 1e-12)),
        bias=bool(values.get("qkv_bias", values.get("qv_bias", True))),
        final_norm=not values.get("use_mean_pooling", True),
    )


def huggingface_config(config: VideoMAEConfig) -> dict[str, Any]:
    """The inverse of `config_from_huggingface`."""
    return {
        "model_type": "videomae",
        "image_size": list(config.image_size),
        "patch_size": config.patch_size,
        "tubelet_size": config.tubelet,
        "num_channels": 3,
        "num_frames": config.frames,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": "gelu",
        "layer_norm_eps": config.norm_eps,
        "qkv_bias": config.bias,
        "use_mean_pooling": not config.final_norm,
    }


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, list | tuple):
        return int(value[0]), int(value[1])
    return int(value), int(value)


@dataclass(frozen=True)
class LoadedVideoMAE:
    """A VideoMAE with what its checkpoint says about its input.

    Attributes:
        model: in evaluation mode.
        mean: the checkpoint's own, per channel.
        std: likewise.
        resized: note of a position table computed for another T or size, else empty.
        ignored: names of the heads' tensors that were left out.
    """

    model: VideoMAE
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resized: str
    ignored: tuple[str, ...]


def load_videomae(
    files: WeightFiles,
    *,
    frames: int | None = None,
    size: int | None = None,
    strict: bool = True,
) -> LoadedVideoMAE:
    """Loads a VideoMAE from a folder in Hugging Face's layout.

    Another T or size needs no interpolation: the position table has no weights and is computed
    for the new number of tokens, as the authors do when they fine-tune at another one.

    Args:
        files: the weights, with `config.json` beside them.
        frames: T; the checkpoint's own by default.
        size: height and width in pixels; the checkpoint's own by default.
        strict: refuse missing and unexpected names; otherwise they are logged.

    Raises:
        WeightsError: if the checkpoint is not one of this architecture.
        UsageError: for a T or a size that tubelets or patches do not divide.
    """
    values = files.read_json("config.json")
    if values is None:
        raise WeightsError(
            f"{files.id}: expected config.json beside the weights, which says how many heads and "
            "frames a VideoMAE has; found none"
        )
    source = config_from_huggingface(values, files.id)
    state, ignored = to_msq(read_tensors(files.file), files.id)
    image_size = source.image_size if size is None else (size, size)
    target = replace(source, frames=frames or source.frames, image_size=image_size)
    model = VideoMAE(target)
    for problem in load_strictly(model, state, files.id, strict=strict):
        _log.warning("%s: %s", files.id, problem)
    if ignored:
        _log.info("%s: heads left out: %s", files.id, shortened(ignored))
    old, new = (f"{c.steps}x{c.grid[0]}x{c.grid[1]}" for c in (source, target))
    # An encoder that msq trained has them in its config.json.
    said = {**(files.read_json("preprocessor_config.json") or {}), **values}
    return LoadedVideoMAE(
        model=model.eval(),
        mean=tuple(said.get("image_mean", DEFAULT_MEAN)),
        std=tuple(said.get("image_std", DEFAULT_STD)),
        resized="" if old == new else f"positions {old}->{new} computed",
        ignored=tuple(ignored),
    )


def describe(config: VideoMAEConfig) -> str:
    """The architecture in words, for specs."""
    return (
        f"videomae p{config.patch_size} t{config.tubelet} d{config.depth} w{config.width} "
        f"h{config.heads} m{config.mlp_width} eps{config.norm_eps:g}"
        f"{' norm' if config.final_norm else ''}"
    )
