"""Which encoder, view, split and rows of a store are meant, and which of the rows can be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from msq.errors import UsageError
from msq.head.store_like import DEGRADED, FAILED, MISSING, StoreLike


def choose_partition(
    store: StoreLike, wanted: str | None = None
) -> tuple[str | None, tuple[str, ...]]:
    """The partition in use, and the split of each clip in it, "" for the clips it leaves out.

    A store with partitions has no splits but these: the first counts where none is named.

    Raises:
        UsageError: the store has no such partition.
    """
    found: Mapping[str, Sequence[str]] = getattr(store, "partitions", {})
    if wanted is not None and wanted not in found:
        raise UsageError(
            f"store of {store.name}: no partition {wanted!r}; it has "
            f"{', '.join(found) or 'none: its clips have one split each'}"
        )
    name = wanted or next(iter(found), None)
    return name, tuple(str(x) for x in (store.splits if name is None else found[name]))


def chosen_encoder(store: StoreLike, kind: str, wanted: str | None) -> str | None:
    """The encoder of a kind: the one named, else the only one, None where there is none.

    Raises:
        UsageError: it is not in the store, or there are several and none is named.
    """
    found = list(store.encoders(kind))
    if wanted is not None and wanted not in found:
        raise UsageError(f"store of {store.name}: no {kind} encoder {wanted!r}; it has {found}")
    if wanted is None and len(found) > 1:
        raise UsageError(f"store of {store.name}: several {kind} encoders {found}; name one with "
                         f"features.{kind}=NAME")  # fmt: skip
    return wanted or (found[0] if found else None)


def check_prompt(store: StoreLike, text: str | None, wanted: str | None) -> None:
    """Refuse a prompt that the text encoder does not have, and several where none is named.

    A store that does not list its prompts says so itself when it is read.

    Raises:
        UsageError: with those that there are.
    """
    prompts = getattr(store, "prompts", None)
    if text is None or prompts is None:
        return
    found = list(prompts(text))
    if wanted is not None and wanted not in found:
        raise UsageError(f"store of {store.name}: no prompt {wanted!r} of {text}; it has {found}")
    if wanted is None and len(found) > 1:
        raise UsageError(f"store of {store.name}: several prompts {found} of {text}; name one with "
                         "features.prompt=NAME")  # fmt: skip


def unusable_in(store: StoreLike, encoders: Sequence[str], view: Any) -> str:
    """How many clips each encoder lacks, in words."""
    lines = []
    for slug in encoders:
        status = torch.as_tensor(store.status(slug, view)).long().flatten()
        failed, missing = int((status == FAILED).sum()), int((status == MISSING).sum())
        lines.append(f"{slug}: {failed} failed, {missing} missing")
    return "; ".join(lines)


def chosen_view(store: StoreLike, video: str, view: int) -> Any:
    """The view of this number of the video encoder, which may have another number elsewhere.

    A store that does not list its views is asked by the number itself.
    """
    views = getattr(store, "views", None)
    if views is None:
        return view
    found = views(video)
    return found[view] if view < len(found) else view  # the store says what is wrong


def usable_rows(
    store: StoreLike, video: str, image: str | None, view: Any, used: Tensor
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Row numbers in use, those of them that are degraded, and how many others by reason."""
    status = torch.as_tensor(store.status(video, view)).long().flatten()
    missing, failed, degraded = status == MISSING, status == FAILED, status == DEGRADED
    if image is not None:
        other = torch.as_tensor(store.status(image, view)).long().flatten()
        missing |= other == MISSING
        failed |= other == FAILED
        degraded |= other == DEGRADED
    failed, missing = failed & used, missing & used
    usable = used & ~(missing | failed)
    left_out = {"failed": int(failed.sum()), "missing": int((missing & ~failed).sum())}
    if not bool(used.all()):
        left_out["unused"] = int((~used).sum())
    return usable.nonzero().flatten(), (usable & degraded).nonzero().flatten(), left_out


def prompt_template(store: StoreLike, text: str, prompt: str | None) -> str | tuple[str, ...]:
    """The template or templates behind a prompt's name, where the store tells; else `{}`."""
    if (templates := getattr(store, "templates", None)) is not None:
        found: tuple[str, ...] = templates(text, prompt)
        return found[0] if len(found) == 1 else found
    if (templates := getattr(store, "prompts", None)) is not None:
        single: Mapping[str, str] = templates(text)
        return single[prompt] if prompt is not None else next(iter(single.values()))
    return "{}"
