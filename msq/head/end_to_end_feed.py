"""What end-to-end steps are fed: decoded clips of each part of a batch, on the encoder's device."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msq.head.batches import Batches
from msq.head.end_to_end_step import Part
from msq.head.features import Features
from msq.head.ranks import ALONE, Ranks
from msq.head.sending import sent

if TYPE_CHECKING:
    from msq.extract.clip_feed import ClipFeed, Shown
    from msq.extract.encoders.clip import ImageEncoder


class PartFeed:
    """The parts of each step that this process takes.

    Args:
        features: labels and image features, on the device to train on.
        batches: which rows each step takes.
        feed: decodes training clips: first the video encoder's pictures, then those of `image`.
        steps: of the whole run; what comes after is not decoded.
        accumulate: parts that each process takes one after the other.
        loss: as `msq.head.loss.loss_kind` has it.
        image: runs on the frames of the step; None takes the image features that are there.
        ranks: the processes that take the step together.
        shape: [T, 3, h, w] of a clip, as the video encoder sees it.
    """

    def __init__(
        self,
        features: Features,
        batches: Batches,
        feed: ClipFeed,
        steps: int,
        accumulate: int,
        loss: str,
        image: ImageEncoder | None = None,
        ranks: Ranks = ALONE,
        shape: Sequence[int] = (),
    ) -> None:
        self._shape = tuple(shape)
        # Rows are read by the processor: on a GPU it would wait for the steps before.
        self._features, self._batches, self._feed, self._steps = (
            features, batches.to("cpu"), feed, steps
        )  # fmt: skip
        known = features.known
        self._known = None if known is None or loss == "ce" else known.sum(1).cpu()
        self._accumulate, self._image, self._ranks = accumulate, image, ranks
        self._device = features.labels.device
        self._frames = _Mover(self._device)
        self._next = -1
        self._shown: Iterator[Shown] = iter(())
        self.last_rows: list[int] = []  # of this process, of the last step

    def of(self, step: int) -> Generator[Part]:
        """The parts of one step; later ones are decoded meanwhile."""
        if step != self._next:  # the first, or one after a resume
            self._shown = self._feed.parts(self._order(step))
        self._next = step + 1
        whole = self._batches.of(step)
        self.last_rows = []
        mine = self._mine(whole)
        for place, (number, rows) in enumerate(mine):
            last = place == len(mine) - 1
            if not len(rows):
                yield self._idle(number, whole[:1].to(self._device))._replace(last=last)
                continue
            shown = next(self._shown)
            self.last_rows += shown.rows
            part = self._part(number, torch.tensor(shown.rows), rows, whole, shown.frames)
            yield part._replace(last=last)

    def _order(self, first: int) -> Iterator[tuple[int, list[int]]]:
        for step in range(first, self._steps):
            for _, rows in self._mine(self._batches.of(step)):
                if len(rows):
                    yield step, rows.tolist()

    def _mine(self, rows: Tensor) -> list[tuple[int, Tensor]]:
        """Number and rows of each part that this process takes of a step.

        As many in each process, for they exchange gradients: where clips run out (the last step
        of an epoch with `epoch_clips`), the last part of some has no rows.
        """
        world, rank = self._ranks.world, self._ranks.rank
        parts = torch.tensor_split(rows, world * self._accumulate)
        rounds = -(-min(len(rows), len(parts)) // world)
        numbers = range(rank, rounds * world, world)
        return [(number, parts[number]) for number in numbers]

    def _idle(self, number: int, place: Tensor) -> Part:
        """A part that counts nothing, of a clip [1] that another process takes."""
        features = self._features
        frames = torch.zeros(1, *self._shape, dtype=torch.uint8, device=self._device)
        image = None if features.image is None else features.image[place].float()
        known = None if features.known is None else features.known[place]
        return Part(number, place, frames, image, features.labels[place], known, 0.0)

    def _part(
        self, number: int, rows: Tensor, asked: Tensor, whole: Tensor, frames: Sequence[Any]
    ) -> Part:
        features, place = self._features, sent(rows, self._device)
        video, *others = (self._frames.moved(x) for x in frames)
        image = features.image
        if self._image is not None:
            image = self._encoded(others[0])
        elif image is not None:
            image = image[place].float()
        known = features.known
        return Part(
            number,
            place,
            video,
            image,
            features.labels[place],
            None if known is None else known[place],
            self._weight(asked, whole),
        )

    def _encoded(self, frames: Tensor) -> Tensor:
        from msq.extract.shard_builder import encode_pixels

        assert self._image is not None
        return encode_pixels(self._image, frames)

    def _weight(self, asked: Tensor, whole: Tensor) -> float:
        """Of a part's mean loss: its share of the clips, or of the known labels that are averaged.

        By the clips that were asked for: what stands in for one that cannot be decoded is known
        to this process alone.
        """
        if self._known is None:
            return len(asked) / len(whole)
        return float(self._known[asked].sum()) / max(float(self._known[whole].sum()), 1.0)


class CleanFrames:
    """Clips in one view, decoded for scoring.

    Args:
        feed: without augmentation and without clips that replace others.
        device: of the encoder.
        ids: of all clips, for messages.
    """

    def __init__(self, feed: ClipFeed, device: torch.device, ids: Sequence[str]) -> None:
        self._feed, self._ids, self._frames = feed, ids, _Mover(device)

    def __call__(self, order: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """See `msq.head.encoded_tokens.ReadFrames`.

        Raises:
            VideoError: a clip that could be decoded before cannot any more.
        """
        from msq.errors import VideoError

        for shown in self._feed.parts(enumerate(order)):
            if shown.failed:
                clip = self._ids[shown.rows[shown.failed[0]]]
                why = self._feed.failures.get(clip, "no reason is known")
                raise VideoError(f"{clip}: cannot be decoded any more: {why}")
            yield self._frames.moved(shown.frames[0])


class _Mover:
    """Uint8 frames to a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sender: Any = None

    def moved(self, frames: Any) -> Tensor:
        """Frames [b, T, 3, h, w] there; on a GPU through pinned memory."""
        if self._device.type != "cuda":
            return torch.from_numpy(frames)
        from msq.extract.device_batches import Sender

        if self._sender is None:
            self._sender = Sender(self._device)
        sent: Tensor = self._sender.send(list(frames))
        return sent
