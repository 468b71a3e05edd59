"""Features that a trained head scores: rows of a store, and what its encoders made of videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from msq.errors import UsageError
from msq.head.features import Features, StoreLike, load_features
from msq.head.predict_labels import templates_of


def rows_of_store(meta: Mapping[str, Any], rows: Any, store: StoreLike | None) -> Features:
    """Rows of a store, by the encoders and the prompt of a run.

    Args:
        meta: the header of the run's `head.safetensors`.
        rows: their numbers.
        store: an open feature store.

    Raises:
        UsageError: no store, or rows of it have no features.
    """
    if store is None:
        raise UsageError("predict: row numbers need store=, an open feature store")
    specs = meta["encoders"]
    video, image, text = (specs.get(k, {}).get("slug") for k in ("video", "image", "text"))
    prompt = _own_prompt(meta, store, text)
    features = load_features(store, video, image, text, prompt, view=meta["view"])
    ids = list(store.clips)
    wanted = [ids[int(row)] for row in rows]
    place = {clip: row for row, clip in enumerate(features.ids)}
    missing = [clip for clip in wanted if clip not in place]
    if missing:
        raise UsageError(f"store of {store.name}: {len(missing)} of the rows asked for have no "
                         f"features, the first is {missing[0]!r}")  # fmt: skip
    return features.select(rows=torch.tensor([place[clip] for clip in wanted]))


def _own_prompt(meta: Mapping[str, Any], store: StoreLike, text: str | None) -> str | None:
    """Name of the run's own prompt in a store that may hold several."""
    if text is None or not hasattr(store, "templates") or not hasattr(store, "prompts"):
        return None
    own = templates_of(meta["prompt"] or "{}")
    names = [name for name in store.prompts(text) if list(store.templates(text, name)) == own]
    return names[0] if names else None


def encoded_clips(
    meta: Mapping[str, Any], outputs: Sequence[Sequence[Tensor]], device: torch.device
) -> Features:
    """Clips as the encoders of a run made them.

    Args:
        meta: the header of the run's `head.safetensors`.
        outputs: of each clip, of which there may be none: tokens [S, D'] and, with an image
            encoder, the image feature [D''].
        device: where to put them.
    """
    n, classes = len(outputs), tuple(meta["classes"])
    spec = meta["encoders"]["video"]
    empty = torch.zeros(0, spec["tokens"], spec["channels"], device=device)
    fused = n > 0 and len(outputs[0]) > 1
    return Features(
        name=meta["dataset"],
        task=meta["task"],
        classes=classes,
        ids=tuple(str(i) for i in range(n)),
        splits=("test",) * n,
        tokens=torch.stack([x[0] for x in outputs]).to(device) if n else empty,
        labels=torch.zeros(n, len(classes), dtype=torch.uint8, device=device),
        image=torch.stack([x[1] for x in outputs]).to(device) if fused else None,
    )
