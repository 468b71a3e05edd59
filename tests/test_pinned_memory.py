"""Pinned memory through which frames go to a GPU; what a GPU would be asked for is faked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from msq.extract.device_batches import Sender


class Event:
    """What a buffer was sent with; counts how often it was waited for."""

    waits = 0

    def synchronize(self) -> None:
        Event.waits += 1


def test_pinned_memory_is_that_of_the_largest_batch_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    empty = torch.empty

    def pinned(shape: Any, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        made.append(empty(shape, dtype=dtype))
        return made[-1]

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    sender = Sender(torch.device("cpu"))
    clip = (4, 3, 8, 8)
    taken = [sender._slot((count, *clip)) for count in (12, *range(12, 0, -1), *range(12, 0, -1))]
    assert [tuple(buffer.shape) for buffer, _ in taken[1:13]] == [
        (count, *clip) for count in range(12, 0, -1)
    ]
    assert [len(buffer) for buffer in made] == [12, 12]
    # Two in turn, each with the event of its own last use.
    places = [buffer.data_ptr() for buffer, _ in taken]
    assert places[::2] == places[:1] * 13
    assert places[1::2] == places[1:2] * 12
    assert places[0] != places[1]
    assert len({id(event) for _, event in taken}) == 2
    # A larger one takes the place of the smaller, once that was sent.
    Event.waits = 0
    assert [len(sender._slot((20, *clip))[0]) for _ in range(4)] == [20] * 4
    assert [len(buffer) for buffer in made] == [12, 12, 20, 20]
    assert Event.waits == 2
