"""The files of a run: written under a temporary name, synced and renamed. JSON needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msq.whole_file import write_whole


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that after a crash there is the old one or the new one, never a part.

    Raises:
        OSError: naming `path`, such as a full disk; the old file stays, and nothing else is left.
    """
    write_whole(path, [content])


def jsonable(value: Any) -> Any:
    """Plain JSON values: tuples become lists, paths text, numbers that are not finite null."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, atomically."""
    text = json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())
