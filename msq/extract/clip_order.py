"""Which clip is shown at each place of the parts of a training step, decided ahead of decoding.

A clip that cannot be decoded gives its place to another one. Which one is a function of the seed,
the number of the draw and the place alone: candidates are drawn in an order that depends on
nothing else, and the first that decodes is shown, whether the bad ones before it were known to be
bad or have just been found to be. So a resumed run, which has forgotten them, shows the same.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from msq.extract.augment import keyed_stream
from msq.extract.datasets.dataset import Clip
from msq.extract.decode_task import Decoded, DecodeTask, Picture
from msq.extract.frame_cache import FrameCache
from msq.extract.views import View, ViewKind, seed_of_draw

Augment = Literal["none", "consistent", "official"]

TRIES = 32  # clips that are tried in the place of one that cannot be decoded
_KINDS: dict[str, ViewKind] = {"consistent": "augmented", "official": "official"}


@dataclass(slots=True)
class Place:
    """One clip of a part.

    Attributes:
        ticket: its number among all places; the `row` of its task.
        number: of the draw.
        asked: the row that was asked for.
        candidates: rows that may be shown there and have not been tried.
        row: the one that is.
        awaited: a result of decoding will come for it.
        cached: its frames are in the cache.
        failed: none of its candidates can be decoded.
        tried: those that cannot.
    """

    ticket: int
    number: int
    asked: int
    candidates: Iterator[int]
    row: int
    awaited: bool = False
    cached: bool = False
    failed: bool = False
    tried: list[int] = field(default_factory=list)


class ClipOrder:
    """Parts in order, and the tasks of their clips: a source for `decode_in_order`.

    It may have no task now, since the clips of the next `ahead` places are cached, and have more
    later.

    Args:
        clips: rows -> clips.
        pictures: what is shown of each.
        order: (number, rows) of each part.
        augment: which views are drawn.
        seed: of the run.
        spare: rows that are shown in the place of others.
        failures: clip id -> why it cannot be decoded; what is found is added.
        cache: whose clips are not decoded.
        ahead: places that may be decided before their part is asked for.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        pictures: Sequence[Picture],
        order: Iterable[tuple[int, Sequence[int]]],
        *,
        augment: Augment,
        seed: int,
        spare: Sequence[int],
        failures: dict[str, str],
        cache: FrameCache | None,
        ahead: int,
    ) -> None:
        self._clips, self._spare, self._cache = clips, spare, cache
        self._order = iter(order)
        self._seed, self._ahead = seed, ahead
        self._failures = failures
        self._parts: deque[list[Place]] = deque()
        self._tasks: deque[DecodeTask] = deque()
        self._open: dict[int, Place] = {}
        self._tickets = self._decided = 0
        kind = _KINDS.get(augment)

        @functools.lru_cache(maxsize=4)
        def shown(number: int) -> tuple[Picture, ...]:
            if kind is None:
                return tuple(pictures)
            view = View(kind, seed_of_draw(seed, number))
            return tuple(replace(picture, view=view) for picture in pictures)

        self._shown = shown

    def __iter__(self) -> Iterator[DecodeTask]:
        """Itself."""
        return self

    def __next__(self) -> DecodeTask:
        """The next clip to decode."""
        while not self._tasks:
            if self._decided >= self._ahead or not self._decide():
                raise StopIteration
        return self._tasks.popleft()

    def part(self) -> list[Place] | None:
        """The places of the next part, whose results come in their order; None at the end."""
        if not self._parts and not self._decide():
            return None
        part = self._parts.popleft()
        self._decided -= len(part)
        return part

    def instead(self, result: Decoded) -> DecodeTask | None:
        """Take note of a clip that failed; what is decoded in its place."""
        place = self._open[result.row]
        self._failures.setdefault(self._clips[place.row].id, result.reason or "")
        place.tried.append(place.row)
        return self._choose(place)

    def arrived(self, place: Place) -> None:
        """Its result is there: nothing more is decoded for it."""
        del self._open[place.ticket]

    def task(self, place: Place) -> DecodeTask:
        """What is to be decoded of the clip that is shown at a place."""
        clip = self._clips[place.row]
        pictures = self._shown(place.number)
        return DecodeTask(
            place.ticket, clip.path, clip.start, clip.end, pictures, clip.fps, clip.id, clip.keep
        )

    def _decide(self) -> bool:
        """Decide on the clips of one more part, if there is one."""
        found = next(self._order, None)
        if found is None:
            return False
        number, rows = found
        part = []
        for index, row in enumerate(map(int, rows)):
            candidates = self._candidates(number, index, row)
            place = Place(self._tickets, number, row, candidates, row)
            self._tickets += 1
            task = self._choose(place)
            if task is not None:
                place.awaited = True
                self._open[place.ticket] = place
                self._tasks.append(task)
            part.append(place)
        self._parts.append(part)
        self._decided += len(part)
        return True

    def _choose(self, place: Place) -> DecodeTask | None:
        """The next candidate that is not known to be bad; its task, unless it is cached."""
        for row in place.candidates:
            clip = self._clips[row]
            if clip.id in self._failures:
                place.tried.append(row)
                continue
            place.row = row
            place.cached = self._cache is not None and clip.id in self._cache
            return None if place.cached else self.task(place)
        place.row, place.failed = place.asked, True
        return None

    def _candidates(self, number: int, index: int, row: int) -> Iterator[int]:
        """The row itself, then spare ones, none twice."""
        yield row
        rng = keyed_stream(seed_of_draw(self._seed, number), str(index), "replacement")
        drawn: set[int] = set()
        while len(drawn) < min(TRIES, len(self._spare)):
            other = int(rng.random() * len(self._spare))
            if other not in drawn:
                drawn.add(other)
                yield int(self._spare[other])
