"""Reading all of a store against its checksums."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from msq.errors import StoreError

if TYPE_CHECKING:
    from msq.extract.store import FeatureStore


def readable_rows(store: FeatureStore) -> int:
    """How many rows, over all encoders and views, are recorded as done."""
    return sum(
        len(store.ok_rows([slug], view))
        for kind in ("video", "image")
        for slug in store.encoders(kind)
        for view in store.views(slug)
    )


def problems_in(store: FeatureStore) -> list[str]:
    """Read every row, of every encoder and view, that is recorded as done.

    Returns:
        What is wrong, one line each; nothing where all is sound.
    """
    problems: list[str] = []
    for kind in ("video", "image"):
        for slug in store.encoders(kind):
            try:
                rows = [(view, store.ok_rows([slug], view)) for view in store.views(slug)]
            except StoreError as error:
                problems.append(str(error))
                continue
            read = store.tokens if kind == "video" else store.image
            for view, wanted in rows:
                for part in torch.split(wanted, store.shard(slug)):
                    for function in (read, store.time):
                        try:
                            function(part, slug, view)
                        except StoreError as error:
                            problems.append(str(error))
    for slug in store.encoders("text"):
        for prompt in store.prompts(slug):
            try:
                store.text(slug, prompt)
            except StoreError as error:
                problems.append(str(error))
    return problems
