"""What the two protocols fix: `paper` (the equations as printed), `official` (the authors' code).

Keys are dotted as in `msq.config`, which takes its defaults from here and checks against it.
"""

from __future__ import annotations

from typing import Any, Literal

Protocol = Literal["paper", "official"]

# What a protocol is: with other values it would be something else under the same name.
FIXED: dict[Protocol, dict[str, Any]] = {
    "paper": {
        "head.encoder_layers": 0,
        "head.label_projection": "always",
        "train.epoch_clips": 0,
        "train.select_by": "map",
    },
    "official": {
        "head.classifier": "per-class",
        "head.width": 512,
        "head.layers": 6,
        "head.heads": 8,
        "head.ffn": 2048,
        "head.dropout": 0.1,
        "head.memory_position": "sincos-input",
        "head.query_position": False,
        "head.encoder_layers": 6,
        "head.label_projection": "fused",
        "head.start": "torch",
        "optim.name": "adam",
        "optim.weight_decay": 0.0,
        "optim.schedule": "warm-restarts",
        "optim.warmup": 0.0,
        "optim.clip_grad": 0.0,
        "optim.beta2": 0.999,
        "train.select_by": "official",
        "train.ema": 0.0,
    },
}
# How much of it: may be changed, and every result lists what was.
AMOUNTS: dict[Protocol, dict[str, Any]] = {
    "paper": {},
    "official": {
        "optim.lr": 1e-5,
        "optim.restart_epochs": 10,
        "train.epochs": 100,
        "train.epoch_clips": 2500,
        "train.batch": 32,
        "train.loss": "auto",
        "train.precision": "fp32",
    },
}

# CLIP's own preprocessing, which the authors' code applies for both encoders.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# The same for stage one: settings of `msq extract`, and options of datasets ({frames} is T).
EXTRACT_FIXED: dict[Protocol, dict[str, Any]] = {
    "paper": {},
    "official": {
        "pooling": "band",
        "clip_output": "pooler",
        "sampling": "official",
        "size": 224,
        "short_side": 256,
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
        "prompts": ("{}",),
    },
}
EXTRACT_AMOUNTS: dict[Protocol, dict[str, Any]] = {"paper": {}, "official": {"frames": 10}}
EXTRACT_OPTIONS: dict[Protocol, dict[str, dict[str, str]]] = {
    "paper": {},
    "official": {
        "charades": {"frames": "labelled", "targets": "{frames}", "unlabelled": "skip"},
    },
}


def preset(protocol: Any) -> dict[str, dict[str, Any]]:
    """What a protocol sets, by section; nothing for a name that is none (checked elsewhere)."""
    sections: dict[str, dict[str, Any]] = {}
    if protocol in FIXED:
        values = {**FIXED[protocol], **AMOUNTS[protocol], "train.protocol": protocol}
        for key, value in values.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
    return sections
