"""The encoder that a store or a run recorded, loaded again and compared with the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from msq.errors import SpecMismatch, UsageError
from msq.extract.encoders import ImageEncoder, VideoEncoder, load_clip, load_video_encoder
from msq.extract.encoders.families import location_key, moved_name
from msq.extract.encoders.locations import recall
from msq.extract.encoders.spec import IMPORTED, EncoderSpec, Output, Pooling, difference


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
    source, weights = _place(spec, moved)
    options: dict[str, Any] = {
        "precision": spec.precision,
        "device": device,
        "frames": spec.frames,
        "size": spec.size,
        "sampling": spec.sampling,
        "resize": spec.resize,
        "mean": spec.mean,
        "std": spec.std,
        "short_side": spec.short_side,
    }
    encoder: VideoEncoder | ImageEncoder
    if spec.kind == "video":
        in_time = spec.resized.endswith("linear") or "linear," in spec.resized
        encoder = load_video_encoder(
            source,
            weights,
            pooling=cast("Pooling", spec.pooling),
            time_resize="linear" if in_time else "nearest",
            space_resize="bicubic" if spec.resized.endswith("bicubic") else "nearest",
            kernels=spec.kernels or "reference",
            **options,
        )
    else:
        encoder, _ = load_clip(source, weights, output=cast("Output", spec.output), **options)
    found, wanted = ({**s.to_dict(), "slug": ""} for s in (encoder.spec, spec))
    if lines := difference(wanted, found):
        raise SpecMismatch(
            f"{spec.slug}: the encoder from {source!r} is not the one that made the features:\n  "
            + "\n  ".join(lines)
        )
    return encoder


def _place(spec: EncoderSpec, moved: str | None) -> tuple[str, str | None]:
    """Name and weights to load an encoder by."""
    if moved is None:
        return recall(location_key(spec.weights, spec.sha256)) or (spec.weights, None)
    if spec.kind == "video":
        return moved_name(spec.weights, moved)
    if Path(moved.removeprefix("local-dir:")).is_file():
        return spec.architecture, moved
    return moved, None
