"""An image encoder's features of each frame, which a store may hold beside their mean.

The mean over frames is what a head is trained on; the features of each frame are stored on request
(`--image-frames`). One commit record counts for both.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msq.errors import SpecMismatch, UsageError
from msq.extract import store_schema as schema
from msq.extract.encoders.spec import EncoderSpec

_ROUNDING = 2.0**-7  # twice that of bfloat16, of the number types the one with the fewest digits
_SMALLEST = 2.0**-23  # float16 holds nothing between 0 and half of it


def has_image_frames(store: Path, slug: str) -> bool:
    """Whether a store holds what an encoder says of each frame, be it damaged.

    Its metadata may be gone while its chunks are there: then it is not as if they had never been.
    """
    folder = store / schema.IMAGE_FRAMES / slug
    if (folder / "zarr.json").exists():
        return True
    return any(f.is_file() and not f.name.startswith(".") for f in folder.rglob("*"))


def refuse_image_frames(store: Path, spec: EncoderSpec) -> None:
    """Refuse to put features of each frame beside those of an encoder that was stored without.

    One commit record counts for all arrays of an encoder: those that are there would vouch for
    frames that are not. Where nothing was committed yet, nothing stands in the way.

    Raises:
        SpecMismatch: some of its rows are there.
        UsageError: it is no image encoder.
    """
    if spec.kind != "image":
        raise UsageError(
            f"image frames: expected an image encoder, found {spec.slug} ({spec.kind})"
        )
    if any(f.is_file() for f in (store / "status" / spec.slug / "c").rglob("*")):
        raise SpecMismatch(
            f"{store}: {spec.slug} was extracted without its features of each frame: expected "
            f"{schema.IMAGE_FRAMES}/{spec.slug} (--image-frames), found image/{spec.slug} alone; "
            "they are not added to rows that are there.\nLeave --image-frames out, write to "
            "another store, or make this encoder's features anew beside all the others:\n"
            f"  msq store convert {store} NEW.zarr --drop {spec.slug}\n"
            "  the same msq extract with --out NEW.zarr --image-frames"
        )


def apart(
    pooled: NDArray[np.generic], frames: NDArray[np.generic], store_dtype: str
) -> NDArray[np.bool_]:
    """Rows `[n]` whose features of each frame do not average to their image features.

    Both were rounded after the mean had been taken, and again where a store was converted: each
    feature may be off by `_ROUNDING` of its own magnitude and of that of what was averaged.

    Args:
        pooled: image features `[n, D'']` as they are on disk.
        frames: those of each frame `[n, T, D'']`, likewise.
        store_dtype: number type of both.
    """
    mean, each = _numbers(pooled, store_dtype), _numbers(frames, store_dtype)
    allowed = _ROUNDING * (np.abs(each).mean(axis=1) + np.abs(mean)) + _SMALLEST
    return np.asarray((np.abs(each.mean(axis=1) - mean) > allowed).any(axis=1), dtype=np.bool_)


def _numbers(values: NDArray[np.generic], store_dtype: str) -> NDArray[np.float64]:
    if store_dtype == "bfloat16":  # which is the upper half of float32
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)
