"""Encoder outputs and labels of some clips, together with what made them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from msq.errors import UsageError
from msq.head.encoded_tokens import EncodedTokens
from msq.head.stream import StreamedTokens
from msq.head.token_batches import placed
from msq.head.train_views import TrainViews


@dataclass(frozen=True, eq=False)
class Features:
    """Encoder outputs and labels of N clips, in store order, and what made them.

    Attributes:
        name: dataset.
        task: `multilabel` or `singlelabel`.
        classes: K names.
        ids: N clip ids.
        splits: N of `train`, `val`, `test`.
        tokens: [N, S, D'], in memory, left on disk, or made when they are asked for; in the dtype
            of the store, or wider.
        labels: [N, K] uint8.
        image: [N, D''], or None; likewise.
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
    tokens: Tensor | StreamedTokens | EncodedTokens
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
                self.tokens[rows] if isinstance(self.tokens, Tensor) else self.tokens.select(rows)
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


def _prompt_identity(prompt: str | tuple[str, ...] | None) -> str:
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    return f"{len(prompt)} templates averaged, {_hash(list(prompt))[:16]}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
