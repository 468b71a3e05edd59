"""Which clips each step takes: the step alone says, so that a run can go on anywhere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msq.head.sending import sent

if TYPE_CHECKING:
    from msq.head.features import Features


class Batches:
    """Rows of each step.

    With `epoch_clips` 0 the batches are cut from one endless row of seeded shuffles, so all have
    one size and all clips come equally often. Otherwise each epoch is a draw of its own, as torch's
    RandomSampler draws without replacement (which is what the authors' loader has): whole shuffles
    while they fit, where there are fewer clips than that, then a part of one; the epoch's last
    batch is as short as it comes.

    Args:
        rows: [n] the training clips.
        batch: clips per step; where `epoch_clips` is 0, no more than n.
        epoch_clips: clips of an epoch; 0 means n, rounded to whole batches.
        seed: of the shuffles.

    Attributes:
        size: clips per step.
        epoch_steps: steps per epoch.
    """

    def __init__(self, rows: Tensor, batch: int, epoch_clips: int, seed: int) -> None:
        self.rows, self.epoch_clips, self.seed, self._batch = rows, epoch_clips, seed, batch
        clips = len(rows)
        if epoch_clips:
            self.size, self.epoch_steps = batch, math.ceil(epoch_clips / batch)
        else:
            self.size = min(batch, clips)
            self.epoch_steps = max(1, round(clips / self.size))
        self._orders: dict[int, Tensor] = {}

    def to(self, device: str | torch.device) -> Batches:
        """The same rows of each step, on another device."""
        return Batches(self.rows.to(device), self._batch, self.epoch_clips, self.seed)

    def of(self, step: int) -> Tensor:
        """Rows of one step [size], fewer in the last of an epoch with `epoch_clips`."""
        if self.epoch_clips:
            epoch, place = divmod(step, self.epoch_steps)
            laps = math.ceil(self.epoch_clips / len(self.rows))
            order = self._order(epoch, laps)[: self.epoch_clips]
            return order[place * self.size : (place + 1) * self.size]
        place, wanted, parts = step * self.size, self.size, []
        while wanted:
            lap, first = divmod(place, len(self.rows))
            parts.append(self._order(lap, 1)[first : first + wanted])
            place, wanted = place + len(parts[-1]), wanted - len(parts[-1])
        return torch.cat(parts)

    def _order(self, number: int, laps: int) -> Tensor:
        """So many shuffles of all rows, by a generator of this number's own."""
        if number not in self._orders:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            order = [torch.randperm(len(self.rows), generator=generator) for _ in range(laps)]
            self._orders = {number: self.rows[sent(torch.cat(order), self.rows.device)]}
        return self._orders[number]


def split_rows(features: Features, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to validate on, both ascending.

    The dataset's validation split where it has one; otherwise a seeded `share` of the training
    clips, at least one; none where the share is 0.
    """
    train, val = features.rows("train"), features.rows("val")
    if val.numel() or not share or len(train) < 2:
        return train, val
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held = max(1, round(len(train) * share))
    order = order.to(train.device)
    return train[order[held:].sort().values], train[order[:held].sort().values]
