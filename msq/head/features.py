"""Features resident in memory: what a head is trained on and scored on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from msq.config import FeatureConfig
from msq.errors import StoreError, UsageError
from msq.head.finite import require_finite_features
from msq.head.memory import Feed, fits
from msq.head.stream import StreamedTokens, placed, stream_tokens
from msq.head.train_views import (
    REASON,
    TrainViews,
    Which,
    load_train_views,
    readable_in_all,
    wanted_views,
)

MISSING, OK, FAILED, DEGRADED = 0, 1, 2, 3  # the store's `status`


class StoreLike(Protocol):
    """The part of a feature store that is read here (`msq.extract.store.FeatureStore` has it)."""

    @property
    def name(self) -> str:
        """Name of the dataset."""

    @property
    def task(self) -> Any:
        """`multilabel` or `singlelabel`."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names, K."""

    @property
    def clips(self) -> Sequence[str]:
        """Ids of all N clips."""

    @property
    def splits(self) -> Sequence[str]:
        """Split of each clip."""

    def encoders(self, kind: str | None = None) -> Sequence[str]:
        """Names of the encoders of one kind: `video`, `image`, `text`."""

    def spec(self, encoder: str, kind: str | None = None) -> Any:
        """How an encoder's arrays were made; image and text towers may share a name."""

    def status(self, encoder: str, view: int = 0) -> Any:
        """[N] status codes."""

    def tokens(self, rows: Any, encoder: str | None = None, view: int = 0) -> Tensor:
        """[rows, S, D']."""

    def image(self, rows: Any, encoder: str | None = None, view: int = 0) -> Tensor:
        """[rows, D'']."""

    def labels(self, rows: Any = None) -> Tensor:
        """[rows, K]."""

    def text(self, encoder: str | None = None, prompt: str | None = None) -> Tensor:
        """[K, D]."""


