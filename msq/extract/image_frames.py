"""An image encoder's features of each frame, which a store may hold beside their mean.

The mean over frames is what a head is trained on; the features of each frame are stored on request
(`--image-frames`). One commit record counts for both.

They can be added to rows that are done. Their files are then written shard by shard, each whole or
not at all, while the encoder's other arrays say `adding`; their own metadata, without which no Zarr
library sees an array, comes when no done row is without, and the others say `stored` after it. So
a commit record vouches at no moment for frames that Zarr would read as zeros.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from msq.errors import MsqError, UsageError
from msq.extract import store_schema as schema
from msq.extract.encoders.spec import EncoderSpec
from msq.extract.store_seal import read_metadata

# None; those of some rows, to be completed by the next extraction; all, be they damaged.
FramesState = Literal["", "adding", "stored"]
KEY = "image_frames"  # in `attributes.msq` of each of an image encoder's arrays
_ROUNDING = 2.0**-7  # twice that of bfloat16, of the number types the one with the fewest digits
_SMALLEST = 2.0**-23  # float16 holds nothing between 0 and half of it


def frames_in(store: Path, slug: str) -> FramesState:
    """Whether a store holds what an encoder says of each frame; see `FramesState`.

    A mark in any of the encoder's arrays is enough: they are written one after the other, and some
    may be damaged. Stores of before there were marks have them where there is anything of them.
    """
    folder = store / schema.IMAGE_FRAMES / slug
    if (folder / "zarr.json").exists():
        return "stored"
    groups = (schema.FEATURE_GROUP["image"], "time", "status")
    marks = {_mark(store / group / slug / "zarr.json") for group in groups}
    if "stored" in marks:
        return "stored"
    if "adding" in marks:
        return "adding"
    return "stored" if any(_is_file(f) for f in folder.rglob("*")) else ""


def _mark(path: Path) -> object:
    try:
        return read_metadata(path)["attributes"]["msq"].get(KEY)
    except (FileNotFoundError, MsqError, KeyError, AttributeError):
        return None


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def attributes_of(state: FramesState) -> dict[str, str]:
    """What an image encoder's arrays say of its features of each frame: nothing without any."""
    return {KEY: state} if state else {}


def asked_for(store: Path, spec: EncoderSpec) -> FramesState:
    """What becomes of a store without frames that is asked for them.

    Where rows are recorded as done, their frames are added: nobody sees them before all of them
    are there, since the record of these rows would vouch for what is missing.

    Raises:
        UsageError: it is no image encoder.
    """
    if spec.kind != "image":
        raise UsageError(
            f"image frames: expected an image encoder, found {spec.slug} ({spec.kind})"
        )
    records = store / "status" / spec.slug / "c"
    return "adding" if any(_is_file(f) for f in records.rglob("*")) else "stored"


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
