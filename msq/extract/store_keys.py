"""The files of a feature store that are no features: key -> bytes.

Metadata and the small arrays (clip, split, label, text) are made by zarr-python in memory;
`store_writer` publishes each key atomically. The large arrays' chunks are made by `shard`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from msq.extract import store_schema as schema
from msq.extract.datasets.dataset import Dataset
from msq.extract.encoders.prompts import Prompt
from msq.extract.encoders.spec import EncoderSpec
from msq.extract.image_frames import FramesState
from msq.extract.image_frames import attributes_of as frames_attributes
from msq.extract.store_seal import sealed
from msq.extract.store_versions import library_versions
from msq.extract.store_views import attributes_of
from msq.extract.views import CLEAN, View


class StoreKeys:
    """Builds part of a store in memory and hands out its keys and bytes."""

    def __init__(self) -> None:
        self._content: dict[str, Any] = {}
        self._store = MemoryStore(self._content)

    def group(self, path: str, attributes: Mapping[str, Any] | None = None) -> None:
        """Add a group; `path` "" is the root."""
        zarr.create_group(self._store, path=path, zarr_format=3, attributes=dict(attributes or {}))

    def array(
        self,
        path: str,
        shape: Sequence[int],
        dtype: str,
        dimensions: Sequence[str],
        *,
        chunks: Sequence[int] | None = None,
        shards: Sequence[int] | None = None,
        fill: float | str = 0,
        attributes: Mapping[str, Any] | None = None,
        values: NDArray[np.generic] | None = None,
    ) -> None:
        """Add an array, checksummed and not compressed; one chunk unless told otherwise."""
        array = zarr.create_array(
            self._store,
            name=path,
            shape=tuple(shape),
            dtype=dtype,
            chunks=tuple(chunks or (max(1, n) for n in shape)),
            shards=None if shards is None else tuple(shards),
            filters=None,
            serializer="auto" if dtype in ("string", "uint8") else BytesCodec(endian="little"),
            compressors=[Crc32cCodec()],
            fill_value=fill,
            dimension_names=list(dimensions),
            attributes={} if attributes is None else {"msq": dict(attributes)},
            # Without this an all-zero label matrix would have no file, as if it had been lost.
            config={"write_empty_chunks": True},
        )
        if values is not None:
            array[...] = values

    def keys(self) -> dict[str, bytes]:
        """Key -> bytes, groups before what they hold, metadata before chunks."""
        content = {key: value.to_bytes() for key, value in self._content.items()}
        content |= {k: sealed(v) for k, v in content.items() if k.endswith("zarr.json")}
        return dict(sorted(content.items(), key=lambda item: _publishing_order(item[0])))


def _publishing_order(key: str) -> tuple[int, int, str]:
    metadata = key.endswith("zarr.json")
    return (0 if metadata else 1, key.count("/"), key)


def dataset_keys(
    dataset: Dataset, version: str, label_known: NDArray[np.bool_] | None = None
) -> dict[str, bytes]:
    """The keys that depend on the dataset alone: root, clip, split, partition, label."""
    label_known = schema.known_matrix(dataset) if label_known is None else label_known
    keys = StoreKeys()
    made = {"version": version, "versions": library_versions()}
    keys.group("", {"msq": {**schema.root_attributes(dataset), **made}})
    for name in ("tokens", "image", "time", "status", "text"):
        keys.group(name)
    clips = dataset.clips
    count = len(clips)
    ids = np.array([clip.id for clip in clips], dtype=object)
    splits = np.array([clip.split for clip in clips], dtype=object)
    keys.array("clip", (count,), "string", ("clip",), fill="", values=ids)
    keys.array("split", (count,), "string", ("clip",), fill="", values=splits)
    if dataset.partitions:
        keys.group("partition")
    for name, partition in dataset.partitions.items():
        values = np.array(partition, dtype=object)
        keys.array(f"partition/{name}", (count,), "string", ("clip",), fill="", values=values)
    shape = (count, len(dataset.classes))
    keys.array("label", shape, "uint8", ("clip", "class"), values=schema.label_matrix(dataset))
    if label_known is not None:
        known = label_known.astype(np.uint8)
        keys.array("label_known", shape, "uint8", ("clip", "class"), values=known)
    # An empty array, so that zarr does not warn of a folder it does not know.
    keys.array(schema.FAILURES, (0,), "uint8", ("failure",), attributes=schema.FAILURES_NOTE)
    return keys.keys()


def encoder_keys(
    spec: EncoderSpec,
    dataset_name: str,
    clips: int,
    store_dtype: schema.StoreDtype,
    shard: int,
    views: Sequence[View] = (CLEAN,),
    image_frames: FramesState = "",
) -> dict[str, bytes]:
    """Metadata of features, time and status of one video or image encoder.

    Where `image_frames` are stored that of its features of each frame, too.
    """
    keys = StoreKeys()
    attributes = {
        **schema.encoder_attributes(spec, dataset_name, store_dtype, shard),
        **frames_attributes(image_frames),
        **attributes_of(views),
    }
    token, channel, frame = schema.encoder_dimensions(spec.slug)
    dimensions = {
        "tokens": (token, channel),
        "image": (channel,),
        schema.IMAGE_FRAMES: (frame, channel),
        "time": (frame,),
    }
    for array in schema.large_arrays(spec, store_dtype, image_frames == "stored"):
        keys.array(
            array.name,
            (clips, len(views), *array.row),
            array.dtype,
            ("clip", "view", *dimensions[array.name.partition("/")[0]]),
            chunks=(1, 1, *array.row),
            shards=(shard, 1, *array.row) if array.sharded else None,
            fill=array.fill,
            attributes=attributes,
        )
    keys.array(
        f"status/{spec.slug}",
        (clips, len(views)),
        "uint8",
        ("clip", "view"),
        chunks=(shard, 1),
        attributes=attributes,
    )
    return _below(keys, slug=spec.slug)


def image_frames_group() -> dict[str, bytes]:
    """The group of features of each frame, which a store has where some were asked for."""
    keys = StoreKeys()
    keys.group(schema.IMAGE_FRAMES)
    return {k: v for k, v in keys.keys().items() if k.startswith(f"{schema.IMAGE_FRAMES}/")}


def text_keys(
    spec: EncoderSpec,
    dataset_name: str,
    prompt: str,
    template: Prompt,
    unknown_words: Mapping[str, Sequence[str]],
    values: NDArray[np.float32],
) -> dict[str, bytes]:
    """One array of class embeddings `[K, D]` and its group."""
    keys = StoreKeys()
    keys.group(f"text/{spec.slug}")
    attributes = {
        **schema.text_attributes(spec, dataset_name, template),
        "unknown_words": {name: list(words) for name, words in unknown_words.items()},
    }
    _, channel, _ = schema.encoder_dimensions(spec.slug)
    keys.array(
        f"text/{spec.slug}/{prompt}",
        values.shape,
        "float32",
        ("class", channel),
        attributes=attributes,
        values=values,
    )
    return _below(keys, slug=spec.slug)


def _below(keys: StoreKeys, slug: str) -> dict[str, bytes]:
    """Without the groups that the dataset's part of the store already has."""
    return {key: value for key, value in keys.keys().items() if f"/{slug}/" in key}


def with_attributes(content: bytes, more: Mapping[str, Any]) -> bytes:
    """A `zarr.json` with more in `attributes.msq`."""
    document = metadata(content)
    document["attributes"]["msq"] |= more
    return sealed(json.dumps(document).encode())


def metadata(content: bytes) -> dict[str, Any]:
    """A `zarr.json` as a mapping."""
    parsed: dict[str, Any] = json.loads(content)
    return parsed
