"""Folders of random weights in the public layouts, written without any download.

Plain functions: load this file by its path (tests are not a package), e.g.
`runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py")))["write_clip_folder"]`.
The defaults are the public base-size models; pass a smaller configuration for quick tests.
"""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from msq.extract.encoders.timesformer import TimeSformer
from msq.extract.encoders.timesformer_config import TimeSformerConfig
from msq.extract.encoders.timesformer_names import from_msq
from msq.extract.encoders.videomae import VideoMAE, VideoMAEConfig
from msq.extract.encoders.videomae_weights import from_msq as videomae_from_msq

TINY_TIMESFORMER = TimeSformerConfig(
    image_size=(32, 32), patch_size=8, frames=4, width=64, depth=2, heads=1, mlp_ratio=2.0
)
TINY_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 64,
        "patch_size": 8,
        "head_width": 16,
    },
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def randomise(model: nn.Module, seed: int = 0, std: float = 0.02) -> None:
    """Adds noise to every parameter, so that none is at a start value that hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)


def random_timesformer(
    config: TimeSformerConfig | None = None, seed: int = 0, std: float = 0.02
) -> TimeSformer:
    """A TimeSformer (base size by default) with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    model = TimeSformer(config or TimeSformerConfig())
    randomise(model, seed, std)
    return model.eval()


def huggingface_config(config: TimeSformerConfig) -> dict[str, Any]:
    """The `config.json` that Hugging Face would write for a TimeSformer."""
    height, width = config.image_size
    return {
        "model_type": "timesformer",
        "architectures": ["TimesformerForVideoClassification"],
        "attention_type": "divided_space_time",
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "num_channels": 3,
        "num_frames": config.frames,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "drop_path_rate": 0,
    }


def write_timesformer_folder(folder: Path, model: TimeSformer | None = None) -> TimeSformer:
    """Writes a Hugging Face folder (base size by default), classifier head included."""
    model = model or random_timesformer()
    folder.mkdir(parents=True, exist_ok=True)
    state = from_msq(model.state_dict(), "huggingface")
    state["classifier.weight"] = torch.zeros(5, model.config.width)
    state["classifier.bias"] = torch.zeros(5)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(huggingface_config(model.config)))
    return model


def write_fair_file(path: Path, model: TimeSformer) -> None:
    """Writes FAIR's `.pyth`: `model_state` with the prefix `model.`, a head, and an epoch."""
    state = from_msq(model.state_dict(), "fair")
    state["model.head.weight"] = torch.zeros(5, model.config.width)
    state["model.head.bias"] = torch.zeros(5)
    torch.save({"epoch": 3, "model_state": state, "cfg": "TRAIN:\n  DATASET: kinetics\n"}, path)


def write_embedded_timesformer(folder: Path, model: TimeSformer) -> None:
    """Writes the layout of the embedded encoder: our names, half precision, our config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(half, folder / "model.safetensors")
    config = {
        "architecture": model.config.to_dict(),
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.25, 0.3],
        "frames": model.config.frames,
        "size": model.config.image_size[0],
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_clip_folder(folder: Path, config: dict[str, Any] | None = None, seed: int = 0) -> None:
    """Writes an open_clip folder for `local-dir:` (ViT-B-16 by default) with random weights."""
    import open_clip

    config = config or open_clip.get_model_config("ViT-B-16")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    root = logging.getLogger()
    handlers = list(root.handlers)
    model_class = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    model = model_class(**{k: v for k, v in config.items() if k != "custom_text"})
    randomise(model, seed)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3]}})
    )
    root.handlers[:] = handlers


def write_bpe(path: Path, merges: list[tuple[str, str]]) -> int:
    """Writes a table of byte-pair merges as open_clip reads it; returns the vocabulary's size."""
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    with gzip.open(path, "wb") as file:
        file.write("\n".join(lines).encode())
    return 512 + len(merges) + 2


TINY_VIDEOMAE = VideoMAEConfig(
    image_size=(32, 32), patch_size=8, frames=4, width=48, depth=2, heads=4, mlp_width=96
)


def videomae_json(config: VideoMAEConfig) -> dict[str, Any]:
    """The `config.json` that Hugging Face would write for a VideoMAE."""
    return {
        "model_type": "videomae",
        "image_size": config.image_size[0],
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


def write_videomae_folder(
    folder: Path, config: VideoMAEConfig = TINY_VIDEOMAE, seed: int = 0, std: float = 0.02
) -> VideoMAE:
    """Writes a fine-tuned VideoMAE as on the hub, `fc_norm` and classifier included."""
    torch.manual_seed(seed)
    model = VideoMAE(config).eval()
    randomise(model, seed, std)
    folder.mkdir(parents=True, exist_ok=True)
    state = videomae_from_msq(model.state_dict())
    for name in ("fc_norm.weight", "fc_norm.bias", "classifier.bias"):
        state[name] = torch.zeros(config.width)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(videomae_json(config)))
    return model
