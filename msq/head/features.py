"""Features for stage two: what a head is trained on and scored on, read from a store."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from msq.config import FeatureConfig
from msq.errors import StoreError, UsageError
from msq.head.feature_set import Features
from msq.head.finite import require_finite_features
from msq.head.memory import Feed, fits
from msq.head.store_like import DEGRADED, FAILED, MISSING, OK, StoreLike
from msq.head.store_rows import (
    check_prompt,
    choose_partition,
    chosen_encoder,
    chosen_view,
    prompt_template,
    unusable_in,
    usable_rows,
)
from msq.head.stream import StreamedTokens, stream_tokens
from msq.head.train_views import (
    REASON,
    Which,
    load_train_views,
    readable_in_all,
    wanted_views,
)

__all__ = [
    "DEGRADED",
    "FAILED",
    "MISSING",
    "OK",
    "Features",
    "StoreLike",
    "choose_partition",
    "configured_features",
    "load_features",
]


def load_features(
    store: StoreLike,
    video: str | None = None,
    image: str | None = None,
    text: str | None = None,
    prompt: str | None = None,
    view: int = 0,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    partition: str | None = None,
    train_views: Which = "clean",
    feed: Feed = "auto",
) -> Features:
    """Read a store: the clips that every encoder in use has encoded.

    A clip is usable when its status is ok or degraded for the video encoder and, where there is
    one, for the image encoder. The others are counted in `left_out`.

    Args:
        store: an open feature store.
        video: name of the video encoder; None where the store has exactly one.
        image: name of the image encoder; None takes the only one, if there is any.
        text: name of the text encoder; None takes the only one, if there is any.
        prompt: name of the prompt; None where the text encoder has exactly one.
        view: 0 is the clean view.
        device: where the tensors live.
        dtype: of tokens and image features; None keeps the stored one. Text is float32.
        partition: which of the store's official splits; None takes the first, where it has any.
            Clips that it does not use are counted as `unused` in `left_out`.
        train_views: what training clips are shown in: `clean` (that is `view`), the `augmented`
            views of the store, or `all` of these and the clean one. Training clips that lack one
            of them are left out and counted.
        feed: `resident` reads the tokens into memory, `stream` leaves them on disk and reads each
            batch ahead of its step, `auto` streams what would take more than half of the memory
            that is there.

    Raises:
        UsageError: an encoder, a partition or augmented views that are not in the store, or
            several encoders and none named.
        StoreError: no usable clip, an encoder without this view, or features in memory that are
            not finite.
    """
    names = {
        "video": chosen_encoder(store, "video", video),
        "image": chosen_encoder(store, "image", image),
        "text": chosen_encoder(store, "text", text),
    }
    if names["video"] is None:
        raise StoreError(f"store of {store.name}: expected a video encoder's tokens, found none")
    check_prompt(store, names["text"], prompt)
    partition, all_splits = choose_partition(store, partition)
    used = torch.tensor([bool(split) for split in all_splits])
    look = chosen_view(store, names["video"], view)
    usable, degraded, left_out = usable_rows(store, names["video"], names["image"], look, used)
    views = wanted_views(store, names["video"], train_views)
    training = torch.tensor([split == "train" for split in all_splits])
    if views:
        encoders = [name for name in (names["video"], names["image"]) if name is not None]
        lacking = training & ~readable_in_all(store, encoders, views)
        left_out[REASON] = int(lacking[usable].sum())
        usable, degraded = usable[~lacking[usable]], degraded[~lacking[degraded]]
    if not usable.numel():
        encoders = [name for name in (names["video"], names["image"]) if name is not None]
        raise StoreError(
            f"store of {store.name}: no usable clip among {len(store.clips)} ({left_out}; "
            f"{unusable_in(store, encoders, look)}); run `msq extract` again, or with "
            "--retry-failed; msq store convert --drop ENCODER leaves one out"
        )
    ids, splits, listed = list(store.clips), all_splits, usable.tolist()
    known = getattr(store, "label_known", lambda rows: None)(usable)
    tokens = _tokens(store, usable, names["video"], look, device, dtype, feed)
    if views and isinstance(tokens, StreamedTokens):
        raise UsageError(
            f"store of {store.name}: features.train_views={train_views} needs tokens in memory, "
            f"{tokens.nbytes / 1e9:.1f} GB for each view; pool the tokens (--pooling frame), or "
            "use features.train_views=clean"
        )
    pictures = None if names["image"] is None else store.image(usable, names["image"], look)
    words = None if names["text"] is None else store.text(names["text"], prompt)
    features = Features(
        name=store.name,
        task=str(store.task),
        classes=tuple(store.classes),
        ids=tuple(ids[row] for row in listed),
        splits=tuple(str(splits[row]) for row in listed),
        tokens=tokens,
        labels=torch.as_tensor(store.labels(usable)).to(device, torch.uint8),
        image=None if pictures is None else _moved(pictures, device, dtype),
        text=None if words is None else _moved(words, device, torch.float32),
        specs={k: _plain(store.spec(name, k)) for k, name in names.items() if name is not None},
        prompt=None if names["text"] is None else prompt_template(store, names["text"], prompt),
        view=view,
        left_out=left_out,
        degraded=tuple(ids[row] for row in degraded.tolist()),
        known=None if known is None else torch.as_tensor(known).to(device, torch.uint8),
        groups=dict(getattr(store, "groups", {})),
        partition=partition,
        variant=str(getattr(store, "variant", "")),
        view_name="clean" if look == 0 else str(look),
        train_views=load_train_views(
            store, names["video"], names["image"], views, usable, training[usable], device, dtype
        )
        if views
        else None,
        stored=_stored(store, names),
    )
    require_finite_features(features)
    return features


def _stored(store: StoreLike, names: Mapping[str, str | None]) -> dict[str, str]:
    """The dtype of video and image features in the store, where it tells."""
    told = getattr(store, "store_dtype", None)
    chosen = ((kind, names[kind]) for kind in ("video", "image"))
    return {} if told is None else {k: str(told(name)) for k, name in chosen if name is not None}


def configured_features(
    store: StoreLike, chosen: FeatureConfig, partition: str | None = None
) -> Features:
    """The features that a run's configuration names, as training and scoring read them.

    In memory they stay as they are stored, half the size of float32 where that is float16, and are
    widened batch by batch. What is left on disk is widened to float32 by the threads that read it.

    Args:
        store: an open feature store.
        chosen: what the configuration names.
        partition: goes before its own.

    Raises:
        UsageError: as `load_features`.
        StoreError: likewise.
    """
    wanted = partition or chosen.partition
    features = load_features(
        store,
        chosen.video,
        chosen.image,
        chosen.text,
        chosen.prompt,
        chosen.view,
        dtype=None,
        partition=wanted,
        train_views=chosen.train_views,
        feed=chosen.feed,
    )
    if isinstance(features.tokens, StreamedTokens):
        wide = features.tokens.to(dtype=torch.float32)
        features = dataclasses.replace(features, tokens=wide)
    return features


def _tokens(
    store: StoreLike,
    rows: Tensor,
    video: str,
    look: Any,
    device: str | torch.device,
    dtype: torch.dtype | None,
    feed: Feed,
) -> Tensor | StreamedTokens:
    """The tokens of some rows, in memory where they fit."""
    if feed != "resident" and hasattr(store, "token_reader"):
        streamed = stream_tokens(store, rows, video, look).to(device, dtype)
        size = streamed.shape.numel() * streamed.dtype.itemsize
        if feed == "stream" or not fits(size, "cpu"):
            return streamed
        streamed.close()
    return _moved(store.tokens(rows, video, look), device, dtype)


def _plain(spec: Any) -> dict[str, Any]:
    return dict(spec) if isinstance(spec, Mapping) else dict(spec.to_dict())


def _moved(x: Tensor, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
    return torch.as_tensor(x).to(device=device, dtype=dtype)
