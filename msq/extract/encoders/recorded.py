"""Encoders that a store or a run recorded, loaded again and compared with the record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from msq.errors import SpecMismatch, UsageError, WeightsError, WeightsNotFound
from msq.extract.encoders import ImageEncoder, VideoEncoder, load_clip, load_video_encoder
from msq.extract.encoders.families import location_key, moved_name
from msq.extract.encoders.hf_text import is_text_model
from msq.extract.encoders.locations import recall
from msq.extract.encoders.run_encoder import FOLDER, RUN_PREFIX
from msq.extract.encoders.spec import IMPORTED, EncoderSpec, difference
from msq.extract.encoders.text_families import load_text_encoder


def load_recorded(
    spec: EncoderSpec, moved: str | None = None, device: str = "cpu"
) -> VideoEncoder | ImageEncoder:
    """The video or image encoder of a spec.

    Args:
        spec: what a store says of it.
        moved: where its weights are now; as recorded, or last seen here, where None.
        device: where it runs.

    Raises:
        SpecMismatch: what was loaded is another encoder; the message holds the difference.
        UsageError: its features were imported, and nothing here makes them.
        WeightsError: weights that cannot be found or read.
    """
    if spec.weights.startswith(IMPORTED):
        raise UsageError(
            f"{spec.slug}: its features were imported from "
            f"{spec.weights.removeprefix(IMPORTED)!r}, and msq has no encoder that makes them"
        )
    recorded = spec.to_dict()
    place = find_place(spec.kind, recorded, moved)
    try:
        encoder: VideoEncoder | ImageEncoder = load_towers(
            spec.kind, recorded, place, device, kernels=spec.kernels
        )[spec.kind]
    except WeightsNotFound as error:
        if moved is None:  # nobody named a path that is not there: they moved
            raise WeightsError(str(error)) from error
        raise
    found, wanted = ({**s, "slug": ""} for s in (encoder.spec.to_dict(), recorded))
    if lines := difference(wanted, found):
        raise SpecMismatch(
            f"{spec.slug}: the encoder from {place[0]!r} is not the one that made the features:\n  "
            + "\n  ".join(lines)
        )
    return encoder


def find_place(
    kind: str, recorded: Mapping[str, Any], moved: str | None = None, run: Path | None = None
) -> tuple[str, str | None]:
    """Name and weights to load a recorded encoder by.

    Args:
        kind: `video`, `image` or `text`.
        recorded: `EncoderSpec.to_dict()`.
        moved: where its weights are now, as somebody says.
        run: directory of the run that recorded it, which holds the encoder that it trained.

    Returns:
        As told; in the run's own directory; where the weights were last seen; as recorded.
    """
    if moved is None:
        trained = str(recorded["weights"]).startswith(RUN_PREFIX)
        if kind == "video" and trained and run is not None and (run / FOLDER).is_dir():
            return str(run), None
        key = location_key(recorded["weights"], recorded["sha256"])
        return recall(key) or (recorded["weights"], None)
    if kind == "video":
        return moved_name(recorded["weights"], moved)
    if Path(moved.removeprefix("local-dir:")).is_file():
        return recorded["architecture"], moved
    return moved, None


def load_towers(
    kind: str,
    recorded: Mapping[str, Any],
    place: tuple[str, str | None],
    device: str | torch.device,
    *,
    kernels: str,
) -> dict[str, Any]:
    """Encoders by kind, with the options recorded: a video encoder, or both towers of a CLIP.

    Args:
        kind: `video`, `image` or `text`.
        recorded: `EncoderSpec.to_dict()`.
        place: name and weights, see `find_place`.
        device: where they run.
        kernels: `triton` for attention over time by msq's kernel, else empty.

    Raises:
        UsageError: names and options that cannot be.
        WeightsError: weights that cannot be found or read.
    """
    source, weights = place
    options: dict[str, Any] = {"precision": recorded["precision"], "device": device}
    if kind != "text":
        options.update({name: recorded[name] for name in ("frames", "size", "sampling", "resize")})
        options.update({name: tuple(recorded[name]) for name in ("mean", "std")})
        options["short_side"] = recorded.get("short_side", 0)
    if kind == "video":
        resized = recorded.get("resized", "")
        in_time = resized.endswith("linear") or "linear," in resized
        encoder = load_video_encoder(
            source,
            weights,
            pooling=recorded["pooling"],
            time_resize="linear" if in_time else "nearest",
            space_resize="bicubic" if resized.endswith("bicubic") else "nearest",
            kernels="triton" if kernels == "triton" else "reference",
            **options,
        )
        return {"video": encoder}
    if kind == "image":
        image, text = load_clip(source, weights, output=recorded["output"], **options)
        return {"image": image, "text": text}
    own = "pooling" if is_text_model(recorded["architecture"]) else "clip_output"
    options[own] = recorded["output"]
    return {"text": load_text_encoder(source, weights, **options)}
