"""Are these the features that a protocol is about?"""

from __future__ import annotations

from msq.config import RunConfig
from msq.errors import SpecMismatch
from msq.head.features import Features


def require_protocol(features: Features, config: RunConfig) -> None:
    """Refuse features that the run's protocol was not made for.

    `official` needs band-pooled tokens, CLIP's poolers, the authors' choice of frames and bare
    class names; `paper` refuses band pooling, whose tokens are no frames (Eq. 3).

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
    needed = [("video", "pooling", "band"), ("video", "sampling", "official")]
    if queries == "multimodal":
        needed += [("image", "output", "pooler"), ("image", "sampling", "official")]
    if queries != "vanilla":
        needed.append(("text", "output", "pooler"))
    lines = [
        f"{kind} {name}: expected {value}, found {specs.get(kind, {}).get(name) or 'nothing'}"
        for kind, name, value in needed
        if specs.get(kind, {}).get(name) != value
    ]
    if queries != "vanilla" and features.prompt not in (None, "{}"):
        lines.append(f"prompt: expected {{}} (the bare class name), found {features.prompt}")
    if lines:
        raise SpecMismatch(
            f"features of {features.name}: protocol official needs others:\n  "
            + "\n  ".join(lines)
            + "\nextract them with `msq extract --pooling band --clip-output pooler --sampling "
            "official …`, or train with --protocol paper"
        )
