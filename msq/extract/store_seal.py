"""Digests in each `zarr.json`, so that a changed byte in metadata is seen as in any chunk.

Zarr has no checksum for metadata. `attributes.msq.metadata_sha256` holds two, each the SHA-256 of
JSON with sorted keys and no spaces: `content` over all that says what the values are (attributes,
shape, number type, fill value, names of dimensions), which is checked at every open, and `layout`
over how they are cut into files (chunks, codecs, keys). Another program may rewrite an array with
other chunks and keep the attributes, so the layout is compared by `msq store verify` alone; a
damaged one cannot be read, since every chunk has a checksum and a length. Consolidated metadata is
no part of either. Stores that were written before there were digests open as they did.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from msq.errors import StoreError

KEY = "metadata_sha256"
RECORD_KEY = "sha256"  # of a file of failures
_LAYOUT = ("chunk_grid", "chunk_key_encoding", "codecs", "storage_transformers")
_FIX = "msq store repair puts back what it can"


def sealed(content: bytes) -> bytes:
    """A `zarr.json` with the digests of what it says."""
    document: dict[str, Any] = json.loads(content)
    attributes = document.setdefault("attributes", {}).setdefault("msq", {})
    attributes.pop(KEY, None)
    attributes[KEY] = _digests(document)
    return json.dumps(document, indent=2).encode()


def read_metadata(path: Path) -> dict[str, Any]:
    """A `zarr.json`, its content checked against its digest where it has one.

    Raises:
        FileNotFoundError: there is none.
        StoreError: it is no JSON, or is not what was written.
    """
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, BadZipFile) as error:
        raise StoreError(f"{path}: not readable as JSON ({error}); {_FIX}") from None
    if not isinstance(document, dict):
        raise StoreError(f"{path}: expected a JSON object, found {type(document).__name__}; {_FIX}")
    if not isinstance(document.get("attributes"), dict):
        raise StoreError(f"{path}: expected attributes, as every Zarr group has; {_FIX}")
    recorded = recorded_digests(document)
    if recorded and recorded.get("content") != _digests(document)["content"]:
        raise StoreError(
            f"{path}: the metadata was changed after it was written (its SHA-256 is not the one "
            f"that it records); {_FIX}"
        )
    return document


def recorded_digests(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a document says its digests are; empty where it has none."""
    attributes = document.get("attributes")
    own = attributes.get("msq") if isinstance(attributes, Mapping) else None
    found = own.get(KEY) if isinstance(own, Mapping) else None
    return {} if found is None else found if isinstance(found, dict) else {"content": found}


def layout_is_changed(document: Mapping[str, Any]) -> bool:
    """Whether chunks, codecs or keys are others than when the document was written by msq."""
    recorded = recorded_digests(document)
    return bool(recorded) and recorded.get("layout") != _digests(document)["layout"]


def sealed_record(document: Mapping[str, Any]) -> dict[str, Any]:
    """A file of failures with the digest of what it says."""
    return {**document, RECORD_KEY: _hash(document)}


def record_is_whole(document: Mapping[str, Any]) -> bool:
    """Whether a file of failures is what was written, as far as it has a digest."""
    rest = {key: value for key, value in document.items() if key != RECORD_KEY}
    return document.get(RECORD_KEY) in (None, _hash(rest))


def _digests(document: Mapping[str, Any]) -> dict[str, str]:
    attributes = dict(document["attributes"])
    attributes["msq"] = {k: v for k, v in attributes["msq"].items() if k != KEY}
    left_out = (*_LAYOUT, "consolidated_metadata")
    content = {k: v for k, v in document.items() if k not in left_out}
    return {
        "content": _hash({**content, "attributes": attributes}),
        "layout": _hash({k: document[k] for k in _LAYOUT if document.get(k)}),
    }


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
