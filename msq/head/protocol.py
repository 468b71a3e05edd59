"""Are these the features that a protocol is about?"""

from __future__ import annotations

from typing import Any

from msq.config import RunConfig
from msq.errors import SpecMismatch
from msq.head.features import Features
from msq.protocol import EXTRACT_FIXED

_WORDS = {"short_side": "short side"}


def require_protocol(features: Features, config: RunConfig) -> None:
    """Refuse features that the run's protocol was not made for.

    `official` needs band-pooled tokens, CLIP's poolers, the authors' choice and preprocessing of
    frames and bare class names; `paper` refuses band pooling, whose tokens are no frames (Eq. 3).

    Raises:
        SpecMismatch: listing what differs, and how to extract what is needed.
    """
    protocol, queries = config.train.protocol, config.head.queries
    specs = features.specs
    if protocol == "paper":
        if specs.get("video", {}).get("pooling") == "band":
            raise SpecMismatch(
                f"features of {features.name}: protocol paper needs one token per frame (Eq. 3): "
                "video pooling: expected frame, found band; extract with `msq extract --pooling "
                "frame`, or train with --protocol official"
            )
        return
    fixed = EXTRACT_FIXED["official"]
    inputs = [(name, fixed[name]) for name in ("sampling", "size", "short_side", "mean", "std")]
    needed = [("video", "pooling", fixed["pooling"]), *(("video", *pair) for pair in inputs)]
    if queries == "multimodal":
        needed += [("image", "output", fixed["clip_output"])]
        needed += [("image", *pair) for pair in inputs]
    if queries != "vanilla":
        needed.append(("text", "output", fixed["clip_output"]))
    lines = [
        f"{kind} {_WORDS.get(name, name)}: expected {_shown(value)}, found {_shown(found)}"
        for kind, name, value in needed
        if (found := _plain(specs.get(kind, {}).get(name))) != value
    ]
    if queries != "vanilla" and features.prompt not in (None, "{}"):
        found = features.prompt if isinstance(features.prompt, str) else "a set of templates"
        lines.append(f"prompt: expected {{}} (the bare class name), found {found}")
    if lines:
        raise SpecMismatch(
            f"features of {features.name}: protocol official needs others:\n  "
            + "\n  ".join(lines)
            + "\nextract them with `msq extract --protocol official …`, or train with --protocol "
            "paper"
        )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{part:.8g}" for part in value)
    return str(value) if value else "nothing"
