"""Where local weights were last seen on this machine, by their SHA-256.

Stores and runs hold no paths of any machine, so that they mean the same everywhere. This index, in
the user's cache folder, lets `msq predict` find weights that `msq extract` was given as a folder or
a file, without naming them again. It is a convenience: what it points to is checked as always.

The folder is `$MSQ_CACHE`, else `$XDG_CACHE_HOME/msq`, else `~/.cache/msq`.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from msq.extract.atomic import write_file
from msq.extract.encoders.weights import FOLDER_PREFIX, HUB_PREFIX

_log = logging.getLogger(__name__)


def remember(sha256: str, name: str, weights: str | None = None) -> None:
    """Note how the weights with this hash were loaded: `name`, or architecture and `weights`.

    Names that are no local path are not noted. A cache folder that cannot be written is passed
    over: nothing but convenience is lost.
    """
    place = _absolute(name if weights is None else weights)
    if place is None:
        return
    entry = {"name": place} if weights is None else {"name": name, "weights": place}
    file = _entry(sha256)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, [json.dumps(entry).encode()])
    except OSError as error:
        _log.info("%s: not written (%s)", file, error)


def recall(sha256: str) -> tuple[str, str | None] | None:
    """What `remember` noted, if it is still there."""
    try:
        entry = json.loads(_entry(sha256).read_bytes())
        name, weights = str(entry["name"]), entry.get("weights")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    there = _absolute(name if weights is None else str(weights))
    return None if there is None else (name, weights)


def _entry(sha256: str) -> Path:
    base = os.environ.get("MSQ_CACHE")
    if base:
        return Path(base).expanduser() / "weights" / f"{sha256}.json"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "msq" / "weights" / f"{sha256}.json"


def _absolute(name: str) -> str | None:
    """The same name from anywhere on this machine; None where it is no local path."""
    if name.startswith(HUB_PREFIX):
        return None
    path = Path(name.removeprefix(FOLDER_PREFIX)).expanduser()
    if not path.exists():
        return None
    return f"{FOLDER_PREFIX if path.is_dir() else ''}{path.resolve()}"
