"""A request of stage one from plain values, as a grid file or a Python caller gives them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from msq.config_values import checked_section
from msq.errors import UsageError
from msq.extract.extract_options import PATHS, ExtractOptions
from msq.extract.request import ExtractRequest

_TUPLES = {"prompts": str, "mean": float, "std": float}
_WORDS: dict[type, str] = {str: "text", float: "numbers"}


def request_of(settings: Mapping[str, Any], source: str) -> ExtractRequest:
    """The request of stage one that plain values mean.

    Args:
        settings: fields of `ExtractOptions`; None is what was not asked for. Paths may be text,
            one prompt may stand without a list, options of a dataset may be numbers.
        source: of the values, for messages.

    Raises:
        UsageError: an unknown field (names the nearest), a value of another type, or values that
            contradict each other.
    """
    asked = {
        key: value.item() if isinstance(value, np.generic) else value
        for key, value in settings.items()
        if value is not None or getattr(ExtractOptions, key, "") is not None
    }
    made: dict[str, Any] = {}
    for key in (*PATHS, *_TUPLES, "options"):
        if key in asked:
            made[key] = _made(key, asked.pop(key), f"{source}: extract.{key}")
    known = {"extract": ExtractOptions}
    return ExtractRequest(**made, **checked_section("extract", asked, known, source))


def _made(key: str, value: Any, name: str) -> Any:
    """A path, a tuple or the options of a dataset, of what a caller wrote for it."""
    if key in PATHS:
        if not isinstance(value, str | os.PathLike):
            raise UsageError(f"{name}: expected a path, found {value!r}")
        return value if isinstance(value, Path) else Path(value)
    if key == "options":
        if not isinstance(value, Mapping):
            raise UsageError(f"{name}: expected option -> value, found {value!r}")
        return {str(one): str(given) for one, given in value.items()}
    kind = _TUPLES[key]
    parts = (value,) if isinstance(value, str) else value
    if not isinstance(parts, Sequence) or not all(
        isinstance(part, str if kind is str else int | float) for part in parts
    ):
        raise UsageError(f"{name}: expected a list of {_WORDS[kind]}, found {value!r}")
    return tuple(parts) or None