@dataclass(frozen=True, eq=False)
class Features:
    """Encoder outputs and labels of N clips, in store order, and what made them.

    Attributes:
        name: dataset.
        task: `multilabel` or `singlelabel`.
        classes: K names.
        ids: N clip ids.
        splits: N of `train`, `val`, `test`.
        tokens: [N, S, D'], in memory or left on disk.
        labels: [N, K] uint8.
        image: [N, D''], or None.
        text: [K, D_text], or None.
        specs: for `video`, `image` and `text`, the encoder's spec as a plain dict.
        prompt: the template that made `text` from class names, `{}` standing for the name; the
            templates, where several were averaged.
        view: which view of the clips.
        left_out: clips of the store that are not here, by reason.
        degraded: ids of the clips here whose decoding was not clean.
        known: [N, K] uint8, 0 where nobody knows whether the clip has the class; None where all
            is known.
        groups: name -> class indices, where the field reports groups of classes.
        partition: which official split of the store `splits` is; None where it has one only.
        variant: which reading of the dataset it is; "" where there is one only.
        view_name: of `view`: `clean`, or what the store calls it.
        train_views: what training clips are shown in instead of `view`; None for `view` itself.
        stored: dtype in the store, for `video` and `image`; the values here may be wider.
    """

    name: str
    task: str
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    splits: tuple[str, ...]
    tokens: Tensor | StreamedTokens
    labels: Tensor
    image: Tensor | None = None
    text: Tensor | None = None
    specs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    prompt: str | tuple[str, ...] | None = None
    view: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    degraded: tuple[str, ...] = ()
    known: Tensor | None = None
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    partition: str | None = None
    variant: str = ""
    view_name: str = "clean"
    train_views: TrainViews | None = None
    stored: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse tensors that do not fit each other."""
        n, k = len(self.ids), len(self.classes)
        expected = {"splits": (n, len(self.splits)), "tokens": (n, len(self.tokens))}
        expected["labels"] = (n, len(self.labels))
        expected["label columns"] = (k, self.labels.shape[1])
        if self.known is not None:
            expected["known"] = (n * k, self.known.numel())
        if self.image is not None:
            expected["image"] = (n, len(self.image))
        if self.text is not None:
            expected["text"] = (k, len(self.text))
        for what, (wanted, found) in expected.items():
            if wanted != found:
                raise UsageError(f"features of {self.name}: {what}: expected {wanted}, "
                                 f"found {found}")  # fmt: skip

    def rows(self, *splits: str) -> Tensor:
        """Row numbers [n] of the given splits, in store order, on the tokens' device."""
        found = [row for row, split in enumerate(self.splits) if split in splits]
        return torch.tensor(found, dtype=torch.long, device=self.tokens.device)

    def select(
        self, *, rows: Tensor | None = None, columns: Sequence[int] | None = None
    ) -> Features:
        """The same features for some rows and some classes, in the order given."""
        changes: dict[str, Any] = {}
        labels, known = self.labels, self.known
        if rows is not None:
            listed = rows.tolist()
            changes["ids"] = tuple(self.ids[row] for row in listed)
            changes["splits"] = tuple(self.splits[row] for row in listed)
            changes["tokens"] = (
                self.tokens.select(rows)
                if isinstance(self.tokens, StreamedTokens)
                else self.tokens[rows]
            )
            changes["image"] = None if self.image is None else self.image[rows]
            kept = set(changes["ids"])
            changes["degraded"] = tuple(clip for clip in self.degraded if clip in kept)
            labels = labels[rows]
            known = None if known is None else known[rows]
            views = self.train_views
            changes["train_views"] = None if views is None else views.select(rows)
        if columns is not None:
            index = torch.tensor(list(columns), dtype=torch.long, device=labels.device)
            changes["classes"] = tuple(self.classes[column] for column in columns)
            changes["text"] = None if self.text is None else self.text[index]
            labels = labels[:, index]
            known = None if known is None else known[:, index]
            place = {column: k for k, column in enumerate(columns)}
            changes["groups"] = {
                name: tuple(place[k] for k in members if k in place)
                for name, members in self.groups.items()
            }
        return dataclasses.replace(self, labels=labels, known=known, **changes)

    def to(self, device: str | torch.device) -> Features:
        """The same features on another device."""
        return dataclasses.replace(
            self,
            tokens=placed(self.tokens, device),
            labels=self.labels.to(device),
            image=None if self.image is None else self.image.to(device),
            text=None if self.text is None else self.text.to(device),
            known=None if self.known is None else self.known.to(device),
            train_views=None if self.train_views is None else self.train_views.to(device),
        )

    def coverage(self) -> str:
        """A sentence such as `698 of 700 clips (2 failed; 1 degraded kept)`."""
        total = len(self.ids) + sum(self.left_out.values())
        notes = [f"{count} {reason}" for reason, count in self.left_out.items() if count]
        if self.degraded:
            notes.append(f"{len(self.degraded)} degraded kept")
        return f"{len(self.ids)} of {total} clips" + (f" ({'; '.join(notes)})" if notes else "")

    def identity(self) -> dict[str, Any]:
        """What a run must find again to be resumed: plain values, the long ones hashed.

        The labels are in it and the feature values are not: the specs say how those were made, and
        the stored dtype how they were rounded.
        """
        rows = [list(self.ids), list(self.splits), self.labels.cpu().to(torch.uint8).tolist()]
        if self.known is not None:
            rows.append(self.known.cpu().to(torch.uint8).tolist())
        return {
            "dataset": self.name,
            "task": self.task,
            "classes": len(self.classes),
            "class_hash": _hash(list(self.classes)),
            "clips": len(self.ids),
            "clip_hash": _hash(rows),
            "tokens": list(self.tokens.shape[1:]),
            "view": self.view,
            "prompt": _prompt_identity(self.prompt),
            "encoders": {kind: _hash(dict(spec)) for kind, spec in self.specs.items()},
            **({} if self.partition is None else {"partition": self.partition}),
            **({} if self.train_views is None else {"train_views": list(self.train_views.names)}),
            **({"stored": dict(self.stored)} if self.stored else {}),
        }


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
        dtype: of the features; None keeps the stored one.
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
        "video": _encoder(store, "video", video),
        "image": _encoder(store, "image", image),
        "text": _encoder(store, "text", text),
    }
    if names["video"] is None:
        raise StoreError(f"store of {store.name}: expected a video encoder's tokens, found none")
    partition, all_splits = choose_partition(store, partition)
    used = torch.tensor([bool(split) for split in all_splits])
    look = _look(store, names["video"], view)
    usable, degraded, left_out = _usable(store, names["video"], names["image"], look, used)
    views = wanted_views(store, names["video"], train_views)
    training = torch.tensor([split == "train" for split in all_splits])
    if views:
        encoders = [name for name in (names["video"], names["image"]) if name is not None]
        lacking = training & ~readable_in_all(store, encoders, views)
        left_out[REASON] = int(lacking[usable].sum())
        usable, degraded = usable[~lacking[usable]], degraded[~lacking[degraded]]
    if not usable.numel():
        raise StoreError(
            f"store of {store.name}: no usable clip among {len(store.clips)} ({left_out}); "
            "run `msq extract` again, or with --retry-failed"
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
        text=None if words is None else _moved(words, device, dtype),
        specs={k: _plain(store.spec(name, k)) for k, name in names.items() if name is not None},
        prompt=None if names["text"] is None else _template(store, names["text"], prompt),
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
    """The features that a run's configuration names; `partition` goes before its own."""
    wanted = partition or chosen.partition
    return load_features(
        store,
        chosen.video,
        chosen.image,
        chosen.text,
        chosen.prompt,
        chosen.view,
        partition=wanted,
        train_views=chosen.train_views,
        feed=chosen.feed,
    )


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


def _encoder(store: StoreLike, kind: str, wanted: str | None) -> str | None:
    found = list(store.encoders(kind))
    if wanted is not None and wanted not in found:
        raise UsageError(f"store of {store.name}: no {kind} encoder {wanted!r}; it has {found}")
    if wanted is None and len(found) > 1:
        raise UsageError(f"store of {store.name}: several {kind} encoders {found}; name one with "
                         f"features.{kind}=NAME")  # fmt: skip
    return wanted or (found[0] if found else None)


def _look(store: StoreLike, video: str, view: int) -> Any:
    """The view of this number of the video encoder, which may have another number elsewhere.

    A store that does not list its views is asked by the number itself.
    """
    views = getattr(store, "views", None)
    if views is None:
        return view
    found = views(video)
    return found[view] if view < len(found) else view  # the store says what is wrong


def _usable(
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


def _template(store: StoreLike, text: str, prompt: str | None) -> str | tuple[str, ...]:
    """The template or templates behind a prompt's name, where the store tells; else `{}`."""
    if (templates := getattr(store, "templates", None)) is not None:
        found: tuple[str, ...] = templates(text, prompt)
        return found[0] if len(found) == 1 else found
    if (templates := getattr(store, "prompts", None)) is not None:
        single: Mapping[str, str] = templates(text)
        return single[prompt] if prompt is not None else next(iter(single.values()))
    return "{}"


def _prompt_identity(prompt: str | tuple[str, ...] | None) -> str:
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    return f"{len(prompt)} templates averaged, {_hash(list(prompt))[:16]}"


def _plain(spec: Any) -> dict[str, Any]:
    return dict(spec) if isinstance(spec, Mapping) else dict(spec.to_dict())


def _moved(x: Tensor, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
    return torch.as_tensor(x).to(device=device, dtype=dtype)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
