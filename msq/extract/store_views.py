"""The views that an encoder's arrays hold: a list in their attributes, as long as `view` is.

The list of `status/ENC` counts: it is written last when views are added, so a view is there for
the features before it is there for the commit record. An encoder without a list has the clean view
alone, as all stores had before there were others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msq.errors import StoreError
from msq.extract.store_seal import sealed
from msq.extract.views import CLEAN, View, parse_view

KEY = "views"  # in `attributes.msq` of each of an encoder's arrays
COMMAND = "msq extract --views N, or --test-views 10x3, on the same store adds views"


def views_in(attributes: Mapping[str, Any]) -> tuple[View, ...]:
    """The views of an array, in the order of its `view` dimension, from `attributes.msq`.

    Raises:
        UsageError: a name that is no view's.
    """
    return tuple(parse_view(str(name)) for name in attributes.get(KEY, ["clean"]))


def attributes_of(views: Sequence[View]) -> dict[str, list[str]]:
    """What an array's attributes say of its views: nothing, where there is the clean one alone."""
    return {} if tuple(views) == (CLEAN,) else {KEY: [str(view) for view in views]}


def joined(found: Iterable[View], wanted: Iterable[View]) -> tuple[View, ...]:
    """The clean view, what is there, and what is new, each once: nothing changes its number."""
    return tuple(dict.fromkeys((CLEAN, *found, *wanted)))


def with_views(
    content: bytes, views: Sequence[View], more: Mapping[str, Any] | None = None
) -> bytes:
    """A `zarr.json` whose array has these views: its extent and its list, nothing else.

    Args:
        content: the `zarr.json` before.
        views: those that it is to have.
        more: attributes that it is to have besides, in the place where a new array has them.
    """
    meta: dict[str, Any] = json.loads(content)
    meta["shape"][1] = len(views)
    attributes = meta["attributes"]["msq"]
    for key in (*(more or ()), KEY):
        attributes.pop(key, None)
    attributes |= {**(more or {}), **attributes_of(views)}
    return sealed(json.dumps(meta).encode())


def number_of(view: View | int, views: Sequence[View], what: str) -> int:
    """The number of a view along `view`.

    Args:
        view: the view, or its number, which is checked.
        views: those that are there.
        what: whose they are, for the message.

    Raises:
        StoreError: it is not there; the message lists those that are, and how to add others.
    """
    if isinstance(view, View):
        if view in views:
            return views.index(view)
        asked = f"view {str(view)!r}"
    elif 0 <= view < len(views):
        return view
    else:
        asked = f"view {view}"
    raise StoreError(f"{what}: no {asked}; its views: {summary(views)}. {COMMAND}")


def summary(views: Sequence[View]) -> str:
    """A few words such as `0 clean, 1-4 augmented, 5-34 test 10 clips x 3 crops`."""
    return ", ".join(
        f"{a} {words}" if a == b else f"{a}-{b} {words}" for a, b, words in groups_of(views)
    )


def groups_of(views: Sequence[View]) -> list[tuple[int, int, str]]:
    """First number, last number and name of each run of views of one kind."""
    groups: list[tuple[int, int, str]] = []
    for number, view in enumerate(views):
        words = {
            "clean": "clean",
            "augmented": "augmented",
            "official": "official",
            "test": f"test {view.clips} clips x {view.crops} crops",
        }[view.kind]
        if groups and groups[-1][2] == words:
            groups[-1] = (groups[-1][0], number, words)
        else:
            groups.append((number, number, words))
    return groups
