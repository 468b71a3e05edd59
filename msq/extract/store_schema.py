"""The feature store's layout: names, dimensions, number types, attributes, small arrays.

`store_keys` makes files of it, `store_difference` tells two stores apart.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from msq.errors import UsageError
from msq.extract.datasets.dataset import Dataset
from msq.extract.encoders.prompts import AVERAGE, Prompt, joined, templates_of
from msq.extract.encoders.spec import EncoderSpec

SCHEMA = 1
MISSING, OK, UNDECODABLE, DEGRADED = 0, 1, 2, 3
StoreDtype = Literal["float16", "float32", "bfloat16"]
# What the bytes on disk are, by the name that stands in the attributes.
DISK_DTYPE: dict[str, str] = {"float16": "float16", "float32": "float32", "bfloat16": "uint16"}
FEATURE_GROUP = {"video": "tokens", "image": "image", "text": "text"}
IMAGE_FRAMES = "image_frames"  # group of what image encoders say of each frame, on request
FAILURES = "failures"
FAILURES_NOTE = {"about": "one JSON file per shard with clips that failed or decoded only in part"}
CONVERTED = "converted_from"  # the number type before `msq store convert` made it wider

_SLUG = re.compile(r"[a-z0-9_-]+")
_DIMENSIONS = ("clip", "view", "class", "failure")


@dataclass(frozen=True)
class FeatureArray:
    """One large array: a row per clip and view.

    Attributes:
        name: path in the store, such as `tokens/timesformer-embedded`.
        row: shape of one row, without clip and view.
        dtype: numpy name of what is on disk.
        fill: fill value, 0 or NaN.
        sharded: True for `shard` rows per file, False for one row per file.
    """

    name: str
    row: tuple[int, ...]
    dtype: str
    fill: float
    sharded: bool

    @property
    def row_bytes(self) -> int:
        """Bytes of one row without its checksum."""
        return int(np.prod(self.row)) * np.dtype(self.dtype).itemsize

    def key(self, unit: int, view: int = 0) -> str:
        """Path of the file of shard (or, unsharded, row) `unit`."""
        return "/".join([self.name, "c", str(unit), str(view), *("0" for _ in self.row)])


def feature_arrays(spec: EncoderSpec, store_dtype: StoreDtype) -> tuple[FeatureArray, FeatureArray]:
    """The array of features and the array of frame times of one video or image encoder."""
    group = FEATURE_GROUP[spec.kind]
    row = (spec.tokens, spec.channels) if spec.kind == "video" else (spec.channels,)
    features = FeatureArray(
        f"{group}/{spec.slug}", row, DISK_DTYPE[store_dtype], 0.0, spec.pooling != "patch"
    )
    times = FeatureArray(f"time/{spec.slug}", (spec.frames,), "float32", float("nan"), True)
    return features, times


def frame_array(spec: EncoderSpec, store_dtype: StoreDtype) -> FeatureArray:
    """The array of an image encoder's features of each frame, `[T, D'']` a row."""
    row = (spec.frames, spec.channels)
    return FeatureArray(f"{IMAGE_FRAMES}/{spec.slug}", row, DISK_DTYPE[store_dtype], 0.0, True)


def large_arrays(
    spec: EncoderSpec, store_dtype: StoreDtype, image_frames: bool
) -> tuple[FeatureArray, ...]:
    """All arrays of a video or image encoder but `status`, in the order they are written."""
    features, times = feature_arrays(spec, store_dtype)
    frames = (frame_array(spec, store_dtype),) if image_frames else ()
    return features, *frames, times


def check_slug(slug: str, what: str, dimensions: Iterable[str]) -> None:
    """Refuse a name that cannot stand in a store.

    Raises:
        UsageError: other characters than a-z, 0-9, `_`, `-`, or the name of a dimension (xarray
            takes an array of a dimension's name for that dimension's coordinate).
    """
    if not _SLUG.fullmatch(slug):
        raise UsageError(f"{what} {slug!r}: only a-z, 0-9, _ and - are possible in its name")
    if slug in {*_DIMENSIONS, *dimensions}:
        raise UsageError(f"{what} {slug!r}: a dimension of the store has this name; choose another")


