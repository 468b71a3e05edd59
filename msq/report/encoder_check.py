"""`msq encoders check`: one encoder loaded as `msq extract` would, and run on one small batch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msq.report import terminal

CLIPS = 2
VIDEO_PREFIXES = ("timm/", "open_clip/", "torchvision/")


def check(
    name: str,
    weights: str | None = None,
    *,
    kind: str = "auto",
    precision: str = "fp32",
    device: str = "auto",
) -> dict[str, Any]:
    """Load an encoder and run it on noise of the size that it wants.

    Args:
        name: as `--video-encoder` or `--image-encoder` of `msq extract` takes it.
        weights: of an architecture in `name`.
        kind: `video`, `image`, or `auto`: image for a CLIP (an architecture of open_clip, or a
            folder with its configuration), else video.
        precision: `fp32`, `bf16` or `fp16`.
        device: where it runs.

    Returns:
        `encoder, kind, weights, sha256, spec, frames, size, tokens` (S; None for an image
        encoder), `channels` (D'), `shape` of the output, `finite, device, load_seconds` (its
        libraries with it), `seconds` (of the batch of `clips` clips).

    Raises:
        UsageError: a name that means nothing, or a path at which there is nothing.
        WeightsError: weights that cannot be fetched, read, or do not fit.
    """
    import torch

    from msq.extract.devices import resolve_device
    from msq.head.device import in_words

    place = resolve_device(device)
    kind = kind if kind != "auto" else kind_of(name)
    began = time.perf_counter()
    encoder = _loaded(name, weights, kind, precision, place)
    loaded = time.perf_counter() - began
    spec = encoder.spec
    noise = torch.Generator().manual_seed(0)
    video = torch.randn(CLIPS, spec.frames, 3, spec.size, spec.size, generator=noise)
    began = time.perf_counter()
    out = encoder(video).cpu()
    return {
        "encoder": spec.slug,
        "kind": spec.kind,
        "weights": spec.weights,
        "sha256": spec.sha256,
        "spec": spec.line(""),
        "frames": spec.frames,
        "size": spec.size,
        "tokens": spec.tokens or None,
        "channels": spec.channels,
        "shape": list(out.shape),
        "finite": bool(torch.isfinite(out).all()),
        "device": in_words(place, precision),
        "load_seconds": loaded,
        "seconds": time.perf_counter() - began,
        "clips": CLIPS,
    }


def kind_of(name: str) -> str:
    """`image` for the name of a CLIP, else `video`."""
    if name == "embedded" or name.startswith(VIDEO_PREFIXES):
        return "video"
    from msq.extract.encoders.clip_source import CONFIG_FILE
    from msq.extract.encoders.weights import FOLDER_PREFIX

    place = Path(name.removeprefix(FOLDER_PREFIX)).expanduser()
    if place.is_dir():
        return "image" if (place / CONFIG_FILE).is_file() else "video"
    import open_clip

    return "image" if name.partition("/")[0] in open_clip.list_models() else "video"


def _loaded(name: str, weights: str | None, kind: str, precision: Any, device: str) -> Any:
    from msq.extract.encoders import load_clip, load_video_encoder
    from msq.extract.request import split_clip_name

    if kind == "image":
        if weights is None:
            name, weights = split_clip_name(name)
        return load_clip(name, weights, precision=precision, device=device)[0]
    if weights is None:
        name, weights = "auto", name
    return load_video_encoder(name, weights, precision=precision, device=device)


def show(found: Mapping[str, Any], *, json: bool = False) -> int:
    """What was found, on stdout; 4 where the output is not finite, else 0."""
    if json:
        terminal.print_json(found)
    else:
        size = f"{found['frames']} frames of {found['size']} pixels"
        tokens = "a vector" if found["tokens"] is None else f"{found['tokens']} tokens (S)"
        verdict = "finite" if found["finite"] else "NOT finite: another --precision may help"
        print(f"{found['encoder']}: {found['kind']} encoder, weights {found['weights']}")
        print(f"spec: {found['spec']}")
        print(f"sha256: {found['sha256']}")
        print(f"{size} -> {tokens} of width {found['channels']} (D')")
        print(f"output {found['shape']} of {found['clips']} clips: {verdict}")
        print(
            f"{found['device']}: loaded in {found['load_seconds']:.2f} s, "
            f"batch in {found['seconds']:.2f} s"
        )
    return 0 if found["finite"] else 4
