"""A request of stage one as text, for workers in other processes and on other machines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from msq.extract.datasets.options import find_class_file, with_class_file
from msq.extract.extract_options import PATHS
from msq.extract.location import absolute, locate
from msq.extract.request import ExtractRequest, split_clip_name

_TUPLES = ("mean", "std", "prompts")
_WEIGHTS = ("video_encoder", "image_encoder", "text_encoder")
_LOCAL = "local-dir:"


def write_request(request: ExtractRequest) -> str:
    """A request as JSON; its clips are not part of it."""
    return json.dumps(vars(request) | {"options": dict(request.options)}, default=str)


def read_request(text: str) -> ExtractRequest:
    """The request that `write_request` wrote."""
    given = json.loads(text)
    for name in PATHS:
        given[name] = None if given[name] is None else Path(given[name])
    for name in _TUPLES:
        given[name] = None if given[name] is None else tuple(given[name])
    return ExtractRequest(**given)


def anchored(request: ExtractRequest) -> ExtractRequest:
    """The same request with absolute paths, for processes that run in other folders.

    A class file is looked for here, where the user is, and not by the workers.
    """
    found: dict[str, Any] = {}
    for name in PATHS:
        if (path := getattr(request, name)) is not None:
            found[name] = absolute(locate(path))
    if request.classes is not None and request.dataset is not None:
        found["classes"] = find_class_file(request.classes, request.root)
    if request.dataset is not None:
        found["options"] = with_class_file(request.options, request.root)
    for name in _WEIGHTS:
        if (weights := getattr(request, name)) is not None:
            found[name] = _anchored_weights(weights)
    found["prompts"] = tuple(_anchored_file(prompt) for prompt in request.prompts)
    return replace(request, **found)


def _anchored_weights(name: str) -> str:
    if name.startswith(_LOCAL):
        return f"{_LOCAL}{Path(name.removeprefix(_LOCAL)).expanduser().absolute()}"
    architecture, weights = split_clip_name(name)
    return _anchored_file(name) if weights is None else f"{architecture}/{_anchored_file(weights)}"


def _anchored_file(name: str) -> str:
    return str(Path(name).absolute()) if "{" not in name and Path(name).exists() else name