def encoder_dimensions(slug: str) -> tuple[str, str, str]:
    """The dimensions that belong to one encoder."""
    return f"{slug}_token", f"{slug}_channel", f"{slug}_frame"


def root_attributes(dataset: Dataset) -> dict[str, Any]:
    """`attributes.msq` of the root group, without the version of msq."""
    return {
        "schema": SCHEMA,
        "dataset": dataset.name,
        "task": dataset.task,
        "metric": dataset.metric,
        "classes": list(dataset.classes),
        "clips": len(dataset.clips),
        "clip_list_hash": dataset.clip_list_hash(),
        **_partition_attributes(dataset),
        **({"groups": {k: list(v) for k, v in dataset.groups.items()}} if dataset.groups else {}),
        **({"variant": dataset.variant} if dataset.variant else {}),
    }


def _partition_attributes(dataset: Dataset) -> dict[str, Any]:
    """The names of the partitions in order, and a hash of each; nothing where there are none."""
    listed = []
    for name, splits in dataset.partitions.items():
        check_slug(name, "partition", ())
        digest = hashlib.sha256("\n".join(splits).encode()).hexdigest()
        listed.append({"name": name, "sha256": digest})
    return {"partitions": listed} if listed else {}


def label_matrix(dataset: Dataset) -> NDArray[np.uint8]:
    """Labels `[clips, classes]`, 1 where the clip has the class."""
    labels = np.zeros((len(dataset.clips), len(dataset.classes)), dtype=np.uint8)
    for row, clip in enumerate(dataset.clips):
        labels[row, list(clip.labels)] = 1
    return labels


def known_matrix(dataset: Dataset) -> NDArray[np.bool_] | None:
    """Which labels are known `[clips, classes]`; None where all are."""
    if not any(clip.unknown for clip in dataset.clips):
        return None
    known = np.ones((len(dataset.clips), len(dataset.classes)), dtype=np.bool_)
    for row, clip in enumerate(dataset.clips):
        known[row, list(clip.unknown)] = False
    return known


def encoder_attributes(
    spec: EncoderSpec, dataset_name: str, store_dtype: StoreDtype, shard: int
) -> dict[str, Any]:
    """What each array of an encoder carries: how its rows were made."""
    return {
        "spec": spec.line(dataset_name),
        "spec_hash": spec.fingerprint(dataset_name),
        "encoder": spec.to_dict(),
        "store_dtype": store_dtype,
        "shard": shard,
    }


def array_names(kind: str, slug: str, image_frames: bool = False) -> tuple[str, ...]:
    """Paths of the arrays of one video or image encoder: features first, `status` last.

    Args:
        kind: of the encoder.
        slug: its name.
        image_frames: whether its features of each frame are there, too; they come second.
    """
    frames = (f"{IMAGE_FRAMES}/{slug}",) if image_frames else ()
    return f"{FEATURE_GROUP[kind]}/{slug}", *frames, f"time/{slug}", f"status/{slug}"


def text_attributes(spec: EncoderSpec, dataset_name: str, template: Prompt) -> dict[str, Any]:
    """What the class embeddings of one prompt carry, without the words it does not know.

    A set of several templates is listed in `templates`, with the rule that makes one of them.
    """
    templates = templates_of(template)
    several = {"templates": list(templates), "average": AVERAGE} if len(templates) > 1 else {}
    return {
        "spec": spec.line(dataset_name),
        "spec_hash": spec.fingerprint(dataset_name),
        "encoder": spec.to_dict(),
        "template": joined(template),
        **several,
    }


def templates_in(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """The templates that made an array of class embeddings, from its attributes."""
    return tuple(attributes.get("templates") or (attributes["template"],))
