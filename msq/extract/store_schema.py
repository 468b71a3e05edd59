"""The feature store's layout: names, dimensions, codecs, attributes, and what tells two apart.

Metadata and the small arrays (clip, split, label, text) are made by zarr-python in memory as a
mapping key -> bytes; `store_writer` publishes each key atomically. The large arrays' chunks are
made by `shard`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from msq.errors import UsageError
from msq.extract.datasets.dataset import Dataset
from msq.extract.encoders.prompts import AVERAGE, Prompt, joined, templates_of
from msq.extract.encoders.spec import EncoderSpec, difference
from msq.extract.store_seal import sealed
from msq.extract.store_views import attributes_of
from msq.extract.views import CLEAN, View

SCHEMA = 1
MISSING, OK, UNDECODABLE, DEGRADED = 0, 1, 2, 3
StoreDtype = Literal["float16", "float32", "bfloat16"]
# What the bytes on disk are, by the name that stands in the attributes.
DISK_DTYPE: dict[str, str] = {"float16": "float16", "float32": "float32", "bfloat16": "uint16"}
FEATURE_GROUP = {"video": "tokens", "image": "image", "text": "text"}
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
    label_known = known_matrix(dataset) if label_known is None else label_known
    keys = StoreKeys()
    keys.group("", {"msq": {**root_attributes(dataset), "version": version}})
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
    keys.array("label", shape, "uint8", ("clip", "class"), values=label_matrix(dataset))
    if label_known is not None:
        known = label_known.astype(np.uint8)
        keys.array("label_known", shape, "uint8", ("clip", "class"), values=known)
    # An empty array, so that zarr does not warn of a folder it does not know.
    keys.array(FAILURES, (0,), "uint8", ("failure",), attributes=FAILURES_NOTE)
    return keys.keys()


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


def encoder_arrays(spec: EncoderSpec) -> tuple[str, str, str]:
    """Paths of the arrays of one video or image encoder, `status` last."""
    return array_names(spec.kind, spec.slug)


def array_names(kind: str, slug: str) -> tuple[str, str, str]:
    """The same by the kind of the encoder and its name."""
    return f"{FEATURE_GROUP[kind]}/{slug}", f"time/{slug}", f"status/{slug}"


def encoder_keys(
    spec: EncoderSpec,
    dataset_name: str,
    clips: int,
    store_dtype: StoreDtype,
    shard: int,
    views: Sequence[View] = (CLEAN,),
) -> dict[str, bytes]:
    """Metadata of features, time and status of one video or image encoder."""
    keys = StoreKeys()
    attributes = {
        **encoder_attributes(spec, dataset_name, store_dtype, shard),
        **attributes_of(views),
    }
    token, channel, frame = encoder_dimensions(spec.slug)
    features, times = feature_arrays(spec, store_dtype)
    named = {2: (token, channel), 1: (channel,)}[len(features.row)]
    for array, dimensions in ((features, named), (times, (frame,))):
        keys.array(
            array.name,
            (clips, len(views), *array.row),
            array.dtype,
            ("clip", "view", *dimensions),
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
        **text_attributes(spec, dataset_name, template),
        "unknown_words": {name: list(words) for name, words in unknown_words.items()},
    }
    _, channel, _ = encoder_dimensions(spec.slug)
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


def root_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Lines that tell a dataset's root attributes from those of a store; the version is no part."""
    lines = []
    for name in ("schema", "dataset", "task", "metric"):
        if expected[name] != found.get(name):
            lines.append(f"{name}: expected {expected[name]}, found {found.get(name)}")
    lines += sequence_difference("classes", expected["classes"], list(found.get("classes", ())))
    if expected["clips"] != found.get("clips"):
        lines.append(f"clips: expected {expected['clips']}, found {found.get('clips')}")
    elif expected["clip_list_hash"] != found.get("clip_list_hash"):
        lines.append(
            "clip list (ids, cuts, labels, splits in order): expected hash "
            f"{expected['clip_list_hash'][:16]}…, found {str(found.get('clip_list_hash'))[:16]}…"
        )
    wanted, there = (
        {p["name"]: p["sha256"] for p in root.get("partitions", ())} for root in (expected, found)
    )
    if list(wanted) != list(there):
        names = (", ".join(x) or "none" for x in (wanted, there))
        lines.append("partitions: expected {}, found {}".format(*names))
    else:
        lines += [f"partition {k}: other splits" for k in wanted if wanted[k] != there[k]]
    # Stores were written before there were groups: they are no part of the identity then.
    if "groups" in expected and "groups" in found and expected["groups"] != found["groups"]:
        lines.append(f"groups: expected {expected['groups']}, found {found['groups']}")
    return lines


def sequence_difference(name: str, expected: Sequence[Any], found: Sequence[Any]) -> list[str]:
    """At most two lines: the lengths, and the first place where they differ."""
    lines = []
    if len(expected) != len(found):
        lines.append(f"{name}: expected {len(expected)}, found {len(found)}")
    for place, (a, b) in enumerate(zip(expected, found, strict=False)):
        if a != b:
            lines.append(f"{name}, first difference at row {place}: expected {a!r}, found {b!r}")
            break
    return lines


def encoder_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Lines that tell two encoders' attributes apart."""
    slug = expected["encoder"]["slug"]
    lines = difference(expected["encoder"], found.get("encoder", {}))
    for name in ("store_dtype", "shard"):
        if name in expected and expected[name] != found.get(name):
            lines.append(f"{name}: expected {expected[name]!r}, found {found.get(name)!r}")
    # Widened from float16, float32 holds fewer digits than an extraction in float32 has.
    if expected.get(CONVERTED) != found.get(CONVERTED):
        before = found.get(CONVERTED) or "nothing"
        lines.append(f"converted: expected {expected.get(CONVERTED) or 'nothing'}, found {before}")
    if "template" in expected:
        lines += _template_difference(expected, found)
    return [f"{slug}: {line}" for line in lines]


def _template_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Lines that tell two prompts apart; sets by their first difference."""
    wanted, there = templates_in(expected), templates_in({"template": None, **found})
    if len(wanted) == len(there) == 1:
        same = wanted == there
        return [] if same else [f"template: expected {wanted[0]!r}, found {there[0]!r}"]
    lines = sequence_difference("templates", wanted, there)
    rules = expected.get("average"), found.get("average")
    if not lines and rules[0] != rules[1]:
        lines.append(f"average: expected {rules[0]!r}, found {rules[1]!r}")
    return lines


def with_attributes(content: bytes, more: Mapping[str, Any]) -> bytes:
    """A `zarr.json` with more in `attributes.msq`."""
    document = metadata(content)
    document["attributes"]["msq"] |= more
    return sealed(json.dumps(document).encode())


def metadata(content: bytes) -> dict[str, Any]:
    """A `zarr.json` as a mapping."""
    parsed: dict[str, Any] = json.loads(content)
    return parsed
