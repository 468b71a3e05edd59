"""Training on augmented views: which of its views a clip is shown in, drawn anew for every step.

A draw depends on the seed and the step alone, so that a run that goes on in the middle of an epoch
sees what it would have seen.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from msq.errors import UsageError
from msq.head.sending import sent

Which = Literal["clean", "augmented", "all"]
REASON = "without all training views"  # in `Features.left_out`


@dataclass(frozen=True, eq=False)
class TrainViews:
    """Features of the n training clips in V views, resident in memory.

    Attributes:
        names: V names of views, as the store lists them.
        place: [N] where each clip of the features stands among the n; -1 for the others.
        tokens: [V, n, S, D'].
        image: [V, n, D''], or None.
    """

    names: tuple[str, ...]
    place: Tensor
    tokens: Tensor
    image: Tensor | None = None

    def draw(self, count: int, seed: int, step: int) -> Tensor:
        """Views [count] of the clips of one step, each as likely as the others."""
        digest = hashlib.sha256(f"train views {seed} {step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randint(len(self.names), (count,), generator=generator)

    def of(self, rows: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, S, D'] and image features [B, D''] of the clips of one step.

        Args:
            rows: [B] training clips, as row numbers of the features.
            seed: of the run.
            step: of the optimiser.
        """
        views = sent(self.draw(len(rows), seed, step), rows.device)
        places = self.place[rows]
        image = None if self.image is None else self.image[views, places]
        return self.tokens[views, places], image

    def select(self, rows: Tensor) -> TrainViews:
        """The same for some of the rows, in the order given."""
        return dataclasses.replace(self, place=self.place[rows.to(self.place.device)])

    def to(self, device: str | torch.device) -> TrainViews:
        """The same on another device."""
        return dataclasses.replace(
            self,
            place=self.place.to(device),
            tokens=self.tokens.to(device),
            image=None if self.image is None else self.image.to(device),
        )


def wanted_views(store: Any, video: str, which: Which) -> tuple[Any, ...]:
    """The views of a store's video encoder that training clips are shown in; none for `clean`.

    Raises:
        UsageError: augmented ones are asked for and the store has none.
    """
    if which == "clean":
        return ()
    views: Sequence[Any] = store.views(video) if hasattr(store, "views") else ()
    augmented = tuple(view for view in views if view.kind == "augmented")
    if not augmented:
        raise UsageError(
            f"store of {store.name}: features.train_views={which} needs augmented views, and "
            f"{video} has none; `msq extract ... --views 4` with the options that made the store "
            "adds them to it and touches nothing that is there"
        )
    clean = tuple(view for view in views if view.kind == "clean")
    return augmented if which == "augmented" else (*clean, *augmented)


def readable_in_all(store: Any, encoders: Sequence[str], views: Sequence[Any]) -> Tensor:
    """Whether each clip of a store can be read in all these views of all these encoders [N]."""
    readable = torch.ones(len(store.clips), dtype=torch.bool)
    for view in views:
        here = torch.zeros_like(readable)
        here[store.ok_rows(list(encoders), view)] = True
        readable &= here
    return readable


def load_train_views(
    store: Any,
    video: str,
    image: str | None,
    views: Sequence[Any],
    rows: Tensor,
    training: Tensor,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> TrainViews:
    """Read the views of the training clips.

    Args:
        store: an open feature store.
        video: name of the video encoder.
        image: name of the image encoder, or None.
        views: V views that both have.
        rows: [N] rows of the store that the features hold.
        training: [N] bool, which of them are training clips.
        device: where the tensors live.
        dtype: of the features; None keeps the stored one.
    """
    chosen = rows[training]
    place = torch.full((len(rows),), -1, dtype=torch.long)
    place[training] = torch.arange(len(chosen))

    def stacked(read: Any, encoder: str) -> Tensor:
        return torch.stack([read(chosen, encoder, v).to(device=device, dtype=dtype) for v in views])

    return TrainViews(
        tuple(str(view) for view in views),
        place.to(device),
        stacked(store.tokens, video),
        None if image is None else stacked(store.image, image),
    )
